"""TPU kernel: the k-th score by bisection with counts, then compaction by matrix products.

The TensorCore has no sort, cumulative sum or gather, so place j of a row is found in two products
with one-hot matrices. A tile is 128 columns. Tile t is the one of place j where the number of
selected columns before it is at most j and including it more than j: that comparison is a one-hot
matrix [tiles, places], which picks j's tile out of the mask of selected columns; a triangular
matrix counts within the tile. Counts fit float32, masks bfloat16: everything is exact.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.top_k import reference

LANES = 128
SPAN = LANES * LANES  # columns of a group of tiles
UNSEEN = jnp.iinfo(jnp.int32).min
MAX_COLUMNS = 1 << 20  # a row's keys, and its next neighbour's, must fit VMEM
ROW_BYTES = 8 << 20  # keys held at once; the pipeline doubles it


def _keys(scores: Array, eligible: Array) -> Int[Array, "R N"]:
    """int32 of the scores' order; the lowest one where nothing may be selected."""
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(eligible, jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits), UNSEEN)


def _iota(axis: int, columns: int) -> Int[Array, "128 columns"]:
    return jax.lax.broadcasted_iota(jnp.int32, (LANES, columns), axis)


def _ones(mask: Bool[Array, "*n"], dtype: Any = jnp.bfloat16) -> Array:
    return jnp.where(mask, 1.0, 0.0).astype(dtype)


def _dot(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _kernel(take_ref: Any, keys_ref: Any, out_ref: Any, kth_ref: Any, cut_ref: Any) -> None:
    """[G, 1, 1] f32, [G, T, 128] -> [G, 1, places]; scratch: [G, 1, 128] int32 twice."""
    rows, tiles, _ = keys_ref.shape
    groups, places = tiles // LANES, out_ref.shape[-1]
    take = take_ref[...]

    # member([G, 128, 128] keys, columns) -> bool; summed to [G, 1, 1]
    def count(member: Callable[[Array, Array], Array]) -> Array:
        def add(group: Array, total: Array) -> Array:
            keys = keys_ref[:, pl.ds(group * LANES, LANES), :]
            column = (group * LANES + _iota(0, LANES)) * LANES + _iota(1, LANES)
            return total + jnp.sum(_ones(member(keys, column), jnp.float32), 1, keepdims=True)

        total = jax.lax.fori_loop(0, groups, add, jnp.zeros((rows, 1, LANES), jnp.float32))
        return jnp.sum(total, axis=2, keepdims=True)

    # The highest key that `take` keys reach; UNSEEN where fewer exist.
    def refine(i: Array, kth: Array) -> Array:
        candidate = kth + jnp.left_shift(jnp.int32(1), 31 - i)
        return jnp.where(count(lambda keys, _: keys >= candidate) >= take, candidate, kth)

    kth = jax.lax.fori_loop(0, 32, refine, jnp.full((rows, 1, 1), UNSEEN, jnp.int32))
    room = take - count(lambda keys, _: keys > kth)
    tied = count(lambda keys, _: (keys == kth) & (keys > UNSEEN)) > room
    bits = (tiles * LANES).bit_length()

    # The first column whose equal scores are too many.
    def narrow(i: Array, cut: Array) -> Array:
        candidate = cut + jnp.left_shift(jnp.int32(1), bits - 1 - i)
        before = count(lambda keys, column: (keys == kth) & (column < candidate))
        return jnp.where(tied & (before <= room), candidate, cut)

    steps = jnp.where(jnp.max(_ones(tied, jnp.float32)) > 0, bits, 0)
    cut = jnp.where(tied, 0, jnp.iinfo(jnp.int32).max)
    cut = jax.lax.fori_loop(0, steps, narrow, cut)
    kth_ref[...] = jnp.broadcast_to(kth, kth_ref.shape)
    cut_ref[...] = jnp.broadcast_to(cut, cut_ref.shape)

    place = _iota(1, places).astype(jnp.float32)
    earlier = _ones(_iota(1, LANES) < _iota(0, LANES))
    up_to = _ones(_iota(1, LANES) <= _iota(0, LANES))
    all_lanes = jnp.ones((LANES, LANES), jnp.bfloat16)

    def compact(row: Array, nothing: None) -> None:
        kth, cut = kth_ref[row], cut_ref[row]

        def pick(group: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
            start, picked, tile, before = sums
            keys = keys_ref[row, pl.ds(group * LANES, LANES), :]
            column = (group * LANES + _iota(0, LANES)) * LANES + _iota(1, LANES)
            keep = (keys > kth) | ((keys == kth) & (keys > UNSEEN) & (column < cut))
            keep = _ones(keep, jnp.float32)
            own = _dot(keep.astype(jnp.bfloat16), all_lanes)  # each tile's count, in every lane
            first = start + _dot(earlier, own.astype(jnp.bfloat16))  # places before each tile
            start = (first + own)[-1:]
            first, own = (jnp.concatenate([x] * (places // LANES), axis=1) for x in (first, own))
            here = (first <= place) & (place < first + own)  # [tile, place]
            picked += _dot(keep.T.astype(jnp.bfloat16), _ones(here))  # [lane, place]
            number = (group * LANES + _iota(0, places)).astype(jnp.float32)
            tile += jnp.sum(jnp.where(here, number, 0.0), axis=0, keepdims=True)
            before += jnp.sum(jnp.where(here, first, 0.0), axis=0, keepdims=True)
            return start, picked, tile, before

        shapes = ((1, LANES), (LANES, places), (1, places), (1, places))
        zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
        _, picked, tile, before = jax.lax.fori_loop(0, groups, pick, zeros)
        rank = _dot(up_to, picked.astype(jnp.bfloat16))  # of each lane within the place's tile
        hit = (rank == place - before + 1) & (picked > 0)
        lane = jnp.sum(jnp.where(hit, _iota(0, places), 0).astype(jnp.float32), 0, keepdims=True)
        out_ref[row] = (tile * LANES + lane).astype(jnp.int32)
        return nothing

    jax.lax.fori_loop(0, rows, compact, None)


@functools.partial(jax.jit, static_argnames=("places", "rows", "interpret"))
def _select(
    take: Float[Array, "R 1 1"],
    keys: Int[Array, "R T 128"],
    *,
    places: int,
    rows: int,
    interpret: Any,
) -> Int[Array, "R 1 places"]:
    count, tiles, _ = keys.shape

    def block(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, *shape), lambda i: (i, 0, 0))

    return pl.pallas_call(
        _kernel,
        grid=(count // rows,),
        in_specs=[block(1, 1), block(tiles, LANES)],
        out_specs=block(1, places),
        out_shape=jax.ShapeDtypeStruct((count, 1, places), jnp.int32),
        scratch_shapes=[pltpu.VMEM((rows, 1, LANES), jnp.int32)] * 2,
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=48 << 20),
        name="top_k",
        interpret=interpret,
    )(take, keys)


def top_k(
    scores: Float[Array, "R N"],
    visible: Int[Array, " R"] | Bool[Array, "R N"],
    k: int,
    *,
    limit: Int[Array, " R"] | None = None,
    rows: int = 8,
    interpret: Any = False,
) -> tuple[Int[Array, "R k"], Bool[Array, "R k"]]:
    """See the package's `top_k`. Places are in order of column. `rows` share a program."""
    count, columns = scores.shape
    if not 0 < columns <= MAX_COLUMNS or not count:
        wanted = f"a row and 1 to {MAX_COLUMNS} columns"
        raise Unsupported(f"scores must have {wanted}, got {list(scores.shape)}")
    eligible = reference.seen(visible, columns) & (scores > -jnp.inf)
    width = -(-columns // SPAN) * SPAN
    rows = max(1, min(rows, count, ROW_BYTES // (4 * width)))
    padding = ((0, -count % rows), (0, width - columns))
    keys = jnp.pad(_keys(scores, eligible), padding, constant_values=UNSEEN)
    take = jnp.full(count, k, jnp.int32) if limit is None else jnp.clip(limit, 0, k)
    padded = jnp.pad(take, padding[0]).astype(jnp.float32)
    index = _select(
        padded[:, None, None],
        keys.reshape(-1, width // LANES, LANES),
        places=-(-k // LANES) * LANES,
        rows=rows,
        interpret=interpret,
    )
    kept = jnp.minimum(jnp.sum(eligible, axis=1, dtype=jnp.int32), take)
    return index[:count, 0, :k], jnp.arange(k) < kept[:, None]
