"""Hopper kernels: the copy engine moves tiles of records through shared memory, both ways.

A block keeps a ring of tiles: loads run `LAG` tiles ahead of stores, and a store has the rest of
the ring to finish. No byte passes through registers.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int, UInt8

from pallas_kernels.dispatch import Unsupported

BLOCKS = 264  # two for each of an H100's multiprocessors
TILE = 128  # rows of 128 bytes
STAGES = 6  # tiles in the ring
LAG = 3


def _ring(items: Any, first: Any, step: int, load: Callable, store: Callable, stages: int) -> None:
    """`load(item, buffer)` and, LAG items later, `store(item, buffer)`, for every step-th item."""
    mine = jnp.maximum(items - first + step - 1, 0) // step

    def turn(n: Any, nothing: Any) -> Any:
        @pl.when(n < mine)
        def _() -> None:
            # The buffer's last store is the oldest of those that may be unfinished.
            plgpu.wait_smem_to_gmem(stages - 1 - LAG, wait_read_only=True)
            load(first + n * step, jax.lax.rem(n, stages))

        @pl.when(n >= LAG)
        def _() -> None:
            store(first + (n - LAG) * step, jax.lax.rem(n - LAG, stages))

        return nothing

    jax.lax.fori_loop(0, jnp.where(mine > 0, mine + LAG, 0), turn, 0)
    plgpu.wait_smem_to_gmem(0)


def _body(
    slots_ref: Any, source_ref: Any, *refs: Any, gathers: bool, blocks: int, stages: int
) -> None:
    """[M], [a, R, 128] -> the first of the last four refs; the other three are in shared memory:
    the ring, its barriers, a tile of zeros."""
    out_ref, buffers, ready, blank = refs[-4:]
    rows, tile = source_ref.shape[1], buffers.shape[1]
    tiles = -(-rows // tile)
    block = jax.lax.axis_index("block")
    count = source_ref.shape[0] if gathers else out_ref.shape[0]
    if gathers:
        blank[...] = jnp.zeros(blank.shape, blank.dtype)
        plgpu.commit_smem()

    def place(item: Array) -> tuple[Array, Array, Array, Any]:
        entry, part = jax.lax.div(item, tiles), jax.lax.rem(item, tiles)
        # The last tile is moved back to end with the record: some rows are copied twice.
        at = pl.ds(jnp.minimum(part * tile, rows - tile), tile)
        slot = slots_ref[entry]
        return entry, slot, (slot >= 0) & (slot < count), at

    def load(item: Array, buffer: Array) -> None:
        entry, slot, _, at = place(item)
        row = jnp.clip(slot, 0, count - 1) if gathers else entry
        plgpu.copy_gmem_to_smem(source_ref.at[row, at], buffers.at[buffer], ready.at[buffer])

    def store(item: Array, buffer: Array) -> None:
        entry, slot, exists, at = place(item)
        plgpu.barrier_wait(ready.at[buffer])

        @pl.when(exists)
        def _() -> None:
            row = entry if gathers else slot
            plgpu.copy_smem_to_gmem(buffers.at[buffer], out_ref.at[row, at])

        @pl.when(jnp.logical_not(exists))
        def _() -> None:
            if gathers:
                plgpu.copy_smem_to_gmem(blank, out_ref.at[entry, at])
            else:
                plgpu.wait_smem_to_gmem(0)  # the ring counts a store per tile

    _ring(slots_ref.shape[0] * tiles, block, blocks, load, store, stages)


def _copy(
    source: UInt8[Array, "a R 128"],
    target: UInt8[Array, "b R 128"] | None,
    slots: Int[Array, " M"],
    tile: int,
    stages: int,
    blocks: int,
    interpret: bool,
) -> Array:
    """Gathers records into a new array, or scatters them into `target`."""
    rows, entries, gathers = source.shape[1], slots.shape[0], target is None
    if stages <= LAG or tile > 256:
        raise Unsupported(f"stages must exceed {LAG} and tile be at most 256 rows")
    if not source.size or not entries or (target is not None and not target.size):
        raise Unsupported(f"needs pages and slots, got {list(source.shape)}, {entries} slots")
    tile = min(tile, 1 << (rows.bit_length() - 1))  # a power of two
    # Rather a smaller tile than rows that are copied twice. Zeros are stored 8 rows at a time.
    tile = next((t for t in range(tile, tile // 2, -8) if rows % t == 0), tile)

    shape = jax.ShapeDtypeStruct((entries, *source.shape[1:]), source.dtype)
    kernel = plgpu.kernel(
        functools.partial(_body, gathers=gathers, blocks=blocks, stages=stages),
        out_type=shape if target is None else (),
        scratch_types=[
            plgpu.SMEM((stages, tile, 128), jnp.uint8),
            plgpu.Barrier(num_barriers=stages),
            plgpu.SMEM((tile, 128), jnp.uint8),
        ],
        grid=(blocks,),
        grid_names=("block",),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="page_gather" if gathers else "page_scatter",
    )
    if target is None:
        return kernel(slots, source)
    memory = jax.new_ref(target)  # an operand that the kernel may write
    kernel(slots, source, memory)
    return jax.freeze(memory)


@functools.partial(jax.jit, static_argnames=("tile", "stages", "blocks", "interpret"))
def page_gather(
    pool: UInt8[Array, "S R 128"],
    slots: Int[Array, " M"],
    *,
    tile: int = TILE,
    stages: int = STAGES,
    blocks: int = BLOCKS,
    interpret: bool = False,
) -> UInt8[Array, "M R 128"]:
    """See the package's `page_gather`. `tile` is a power of two."""
    return _copy(pool, None, slots, tile, stages, blocks, interpret)


@functools.partial(jax.jit, static_argnames=("tile", "stages", "blocks", "interpret"))
def page_scatter(
    pool: UInt8[Array, "S R 128"],
    records: UInt8[Array, "M R 128"],
    slots: Int[Array, " M"],
    *,
    tile: int = TILE,
    stages: int = STAGES,
    blocks: int = BLOCKS,
    interpret: bool = False,
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_scatter`. `tile` is a power of two."""
    return _copy(records, pool, slots, tile, stages, blocks, interpret)
