"""The definition in plain XLA (DeepSeek-V4 spec 4, planes as in `pallas_kernels.rows`).

Softmax statistics of disjoint token sets merge exactly as the sets do, so a window that began in an
earlier chunk continues from the three numbers per channel that the tail carries.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels.rows import LANES, Fp8Rows, Rows, e8m0

EMPTY = -1e30  # the gate maximum of no tokens: finite, so that differences of two are not NaN
LAYOUTS = ("float32", "bfloat16", "fp8")
E4M3_MAX, AMAX_FLOOR = 448.0, 1e-4


class Tail(NamedTuple):
    """Unfinished windows: (gate maximum, sum of weights, weighted sum of values) per channel."""

    current: Float[Array, "B 3 width"]  # tokens of the window that the next token falls into
    previous: Float[Array, "B 3 dim"] | None  # overlap: first half of the last finished window


class Entries(NamedTuple):
    """What a chunk completed: row b owns slots 0 .. count[b] - 1, entries first[b] + slot."""

    rows: Rows  # [B, E, ...]
    first: Int[Array, " B"]
    count: Int[Array, " B"]


def slots(tokens: int, ratio: int) -> int:
    """Windows that a chunk may touch, wherever it starts."""
    return (tokens + ratio - 2) // ratio + 1


def merge(a: Float[Array, "*n 3 k"], b: Float[Array, "*n 3 k"]) -> Float[Array, "*n 3 k"]:
    """Statistics of the union of two disjoint token sets."""
    top = jnp.maximum(a[..., 0, :], b[..., 0, :])
    of_a, of_b = jnp.exp(a[..., 0, :] - top), jnp.exp(b[..., 0, :] - top)
    weight = a[..., 1, :] * of_a + b[..., 1, :] * of_b
    return jnp.stack([top, weight, a[..., 2, :] * of_a + b[..., 2, :] * of_b], axis=-2)


def statistics(value: Float[Array, "*n m k"], gate: Float[Array, "*n m k"]) -> Array:
    """Statistics [*n, 3, k] over the tokens of windows; tokens whose gate is EMPTY do not count."""
    top = jnp.max(gate, axis=-2)
    weight = jnp.where(gate > EMPTY / 2, jnp.exp(gate - top[..., None, :]), 0.0)
    return jnp.stack([top, weight.sum(axis=-2), (weight * value).sum(axis=-2)], axis=-2)


def masked(
    value: Array, gate: Array, ape: Array | None, start: Array, count: Array, ratio: int
) -> tuple[Float[Array, "B T width"], Float[Array, "B T width"]]:
    """float32 values and gates, with `ape`; tokens beyond a row's count have weight and value 0."""
    token = jnp.arange(value.shape[1])
    value, gate = value.astype(jnp.float32), gate.astype(jnp.float32)
    if ape is not None:
        gate = gate + ape[(start[:, None] + token) % ratio]
    seen = (token < count[:, None])[..., None]
    return jnp.where(seen, value, 0.0), jnp.where(seen, gate, EMPTY)


def _slices(x: Float[Array, "B S k"], start: Int[Array, " B"], size: int) -> Float[Array, "B s k"]:
    cut = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=0))
    return cut(x, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def into_windows(
    x: Float[Array, "B T k"], offset: Int[Array, " B"], ratio: int, fill: float
) -> Float[Array, "B w m k"]:
    """Token t of a row at place offset + t of whole windows, by one slice of a padded copy.

    Reverse mode takes the places back by slices too; XLA would add them up one by one.
    """
    batch, tokens, width = x.shape
    total = slots(tokens, ratio) * ratio
    padded = jnp.pad(x, ((0, 0), (ratio - 1, total - tokens), (0, 0)), constant_values=fill)
    return _slices(padded, ratio - 1 - offset, total).reshape(batch, -1, ratio, width)


def _forward(x: Array, offset: Array, ratio: int, fill: float) -> tuple[Array, tuple[Array, Array]]:
    return into_windows(x, offset, ratio, fill), (x, offset)


def _backward(
    ratio: int, fill: float, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    del ratio, fill
    x, offset = kept
    return _slices(cotangent.reshape(x.shape[0], -1, x.shape[2]), offset, x.shape[1]), None


into_windows.defvjp(_forward, _backward)


def angles(first: Array, entries: int, ratio: int, freqs: Array) -> tuple[Array, Array]:
    """Cosine and sine [B, entries, r] at the first token of each window."""
    position = (first[:, None] + jnp.arange(entries)) * ratio
    angle = position[..., None].astype(jnp.float32) * freqs
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "*n dim"], cos: Array, sin: Array) -> Float[Array, "*n dim"]:
    """Adjacent pairs of the last 2 r channels turned by the angles."""
    split = x.shape[-1] - 2 * cos.shape[-1]
    pairs = x[..., split:].reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return jnp.concatenate([x[..., :split], turned.reshape(*x.shape[:-1], -1)], axis=-1)


def row_bytes(nope: int, group: int) -> int:
    """Bytes of an fp8 row: codes and scales up to whole lanes."""
    return -(-(nope + nope // group) // LANES) * LANES


def scale_bytes(x: Float[Array, "*n g"]) -> UInt8[Array, "*n"]:
    """The byte of the least power of two that brings a group within e4m3's range.

    Read off the bits of the largest magnitude: a logarithm is inexact at powers of two.
    """
    amax = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), AMAX_FLOOR)
    bits = jax.lax.bitcast_convert_type(amax, jnp.int32)
    doublings = (bits - np.float32(E4M3_MAX).view(np.int32) + 0x7FFFFF) >> 23
    return (doublings + 127).astype(jnp.uint8)


def encode(x: Float[Array, "*n dim"], layout: str, rope: int, group: int) -> Rows:
    """Entries as the layout's planes; the last `rope` dims stay bfloat16 beside fp8 codes."""
    if layout != "fp8":
        return x.astype(jnp.dtype(layout))
    lead, nope = x.shape[:-1], x.shape[-1] - rope
    groups = x[..., :nope].reshape(*lead, -1, group)
    scale = scale_bytes(groups)
    scaled = jnp.clip(groups * e8m0(254 - scale)[..., None], -E4M3_MAX, E4M3_MAX)
    codes = jax.lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8)
    row = jnp.concatenate([codes.reshape(*lead, nope), scale], axis=-1)
    row = jnp.pad(row, [(0, 0)] * len(lead) + [(0, row_bytes(nope, group) - row.shape[-1])])
    return Fp8Rows(row.reshape(*lead, -1, LANES), x[..., nope:].astype(jnp.bfloat16))


def compress(
    value: Float[Array, "B T width"],
    gate: Float[Array, "B T width"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    tail: Tail,
    norm: Float[Array, " dim"],
    freqs: Float[Array, " r"],
    ape: Float[Array, "m width"] | None,
    *,
    ratio: int,
    eps: float,
    layout: str,
    group: int,
    aligned: bool,
) -> tuple[Entries, Tail]:
    """See the package's `compress`."""
    del aligned  # a promise that other backends make use of
    dim, batch = norm.shape[0], jnp.arange(value.shape[0])
    value, gate = masked(value, gate, ape, start, count, ratio)
    if value.shape[1] == 1:  # a single token needs no alignment
        value, gate = value[:, :, None], gate[:, :, None]
    else:
        offset = start % ratio
        value = into_windows(value, offset, ratio, 0.0)
        gate = into_windows(gate, offset, ratio, EMPTY)
    stats = statistics(value, gate)
    stats = stats.at[:, 0].set(merge(tail.current, stats[:, 0]))
    first, done = start // ratio, (start + count) // ratio - start // ratio
    whole, previous = stats, None
    if tail.previous is not None:
        history = jnp.concatenate([tail.previous[:, None], stats[..., :dim]], axis=1)
        whole, previous = merge(history[:, :-1], stats[..., dim:]), history[batch, done]
    pooled = whole[:, :, 2] / jnp.maximum(whole[:, :, 1], 1e-30)
    mean = jnp.mean(jnp.square(pooled), axis=-1, keepdims=True)
    normed = pooled * jax.lax.rsqrt(mean + eps) * norm.astype(jnp.float32)
    entries = rotate(normed, *angles(first, stats.shape[1], ratio, freqs))
    owned = jnp.arange(stats.shape[1]) < done[:, None]
    rows = encode(jnp.where(owned[..., None], entries, 0.0), layout, 2 * freqs.shape[0], group)
    empty = jnp.zeros_like(stats[:, :1]).at[:, :, 0].set(EMPTY)
    current = jnp.concatenate([stats, empty], axis=1)[batch, done]
    return Entries(rows, first, done), Tail(current, previous)
