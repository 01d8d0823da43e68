"""The definition in plain XLA (DeepSeek-V4 spec 9.1 for the formats)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.rows import e8m0

BLOCK = 128  # rows and columns that share one scale of an fp8 weight
FP4_GROUP = 32  # inputs that share one scale of an fp4 weight
PAIR_BYTES = 1 << 30  # float32 weights of the pairs that are multiplied at once


def e2m1(code: UInt8[Array, "*n"], dtype: Any) -> Float[Array, "*n"]:
    """Codes s ee m -> 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    exponent, half = (code >> 1) & 3, 0.5 * (code & 1).astype(jnp.float32)
    magnitude = jnp.where(
        exponent == 0, half, e8m0((exponent + 126).astype(jnp.uint8)) * (1 + half)
    )
    return jnp.where(code & 8 != 0, -magnitude, magnitude).astype(dtype)


def dequantise(w: Array, scale: Array, dtype: Any) -> Float[Array, "*n N K"]:
    """The stored weight in `dtype`: exact in bfloat16 (at most 4 significant bits times 2^k)."""
    factor = e8m0(scale).astype(dtype)
    if w.dtype != jnp.uint8:
        factor = jnp.repeat(jnp.repeat(factor, BLOCK, axis=-1), BLOCK, axis=-2)
        return w.astype(dtype) * factor[..., : w.shape[-2], : w.shape[-1]]
    both = jnp.stack([e2m1(w & 15, dtype), e2m1(w >> 4, dtype)], axis=-1)
    return both.reshape(*w.shape[:-1], -1) * jnp.repeat(factor, FP4_GROUP, axis=-1)


def quant_matmul(x: Float[Array, "M K"], w: Array, scale: Array, out: Any) -> Float[Array, "M N"]:
    """See the package's `quant_matmul`."""
    exact = x.dtype == jnp.float32
    y = jax.lax.dot_general(
        x,
        dequantise(w, scale, x.dtype),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if exact else None,
        preferred_element_type=jnp.float32,
    )
    return y.astype(out)


def _rows(x: Array, w: Array, scale: Array) -> Float[Array, "s N"]:
    """x[s] . w[s]^T as one multiply and reduce, which reads the stored bytes once."""
    x = x.astype(jnp.float32)[:, None]
    if w.dtype != jnp.uint8:
        return jnp.sum(dequantise(w, scale, jnp.float32) * x, axis=-1)
    even, odd = e2m1(w & 15, jnp.float32), e2m1(w >> 4, jnp.float32)
    factor = jnp.repeat(e8m0(scale), FP4_GROUP // 2, axis=-1)
    return jnp.sum((even * x[..., ::2] + odd * x[..., 1::2]) * factor, axis=-1)


def expert_matmul(
    x: Float[Array, "R K"], experts: Int[Array, " S"], w: Array, scale: Array
) -> Float[Array, "S N"]:
    """See the package's `expert_matmul`."""
    (rows, k), pairs, (groups, n, _) = x.shape, experts.shape[0], w.shape
    share = pairs // rows

    def one_block(pair: Int[Array, " s"]) -> Float[Array, "s N"]:
        expert = experts[pair]
        known = (expert >= 0) & (expert < groups)
        at = jnp.where(known, expert, 0)
        return jnp.where(known[:, None], _rows(x[pair // share], w[at], scale[at]), 0.0)

    size = min(pairs, max(1, PAIR_BYTES // (4 * n * k)))
    blocks = -(-pairs // size)
    if blocks == 1:
        return one_block(jnp.arange(pairs))
    order = jnp.minimum(jnp.arange(blocks * size), pairs - 1).reshape(blocks, size)
    return jax.lax.map(one_block, order).reshape(-1, n)[:pairs]
