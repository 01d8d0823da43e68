"""Hopper kernel: tiles of contiguous entries by TMA, two warpgroups of tensor-core products.

A block takes a contiguous share of one row's chunks of 64 keys: first those of the window, then the
entries. One warpgroup issues the copies. The other two each compute all scores (a third more
products than needed, which bandwidth hides); `mosaic_gpu_scored` has a fourth one for them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels.decode_hopper import steps
from pallas_kernels.decode_hopper.steps import CHUNK, HALVES, LOG2E, Tuning
from pallas_kernels.dense_decode import mosaic_gpu_fp8 as fp8
from pallas_kernels.dense_decode import mosaic_gpu_scored as scored
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Fp8Rows, Rows

FP8_SIZES = (512, 64, 64)  # dims, rotary dims and group that the fp8 kernel is written for


def _require(q: Array, window: Array, rows: Rows, group: int) -> None:
    (_, heads, dims), slots, entries = q.shape, window.shape[1], soft.lead(rows)[1]
    if q.dtype != jnp.bfloat16 or not (isinstance(rows, Fp8Rows) or rows.dtype == jnp.bfloat16):
        raise Unsupported("q must be bfloat16, rows bfloat16 or fp8")
    if heads > soft.HEADS or dims % 128 or dims > 512:
        raise Unsupported(f"needs up to 64 heads, dims of 128 times 1 to 4; got {heads}, {dims}")
    if isinstance(rows, Fp8Rows) and (dims, rows.rope.shape[-1], group) != FP8_SIZES:
        got = (dims, rows.rope.shape[-1], group)
        raise Unsupported(f"fp8 rows must have (dims, rope, group) {FP8_SIZES}, got {got}")
    if slots % CHUNK or entries % CHUNK or not slots or not entries:
        raise Unsupported(f"needs multiples of {CHUNK}, got {slots} slots, {entries} entries")


@functools.partial(jax.jit, static_argnames=("scale", "group", "tuning", "interpret"))
def dense_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    count: Int[Array, " B"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> Float[Array, "B H c"]:
    """See the package's `dense_decode`. Jitted, so that all layers lower one kernel once."""
    _require(q, window, rows, group)
    given = q.shape
    q, sink = soft.pad_heads(q, sink, soft.HEADS)
    (batch, heads, dims), entries = q.shape, soft.lead(rows)[1]
    chunks = (window.shape[1] + entries) // CHUNK  # a block has two or more
    tuning = tuning or Tuning(splits=soft.default_splits(batch, heads, max(1, chunks // 2)))
    if tuning.scorer:
        call = scored.Call(scale, tuning, isinstance(rows, Fp8Rows), interpret)
        found = scored.attend(call, q, window, window_count, rows, count, sink)
        return _whole(*found, sink, q.dtype)[:, : given[1]]
    if tuning.cluster:
        raise Unsupported("clusters need a warpgroup that scores")
    if isinstance(rows, Fp8Rows):
        # In groups of 64, one of a scale each; the last holds the scales and no codes.
        planes = (rows.nope.reshape(batch, entries, dims // 64, 64), rows.rope)
        body, scratch = fp8.body, fp8.scratch(dims, tuning.stages)
    else:
        planes = (rows.reshape(batch, entries, dims),)
        body, scratch = _body, _scratch(dims, tuning.stages)
    sizes = {"scale": scale, "splits": tuning.splits, "stages": tuning.stages}
    kernel = plgpu.kernel(
        functools.partial(body, **sizes, interpret=interpret),
        out_type=(
            jax.ShapeDtypeStruct(
                (batch, tuning.splits, heads, dims), tuning.parts if tuning.splits > 1 else q.dtype
            ),
            jax.ShapeDtypeStruct((batch, tuning.splits, 2, heads), jnp.float32),
        ),
        grid=(batch, tuning.splits),
        grid_names=("row", "split"),
        num_threads=HALVES + 1,
        thread_name="warpgroup",
        scratch_types=[
            steps.tile((HALVES, heads, dims // HALVES)),
            plgpu.SMEM((2, heads), jnp.float32),
            plgpu.Barrier(num_arrivals=HALVES),
            plgpu.Barrier(num_arrivals=HALVES),
            *scratch,
        ],
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="dense_decode",
    )
    out, stats = kernel(q, window, window_count, count, sink, *planes)
    return _whole(out, stats, sink, q.dtype)[:, : given[1]]


def _whole(out: Array, stats: Array, sink: Array, dtype: Any) -> Array:
    """The output of parts, or of the one that is the output."""
    if out.shape[1] == 1:
        return out[:, 0]
    return soft.combine(soft.Part(stats[:, :, 0] / LOG2E, stats[:, :, 1], out), sink, dtype)


def _scratch(dims: int, stages: int) -> list[Any]:
    return [
        steps.tile((stages, HALVES, CHUNK, dims // HALVES)),
        plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
        plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
    ]


def _body(
    q: Any, window: Any, window_count: Any, count: Any, sink: Any, rows: Any, out: Any, stats: Any,
    q_s: Any, stats_s: Any, q_ready: Any, both: Any, keys_s: Any, ready: Any, used: Any,
    *, scale: float, splits: int, stages: int, interpret: bool,
) -> None:  # fmt: skip
    """All refs but the last seven are in global memory; `keys_s` is [stages, 2, 64, c / 2]."""
    row, split = jax.lax.axis_index("row"), jax.lax.axis_index("split")
    worker = jax.lax.axis_index("warpgroup")
    half = q_s.shape[2]
    recent = jnp.minimum(window_count[row], window.shape[1])
    mine = steps.share(recent, jnp.minimum(count[row], rows.shape[1]), split, splits)
    columns = [pl.ds(i * half, half) for i in range(HALVES)]

    @pl.when(worker == HALVES)
    def _copies() -> None:
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")
        for i in range(HALVES):
            plgpu.copy_gmem_to_smem(q.at[row, :, columns[i]], q_s.at[i], q_ready)

        steps.fetch(mine, window.at[row], rows.at[row], keys_s, ready, used)

    @pl.when(worker < HALVES)
    def _products() -> None:
        if not interpret:
            plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(q_ready)
        state = steps.attend(mine, q_s, keys_s, ready, used, scale, interpret)
        places = out.at[row, split], stats.at[row, split]
        steps.store(state, sink, *places, q_s, stats_s, both, splits == 1)
