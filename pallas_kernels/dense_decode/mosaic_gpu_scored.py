"""Hopper kernel with a warpgroup of its own for scores, as `decode_hopper.scorer` describes it.

Plain rows come by TMA; of fp8 rows the copying warpgroup fetches codes, and decodes them on the
way. Blocks that share a row may be a cluster, which combines them through shared memory.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import split_softmax as soft
from pallas_kernels.decode_hopper import cluster, copies, scorer, steps
from pallas_kernels.decode_hopper.scorer import STAGES
from pallas_kernels.decode_hopper.steps import CHUNK, HALVES, Tuning
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Fp8Rows, Rows


class Call(NamedTuple):
    """What a kernel is built for."""

    scale: float
    tuning: Tuning
    fp8: bool
    interpret: bool

    @property
    def fused(self) -> bool:
        """Whether the blocks of a row combine what they have. Nothing interprets clusters."""
        return self.tuning.cluster and self.tuning.splits > 1 and not self.interpret


def attend(
    call: Call,
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Array,
    rows: Rows,
    count: Array,
    sink: Float[Array, " H"],
) -> tuple[Array, Array]:
    """The output [B, 1, H, c]; or parts [B, splits, H, c], tops and totals [B, splits, 2, H]."""
    (batch, heads, dims), entries, tuning = q.shape, soft.lead(rows)[1], call.tuning
    if tuning.stages != STAGES:
        raise Unsupported(f"with a scorer there are {STAGES} stages, got {tuning.stages}")
    if tuning.cluster:
        cluster.require(tuning.splits, dims)
    parts = 1 if call.fused else tuning.splits
    dtype = tuning.parts if parts > 1 else q.dtype
    if isinstance(rows, Fp8Rows):
        planes = (rows.nope.reshape(-1, dims), rows.rope.reshape(-1, rows.rope.shape[-1]))
        window = window.reshape(-1, dims)
        source = copies.scratch(2, STAGES, True, call.interpret)
    else:
        planes = (rows.reshape(batch, entries, dims),)
        source = [plgpu.Barrier(num_arrivals=HALVES, num_barriers=STAGES) for _ in range(2)]
    kernel = plgpu.kernel(
        functools.partial(_body, call=call, planes=len(planes), entries=entries),
        out_type=(
            jax.ShapeDtypeStruct((batch, parts, heads, dims), dtype),
            jax.ShapeDtypeStruct((batch, tuning.splits, 2, heads), jnp.float32),
        ),
        **cluster.launch(batch, tuning.splits, call.fused),
        num_threads=scorer.WARPGROUPS,
        thread_name="warpgroup",
        scratch_types=[
            steps.tile((STAGES, HALVES, CHUNK, dims // HALVES)),
            *scorer.scratch(heads, dims),
            *source,
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            approx_math=True,
            reduction_scratch_bytes=0,  # of reductions between warps: these are within one
        ),
        interpret=plgpu.InterpretGPUParams() if call.interpret else False,
        kernel_name="dense_decode",
    )
    return kernel(q, window, window_count, count, sink, *planes)


def _body(*refs: Any, call: Call, planes: int, entries: int) -> None:
    """Refs: q, window, its counts, counts, sink, the entries' planes and results, all in global
    memory; then what `attend` lists as scratch."""
    q, window, window_count, count, sink = refs[:5]
    rows, (out, stats) = refs[5 : 5 + planes], refs[5 + planes : 7 + planes]
    tiles, *rest = refs[7 + planes :]
    fields = len(scorer.Board._fields)
    board, source = scorer.Board(*rest[:fields]), rest[fields:]
    row, split = jax.lax.axis_index("row"), jax.lax.axis_index("split")
    slots = window.shape[0] // q.shape[0] if call.fp8 else window.shape[1]
    recent = jnp.minimum(window_count[row], slots)
    mine = steps.share(recent, jnp.minimum(count[row], entries), split, call.tuning.splits)
    limit = lambda n: mine.limit(mine.first + n)  # noqa: E731

    # What lies beyond the count may be NaN, which a weight of zero does not cancel.
    def prepare(n: Array, tile: Any) -> None:
        pl.when(limit(n) < CHUNK)(lambda: steps.clear(tile, limit(n)))

    def masked(n: Array, dots: Array) -> Array:
        return steps.masked(dots, limit(n), call.scale)

    if call.fp8:
        first = functools.partial(_first, mine, row * slots, row * entries)
        raw, listed, interpreted, used = source
        copier = copies.RunCopier(
            window, rows, tiles, raw, listed, interpreted, used, call.interpret, first
        )
        copier.make_barriers()
        coming = (lambda: copier.fp8(mine), copier.arrived, used)
    else:
        ready, used = source

        def arrived(n: Array) -> Array:
            stage = jax.lax.rem(n, STAGES)
            plgpu.barrier_wait(ready.at[stage])
            return stage

        own = (window.at[row], rows[0].at[row])
        coming = (lambda: steps.fetch(mine, *own, tiles, ready, used), arrived, used)
    keys = scorer.Keys(tiles, mine.chunks, *coming, masked, prepare)
    part = out.at[row, 0 if call.fused else split]
    place = scorer.Place(sink, part, stats.at[row, split], call.tuning.splits, call.fused)
    scorer.work(q.at[row], board, keys, place, call.interpret)


def _first(mine: steps.Share, slot: Array, entry: Array, n: Array) -> Array:
    """The number of the n-th chunk's first row: of the window's slots, or of the entries; `slot`
    and `entry` are the first ones of this row of the batch."""
    i = mine.first + n
    of_entries = entry + (i - mine.recent_chunks) * CHUNK
    return jnp.where(n < mine.window_chunks, slot + i * CHUNK, of_entries)
