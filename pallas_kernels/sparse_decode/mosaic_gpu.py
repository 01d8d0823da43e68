"""Hopper kernel: rows gathered by 16-byte asynchronous copies, two warpgroups of matrix products.

A block takes an even share of one row's keys, window and picks alike, in chunks of 64. One
warpgroup starts the copies, each row's 16-byte pieces straight to where the matrix instructions
read them, two chunks ahead; fp8 rows it decodes on the way. The products are those of
`dense_decode`, with or without a warpgroup that scores. The blocks that share a row are a cluster:
each combines some heads of all of them through shared memory, which spares a second kernel.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels.decode_hopper import cluster, copies, ptx, scorer, steps
from pallas_kernels.decode_hopper.steps import CHUNK, HALVES, LOG2E
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Fp8Rows, Rows

DIMS = cluster.DIMS
REGISTERS = 224  # of a thread that scores and sums: with those that copy, all there are
# In clusters of more than two: 32 clusters of 4 took 29.6 us, as they do not all run at once, 64
# clusters of 2 with twice the keys each 21.1 (H100, 32 rows of bfloat16).
CLUSTERED = 64
HIDDEN = -1e38  # score of no key: far below `NO_SCORE`, so that its weight is zero in any company


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that change the kernel's speed and, but for rounding, not its result."""

    splits: int  # blocks that share one row's keys
    cluster: bool = True  # which combines them; else a second kernel does
    parts: Any = jnp.bfloat16  # dtype of the sums between two kernels, or float32
    scorer: bool = False  # a warpgroup of its own computes scores, as `scorer` does


@dataclasses.dataclass(frozen=True)
class Call:
    """What a kernel is built for."""

    scale: float
    tiles: int  # of 64 heads
    per_row: int  # entries that each row of the batch has of its own; 0: they share a pool
    fused: bool  # combined by the cluster
    tuning: Tuning
    interpret: bool


def default_tuning(batch: int, heads: int, slots: int, picks: int, fp8: bool) -> Tuning:
    """Clusters that run at once, and of more blocks where a block's list is too long."""
    splits = 1 << (soft.default_splits(batch, heads, cluster.BLOCKS).bit_length() - 1)
    programs = batch * (heads // soft.HEADS)
    while splits > 2 and programs * splits > CLUSTERED:
        splits //= 2
    while splits < cluster.BLOCKS:
        if copies.fits(copies.most_chunks(slots, picks, splits), splits, fp8):
            break
        splits *= 2
    return Tuning(splits=splits)


def _require(q: Array, rows: Rows, slots: int, index: Array, group: int) -> None:
    dims = q.shape[2]
    if q.dtype != jnp.bfloat16 or not (isinstance(rows, Fp8Rows) or rows.dtype == jnp.bfloat16):
        raise Unsupported("q must be bfloat16, rows bfloat16 or fp8")
    if dims != DIMS:
        raise Unsupported(f"needs {DIMS} dims, got {dims}")
    if isinstance(rows, Fp8Rows) and (rows.rope.shape[-1], group) != (copies.ROPE, copies.GROUP):
        raise Unsupported(f"needs 64 rotary dims, groups of 64; got {rows.rope.shape[-1]}, {group}")
    if not slots or not index.shape[1] or not jax.tree.leaves(rows)[0].size:
        raise Unsupported("needs window slots and entries to pick from")


def _require_fit(tuning: Tuning, chunks: int, fp8: bool) -> None:
    if tuning.cluster:
        cluster.require(tuning.splits, DIMS)
    if not copies.fits(chunks, tuning.splits, fp8):
        raise Unsupported(f"needs shorter lists of picks, got {chunks} chunks of 64 to a block")


@functools.partial(jax.jit, static_argnames=("scale", "group", "own", "tuning", "interpret"))
def sparse_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B k"],
    valid: Bool[Array, "B k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    own: bool,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "B H c"]:
    """See the package's `sparse_decode`. Jitted, so that all layers lower one kernel once."""
    _require(q, rows, window.shape[1], index, group)
    given = q.shape
    q, sink = soft.pad_heads(q, sink, soft.HEADS)
    (batch, heads, dims), tiles = q.shape, q.shape[1] // soft.HEADS
    sizes = (window.shape[1], index.shape[1])
    tuning = tuning or default_tuning(batch, heads, *sizes, isinstance(rows, Fp8Rows))
    chunks = copies.most_chunks(*sizes, tuning.splits)
    _require_fit(tuning, chunks, isinstance(rows, Fp8Rows))
    planes = tuple(rows) if isinstance(rows, Fp8Rows) else (rows,)
    planes = tuple(x.reshape(-1, math.prod(x.shape[2:])) for x in planes)
    fused = tuning.cluster and tuning.splits > 1 and not interpret  # nothing interprets clusters
    per_row = soft.lead(rows)[1] if own else 0
    call = Call(scale, tiles, per_row, fused, tuning, interpret)
    kernel = _kernel(call, batch, chunks, len(planes))
    # A tile of heads is a row of its own.
    tiled, logits = q.reshape(-1, soft.HEADS, dims), sink.reshape(tiles, soft.HEADS)
    slots = window.reshape(-1, dims)
    out, stats = kernel(tiled, slots, window_count, index, valid, logits, *planes)
    if out.shape[1] > 1:
        top, total = stats[:, :, 0], stats[:, :, 1]
        logits = jnp.broadcast_to(logits, (batch, *logits.shape)).reshape(-1, soft.HEADS)
        out = soft.combine(soft.Part(top / LOG2E, total, out), logits, q.dtype)
    return out.reshape(q.shape)[:, : given[1]]


def _kernel(call: Call, batch: int, chunks: int, planes: int) -> Any:
    """The kernel; its results are the output, or parts and their tops and totals."""
    splits, programs = call.tuning.splits, batch * call.tiles
    parts = 1 if call.fused else splits
    dtype = call.tuning.parts if parts > 1 else jnp.bfloat16
    return plgpu.kernel(
        functools.partial(_body, call=call, planes=planes),
        out_type=(
            jax.ShapeDtypeStruct((programs, parts, soft.HEADS, DIMS), dtype),
            jax.ShapeDtypeStruct((programs, splits, 2, soft.HEADS), jnp.float32),
        ),
        **cluster.launch(programs, splits, call.fused),
        num_threads=scorer.WARPGROUPS if call.tuning.scorer else HALVES + 1,
        thread_name="warpgroup",
        scratch_types=[
            steps.tile((scorer.STAGES, HALVES, CHUNK, DIMS // HALVES)),
            *copies.scratch(chunks, scorer.STAGES, planes > 1, call.interpret),
            *(scorer.scratch(soft.HEADS, DIMS) if call.tuning.scorer else _scratch(splits)),
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            reduction_scratch_bytes=0,  # of reductions between warps: these are within one
        ),
        interpret=plgpu.InterpretGPUParams() if call.interpret else False,
        kernel_name="sparse_decode",
    )


def _scratch(splits: int) -> list[Any]:
    """Queries, barriers, and statistics for the other blocks, where nobody only scores."""
    return [
        steps.tile((HALVES, soft.HEADS, DIMS // HALVES)),
        plgpu.Barrier(num_arrivals=HALVES),
        plgpu.Barrier(num_arrivals=HALVES),
        *([plgpu.SMEM((2, soft.HEADS), jnp.float32)] if splits > 1 else []),
    ]


class Job(NamedTuple):
    """What a block's warpgroups work on."""

    call: Call
    copier: copies.Copier
    mine: copies.Share
    sink: Any  # [64]
    out: Any  # [64, 512], here or of all parts
    stats: Any  # [2, 64] of this block

    def masked(self, n: Array, dots: Array) -> Array:
        """Scores in base 2 of chunk n's products."""
        listed = self.copier.listed.at[n]
        number = plgpu.load(listed, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        hidden = jnp.where(number < 0, jnp.float32(HIDDEN), jnp.float32(0))
        scale = self.call.scale * LOG2E
        return dots * scale + jax.lax.broadcast_in_dim(hidden, dots.shape, (1,))


def _body(*refs: Any, call: Call, planes: int) -> None:
    """Refs: q, window, its counts, index, valid, sink [tiles, 64], the entries' planes and results,
    all in global memory; then what `_kernel` lists as scratch."""
    q, window, window_count, index, valid, sink = refs[:6]
    entries, out, stats = refs[6 : 6 + planes], refs[6 + planes], refs[7 + planes]
    keys_s, raw_s, listed, interpreted, used, *own = refs[8 + planes :]
    tuning, program = call.tuning, jax.lax.axis_index("row")
    row, tile = jax.lax.div(program, call.tiles), jax.lax.rem(program, call.tiles)
    copier = copies.Copier(
        window, entries, keys_s, raw_s, listed, interpreted, used, call.interpret
    )
    copier.begin(index, valid, row)
    slots = window.shape[0] // index.shape[0]
    recent = jnp.minimum(window_count[row], slots)
    split = jax.lax.axis_index("split")
    mine = copies.share(recent, index.shape[1], split, tuning.splits)
    places = out.at[program, 0 if call.fused else split], stats.at[program, split]
    job = Job(call, copier, mine, sink.at[tile], *places)

    def copy() -> None:
        copier.post(index, valid, row, mine, row * call.per_row)
        (copier.plain if planes == 1 else copier.fp8)(mine)

    if not tuning.scorer:
        _scored_twice(job, q.at[program], copy, *own)
        return
    coming = (copy, copier.arrived, used, job.masked, lambda n, tile: None)
    keys = scorer.Keys(keys_s, mine.chunks, *coming)
    place = scorer.Place(job.sink, job.out, job.stats, tuning.splits, call.fused)
    scorer.work(q.at[program], scorer.Board(*own), keys, place, call.interpret)


def _scored_twice(
    job: Job, q: Any, copy: Callable[[], None], q_s: Any, q_ready: Any, both: Any, *maybe: Any
) -> None:
    """Two warpgroups with all scores and half of the dims each, and one that copies."""
    worker, stats_s = jax.lax.axis_index("warpgroup"), maybe[0] if maybe else None
    call, tuning = job.call, job.call.tuning

    @pl.when(worker == HALVES)
    def _copies() -> None:
        if not call.interpret:
            plgpu.set_max_registers(copies.REGISTERS, action="decrease")
        for i in range(HALVES):
            columns = pl.ds(i * DIMS // HALVES, DIMS // HALVES)
            plgpu.copy_gmem_to_smem(q.at[:, columns], q_s.at[i], q_ready)
        copy()
        if call.fused:
            ptx.run(cluster.met(), ())

    @pl.when(worker < HALVES)
    def _products() -> None:
        if not call.interpret:
            plgpu.set_max_registers(REGISTERS, action="increase")
        plgpu.barrier_wait(q_ready)
        step = functools.partial(_chunk, q_s, job)
        start = steps.nothing(soft.HEADS, DIMS // HALVES)
        state = jax.lax.fori_loop(0, job.mine.chunks, step, start)
        if call.fused:
            _share_parts(state, q_s, stats_s, both)
            arrays = (q_s, stats_s, job.sink, job.out)
            ptx.run(cluster.combined(tuning.splits), arrays, tiles=1)
        else:
            whole = tuning.splits == 1
            steps.store(state, job.sink, job.out, job.stats, q_s, stats_s, both, whole)


def _chunk(
    q_s: Any, job: Job, n: Array, state: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array]:
    """Chunk n joins top, total and sums: this warpgroup's half of the dims."""
    (top, total, sums), worker = state, jax.lax.axis_index("warpgroup")
    copier, interpret = job.copier, job.call.interpret
    stage = copier.arrived(n)
    keys = copier.keys.at[stage]
    dots = steps.product(q_s, keys, (q_s.shape[1], CHUNK), interpret)
    weights, fade, top, total = steps.fold(job.masked(n, dots), top, total)
    sums = sums * steps.by_head(fade, sums.shape)
    sums = steps.add_product(sums, weights, keys.at[worker], interpret)
    plgpu.barrier_arrive(copier.used.at[stage])
    return top, total, sums


def _share_parts(state: tuple[Array, Array, Array], q_s: Any, stats_s: Any, both: Any) -> None:
    """Leaves averages over this block's keys in `q_s`, and tops and totals, for the cluster."""
    (top, total, sums), worker = state, jax.lax.axis_index("warpgroup")
    plgpu.barrier_arrive(both)
    plgpu.barrier_wait(both)  # neither reads q_s any more
    steps.put_average(total, (sums,), q_s)

    @pl.when(worker == 0)
    def _() -> None:
        stats_s[0] = top
        stats_s[1] = total
