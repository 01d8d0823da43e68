"""The warpgroup that copies rows: lists a block's keys, then copies them chunk by chunk.

What Pallas has no words for are the texts of `ptx`. Nothing interprets those, so in
interpret mode plain indexing stands in for them here, between the same barriers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.decode_hopper import ptx, steps
from pallas_kernels.decode_hopper.steps import CHUNK, HALVES
from pallas_kernels.rows import LANES, Fp8Rows, decode

REGISTERS = 56  # of a thread that copies
ROPE = GROUP = 64  # rotary dims of fp8 rows, dims of one scale


class Share(NamedTuple):
    """A block's share of one row's keys, in chunks: first window slots, then picks."""

    slot: Array  # the first
    slots: Array
    pick: Array  # the first
    picks: Array

    @property
    def window_chunks(self) -> Array:
        """Chunks of window slots."""
        return (self.slots + CHUNK - 1) // CHUNK

    @property
    def chunks(self) -> Array:
        """All chunks."""
        return self.window_chunks + (self.picks + CHUNK - 1) // CHUNK


def share(recent: Array, picks: int, split: Array, splits: int) -> Share:
    """Even shares of `recent` slots and all picks."""
    total = recent + picks
    each = (total + splits - 1) // splits
    first = jnp.minimum(split * each, total)
    last = jnp.minimum(first + each, total)
    slot, pick = jnp.minimum(first, recent), jnp.maximum(first - recent, 0)
    return Share(slot, jnp.minimum(last, recent) - slot, pick, jnp.maximum(last - recent, 0) - pick)


def most_chunks(slots: int, picks: int, splits: int) -> int:
    """Chunks of a share at most: of both kinds one may be short."""
    if splits == 1:
        return -(-slots // CHUNK) + -(-picks // CHUNK)
    return -(-(slots + picks) // splits - 2) // CHUNK + 2


def fits(chunks: int, splits: int, fp8: bool) -> bool:
    """Whether shared memory has room for a share's list: 31 KiB are left, 3 next to codes, of
    which parts' statistics take 1. (A scorer's statistics and fades take 2 of 2 more.)"""
    return -(-(chunks + 1) * CHUNK * 4 // 1024) + (splits > 1) <= (3 if fp8 else 31)


def scratch(chunks: int, stages: int, fp8: bool, interpret: bool) -> list[Any]:
    """What follows `keys` in a `Copier`. The list has one more row, whose words are the barriers
    of chunks that are there: Pallas lets no text use its own."""
    return [
        plgpu.SMEM((ptx.RAW if fp8 else LANES,), jnp.uint8),
        plgpu.SMEM((chunks + 1, CHUNK), jnp.int32),
        plgpu.Barrier(num_barriers=stages if interpret else 1),
        plgpu.Barrier(num_arrivals=HALVES, num_barriers=stages),
    ]


@dataclasses.dataclass(frozen=True)
class Copier:
    """Refs of the copying warpgroup. `listed` [chunks, 64] has rows' numbers, -1 for none."""

    window: Any  # [B * W, 512]
    planes: Sequence[Any]  # [M, 512] in bfloat16; or [M, 512] in bytes and [M, 64]
    keys: Any  # [stages, 2, 64, 256]
    raw: Any  # codes on their way
    listed: Any
    interpreted: Any  # barriers of chunks that are there, in interpret mode
    used: Any
    interpret: bool

    @property
    def chunks(self) -> int:
        """Chunks that the list has room for."""
        return self.listed.shape[0] - 1

    def named(self, n: Array) -> Any:
        """Chunk n's part of the list."""
        return self.listed.at[n]

    def name(self, n: Array) -> None:
        """Sees to it that chunk n's part of the list is there, before it is first used."""

    def _ready(self, stage: Array) -> Any:
        return self.listed.at[self.chunks, pl.ds(pl.multiple_of(2 * stage, 2), 2)]

    def begin(self, index: Any, valid: Any, row: Array) -> None:
        """Makes the barriers; all threads of the block."""
        if not self.interpret:
            ptx.run(ptx.nearer(index.shape[1]), (index, valid), (row,))
            self.make_barriers()

    def make_barriers(self) -> None:
        """Of chunks that are there; all threads of the block."""
        if not self.interpret:
            ptx.run(ptx.barriers(self.keys.shape[0]), (self.listed.at[self.chunks],))

    def arrived(self, n: Array) -> Array:
        """Chunk n's place, once it is there."""
        stages = self.keys.shape[0]
        stage = jax.lax.rem(n, stages)
        if self.interpret:
            plgpu.barrier_wait(self.interpreted.at[stage])
        else:
            phase = jax.lax.rem(jax.lax.div(n, stages), 2)
            ptx.run(ptx.waits(), (self._ready(stage),), (phase,))
        return stage

    def post(self, index: Any, valid: Any, row: Array, mine: Share, first: Array) -> None:
        """Writes the list. `first` is the number of the entry that index 0 names."""
        slots, (_, picks) = self.window.shape[0] // index.shape[0], index.shape
        window_keys, slot = mine.window_chunks * CHUNK, row * slots + mine.slot
        if not self.interpret:
            at = (window_keys, slot, mine.slots, row * picks + mine.pick, mine.picks, first)
            ptx.run(ptx.posted(self.chunks * CHUNK), (self.listed, index, valid), at)
            plgpu.commit_smem()  # the warpgroup's threads read one another's
            return
        key = jnp.arange(self.chunks * CHUNK)
        pick = key - window_keys
        there = (pick >= 0) & (pick < mine.picks)
        at = jnp.where(there, pick + mine.pick, 0)
        there &= valid[row][at]
        numbers = jnp.where(there, index[row][at] + first, -1)
        numbers = jnp.where(key < mine.slots, slot + key, numbers)
        self.listed[: self.chunks] = numbers.astype(jnp.int32).reshape(-1, CHUNK)

    def _free(self, n: Array) -> Array:
        """Chunk n's place, once the chunk that was there is used."""
        stages = self.keys.shape[0]
        stage = jax.lax.rem(n, stages)
        pl.when(n >= stages)(lambda: plgpu.barrier_wait(self.used.at[stage]))
        return stage

    def _interpreted(self, n: Array, stage: Array, read: Callable[[Array], Array]) -> None:
        number = self.named(n)[...]
        rows = jnp.where(number[:, None] >= 0, read(jnp.maximum(number, 0)), 0)
        self.keys[stage] = rows.reshape(CHUNK, HALVES, -1).swapaxes(0, 1).astype(self.keys.dtype)
        plgpu.barrier_arrive(self.interpreted.at[stage])

    def _rows(self, n: Array, stage: Array, source: Any) -> None:
        if self.interpret:
            self._interpreted(n, stage, lambda number: source[...][number])
            return
        arrays = (self.keys.at[stage], self.named(n), source, self._ready(stage))
        ptx.run(ptx.rows(), arrays, tiles=1)

    def plain(self, mine: Share | steps.Share) -> None:
        """Copies all chunks, entries being bfloat16."""

        def chunk(n: Array, _: None) -> None:
            self.name(n)
            stage = self._free(n)
            pl.when(n < mine.window_chunks)(lambda: self._rows(n, stage, self.window))
            pl.when(n >= mine.window_chunks)(lambda: self._rows(n, stage, self.planes[0]))

        jax.lax.fori_loop(0, mine.chunks, chunk, None)

    def fp8(self, mine: Share | steps.Share) -> None:
        """Copies all chunks; codes go to `raw` a chunk ahead, and from there into the tiles."""

        def recent(n: Array, _: None) -> None:
            self.name(n)
            self._rows(n, self._free(n), self.window)

        jax.lax.fori_loop(0, mine.window_chunks, recent, None)
        if self.interpret:
            jax.lax.fori_loop(mine.window_chunks, mine.chunks, self._fp8_interpreted, None)
            return
        nope, rope = self.planes

        # The barrier of a chunk of the window would wait for codes that were asked for before it.
        @pl.when(mine.chunks > mine.window_chunks)
        def _() -> None:
            self.name(mine.window_chunks)
            arrays = (self.keys.at[0], self.named(mine.window_chunks), nope, self.raw)
            ptx.run(ptx.codes(), arrays, tiles=1)

        def chunk(n: Array, _: None) -> None:
            stage, more = self._free(n), n + 1 < mine.chunks
            keys, following = self.keys.at[stage], jnp.minimum(n + 1, mine.chunks - 1)
            pl.when(more)(lambda: self.name(following))
            ptx.run(ptx.rope(), (keys, self.named(n), rope), tiles=1)
            arrays = (keys, self.named(following), nope, self.raw, self._ready(stage))
            ptx.run(ptx.decoded(), arrays, (more,), tiles=1)

        jax.lax.fori_loop(mine.window_chunks, mine.chunks, chunk, None)

    def _fp8_interpreted(self, n: Array, _: None) -> None:
        self.name(n)
        nope, rope = self.planes

        def read(number: Array) -> Array:
            rows = Fp8Rows(nope[...][number].reshape(CHUNK, -1, LANES), rope[...][number])
            return decode(rows, nope.shape[1], GROUP, self.keys.dtype)

        self._interpreted(n, self._free(n), read)


@dataclasses.dataclass(frozen=True)
class RunCopier(Copier):
    """Of chunks that are runs of rows: their list is made as it is needed, and has two chunks."""

    first: Callable[[Array], Array]  # the number of a chunk's first row

    def named(self, n: Array) -> Any:
        """Chunk n's part of the list: a chunk and the one behind it are in use at once."""
        return self.listed.at[jax.lax.rem(n, 2)]

    def name(self, n: Array) -> None:
        """Writes chunk n's part."""
        if self.interpret:
            self.named(n)[...] = self.first(n) + jnp.arange(CHUNK, dtype=jnp.int32)
        else:
            ptx.run(ptx.counted(), (self.named(n),), (self.first(n),))
