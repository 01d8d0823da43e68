"""Hopper decode attention with a warpgroup of its own for scores, beside two that sum.

The scorer computes a chunk's scores once and their softmax, and leaves weights in shared memory;
each summer owns half of the dims. So scores of one chunk and sums of the chunk before overlap, and
no product is done twice. The weights of a stage lie where 64 dims of the queries were, which the
scorer keeps in registers: shared memory has no other room.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.decode_hopper import cluster, copies, ptx, steps
from pallas_kernels.decode_hopper.steps import CHUNK, HALVES

STAGES = 2  # chunks in shared memory: there is no room for more
SCORER = HALVES  # number of that warpgroup; the summers come before it, the copies behind
WARPGROUPS = SCORER + 2
BEGIN = 128  # registers of a thread in the beginning: four warpgroups share them evenly
# With those of a thread that copies these are all there are. With less the accumulators spill.
SUMMER_REGISTERS, SCORER_REGISTERS = 160, 136
TILE = 64  # dims of the queries in one tile
# Dims of one product of weights and keys at most: in a block of 512 threads, which begin with 128
# registers, ptxas refuses an instruction that needs more.
WIDTH = 128


class Board(NamedTuple):
    """Refs in shared memory by which the warpgroups talk."""

    queries: Any  # [c / 64, H, 64]; then the first ones are weights [stages, H, CHUNK]
    fades: Any  # [stages, H]: how much the sums fade before a chunk joins them
    stats: Any  # [2, H]: in the end, tops and totals
    asked: Any  # barrier: the queries are there
    written: Any  # barriers: a stage's weights are there
    ended: Any  # barrier of scorer and summers


class Keys(NamedTuple):
    """A block's chunks, and how they come."""

    tiles: Any  # [stages, 2, CHUNK, c / 2]
    chunks: Array  # how many
    copy: Callable[[], None]  # all of them, by the copying warpgroup
    arrived: Callable[[Array], Array]  # waits for a chunk; its stage
    used: Any  # barriers, at which both summers give a stage back
    masked: Callable[[Array, Array], Array]  # a chunk's products as scores in base 2
    prepare: Callable[[Array, Any], None]  # may change a chunk's tile [CHUNK, c / 2] before sums


class Place(NamedTuple):
    """Where a block's result goes, in global memory."""

    sink: Any  # [H]
    out: Any  # [H, c]: the whole output, or this block's part
    stats: Any  # [2, H]
    splits: int
    fused: bool  # the blocks are a cluster, which combines them


def scratch(heads: int, dims: int) -> list[Any]:
    """What a `Board` has."""
    return [
        steps.tile((dims // TILE, heads, TILE)),
        plgpu.SMEM((STAGES, heads), jnp.float32),
        plgpu.SMEM((2, heads), jnp.float32),
        plgpu.Barrier(num_arrivals=dims // TILE),
        plgpu.Barrier(num_barriers=STAGES),
        plgpu.Barrier(num_arrivals=HALVES + 1),
    ]


def work(q: Any, board: Board, keys: Keys, place: Place, interpret: bool) -> None:
    """All of a block's work: attention of queries q [H, c] to its chunks."""
    worker = jax.lax.axis_index("warpgroup")

    @pl.when(worker == SCORER + 1)
    def _copies() -> None:
        _registers(copies.REGISTERS, interpret)
        for j in range(board.queries.shape[0]):
            part = q.at[:, pl.ds(j * TILE, TILE)]
            plgpu.copy_gmem_to_smem(part, board.queries.at[j], board.asked)
        keys.copy()
        _meet(place)

    @pl.when(worker == SCORER)
    def _scores() -> None:
        _registers(SCORER_REGISTERS, interpret)
        plgpu.barrier_wait(board.asked)
        _score(board, keys, interpret)
        _meet(place)

    @pl.when(worker < SCORER)
    def _sums() -> None:
        _registers(SUMMER_REGISTERS, interpret)
        top, total, sums = _add_up(board, keys, interpret)
        # By way of keys' tiles, which are free by then; those of queries have another order.
        tiles = keys.tiles.at[0]
        if place.fused:
            steps.put_average(total, sums, tiles)
            arrays = (tiles, board.stats, place.sink, place.out)
            ptx.run(cluster.combined(place.splits), arrays, tiles=1)
        else:
            whole = place.splits == 1
            results = (place.sink, place.out, place.stats)
            steps.write((top, total, sums), *results, tiles, board.stats, whole)


def _registers(count: int, interpret: bool) -> None:
    """Of each of this warpgroup's threads."""
    if not interpret:
        plgpu.set_max_registers(count, action="decrease" if count < BEGIN else "increase")


def _meet(place: Place) -> None:
    """Where a cluster combines, all threads meet at its barriers. What the scorer wrote has been
    seen by the summers, who pass it on."""
    if place.fused:
        ptx.run(cluster.met(), ())


def _dots(kept: list[Array], board: Board, keys: Any, interpret: bool) -> Array:
    """Queries times keys [2, CHUNK, c / 2]: the first tiles of queries are in registers."""
    tiles, heads, _ = board.queries.shape
    queries = [*kept, *(board.queries.at[j] for j in range(len(kept), tiles))]
    each = tiles // HALVES
    dims = [keys.at[j // each, :, pl.ds(j % each * TILE, TILE)] for j in range(tiles)]
    if interpret:
        pairs = zip(queries, dims, strict=True)
        return functools.reduce(jnp.add, (steps.dot(a[...], b[...].T) for a, b in pairs))

    def multiply(acc: Any) -> Any:
        for a, b in zip(queries, dims, strict=True):
            plgpu.wgmma(acc, a, b.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((heads, CHUNK), jnp.float32))


def _score(board: Board, keys: Keys, interpret: bool) -> None:
    """The scorer's part.

    A stage's weights may be written when its chunk has come: it was copied after both summers
    had used the chunk before it, weights included.
    """
    stages, heads = board.fades.shape
    layout = plgpu.Layout.WGMMA
    kept = [plgpu.load(board.queries.at[j], layout=layout) for j in range(stages)]

    def chunk(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        stage = keys.arrived(n)
        scores = keys.masked(n, _dots(kept, board, keys.tiles.at[stage], interpret))
        weights, fade, top, total = steps.fold(scores, *carry)
        board.queries[stage] = weights
        board.fades[stage] = fade
        plgpu.commit_smem()
        plgpu.barrier_arrive(board.written.at[stage])
        return top, total

    start = steps.nothing_seen(heads)
    top, total = jax.lax.fori_loop(0, keys.chunks, chunk, start)
    board.stats[0] = top
    board.stats[1] = total
    plgpu.commit_smem()
    _end(board)


def _add_up(board: Board, keys: Keys, interpret: bool) -> tuple[Array, Array, steps.Sums]:
    """A summer's part: tops, totals, and its half of the dims of the sums."""
    worker, half = jax.lax.axis_index("warpgroup"), keys.tiles.shape[-1]
    (_, heads), reduced = board.fades.shape, plgpu.Layout.WGMMA.reduce(1)
    width = math.gcd(half, WIDTH)

    def chunk(n: Array, sums: steps.Sums) -> steps.Sums:
        stage = keys.arrived(n)
        plgpu.barrier_wait(board.written.at[stage])
        mine = keys.tiles.at[stage, worker]
        keys.prepare(n, mine)
        fade = plgpu.load(board.fades.at[stage], layout=reduced, optimized=False)
        faded = [part * steps.by_head(fade, part.shape) for part in sums]
        added = steps.add_products(faded, board.queries.at[stage], mine, interpret)
        plgpu.barrier_arrive(keys.used.at[stage])
        return added

    start = tuple(steps.nothing_summed(heads, width) for _ in range(half // width))
    sums = jax.lax.fori_loop(0, keys.chunks, chunk, start)
    _end(board)
    top, total = (plgpu.load(board.stats.at[i], layout=reduced, optimized=False) for i in range(2))
    return top, total, sums


def _end(board: Board) -> None:
    """Nobody reads queries, weights or keys any more, and the statistics are there."""
    plgpu.barrier_arrive(board.ended)
    plgpu.barrier_wait(board.ended)
