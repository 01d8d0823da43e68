"""TPU kernel: one DMA per record, from pinned host memory (or device memory) into the pool.

One call per segment. Host memory is tiled by 4096 bytes, so a record must be whole tiles; the
compiler takes no other (it aborts on 1024-byte tiles).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, UInt8

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.page_gather.mosaic_tpu import IN_FLIGHT, MAX_ENTRIES, pipeline

TILE_ROWS = 32  # of 128 bytes


def _kernel(
    src_ref: Any,
    dst_ref: Any,
    segment_ref: Any,
    _pool_in: Any,
    pool_ref: Any,
    done: Any,
    *,
    first: int,
) -> None:
    """[M] twice in scalar memory; [n, R, 128] in host memory -> [S, R, 128], in place."""
    (rows, slots), in_flight = (segment_ref.shape[0], pool_ref.shape[0]), done.shape[0]

    def act(i: Array, then: Callable[[Any], None]) -> None:
        row, slot = src_ref[i] - first, dst_ref[i]

        @pl.when((row >= 0) & (row < rows) & (slot >= 0) & (slot < slots))
        def _() -> None:
            sem = done.at[i % in_flight]
            then(pltpu.make_async_copy(segment_ref.at[row], pool_ref.at[slot], sem))

    pipeline(
        src_ref.shape[0],
        in_flight,
        lambda i: act(i, lambda copy: copy.start()),
        lambda i: act(i, lambda copy: copy.wait()),
    )


@functools.partial(jax.jit, static_argnames=("in_flight", "interpret"))
def page_recall(
    pool: UInt8[Array, "S R 128"],
    segments: tuple[UInt8[Array, "n R 128"], ...],
    src: Int[Array, " M"],
    dst: Int[Array, " M"],
    *,
    in_flight: int = IN_FLIGHT,
    interpret: Any = False,
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_recall`."""
    if pool.shape[1] % TILE_ROWS:
        raise Unsupported(f"records must be whole tiles of {TILE_ROWS} rows, got {pool.shape[1]}")
    if src.shape[0] > MAX_ENTRIES:
        raise Unsupported(f"takes {MAX_ENTRIES} entries at most, got {src.shape[0]}")
    first = 0
    for segment in segments:
        if segment.size and src.size and pool.size:
            pool = _from_one(pool, segment, src, dst, first, in_flight, interpret)
        first += segment.shape[0]
    return pool


def _from_one(
    pool: Array, segment: Array, src: Array, dst: Array, first: int, in_flight: int, interpret: Any
) -> Array:
    on_host = jax.typeof(segment).memory_space == jax.memory.Space.Host
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        functools.partial(_kernel, first=first),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(),
            in_specs=[pl.BlockSpec(memory_space=pl.HOST) if on_host else anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA((in_flight,))],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, jnp.uint8),
        input_output_aliases={3: 0},
        name="page_recall",
        interpret=interpret,
    )(src, dst, segment, pool)
