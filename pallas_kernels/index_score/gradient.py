"""The scores' reverse mode, for training: per-head dot products are computed again, block by block.

With d[h, n] = q[h] . k[n], S[n] = sum_h w[h] relu(d[h, n]) and a cotangent g of S * scale:

    dw[h] = sum_n g scale relu(d)     dd[h, n] = g scale w[h] [d > 0]     dscale[n] = sum_t g S
    dq[h] = sum_n dd k[n]             dk[n] = sum_th dd q[h]

Memory is that of the arguments and one block's dot products, as in the definition.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.index_score import reference


class Inputs(NamedTuple):
    """Arguments of `index_score` as arrays."""

    q: Float[Array, "B T H K"]
    w: Float[Array, "B T H"]
    keys: Float[Array, "*n K"]
    scale: Float[Array, "*n"] | None
    lengths: Int[Array, "B T"] | None
    table: Int[Array, "B pages"] | None


def _contract(formula: str, dd: Array, x: Array) -> Array:
    """dd with one operand of the dots, in the dtype that the dots were in, summed in float32."""
    exact = x.dtype == jnp.float32
    dtype = jnp.float32 if exact else jnp.bfloat16
    return jnp.einsum(
        formula,
        dd.astype(dtype),
        x.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def _of_block(
    inputs: Inputs, cotangent: Float[Array, "B T N"], start: Array, fresh: Array, size: int
) -> tuple[Array, Array, Array, Array]:
    """Cotangents of q and w from one block, and of the block's keys and scales.

    Keys below `fresh` were part of the block before. Keys that no query sees count as zeros: they
    may hold anything, and 0 * NaN is NaN.
    """
    keys = reference.Keys(inputs.keys, inputs.scale, inputs.table)
    values, scale, exists = reference.block(keys, start, size)
    seen = reference.seen(start, exists, inputs.lengths)
    seen = jnp.broadcast_to(seen, (seen.shape[0], *inputs.q.shape[1:2], size))
    seen = seen & (start + jnp.arange(size) >= fresh)
    real = jnp.any(seen, axis=1)
    values = values.astype(jnp.float32 if inputs.q.dtype == jnp.float32 else jnp.bfloat16)
    values = jnp.where(real[..., None], values, 0)
    scale = jnp.ones(real.shape) if scale is None else jnp.where(real, scale, 0)
    g = jnp.where(seen, reference.rows(cotangent.swapaxes(1, 2), start, size).swapaxes(1, 2), 0)
    d = reference.dots(inputs.q, values)
    dscale = jnp.sum(g * reference.head_sum(d, inputs.w), axis=1)
    g = g * scale[:, None]
    dw = jnp.einsum("bhtn,btn->bth", jax.nn.relu(d), g, precision=jax.lax.Precision.HIGHEST)
    dd = jnp.where(d > 0, g[:, None] * jnp.moveaxis(inputs.w, 2, 1)[..., None], 0)
    dq = _contract("bhtn,bnk->bthk", dd, values)
    dk = _contract("bhtn,bthk->bnk", dd, inputs.q)
    return dq, dw, dk, dscale


def _add(total: Array, part: Array, table: Array | None, start: Array) -> Array:
    """A block's rows added where they belong: [B, N, ...] in place, or the pool's pages."""
    size = part.shape[1]
    if table is None:
        old = jax.lax.dynamic_slice_in_dim(total, start, size, axis=1)
        return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis=1)
    page = total.shape[1]
    at = reference.rows(table, start // page, size // page)
    at = jnp.where(at < 0, total.shape[0], at)  # absent pages fall out of range
    return total.at[at].add(part.reshape(*at.shape, page, *part.shape[2:]), mode="drop")


def backward(
    inputs: Inputs, cotangent: Float[Array, "B T N"], *, block_bytes: int | None = None
) -> tuple[Any, Any, Any, Any]:
    """Cotangents of q, w, keys and scale (None for no scale), each in its argument's dtype.

    One-byte arrays are codes, not numbers to train: theirs are zeros.
    """
    q, w, table = inputs.q, inputs.w, inputs.table
    keys = reference.Keys(inputs.keys, inputs.scale, table)
    size = reference.block_size(q, keys, keys.page, block_bytes)
    trained = inputs.keys.dtype.itemsize > 1

    def step(i: Int[Array, ""], total: tuple[Any, ...]) -> tuple[Any, ...]:
        start = jnp.minimum(i * size, keys.count - size)
        dq, dw, dk, dscale = total
        parts = _of_block(inputs, cotangent, start, i * size, size)
        dk = _add(dk, parts[2], table, start) if trained else None
        dscale = None if dscale is None else _add(dscale, parts[3], table, start)
        return dq + parts[0], dw + parts[1], dk, dscale

    zeros = [None if x is None else jnp.zeros(x.shape, jnp.float32) for x in inputs[:4]]
    zeros[2] = zeros[2] if trained else None
    blocks = -(-keys.count // size) if size else 0
    dq, dw, dk, dscale = jax.lax.fori_loop(0, blocks, step, tuple(zeros))
    dq = dq.astype(q.dtype) if q.dtype.itemsize > 1 else jnp.zeros_like(q)
    dk = dk.astype(inputs.keys.dtype) if trained else jnp.zeros_like(inputs.keys)
    return dq, dw.astype(w.dtype), dk, dscale
