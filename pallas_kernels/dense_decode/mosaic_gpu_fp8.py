"""Hopper kernel for fp8 rows: codes by TMA, decoded by the warpgroups that use them.

Each consumer decodes its half of a chunk's dims into a bfloat16 tile that both read. The window's
few chunks are bfloat16 already: the consumers fetch them into that tile themselves, and wait.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.decode_hopper import steps
from pallas_kernels.decode_hopper.steps import CHUNK, HALVES

GROUP = 64  # dims of one scale, and rotary dims
SCALES = 16  # bytes fetched of a row's scales: the shortest copy there is
LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X  # of decoding: reads bytes and writes bfloat16 fast


def scratch(dims: int, stages: int) -> list[Any]:
    """Decoded keys; of each stage codes, scales and rotary dims; barriers."""
    groups = dims // GROUP - 1
    return [
        steps.tile((HALVES, CHUNK, dims // HALVES)),
        steps.tile((stages, groups, CHUNK, GROUP), jnp.uint8),
        plgpu.SMEM((stages, CHUNK, SCALES), jnp.uint8),
        steps.tile((stages, CHUNK, GROUP)),
        plgpu.Barrier(num_arrivals=groups + 2, num_barriers=stages),
        plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
        plgpu.Barrier(num_barriers=HALVES),
        plgpu.Barrier(num_arrivals=HALVES),
        plgpu.Barrier(num_arrivals=HALVES),
    ]


def _e8m0(byte: Array) -> Array:
    """Scale bytes -> float32."""
    wide = byte.astype(jnp.uint32)
    bits = jnp.where(wide == 0, jnp.uint32(1 << 22), wide << 23)  # 2^-127 is subnormal
    bits = jnp.where(wide == 255, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _decode(codes: Any, scales: Array, group: Array, to: Any) -> None:
    """Codes [CHUNK, GROUP] of one group, times its scale of each row, as bfloat16."""
    values = jax.lax.bitcast_convert_type(plgpu.load(codes, layout=LAYOUT), jnp.float8_e4m3fn)
    values = values.astype(jnp.float16).astype(jnp.float32)  # Hopper has no shorter way
    which = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=LAYOUT)
    scale = jnp.where(which == group, scales, jnp.zeros_like(scales)).sum(axis=1)
    to[...] = (values * jax.lax.broadcast_in_dim(scale, values.shape, (0,))).astype(jnp.bfloat16)


def body(
    q: Any, window: Any, window_count: Any, count: Any, sink: Any, nope: Any, rope: Any, out: Any,
    stats: Any, q_s: Any, stats_s: Any, q_ready: Any, both: Any, keys_s: Any, codes_s: Any,
    scales_s: Any, rope_s: Any, ready: Any, used: Any, fetched: Any, written: Any, read: Any,
    *, scale: float, splits: int, stages: int, interpret: bool,
) -> None:  # fmt: skip
    """Refs up to `stats` are in global memory; `nope` is [B, N, 8, 64], the last group scales."""
    row, split = jax.lax.axis_index("row"), jax.lax.axis_index("split")
    worker = jax.lax.axis_index("warpgroup")
    (heads, half), groups = q_s.shape[1:], codes_s.shape[1]
    recent = jnp.minimum(window_count[row], window.shape[1])
    mine = steps.share(recent, jnp.minimum(count[row], nope.shape[1]), split, splits)
    begin = jnp.maximum(mine.first, mine.recent_chunks)  # the first chunk of entries

    @pl.when(worker == HALVES)
    def _copies() -> None:
        if not interpret:
            plgpu.set_max_registers(40, action="decrease")
        for i in range(HALVES):
            plgpu.copy_gmem_to_smem(q.at[row, :, pl.ds(i * half, half)], q_s.at[i], q_ready)

        def chunk(i: Array, _: None) -> None:
            stage = jax.lax.rem(i - begin, stages)

            @pl.when(i - begin >= stages)
            def _() -> None:
                plgpu.barrier_wait(used.at[stage])

            place = pl.ds(pl.multiple_of((i - mine.recent_chunks) * CHUNK, CHUNK), CHUNK)
            for g in range(groups):
                codes = nope.at[row, place, g]
                plgpu.copy_gmem_to_smem(codes, codes_s.at[stage, g], ready.at[stage])
            scales = nope.at[row, place, groups, pl.ds(0, SCALES)]
            plgpu.copy_gmem_to_smem(scales, scales_s.at[stage], ready.at[stage])
            plgpu.copy_gmem_to_smem(rope.at[row, place], rope_s.at[stage], ready.at[stage])

        jax.lax.fori_loop(begin, mine.last, chunk, None)

    def fetch(i: Array) -> None:
        """This warpgroup's half of a chunk of the window."""
        place = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
        columns = pl.ds(pl.multiple_of(worker * half, half), half)
        source = window.at[row, place, columns]
        plgpu.copy_gmem_to_smem(source, keys_s.at[worker], fetched.at[worker])
        plgpu.barrier_wait(fetched.at[worker])

    def decode(i: Array) -> None:
        """This warpgroup's half of a chunk of entries: four groups, or three and rotary dims."""
        stage = jax.lax.rem(i - begin, stages)
        plgpu.barrier_wait(ready.at[stage])
        scales = _e8m0(plgpu.load(scales_s.at[stage], layout=LAYOUT, optimized=False))
        each = half // GROUP
        for j in range(each):
            group, to = worker * each + j, keys_s.at[worker, :, pl.ds(j * GROUP, GROUP)]

            def codes(group: Array = group, to: Any = to) -> None:
                _decode(codes_s.at[stage, group], scales, group, to)

            if j < each - 1:
                codes()
                continue
            pl.when(worker == 0)(codes)

            @pl.when(worker == 1)
            def _(to: Any = to) -> None:
                to[...] = plgpu.layout_cast(rope_s[stage], plgpu.Layout.WGMMA)

        plgpu.barrier_arrive(used.at[stage])

    @pl.when(worker < HALVES)
    def _products() -> None:
        if not interpret:
            plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(q_ready)
        keys = keys_s.at[worker]

        def chunk(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, sums = carry
            limit = mine.limit(i)

            @pl.when(i > mine.first)
            def _() -> None:
                plgpu.barrier_wait(read)  # the other's scores have read this half

            pl.when(i < mine.recent_chunks)(lambda: fetch(i))
            pl.when(i >= mine.recent_chunks)(lambda: decode(i))
            pl.when(limit < CHUNK)(lambda: steps.clear(keys, limit))
            plgpu.commit_smem()
            plgpu.barrier_arrive(written)
            plgpu.barrier_wait(written)
            scores = steps.scores(q_s, keys_s, limit, scale, interpret)
            plgpu.barrier_arrive(read)
            weights, fade, top, total = steps.fold(scores, top, total)
            sums = sums * steps.by_head(fade, sums.shape)
            return top, total, steps.add_product(sums, weights, keys, interpret)

        start = steps.nothing(heads, half)
        state = jax.lax.fori_loop(mine.first, mine.last, chunk, start)
        places = out.at[row, split], stats.at[row, split]
        steps.store(state, sink, *places, q_s, stats_s, both, splits == 1)
