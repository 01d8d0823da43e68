"""Hopper kernel for fp8 rows: codes by TMA, decoded by a warpgroup of their own.

The warpgroup that issues copies decodes a chunk into the bfloat16 tiles that the other two read
while these are at the chunk before, so conversions and products overlap. Codes come one group of
dims at a time, in a ring: a slot is asked for again as soon as it has been read. The window's few
chunks are bfloat16 already, and go into the tiles as they are.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.dense_decode import mosaic_gpu_steps as steps
from pallas_kernels.dense_decode.mosaic_gpu_steps import CHUNK, HALVES

GROUP = 64  # dims of one scale, and rotary dims
SCALES = 16  # bytes fetched of a row's scales: the shortest copy there is
SLOTS = 5  # groups of codes in shared memory: what two chunks of decoded keys leave room for
EACH = 4  # groups whose scales one 32-bit word holds
LAYOUT = plgpu.Layout.WGMMA_UPCAST_2X  # of decoding: reads bytes and writes bfloat16 fast
REGISTERS = (72, 216)  # of a thread that decodes, and of one that multiplies


def scratch(dims: int, stages: int) -> list[Any]:
    """Decoded keys, whether they are there, whether they are used; codes, scales and rotary dims
    with their barriers."""
    return [
        steps.tile((stages, HALVES, CHUNK, dims // HALVES)),
        plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
        plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
        steps.tile((SLOTS, CHUNK, GROUP), jnp.uint8),
        plgpu.SMEM((CHUNK, SCALES), jnp.uint8),
        steps.tile((CHUNK, GROUP)),
        plgpu.Barrier(num_barriers=SLOTS),
        plgpu.Barrier(),
        plgpu.Barrier(),
    ]


def _e8m0(byte: Array) -> Array:
    """Scale bytes -> float32."""
    wide = byte.astype(jnp.uint32)
    bits = jnp.where(wide == 0, jnp.uint32(1 << 22), wide << 23)  # 2^-127 is subnormal
    bits = jnp.where(wide == 255, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _words(scales: Array, words: int) -> list[Array]:
    """The first bytes [CHUNK, SCALES] of a row, EACH in a uint32 [CHUNK]: sums over columns cost
    messages between threads, so there is one for so many groups."""
    column = plgpu.broadcasted_iota(jnp.int32, scales.shape, 1, layout=LAYOUT)
    shift = (column & (EACH - 1)).astype(jnp.uint32) * 8
    part, none = scales.astype(jnp.uint32) << shift, jnp.zeros(scales.shape, jnp.uint32)
    none = plgpu.layout_cast(none, LAYOUT)
    return [jnp.where(column // EACH == i, part, none).sum(axis=1) for i in range(words)]


def _decode(codes: Array, byte: Array, to: Any) -> None:
    """Codes [CHUNK, GROUP] of one group, times its scale of each row, as bfloat16: exact, so scales
    are multiplied two at a time, after and not before the rounding."""
    values = jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    # Hopper has no shorter way.
    values = values.astype(jnp.float16).astype(jnp.float32).astype(jnp.bfloat16)
    scale = _e8m0(byte).astype(jnp.bfloat16)
    to[...] = values * jax.lax.broadcast_in_dim(scale, values.shape, (0,))


class _Codes:
    """A row's chunks of entries on their way into the tiles."""

    def __init__(
        self, nope: Any, rope: Any, slots: Any, scales: Any, rotary: Any,
        landed: Any, scales_landed: Any, rotary_landed: Any, begin: Array, last: Array, skip: Array,
    ):  # fmt: skip
        """`nope` [N, 8, 64] and `rope` [N, 64] are in global memory; chunks `begin` to `last`, of
        which entries are those from `skip` on."""
        self.nope, self.rope, self.slots, self.scales, self.rotary = (
            nope,
            rope,
            slots,
            scales,
            rotary,
        )
        self.landed, self.scales_landed, self.rotary_landed = landed, scales_landed, rotary_landed
        self.begin, self.last, self.skip = begin, last, skip
        self.groups = nope.shape[1] - 1  # the last holds the scales and no codes

    def _place(self, i: Array) -> Any:
        return pl.ds(pl.multiple_of((i - self.skip) * CHUNK, CHUNK), CHUNK)

    def ask(self, i: Array, group: int, slot: Any) -> None:
        """Asks for the codes of a group, which may be one of the next chunk."""
        i, group = i + group // self.groups, group % self.groups

        @pl.when(i < self.last)
        def _() -> None:
            codes = self.nope.at[self._place(i), group]
            plgpu.copy_gmem_to_smem(codes, self.slots.at[slot], self.landed.at[slot])

    def ask_rest(self, i: Array) -> None:
        """Asks for scales and rotary dims of a chunk."""

        @pl.when(i < self.last)
        def _() -> None:
            scales = self.nope.at[self._place(i), self.groups, pl.ds(0, SCALES)]
            plgpu.copy_gmem_to_smem(scales, self.scales, self.scales_landed)
            plgpu.copy_gmem_to_smem(self.rope.at[self._place(i)], self.rotary, self.rotary_landed)

    def decode(self, i: Array, to: Any, ready: Any) -> None:
        """Chunk i into the tiles `to` [2, CHUNK, c / 2], each half announced when it is there."""
        each = to.shape[2] // GROUP
        plgpu.barrier_wait(self.scales_landed)
        scales = plgpu.load(self.scales, layout=LAYOUT, optimized=False)
        words = _words(scales, -(-self.groups // EACH))
        plgpu.barrier_wait(self.rotary_landed)
        rotary = plgpu.layout_cast(self.rotary[...], plgpu.Layout.WGMMA)
        self.ask_rest(i + 1)
        to.at[HALVES - 1, :, pl.ds((each - 1) * GROUP, GROUP)][...] = rotary
        first = jax.lax.rem((i - self.begin) * self.groups, SLOTS)
        for group in range(self.groups):
            half, j = divmod(group, each)
            slot = first + group % SLOTS
            slot = jnp.where(slot < SLOTS, slot, slot - SLOTS)
            plgpu.barrier_wait(self.landed.at[slot])
            byte = (words[group // EACH] >> jnp.uint32(8 * (group % EACH))) & jnp.uint32(0xFF)
            codes = plgpu.load(self.slots.at[slot], layout=LAYOUT)
            self.ask(i, group + SLOTS, slot)
            _decode(codes, byte, to.at[half, :, pl.ds(j * GROUP, GROUP)])
            if j == each - 1 or group == self.groups - 1:
                plgpu.commit_smem()
                plgpu.barrier_arrive(ready)


def body(
    q: Any, window: Any, window_count: Any, count: Any, sink: Any, nope: Any, rope: Any, out: Any,
    stats: Any, q_s: Any, stats_s: Any, q_ready: Any, both: Any, keys_s: Any, ready: Any,
    used: Any, codes_s: Any, scales_s: Any, rotary_s: Any, landed: Any, scales_landed: Any,
    rotary_landed: Any, *, scale: float, splits: int, stages: int, interpret: bool,
) -> None:  # fmt: skip
    """Refs up to `stats` are in global memory; `nope` is [B, N, 8, 64], the last group scales."""
    row, split = jax.lax.axis_index("row"), jax.lax.axis_index("split")
    worker, half = jax.lax.axis_index("warpgroup"), q_s.shape[2]
    recent = jnp.minimum(window_count[row], window.shape[1])
    mine = steps.share(recent, jnp.minimum(count[row], nope.shape[1]), split, splits)
    columns = [pl.ds(i * half, half) for i in range(HALVES)]

    @pl.when(worker == HALVES)
    def _copies() -> None:
        if not interpret:
            plgpu.set_max_registers(REGISTERS[0], action="decrease")
        begin = jnp.maximum(mine.first, mine.recent_chunks)  # the first chunk of entries
        entries = _Codes(
            nope.at[row], rope.at[row], codes_s, scales_s, rotary_s, landed, scales_landed,
            rotary_landed, begin, mine.last, mine.recent_chunks,
        )  # fmt: skip
        for i in range(HALVES):
            plgpu.copy_gmem_to_smem(q.at[row, :, columns[i]], q_s.at[i], q_ready)
        entries.ask_rest(begin)
        for group in range(SLOTS):
            entries.ask(begin, group, group)

        def chunk(i: Array, _: None) -> None:
            stage = jax.lax.rem(i - mine.first, stages)

            @pl.when(i - mine.first >= stages)
            def _() -> None:
                plgpu.barrier_wait(used.at[stage])

            @pl.when(i < mine.recent_chunks)
            def _() -> None:
                place = pl.ds(pl.multiple_of(i * CHUNK, CHUNK), CHUNK)
                for j in range(HALVES):
                    source, to = window.at[row, place, columns[j]], keys_s.at[stage, j]
                    plgpu.copy_gmem_to_smem(source, to, ready.at[stage])

            @pl.when(i >= mine.recent_chunks)
            def _() -> None:
                entries.decode(i, keys_s.at[stage], ready.at[stage])

        jax.lax.fori_loop(mine.first, mine.last, chunk, None)

    @pl.when(worker < HALVES)
    def _products() -> None:
        if not interpret:
            plgpu.set_max_registers(REGISTERS[1], action="increase")
        plgpu.barrier_wait(q_ready)
        state = steps.attend(mine, q_s, keys_s, ready, used, scale, interpret)
        places = out.at[row, split], stats.at[row, split]
        steps.store(state, sink, *places, q_s, stats_s, both, splits == 1)
