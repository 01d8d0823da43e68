"""The same kernel as a Pallas call with the Triton lowering, for machines without jax-triton.

JAX 0.11 announced the removal of this lowering (and warns on every use); see `triton_gpu` for the
durable form. Its offsets are 32-bit up to arrays of 2^32 bytes, so sizes above 2^31 are declined.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Int, UInt8

from pallas_kernels.dispatch import Unsupported

CHUNK_ROWS = 128  # rows of 128 bytes: the chunks of `triton_gpu`
WARPS = 4


def _kernel(src_ref, dst_ref, segment_ref, _pool_in_ref, pool_ref, *, first: int, chunk: int):
    """One program: rows `program_id(0) * chunk ..` of entry `program_id(1)`, if in this segment."""
    entry = pl.program_id(1)
    row, slot = src_ref[entry] - first, dst_ref[entry]
    row_here = (row >= 0) & (row < segment_ref.shape[0])
    # The last chunk is moved back to end with the record: it copies some rows a second time.
    at = pl.ds(jnp.minimum(pl.program_id(0) * chunk, pool_ref.shape[1] - chunk), chunk)

    @pl.when(row_here & (slot >= 0) & (slot < pool_ref.shape[0]))
    def _() -> None:
        pool_ref[slot, at, :] = segment_ref[row, at, :]


def page_recall(
    pool: UInt8[Array, "S R 128"],
    segments: tuple[UInt8[Array, "n R 128"], ...],
    src: Int[Array, " M"],
    dst: Int[Array, " M"],
    *,
    interpret: bool = False,
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_recall`. `interpret` runs the kernel's Python on any device."""
    if jax.default_backend() != "gpu" and not interpret:
        raise Unsupported(f"needs a GPU, got {jax.devices()[0].device_kind}")
    largest = max(x.size for x in (pool, *segments))
    if largest >= 2**31:
        raise Unsupported(f"pool and segments must each be under 2^31 bytes, got {largest}")
    # Imported here: the module exists only as long as JAX ships the Triton lowering.
    from jax.experimental.pallas import triton as plt

    rows, first = pool.shape[1], 0
    chunk = min(CHUNK_ROWS, 1 << (rows.bit_length() - 1))
    for segment in segments:
        pool = pl.pallas_call(
            functools.partial(_kernel, first=first, chunk=chunk),
            out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
            input_output_aliases={3: 0},
            grid=(-(-rows // chunk), src.shape[0]),
            compiler_params=plt.CompilerParams(num_warps=WARPS),
            interpret=interpret,
            name="page_recall",
        )(src, dst, segment, pool)
        first += segment.shape[0]
    return pool
