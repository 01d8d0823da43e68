"""Products, softmax and results of the decode kernels for Hopper, in parts of a warpgroup each.

Two warpgroups own one half of the dims of the sums each. Where no other warpgroup scores, each of
them computes all scores of a chunk of keys, so that they exchange nothing but the keys.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
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
type Sums = tuple[Array, ...]  # parts of the dims of a warpgroup's sums, one beside the other


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that change the kernel's speed and, but for rounding, not its result."""

    splits: int  # blocks that share one row's keys
    stages: int = 2  # chunks in shared memory
    parts: Any = jnp.float32  # dtype of the sums between kernel and combination, or bfloat16
    scorer: bool = False  # a warpgroup of its own computes scores, as `scorer` does; two stages
    cluster: bool = False  # with a scorer: the blocks of a row combine what they have, in bfloat16


class Share(NamedTuple):
    """A block's share of one row's chunks: those of the window come first."""

    recent: Array  # filled slots of the window
    seen: Array  # visible entries
    recent_chunks: Array
    first: Array
    last: Array

    @property
    def window_chunks(self) -> Array:
        """The block's chunks of the window."""
        return jnp.maximum(jnp.minimum(self.recent_chunks, self.last) - self.first, 0)

    @property
    def chunks(self) -> Array:
        """All of its chunks."""
        return self.last - self.first

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


def fetch(mine: Share, window: Any, rows: Any, keys: Any, ready: Any, used: Any) -> None:
    """Copies a share's chunks of window [W, c] and rows [N, c] to `keys` [stages, 2, CHUNK, c / 2]
    by TMA, each as soon as its place is `used`."""
    stages, _, _, half = keys.shape

    def chunk(n: Array, _: None) -> None:
        stage, i = jax.lax.rem(n, stages), mine.first + n
        pl.when(n >= stages)(lambda: plgpu.barrier_wait(used.at[stage]))

        def copy(source: Any, at: Array) -> None:
            place = pl.ds(pl.multiple_of(at * CHUNK, CHUNK), CHUNK)
            for j in range(HALVES):
                part = source.at[place, pl.ds(j * half, half)]
                plgpu.copy_gmem_to_smem(part, keys.at[stage, j], ready.at[stage])

        pl.when(i < mine.recent_chunks)(lambda: copy(window, i))
        pl.when(i >= mine.recent_chunks)(lambda: copy(rows, i - mine.recent_chunks))

    jax.lax.fori_loop(0, mine.chunks, chunk, None)


def transforms(dtype: Any = jnp.bfloat16, dims: int = 64) -> tuple[Any, ...]:
    """Of shared memory for matrices whose rows are tiles of `dims`, swizzled; for bfloat16 and 64,
    the layout that wgmma reads."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    return (tiling((8, dims)), swizzle(dims * jnp.dtype(dtype).itemsize))


def tile(shape: tuple[int, ...], dtype: Any = jnp.bfloat16, dims: int = 64) -> Any:
    """Shared memory with those `transforms`."""
    return plgpu.SMEM(shape, dtype, transforms=transforms(dtype, dims))


def dot(a: Array, b: Array) -> Array:
    """A product in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def product(a: Any, b: Any, shape: tuple[int, int], interpret: bool) -> Array:
    """sum_i a[i] b[i]^T for shared-memory tiles, in float32."""
    if interpret:  # E3: accumulators beyond one scope have no interpretation
        pairs = [dot(a[i], b[i].T) for i in range(HALVES)]
        return functools.reduce(jnp.add, pairs)

    def multiply(acc: Any) -> Any:
        for i in range(HALVES):
            plgpu.wgmma(acc, a.at[i], b.at[i].transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def add_product(sums: Array, weights: Array, keys: Any, interpret: bool) -> Array:
    """sums + weights @ keys, keys being a shared-memory tile."""
    if interpret:
        return sums + dot(weights, keys[...])

    def multiply(acc: Any) -> None:
        plgpu.wgmma(acc, weights, keys)

    accumulated: Any = pl.run_state(multiply)(plgpu.ACC.init(sums))
    return accumulated


def add_products(sums: Sequence[Array], weights: Any, keys: Any, interpret: bool) -> Sums:
    """Each part of the sums + weights @ its dims of the keys, both in shared memory."""
    width = sums[0].shape[1]
    parts = [keys.at[:, pl.ds(j * width, width)] for j in range(len(sums))]
    if interpret:
        return tuple(x + dot(weights[...], part[...]) for x, part in zip(sums, parts, strict=True))

    def multiply(accumulators: Any) -> None:
        for acc, part in zip(accumulators, parts, strict=True):
            plgpu.wgmma(acc, weights, part)

    accumulated: Any = pl.run_state(multiply)(tuple(plgpu.ACC.init(x) for x in sums))
    return tuple(accumulated)


def by_head(x: Array, like: tuple[int, ...]) -> Array:
    """A value of each head along that head's row."""
    return jax.lax.broadcast_in_dim(x, like, (0,))


def scores(q: Any, keys: Any, limit: Array, scale: float, interpret: bool) -> Array:
    """Scores [H, CHUNK] in base 2 of tiles [2, H, c / 2] and [2, CHUNK, c / 2]."""
    return masked(product(q, keys, (q.shape[1], CHUNK), interpret), limit, scale)


def masked(dots: Array, limit: Array, scale: float) -> Array:
    """Products as scores in base 2, none from `limit` on."""
    key = plgpu.broadcasted_iota(jnp.int32, dots.shape, 1, layout=plgpu.Layout.WGMMA)
    return jnp.where(key < limit, dots * (scale * LOG2E), soft.NO_SCORE)


def fold(scores: Array, top: Array, total: Array) -> tuple[Array, Array, Array, Array]:
    """A chunk's weights, how much the sums so far fade, the new top, the new total."""
    new = jnp.maximum(top, scores.max(axis=1))
    fade = jnp.exp2(top - new)
    weights = jnp.exp2(scores - by_head(new, scores.shape))
    return weights.astype(jnp.bfloat16), fade, new, total * fade + weights.sum(axis=1)


def nothing_seen(heads: int) -> tuple[Array, Array]:
    """Top and total over no keys."""
    reduced = plgpu.Layout.WGMMA.reduce(1)
    top = plgpu.layout_cast(jnp.full((heads,), soft.NO_SCORE, jnp.float32), reduced)
    return top, plgpu.layout_cast(jnp.zeros((heads,), jnp.float32), reduced)


def nothing_summed(heads: int, half: int) -> Array:
    """Sums over no keys."""
    return plgpu.layout_cast(jnp.zeros((heads, half), jnp.float32), plgpu.Layout.WGMMA)


def nothing(heads: int, half: int) -> tuple[Array, Array, Array]:
    """Top, total and sums over no keys."""
    return *nothing_seen(heads), nothing_summed(heads, half)


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
    """`write` by way of the queries' tiles, once both warpgroups have read them."""
    (top, total, sums), worker = state, jax.lax.axis_index("warpgroup")
    plgpu.barrier_arrive(both)
    plgpu.barrier_wait(both)
    if not whole:

        @pl.when(worker == 0)
        def _() -> None:
            stats_s[0] = top
            stats_s[1] = total

    write((top, total, (sums,)), sink, out, stats, q_s, stats_s, whole)


def write(
    state: tuple[Array, Array, Sums], sink: Any, out: Any, stats: Any, tiles: Any, stats_s: Any,
    whole: bool,
) -> None:  # fmt: skip
    """Writes this warpgroup's half [H, c / 2] of `out`: with the sink joined where `whole`, else
    `stats_s` goes to `stats`. By way of `tiles` [2, H, c / 2], which nobody reads any more."""
    (top, total, sums), worker, half = state, jax.lax.axis_index("warpgroup"), tiles.shape[2]
    if whole:
        reduced = plgpu.Layout.WGMMA.reduce(1)
        logit = plgpu.load(sink, layout=reduced, optimized=False) * LOG2E
        highest = jnp.maximum(top, logit)
        fade = jnp.exp2(top - highest)
        factor = fade / (total * fade + jnp.exp2(logit - highest))
        sums = [x * by_head(factor, x.shape) for x in sums]
    begin = pl.multiple_of(worker * half, half)
    if out.dtype == jnp.float32:
        for j, x in enumerate(sums):
            out[:, pl.ds(pl.multiple_of(begin + j * x.shape[1], x.shape[1]), x.shape[1])] = x
    else:
        put(sums, tiles.at[worker])
    plgpu.commit_smem()
    if out.dtype != jnp.float32:
        plgpu.copy_smem_to_gmem(tiles.at[worker], out.at[:, pl.ds(begin, half)])
    if not whole:
        pl.when(worker == 0)(lambda: plgpu.copy_smem_to_gmem(stats_s, stats))
    plgpu.wait_smem_to_gmem(0)


def put(sums: Sequence[Array], to: Any) -> None:
    """Writes a warpgroup's half of the dims to a tile [H, c / 2]."""
    for j, x in enumerate(sums):
        to[:, pl.ds(j * x.shape[1], x.shape[1])] = x.astype(to.dtype)


def put_average(total: Array, sums: Sums, tiles: Any) -> None:
    """This warpgroup's half of the dims of the average over the block's keys, in `tiles`."""
    inverse = jnp.where(total > 0, 1 / total, jnp.zeros_like(total))
    average = [x * by_head(inverse, x.shape) for x in sums]
    put(average, tiles.at[jax.lax.axis_index("warpgroup")])
