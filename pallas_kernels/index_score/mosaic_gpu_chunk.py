"""Hopper kernel for many queries a row: a block's keys stay in registers, queries stream past.

Bound by products, with the sum over heads close behind. A warpgroup holds `key_tiles` tiles of keys
as left operands and meets one query after another: while it adds up the heads of one tile, its next
tile's products run. A block skips queries that see none of its keys, as most do early in a prompt.
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

QUERIES = 256  # a block's: enough to repay loading its keys, few enough for many blocks
STAGES = 4  # queries in flight
GROUPS = 2  # warpgroups that multiply; one more loads
KEY_TILES = {64: 2, 128: 1}  # by heads: accumulators of 64 registers in all
REGISTERS = 65536 // 128  # of a processor, per lane of a warpgroup
LOADER_REGISTERS, MOST_REGISTERS = 40, 232


def worker_registers(groups: int) -> int:
    """What each of `groups` workers may take once the loader has given up its share; in eights."""
    launched = REGISTERS // (groups + 1) // 8 * 8 * (groups + 1)
    return min(MOST_REGISTERS, (launched - LOADER_REGISTERS) // groups // 8 * 8)


class _Block:
    """One block's view of its inputs and scratch: keys of `groups * key_tiles` tiles."""

    def __init__(self, call: Call, refs: dict[str, Any], scratch: dict[str, Any], sizes: Any):
        self.call, self.refs, self.scratch = call, refs, scratch
        self.groups, self.key_tiles, self.queries, self.stages, self.interpret = sizes
        self.batch, self.group = lax.axis_index("batch"), lax.axis_index("group")
        self.first_tile = lax.axis_index("block") * self.groups * self.key_tiles
        self.first_query = lax.axis_index("chunk") * self.queries
        tokens = call.arrays["q"].shape[1]
        self.count = jnp.minimum(tokens - self.first_query, self.queries)

    def sees(self, t: Any) -> Any:
        """Whether the t-th query sees any key of the block."""
        return self.scratch["seen"][t] > self.first_tile * TILE

    def load_queries(self) -> None:
        """The loader's part: the queries that see something, through a ring of buffers."""
        heads, w = self.scratch["heads"], self.scratch["w"]
        full, empty = self.scratch["full"], self.scratch["empty"]

        def step(t: Any, n: Any) -> Any:
            @pl.when(self.sees(t))
            def _load() -> None:
                slot = lax.rem(n, self.stages)

                @pl.when(n >= self.stages)
                def _free() -> None:
                    plgpu.barrier_wait(empty.at[slot])

                at = self.first_query + t
                q, weights = self.refs["q"].at[self.batch, at], self.refs["w"].at[self.batch, at]
                plgpu.copy_gmem_to_smem(q, heads.at[slot], full.at[slot])
                plgpu.copy_gmem_to_smem(weights, w.at[slot], full.at[slot])

            return n + self.sees(t).astype(jnp.int32)

        used = lax.fori_loop(0, self.count, step, jnp.int32(0))

        def drain(n: Any, carry: Any) -> Any:  # leave no arrival unseen behind
            plgpu.barrier_wait(empty.at[lax.rem(n, self.stages)])
            return carry

        lax.fori_loop(jnp.maximum(used - self.stages, 0), used, drain, None)

    def load_keys(self) -> list[tuple[Any, Any, Any, Any]]:
        """A worker's tiles: operand, scales, tile number, and whether the tile exists."""
        scratch, scale = self.scratch, self.scratch.get("scale")
        keys, full = scratch["keys"], scratch["keys_full"]
        first, out = self.first_tile + self.group * self.key_tiles, []
        for i in range(self.key_tiles):
            slot = self.group * self.key_tiles + i
            inside = first + i < self.call.tiles
            tile = jnp.minimum(first + i, self.call.tiles - 1)
            at = tiles.place(self.call, self.refs, self.batch, tile)
            buffer = None if scale is None else scale.at[slot]
            tiles.fetch(self.refs, at, keys.at[slot], buffer, full.at[slot])
            plgpu.barrier_wait(full.at[slot])
            operand = keys[slot].astype(self.call.mma)
            factor = None if scale is None else tiles.scales(self.refs, buffer)
            out.append((operand, factor, first + i, (inside, at.exists)))
        return out

    def score(self, t: Any, n: Any, mine: list[tuple[Any, Any, Any, Any]]) -> list[Array]:
        """Scores of the t-th query, the n-th that was loaded, for this worker's tiles."""
        slot, scratch = lax.rem(n, self.stages), self.scratch
        plgpu.barrier_wait(scratch["full"].at[slot])
        w = plgpu.load(scratch["w"].at[slot], layout=tiles.PER_HEAD, optimized=False)
        heads = scratch["heads"].at[slot]

        def finish(i: int, dots: Array) -> Array:
            _, factor, tile, (_, exists) = mine[i]
            seen = scratch["seen"][t] - tile * TILE
            seen = jnp.where(exists, seen, 0) if "table" in self.refs else seen
            return tiles.masked(tiles.head_sum(dots, w, factor), seen)

        def multiply(*accs: Any) -> list[Array]:
            for acc, (operand, *_) in zip(accs, mine, strict=True):
                plgpu.wgmma(acc, operand, heads.transpose((1, 0)))
            out = []
            for i, acc in enumerate(accs):  # while a tile is added up, the next one's products run
                dots = plgpu.wgmma_accumulator_load(acc, wait_n=len(accs) - 1 - i)
                if i == len(accs) - 1:
                    plgpu.barrier_arrive(scratch["empty"].at[slot])
                out.append(finish(i, dots))
            return out

        if self.interpret:
            out = [finish(i, tiles.products(m[0], heads, True)) for i, m in enumerate(mine)]
            plgpu.barrier_arrive(scratch["empty"].at[slot])
            return out
        shape = (TILE, heads.shape[0])
        return pl.run_scoped(multiply, *[plgpu.ACC(shape, jnp.float32)] * len(mine))

    def work(self, out: Any) -> None:
        """A worker's part: its tiles' scores for every query of the block."""
        mine = self.load_keys()

        def store(t: Any, scores: list[Array]) -> None:
            for (_, _, tile, (inside, _)), score in zip(mine, scores, strict=True):

                @pl.when(inside)
                def _store(tile: Any = tile, score: Array = score) -> None:
                    rows = pl.ds(pl.multiple_of(tile * TILE, TILE), TILE)
                    out[self.batch, self.first_query + t, rows] = score

        def step(t: Any, n: Any) -> Any:
            sees = self.sees(t)

            @pl.when(sees)
            def _score() -> None:
                store(t, self.score(t, n, mine))

            @pl.when(jnp.logical_not(sees))
            def _skip() -> None:
                store(t, [tiles.nothing()] * len(mine))

            return n + sees.astype(jnp.int32)

        lax.fori_loop(0, self.count, step, jnp.int32(0))


def _body(call: Call, sizes: Any, *all_refs: Any, **scratch: Any) -> None:
    inputs = len(call.arrays)
    refs, out = tiles.named(call, all_refs[:inputs]), all_refs[inputs]
    block = _Block(call, refs, scratch, sizes)
    chunk = pl.ds(pl.multiple_of(block.first_query, block.queries), block.queries)

    @pl.when(block.group == 0)
    def _lengths() -> None:
        lengths = refs["lengths"].at[block.batch, chunk]
        plgpu.copy_gmem_to_smem(lengths, scratch["seen"], scratch["seen_full"])

    plgpu.barrier_wait(scratch["seen_full"])

    @pl.when(block.group == block.groups)
    def _loader() -> None:
        plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
        block.load_queries()

    @pl.when(block.group < block.groups)
    def _worker() -> None:
        plgpu.set_max_registers(worker_registers(block.groups), action="increase")
        block.work(out)


def scores(
    call: Call, *, groups: int, key_tiles: int, queries: int, stages: int, interpret: bool
) -> Float[Array, "B T N"]:
    """Scores of several queries a row."""
    arrays = dict(call.arrays)
    batch, tokens, heads, dim = arrays["q"].shape
    chunks, slots = -(-tokens // queries), groups * key_tiles
    arrays["q"] = arrays["q"].astype(call.mma)
    padding = ((0, 0), (0, chunks * queries - tokens))
    arrays["lengths"] = jnp.pad(arrays["lengths"], padding)
    call = call._replace(arrays=arrays)
    scratch: dict[str, Any] = {
        "heads": tiles.smem((stages, heads, dim), call.arrays["q"].dtype),
        "w": plgpu.SMEM((stages, heads), jnp.float32),
        "keys": tiles.smem((slots, TILE, dim), arrays["keys"].dtype),
        "seen": plgpu.SMEM((queries,), jnp.int32),
        "full": plgpu.Barrier(num_arrivals=2, num_barriers=stages),
        "empty": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        "keys_full": plgpu.Barrier(num_arrivals=tiles.copies(call), num_barriers=slots),
        "seen_full": plgpu.Barrier(),
    }
    if "scale" in arrays:
        scratch["scale"] = plgpu.SMEM((slots, TILE), jnp.float32)
    return plgpu.kernel(
        functools.partial(_body, call, (groups, key_tiles, queries, stages, interpret)),
        out_type=jax.ShapeDtypeStruct((batch, tokens, call.tiles * TILE), jnp.float32),
        grid=(-(-call.tiles // slots), chunks, batch),
        grid_names=("block", "chunk", "batch"),
        num_threads=groups + 1,
        thread_name="group",
        scratch_types=scratch,
        interpret=tiles.params(interpret),
        kernel_name="index_score_chunk",
    )(*call.arrays.values())
