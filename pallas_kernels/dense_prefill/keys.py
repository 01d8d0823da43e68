"""What prefill kernels have in common: argument checks, the window's keys, running softmax sums."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.rows import Rows, decode, lead_shape


class Sums(NamedTuple):
    """A softmax in progress: the largest logit so far, and sums of weights relative to it."""

    top: Float[Array, "B T H 1"]
    total: Float[Array, "B T H 1"]
    values: Float[Array, "B T H c"]


def check(q: Array, past: Array, kv: Array, start: Array, rows: Rows | None, sink: Array) -> None:
    """Raises ValueError for shapes and dtypes that do not belong together."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"q must be [B, T, H, c] without empty axes, got {list(q.shape)}")
    batch, tokens, heads, dims = q.shape
    wanted = {"past": (batch, past.shape[1], dims), "kv": (batch, tokens, dims)}
    wanted |= {"start": (batch,), "sink": (heads,)}
    given = {"past": past, "kv": kv, "start": start, "sink": sink}
    for name, shape in wanted.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(given[name].shape)}")
    if start.dtype != jnp.int32:
        raise ValueError(f"start must be int32, got {start.dtype}")
    if rows is not None and (len(lead_shape(rows)) != 2 or lead_shape(rows)[0] != batch):
        raise ValueError(f"rows must be [{batch}, N, ...], got {list(lead_shape(rows))} in front")
    if isinstance(rows, jax.Array) and rows.shape[-1] != dims:
        raise ValueError(f"rows must be [..., {dims}], got {list(rows.shape)}")


def count(rows: Rows | None) -> int:
    """Entries that are stored, visible or not."""
    return 0 if rows is None else lead_shape(rows)[1]


def band(past: Array, kv: Array, after: int, dtype: Any) -> Float[Array, "B n c"]:
    """Raw entries in order of position, `after` zeros behind: row i is position start - W + i, so
    query t sees rows t + 1 .. t + W."""
    joined = jnp.concatenate([past.astype(dtype), kv.astype(dtype)], axis=1)
    return jnp.pad(joined, ((0, 0), (0, after), (0, 0)))


def existing(raw: Float[Array, "B n c"], start: Int[Array, " B"], window: int) -> Array:
    """The band with zeros where a position is before the sequence's first."""
    real = jnp.arange(raw.shape[1]) >= window - start[:, None]
    return jnp.where(real[..., None], raw, 0)


def loud(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """NaN and infinities become 2^100.

    Kernels that mask scores multiply masked entries by a weight of zero: garbage must be finite
    there (and its scores too), yet must not look like an entry where it is attended to.
    """
    return jnp.where(jnp.isfinite(x), x, 2.0**100)


def plain(rows: Rows, dims: int, group: int, dtype: Any, multiple: int) -> Float[Array, "B n c"]:
    """Entries as finite vectors, zeros behind them up to a multiple of `multiple`.

    For kernels whose queries share entries: each is decoded once per chunk and read by T * H rows.
    """
    values = loud(decode(rows, dims, group, dtype))
    return jnp.pad(values, ((0, 0), (0, -values.shape[1] % multiple), (0, 0)))


def slice_rows(rows: Rows, first: Int[Array, ""], size: int) -> Rows:
    """Entries first .. first + size - 1 of every sequence."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size, axis=1), rows)


def pad_rows(rows: Rows, multiple: int) -> Rows:
    """Zero entries behind, up to a multiple of `multiple`."""

    def one(x: Array) -> Array:
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % multiple)] + [(0, 0)] * (x.ndim - 2))

    return jax.tree.map(one, rows)


def first_sums(q: Float[Array, "B T H c"], sink: Float[Array, " H"]) -> Sums:
    """Sums over the sink alone: its logit, and a value of zero."""
    shape = (*q.shape[:3], 1)
    top = jnp.broadcast_to(sink.astype(jnp.float32)[:, None], shape)
    return Sums(top, jnp.ones(shape, jnp.float32), jnp.zeros(q.shape, jnp.float32))


def absorb(
    sums: Sums,
    q: Float[Array, "B T H c"],
    keys: Float[Array, "B *G n c"],
    mask: Bool[Array, "B T n"],
    scale: float,
) -> Sums:
    """Adds keys, shared by all queries [B, n, c] or each query's own [B, T, n, c]."""
    axes = "btnc" if keys.ndim == 4 else "bnc"
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    how: dict[str, Any] = {"precision": exact, "preferred_element_type": jnp.float32}
    scores = jnp.einsum(f"bthc,{axes}->bthn", q, keys, **how) * scale
    scores = jnp.where(mask[:, :, None], scores, -jnp.inf)
    top = jnp.maximum(sums.top, jnp.max(scores, axis=-1, keepdims=True))
    weights, before = jnp.exp(scores - top), jnp.exp(sums.top - top)
    # A masked entry weighs zero, but zero times NaN is NaN. One that counts has a NaN score too.
    values = jnp.where(jnp.isfinite(keys), keys, 0)
    added = jnp.einsum(f"bthn,{axes}->bthc", weights.astype(q.dtype), values, **how)
    total = sums.total * before + jnp.sum(weights, axis=-1, keepdims=True)
    return Sums(top, total, sums.values * before + added)


def absorb_window(
    sums: Sums,
    q: Float[Array, "B T H c"],
    raw: Float[Array, "B n c"],
    start: Int[Array, " B"],
    first: Int[Array, ""],
    window: int,
    scale: float,
) -> Sums:
    """Adds the windows of consecutive queries, of which the first is the chunk's query `first`."""
    tokens = q.shape[1]
    keys = jax.lax.dynamic_slice_in_dim(raw, first, tokens + window, axis=1)
    row = jnp.arange(tokens + window)
    age = jnp.arange(tokens)[:, None] + window - row
    exists = start[:, None] - window + first + row >= 0
    return absorb(sums, q, keys, ((age >= 0) & (age < window)) & exists[:, None], scale)


def finish(sums: Sums, dtype: Any) -> Float[Array, "B T H c"]:
    """The attention's result."""
    return (sums.values / sums.total).astype(dtype)


def in_blocks(x: Array, blocks: int, size: int) -> Array:
    """[B, T, ...] -> [blocks, B, size, ...], zeros behind the last of T."""
    x = jnp.pad(x, [(0, 0), (0, blocks * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], blocks, size, *x.shape[2:]).swapaxes(0, 1)


def joined(blocks: Array, tokens: int) -> Array:
    """The inverse of `in_blocks`."""
    x = blocks.swapaxes(0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :tokens]
