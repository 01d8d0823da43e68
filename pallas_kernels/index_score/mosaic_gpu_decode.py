"""Hopper kernel for one query a row: keys stream past the query's heads, which stay in place.

Bound by memory for 64 heads or e4m3 queries; with 128 heads and float16 products, bytes and
products take about equally long, so both must go on all the time. Each warpgroup walks over its own
tiles through its own ring of buffers and waits for no other: while one adds up heads, the others'
products keep the tensor cores busy.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.index_score import mosaic_gpu_tile as tiles
from pallas_kernels.index_score.mosaic_gpu_tile import TILE, Call

PROCESSORS = 132  # of an H100 or H200
START_TILES = 4  # a block's start, in tiles: an estimate
MAX_WAVES = 4
MOST_STAGES = 4
SMEM_BYTES = 224 << 10  # of a block's 227 KB: the rest is for barriers and the compiler


def splits_for(batch: int, count: int, groups: int) -> int:
    """Blocks per row: the fewest that end first. A wave lasts as long as its busiest warpgroup."""
    most = min(-(-count // groups), max(1, MAX_WAVES * PROCESSORS // batch))

    def time(splits: int) -> int:
        waves = -(-batch * splits // PROCESSORS)
        return waves * (-(-count // (splits * groups)) + START_TILES)

    return min(range(1, most + 1), key=time)


def _walk(call: Call, refs: dict[str, Any], splits: int, groups: int) -> tuple[Any, ...]:
    """This warpgroup's tiles: every `stride`-th from `first`, of which `count` have visible keys
    and `total` exist; and the row's length."""
    length = refs["lengths"][lax.axis_index("batch"), 0]
    first = lax.axis_index("split") * groups + lax.axis_index("group")
    stride = splits * groups

    def within(end: Any) -> Any:
        return lax.div(jnp.maximum(end - first, 0) + stride - 1, stride)

    live = jnp.minimum(lax.div(jnp.maximum(length, 0) + TILE - 1, TILE), call.tiles)
    return first, stride, within(live), within(call.tiles), length


def _query(call: Call, refs: dict[str, Any], scratch: dict[str, Any]) -> tuple[Any, Array]:
    """The heads in shared memory as the products take them, and their weights."""
    batch, raw, first = lax.axis_index("batch"), scratch["raw"], lax.axis_index("group") == 0

    @pl.when(first)
    def _load() -> None:
        plgpu.copy_gmem_to_smem(refs["q"].at[batch, 0], raw, scratch["raw_full"])

    heads = raw
    plgpu.barrier_wait(scratch["raw_full"])
    if call.converts:
        heads = scratch["heads"]

        @pl.when(first)
        def _convert() -> None:
            heads[...] = raw[...].astype(jnp.float32).astype(call.mma)
            plgpu.commit_smem()

        plgpu.barrier_arrive(scratch["heads_full"])
        plgpu.barrier_wait(scratch["heads_full"])
    return heads, plgpu.load(refs["w"].at[batch, 0], layout=tiles.PER_HEAD, optimized=False)


def _body(
    call: Call,
    splits: int,
    groups: int,
    stages: int,
    interpret: bool,
    *all_refs: Any,
    **scratch: Any,
) -> None:
    inputs = len(call.arrays)
    refs, out = tiles.named(call, all_refs[:inputs]), all_refs[inputs]
    batch, group = lax.axis_index("batch"), lax.axis_index("group")
    first, stride, count, total, length = _walk(call, refs, splits, groups)
    keys, scale, full = scratch["keys"], scratch.get("scale"), scratch["full"]

    def place(i: Any) -> tiles.Place:
        return tiles.place(call, refs, batch, jnp.minimum(first + i * stride, call.tiles - 1))

    def fetch(at: tiles.Place, slot: Any) -> None:
        buffer = None if scale is None else scale.at[slot]
        tiles.fetch(refs, at, keys.at[slot], buffer, full.at[slot])

    def emit(i: Any, score: Array) -> None:
        start = (first + i * stride) * TILE
        out[batch, pl.ds(pl.multiple_of(start, TILE), TILE)] = score

    for stage in range(stages):

        @pl.when(stage < count)
        def _first(stage: int = stage) -> None:
            fetch(place(stage), group * stages + stage)

    heads, w = _query(call, refs, scratch)

    def step(i: Any, carry: Any) -> Any:
        slot = group * stages + lax.rem(i, stages)
        here, ahead = place(i), place(i + stages)  # a table's reads take long: they start first
        seen = length - (first + i * stride) * TILE
        seen = jnp.where(here.exists, seen, 0) if "table" in refs else seen

        def refill() -> None:
            plgpu.commit_smem()  # every thread has read the slot

            @pl.when(i + stages < count)
            def _next() -> None:
                fetch(ahead, slot)

        plgpu.barrier_wait(full.at[slot])
        factor = None if scale is None else tiles.scales(refs, scale.at[slot])
        if call.converts:
            tile = keys[slot].astype(call.mma)
            refill()
            dots = tiles.products(tile, heads, interpret)
        else:
            dots = tiles.products(keys.at[slot], heads, interpret)
            refill()
        emit(i, tiles.masked(tiles.head_sum(dots, w, factor), seen))
        return carry

    lax.fori_loop(0, count, step, None)

    def unseen(i: Any, carry: Any) -> Any:
        emit(i, tiles.nothing())
        return carry

    lax.fori_loop(count, total, unseen, None)


def _stages(call: Call, groups: int, fixed: int) -> int:
    """Tiles in flight for each warpgroup, as many as fit beside `fixed` bytes."""
    tile = TILE * tiles.DIM * call.arrays["keys"].dtype.itemsize + 4 * TILE
    return min(MOST_STAGES, (SMEM_BYTES - fixed) // (groups * tile))


def scores(
    call: Call, *, groups: int, stages: int | None, splits: int | None, interpret: bool
) -> Float[Array, "B 1 N"]:
    """Scores of one query a row."""
    q, keys = call.arrays["q"], call.arrays["keys"]
    batch, _, heads, dim = q.shape
    splits = splits or splits_for(batch, call.tiles, groups)
    fixed = heads * dim * (q.dtype.itemsize + (2 if call.converts else 0))
    stages = stages or _stages(call, groups, fixed)
    slots = groups * stages
    scratch: dict[str, Any] = {
        "raw": tiles.smem((heads, dim), q.dtype),
        "keys": tiles.smem((slots, TILE, dim), keys.dtype),
        "raw_full": plgpu.Barrier(),
        "full": plgpu.Barrier(num_arrivals=tiles.copies(call), num_barriers=slots),
    }
    if call.converts:
        scratch["heads"] = tiles.smem((heads, dim), call.mma)
        scratch["heads_full"] = plgpu.Barrier(num_arrivals=groups)
    if "scale" in call.arrays:
        scratch["scale"] = plgpu.SMEM((slots, TILE), jnp.float32)
    out = plgpu.kernel(
        functools.partial(_body, call, splits, groups, stages, interpret),
        out_type=jax.ShapeDtypeStruct((batch, call.tiles * TILE), jnp.float32),
        grid=(splits, batch),
        grid_names=("split", "batch"),
        num_threads=groups,
        thread_name="group",
        scratch_types=scratch,
        interpret=tiles.params(interpret),
        kernel_name="index_score_decode",
    )(*call.arrays.values())
    return out[:, None]
