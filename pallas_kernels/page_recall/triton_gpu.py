"""GPU kernel through jax-triton: threads read pinned host memory over PCIe and write the pool.

No host gather, no staging: the host array's device-visible address is an operand like any other.
One launch per segment; a program copies one chunk of one record, and thousands of them in flight
keep the bus busy. Byte offsets are 64-bit, since a segment may exceed 2^31 bytes.
"""

import jax
from jaxtyping import Array, Int, UInt8

CHUNK_BYTES = 16384  # 128 threads, eight 16-byte loads in flight each
WARPS = 4


def chunk_bytes(record_bytes: int) -> int:
    """The largest power of two that a record can be covered with, at most CHUNK_BYTES."""
    return min(CHUNK_BYTES, 1 << (record_bytes.bit_length() - 1))


def page_recall(
    pool: UInt8[Array, "S R 128"],
    segments: tuple[UInt8[Array, "n R 128"], ...],
    src: Int[Array, " M"],
    dst: Int[Array, " M"],
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_recall`."""
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.page_recall.triton_kernel import copy_records

    record = pool.shape[1] * pool.shape[2]
    chunk, first = chunk_bytes(record), 0
    for segment in segments:
        rows = segment.shape[0]
        pool = jax_triton.triton_call(
            src,
            dst,
            segment,
            pool,
            kernel=copy_records,
            out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
            input_output_aliases={3: 0},
            grid=(-(-record // chunk), src.shape[0]),
            num_warps=WARPS,
            name="page_recall",
            first=first,
            rows=rows,
            slots=pool.shape[0],
            record=record,
            chunk=chunk,
        )
        first += rows
    return pool
