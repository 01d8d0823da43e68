"""Steps that the Hopper kernels for plain and for fp8 rows share, all of two consumer warpgroups.

Each computes all scores of a chunk of keys and owns one half of the dims of the sums, so that they
exchange nothing but the keys themselves.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels import split_softmax as soft

CHUNK = 64  # keys: the smallest product over keys that a 128-byte swizzle allows
HALVES = 2  # consumer warpgroups, each with that part of the dims
LOG2E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that change the kernel's speed and, but for rounding, not its result."""

    splits: int  # blocks that share one row's keys
    stages: int = 2  # chunks in shared memory
    parts: Any = jnp.float32  # dtype of the sums between kernel and combination, or bfloat16


class Share(NamedTuple):
    """A block's share of one row's chunks: those of the window come first."""

    recent: Array  # filled slots of the window
    seen: Array  # visible entries
    recent_chunks: Array
    first: Array
    last: Array

    def limit(self, i: Array) -> Array:
        """Keys that count from the first of chunk i on; fewer than CHUNK in a last one."""
        old = i < self.recent_chunks
        return jnp.where(old, self.recent - i * CHUNK, self.seen - (i - self.recent_chunks) * CHUNK)


def share(recent: Array, seen: Array, split: Array, splits: int) -> Share:
    """Contiguous and even shares."""
    recent_chunks = (recent + CHUNK - 1) // CHUNK
    chunks = recent_chunks + (seen + CHUNK - 1) // CHUNK
    each = (chunks + splits - 1) // splits
    first = jnp.minimum(split * each, chunks)
    return Share(recent, seen, recent_chunks, first, jnp.minimum(first + each, chunks))


def transforms(dtype: Any = jnp.bfloat16, dims: int = 64) -> tuple[Any, ...]:
    """Of shared memory for matrices whose rows are tiles of `dims`, swizzled; for bfloat16 and 64,
    the layout that wgmma reads."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return (tiling((8, dims)), swizzle(dims * jnp.dtype(dtype).itemsize))


def tile(shape: tuple[int, ...], dtype: Any = jnp.bfloat16, dims: int = 64) -> Any:
    """Shared memory with those `transforms`."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(dtype, dims))


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def product(a: Any, b: Any, shape: tuple[int, int], interpret: bool) -> Array:
    """sum_i a[i] b[i]^T for shared-memory tiles, in float32."""
    if interpret:  # E3: accumulators beyond one scope have no interpretation
        pairs = [_dot(a[i], b[i].T) for i in range(HALVES)]
        return functools.reduce(jnp.add, pairs)

    def multiply(acc: Any) -> Any:
        for i in range(HALVES):
            plgpu.wgmma(acc, a.at[i], b.at[i].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product(sums: Array, weights: Array, keys: Any, interpret: bool) -> Array:
    """sums + weights @ keys, keys being a shared-memory tile."""
    if interpret:
        return sums + _dot(weights, keys[...])

    def multiply(acc: Any) -> None:
        plgpu.wgmma(acc, weights, keys)

    accumulated: Any = pl.run_state(multiply)(plgpu.ACC.init(sums))
    return accumulated


def by_head(x: Array, like: tuple[int, ...]) -> Array:
    """A value of each head along that head's row."""
    return jax.lax.broadcast_in_dim(x, like, (0,))


def scores(q: Any, keys: Any, limit: Array, scale: float, interpret: bool) -> Array:
    """Scores [H, CHUNK] in base 2 of tiles [2, H, c / 2] and [2, CHUNK, c / 2]."""
    dots = product(q, keys, (q.shape[1], CHUNK), interpret)
    key = plgpu.broadcasted_iota(jnp.int32, dots.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(key < limit, dots * (scale * LOG2E), soft.NO_SCORE)


def fold(scores: Array, top: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """A chunk's weights, how much the sums so far fade, the new top, the new total."""
    new = jnp.maximum(top, scores.max(axis=1))
    fade = jnp.exp2(top - new)
    weights = jnp.exp2(scores - by_head(new, scores.shape))
    return weights.astype(jnp.bfloat16), fade, new, total * fade + weights.sum(axis=1)


def nothing(heads: int, half: int) -> tuple[Array, Array, Array]:
    """Top, total and sums over no keys."""
    reduced = plgpu.Layout.WGMMA.reduce(1)
    top = plgpu.layout_cast(jnp.full((heads,), soft.NO_SCORE, jnp.float32), reduced)
    total = plgpu.layout_cast(jnp.zeros((heads,), jnp.float32), reduced)
    sums = plgpu.layout_cast(jnp.zeros((heads, half), jnp.float32), plgpu.Layout.WGMMA)
    return top, total, sums


def attend(
    mine: Share, q_s: Any, keys_s: Any, ready: Any, used: Any, scale: float, interpret: bool
) -> tuple[Array, Array, Array]:
    """Top, total and sums of a warpgroup over a share's chunks, which come in `keys_s`
    [stages, 2, CHUNK, c / 2] as `ready` says; `used` gives them back."""
    stages, (heads, half) = keys_s.shape[0], q_s.shape[1:]
    worker = jax.lax.axis_index("warpgroup")

    def chunk(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, sums = carry
        stage, limit = jax.lax.rem(i - mine.first, stages), mine.limit(i)
        plgpu.barrier_wait(ready.at[stage])
        found = scores(q_s, keys_s.at[stage], limit, scale, interpret)
        weights, fade, top, total = fold(found, top, total)
        keys = keys_s.at[stage, worker]
        # What lies beyond the count may be NaN, which a weight of zero does not cancel. Scores read
        # it too, in the other warpgroup as well, but only those that are not used.
        pl.when(limit < CHUNK)(lambda: clear(keys, limit))
        sums = sums * by_head(fade, sums.shape)
        sums = add_product(sums, weights, keys, interpret)
        plgpu.barrier_arrive(used.at[stage])
        return top, total, sums

    return jax.lax.fori_loop(mine.first, mine.last, chunk, nothing(heads, half))


def clear(keys: Any, limit: Array) -> None:
    """Zeroes the keys from `limit` on, few dims at a time to save registers."""
    for start in range(0, keys.shape[1], 64):
        part = keys.at[:, pl.ds(start, 64)]
        key = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
        values = plgpu.layout_cast(part[...], plgpu.Layout.WGMMA)
        part[...] = jnp.where(key < limit, values, jnp.zeros_like(values))
    plgpu.commit_smem()


def store(
    state: tuple[Array, Array, Array], sink: Any, out: Any, stats: Any, q_s: Any, stats_s: Any,
    both: Any, whole: bool,
) -> None:  # fmt: skip
    """Writes this warpgroup's half [H, c / 2] of `out`: with the sink joined where `whole`, else
    top and total go to `stats`."""
    (top, total, sums), worker, half = state, jax.lax.axis_index("warpgroup"), q_s.shape[2]
    if whole:
        reduced = plgpu.Layout.WGMMA.reduce(1)
        logit = plgpu.load(sink, layout=reduced, optimized=False) * LOG2E
        highest = jnp.maximum(top, logit)
        fade = jnp.exp2(top - highest)
        sums = sums * by_head(fade / (total * fade + jnp.exp2(logit - highest)), sums.shape)
    mine = out.at[:, pl.ds(pl.multiple_of(worker * half, half), half)]
    plgpu.barrier_arrive(both)
    plgpu.barrier_wait(both)  # neither reads q_s any more
    if out.dtype == jnp.float32:
        mine[...] = sums
    else:
        q_s[worker] = sums.astype(out.dtype)

    if not whole:

        @pl.when(worker == 0)
        def _() -> None:
            stats_s[0] = top
            stats_s[1] = total

    plgpu.commit_smem()
    if out.dtype != jnp.float32:
        plgpu.copy_smem_to_gmem(q_s.at[worker], mine)
    if not whole:
        pl.when(worker == 0)(lambda: plgpu.copy_smem_to_gmem(stats_s, stats))
    plgpu.wait_smem_to_gmem(0)
