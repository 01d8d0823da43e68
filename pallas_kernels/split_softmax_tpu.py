"""What the TPU decode kernels share: keys folded into sums in VMEM, fp8 planes decoded.

Per head the sums are one row: of `top` and `total` [H, 128] all lanes are equal, since a column
of its own would be laid out anew at every use.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from pallas_kernels import split_softmax as soft
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import LANES, Fp8Rows, Rows

DECODED = 64  # fp8 rows decoded at a time: more take long to compile
FP8_SIZES = (512, 64, 64)  # dims, rotary dims and group that `decode` is written for


def require(q: Array, window: Array, rows: Rows, group: int) -> None:
    """Raises Unsupported for what the TPU kernels do not take."""
    (_, heads, dims), slots = q.shape, window.shape[1]
    if q.dtype != jnp.bfloat16 or not (isinstance(rows, Fp8Rows) or rows.dtype == jnp.bfloat16):
        raise Unsupported("q must be bfloat16, rows bfloat16 or fp8")
    if heads % 8 or dims % LANES or slots % 16 or not slots:
        wanted = f"heads % 8, dims % {LANES} and slots % 16 to be 0"
        raise Unsupported(f"needs {wanted}, got {heads}, {dims}, {slots}")
    if isinstance(rows, Fp8Rows):
        rope = rows.rope.shape[-1]
        if (dims, rope, group) != FP8_SIZES:
            got = (dims, rope, group)
            raise Unsupported(f"fp8 rows must have (dims, rope, group) {FP8_SIZES}, got {got}")


class Sums(NamedTuple):
    """References to a softmax over the keys so far, in VMEM."""

    top: Any  # [H, 128]
    total: Any  # [H, 128]
    values: Any  # [H, c]
    rope: Any  # [H, 64], of rotary dims that are kept apart


def scratch(heads: int, dims: int) -> list[Any]:
    """Allocates `Sums`."""
    widths = (LANES, LANES, dims, LANES // 2)
    return [pltpu.VMEM((heads, n), jnp.float32) for n in widths]


def clear(sums: Sums) -> None:
    """The softmax over no keys."""
    sums.top[...] = jnp.full_like(sums.top, soft.NO_SCORE)
    for x in (sums.total, sums.values, sums.rope):
        x[...] = jnp.zeros_like(x)


def _dot(a: Array, b: Array, axis: int) -> Array:
    """Contracts the last axis of `a` with an axis of `b`, in float32."""
    return jax.lax.dot_general(
        a, b, (((1,), (axis,)), ((), ())), preferred_element_type=jnp.float32
    )


def fold(
    sums: Sums, q: Array, keys: Array, valid: Array, scale: float, rope: Array | None = None
) -> None:
    """Adds keys [n, c], valid [1, n]; all finite. With `rope` [64, n], the last 64 dims of `keys`
    are zero and rotary dims come from there."""
    dots = _dot(q, keys, 1)
    if rope is not None:
        dots += _dot(q[:, -rope.shape[0] :], rope, 0)
    scores = jnp.where(valid, dots * scale, soft.NO_SCORE)
    new = jnp.maximum(sums.top[...], jnp.max(scores, axis=1, keepdims=True))
    fade = jnp.exp(sums.top[...] - new)
    # A block without a valid key leaves `new` at NO_SCORE: its weights must be zero, not one.
    weights = jnp.where(valid, jnp.exp(scores - new[:, :1]), 0)
    sums.top[...] = new
    sums.total[...] = sums.total[...] * fade + jnp.sum(weights, axis=1, keepdims=True)
    weights, fade = weights.astype(keys.dtype), fade[:, :1]
    sums.values[...] = sums.values[...] * fade + _dot(weights, keys, 0)
    if rope is not None:
        sums.rope[...] = sums.rope[...] * fade + _dot(weights, rope, 1)


def finish(sums: Sums, sink: Array, dtype: Any, *, rope: bool) -> Array:
    """The output [H, c]; `sink` [H, 128] with all lanes equal."""
    top, total, values = sums.top[...], sums.total[...], sums.values[...]
    if rope:
        apart = sums.rope[...]
        blank = jnp.zeros((values.shape[0], values.shape[1] - apart.shape[1]), jnp.float32)
        values += jnp.concatenate([blank, apart], axis=1)
    whole = jnp.maximum(top, sink)
    fade = jnp.exp(top - whole)
    factor = fade / (total * fade + jnp.exp(sink - whole))
    return (values * factor[:, :1]).astype(dtype)


def finite(keys: Array, count: Array, axis: int = 0) -> Array:
    """Keys with zeros from `count` on along an axis."""
    key = jax.lax.broadcasted_iota(jnp.int32, keys.shape, axis)
    return jnp.where(key < count, keys, jnp.zeros((), keys.dtype))


def decode(nope: Any, keys: Any, group: int) -> None:
    """The nope plane [n, 4, 128] of fp8 rows -> bfloat16 `keys` [n, 512], rotary dims zero."""
    rows = math.gcd(nope.shape[0], DECODED)

    def some(i: Array, _: None) -> None:
        at = pl.ds(pl.multiple_of(i * rows, rows), rows)
        keys[at] = _decoded(nope[at], group)

    jax.lax.fori_loop(0, nope.shape[0] // rows, some, None)


def _decoded(nope: Array, group: int) -> Array:
    """Four rows of lanes are one row of 32-bit words in memory, a byte of each, so that taking them
    apart is shifts. The last row of lanes holds 64 codes, then a scale byte per group."""
    n, lanes, _ = nope.shape
    words = pltpu.bitcast(nope.reshape(n * lanes, LANES), jnp.uint32)
    lane, half = jax.lax.broadcasted_iota(jnp.int32, words.shape, 1), LANES // 2
    bytes_of = [((words >> (8 * i)) & 0xFF).astype(jnp.int32) for i in range(lanes)]
    scales, out = _powers(bytes_of[-1]), []
    for i, codes in enumerate(bytes_of):
        low, high = (scales[:, half + g : half + g + 1] for g in (2 * i, 2 * i + 1))
        values = _e4m3(codes)
        if i == lanes - 1:
            values = jnp.where(lane < half, values * low, 0)
        else:
            values *= jnp.where(lane < group, low, high)
        out.append(values.astype(jnp.bfloat16))
    return jnp.concatenate(out, axis=1)


def _e4m3(code: Array) -> Array:
    """Codes as int32 -> float32, exactly, without subnormal numbers on the way. NaN reads as 480.

    With its exponent moved to float32's, a code e, m reads 2^(e-7) (1 + m/8), which is right but
    for e = 0, where 2^-6 m/8 is meant.
    """
    bits = ((code & 0x7F) << 20) + (120 << 23)
    value = jax.lax.bitcast_convert_type(bits, jnp.float32)
    value = jnp.where((code & 0x78) == 0, 2 * value - 2.0**-6, value)
    return jnp.where(code >= 0x80, -value, value)


def _powers(byte: Array) -> Array:
    """Scale bytes as int32 -> float32. 2^-127 is subnormal: a TPU has zero for it."""
    bits = jnp.where(byte == 255, 0x7FC00000, byte << 23)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
