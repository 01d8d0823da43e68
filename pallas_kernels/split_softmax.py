"""Softmax attention in parts: over any keys at a time, joined later; what decode kernels share.

One query token per row of the batch; every head reads the same entries, which are keys and values
at once. A part is the state of a softmax over some of the keys; two parts join into the part over
both. At the end one sink logit per head, whose value is zero, joins the denominator (DeepSeek-V4
spec 3.1).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.rows import Fp8Rows, Rows

NO_SCORE = -1e30  # the top of no keys: finite, so that a difference of two tops is a number
HEADS = 64  # of one tile: a matrix instruction's rows on Hopper
STREAMING_MULTIPROCESSORS = 132  # of an H100 or H200: blocks that run at once


class Part(NamedTuple):
    """Softmax over some keys: largest score, sum of exp(score - top), sum of that times the key."""

    top: Float[Array, "*b H"]
    total: Float[Array, "*b H"]
    values: Float[Array, "*b H c"]


def empty(batch: int, heads: int, dims: int) -> Part:
    """The part over no keys."""
    zeros = jnp.zeros((batch, heads), jnp.float32)
    return Part(zeros + NO_SCORE, zeros, jnp.zeros((batch, heads, dims), jnp.float32))


def part(
    q: Float[Array, "B H c"], keys: Float[Array, "B N c"], valid: Bool[Array, "B N"], scale: float
) -> Part:
    """The part over these keys. Keys that are not valid may hold anything, NaN included."""
    exact = jax.lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    keys = jnp.where(valid[..., None], keys, jnp.zeros((), keys.dtype))
    like = {"precision": exact, "preferred_element_type": jnp.float32}
    scores = jnp.einsum("bhc,bnc->bhn", q, keys, **like) * scale
    scores = jnp.where(valid[:, None], scores, -jnp.inf)
    top = jnp.max(scores, axis=-1, initial=NO_SCORE)
    weights = jnp.exp(scores - top[..., None])
    values = jnp.einsum("bhn,bnc->bhc", weights.astype(q.dtype), keys, **like)
    return Part(top, jnp.sum(weights, axis=-1), values)


def join(a: Part, b: Part) -> Part:
    """The part over the keys of both."""
    top = jnp.maximum(a.top, b.top)
    fade_a, fade_b = jnp.exp(a.top - top), jnp.exp(b.top - top)
    values = a.values * fade_a[..., None] + b.values * fade_b[..., None]
    return Part(top, a.total * fade_a + b.total * fade_b, values)


def finish(whole: Part, sink: Float[Array, " H"], dtype: Any) -> Float[Array, "*b H c"]:
    """The attention's output: the sink joins the denominator only."""
    sink = sink.astype(jnp.float32)
    top = jnp.maximum(whole.top, sink)
    fade = jnp.exp(whole.top - top)
    total = whole.total * fade + jnp.exp(sink - top)
    return (whole.values * (fade / total)[..., None]).astype(dtype)


def combine(splits: Part, sink: Float[Array, " H"], dtype: Any) -> Float[Array, "B H c"]:
    """The output from parts [B, s, H, ...]. A part over no keys (total 0) may hold any values.

    Unrolled over the splits, so that XLA makes one kernel of it and no reductions.
    """
    sink = sink.astype(jnp.float32)
    parts = [jax.tree.map(lambda x: x[:, i], splits) for i in range(splits.top.shape[1])]  # noqa: B023
    top = functools.reduce(jnp.maximum, [p.top for p in parts], sink)
    fades = [jnp.where(p.total > 0, jnp.exp(p.top - top), 0) for p in parts]
    total = jnp.exp(sink - top)
    values = jnp.zeros((), jnp.float32)
    for p, fade in zip(parts, fades, strict=True):
        total += p.total * fade
        there = jnp.where(fade[..., None] > 0, p.values.astype(jnp.float32), 0)
        values += there * fade[..., None]
    return (values / total[..., None]).astype(dtype)


def lead(rows: Rows) -> tuple[int, int]:
    """The axes X, Y of rows [X, Y, ...]."""
    x, y = jax.tree.leaves(rows)[0].shape[:2]
    return x, y


def as_vectors(rows: Rows, dims: int) -> Rows:
    """Arrays [X, Y, dims / 128, 128] as [X, Y, dims]; other rows as they are."""
    if isinstance(rows, Fp8Rows):
        return rows
    return rows.reshape(*rows.shape[:2], dims)


def flat(rows: Rows) -> Rows:
    """Rows [X, Y, ...] with one leading axis: entry y of x is at x * Y + y."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rows)


def default_splits(batch: int, heads: int, most: int) -> int:
    """Programs that share one row's keys, so that all of a GPU's multiprocessors have work."""
    tiles = batch * -(-heads // HEADS)
    return max(1, min(STREAMING_MULTIPROCESSORS // tiles, most))


def pad_heads(
    q: Float[Array, "B H c"], sink: Float[Array, " H"], tile: int
) -> tuple[Float[Array, "B G c"], Float[Array, " G"]]:
    """Heads of zeros behind, up to a multiple of `tile`: a matrix instruction takes no fewer, and
    they read no further entries. What they attend to is to be cut off."""
    more = -q.shape[1] % tile
    return jnp.pad(q, ((0, 0), (0, more), (0, 0))), jnp.pad(sink, (0, more))


def check(
    q: Array, window: Array, window_count: Array, sink: Array, counts: dict[str, Int[Array, " B"]]
) -> None:
    """Arguments that both decode operations have. Raises ValueError."""
    if q.ndim != 3 or q.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"q must be bfloat16 or float32 [B, H, c], got {q.dtype} {list(q.shape)}")
    batch, heads, dims = q.shape
    if window.dtype != q.dtype or window.ndim != 3 or window.shape[::2] != (batch, dims):
        wanted = f"{q.dtype} [{batch}, W, {dims}]"
        raise ValueError(f"window must be {wanted}, got {window.dtype} {list(window.shape)}")
    if sink.dtype != jnp.float32 or sink.shape != (heads,):
        raise ValueError(f"sink must be float32 [{heads}], got {sink.dtype} {list(sink.shape)}")
    for name, x in {"window_count": window_count, **counts}.items():
        if x.dtype != jnp.int32 or x.shape != (batch,):
            raise ValueError(f"{name} must be int32 [{batch}], got {x.dtype} {list(x.shape)}")


def check_rows(rows: Rows, dims: int, group: int) -> None:
    """Entries [X, Y, ...] of `dims` dims. Raises ValueError."""
    if not isinstance(rows, Fp8Rows):
        shapes = [dims], [dims // 128, 128]
        if rows.dtype not in (jnp.bfloat16, jnp.float32) or list(rows.shape[2:]) not in shapes:
            wanted = f"bfloat16 or float32 [*, *, {dims}] or [*, *, {dims // 128}, 128]"
            raise ValueError(f"rows must be {wanted}, got {rows.dtype} {list(rows.shape)}")
        return
    lead, nope = rows.rope.shape[:-1], dims - rows.rope.shape[-1]
    used = nope + nope // group
    want = (*lead, -(-used // 128), 128)
    if len(lead) != 2 or nope <= 0 or nope % group or rows.nope.shape != want:
        raise ValueError(
            f"rows must be planes [*, *, {want[-2]}, 128] and [*, *, rope] of {dims} dims in groups"
            f" of {group}, got {list(rows.nope.shape)} and {list(rows.rope.shape)}"
        )
    if rows.nope.dtype != jnp.uint8 or rows.rope.dtype != jnp.bfloat16:
        raise ValueError(
            f"rows must be uint8 and bfloat16 planes, got {rows.nope.dtype}, {rows.rope.dtype}"
        )
