"""The Triton source of `page_recall`. Importing this module needs the package triton."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def copy_records(
    src,  # int32 [M], host row ids
    dst,  # int32 [M], slots
    segment,  # uint8 [rows, record], host rows first .. first + rows - 1
    _pool_in,  # the same memory as `pool`
    pool,  # uint8 [slots, record]
    first: tl.constexpr,
    rows: tl.constexpr,
    slots: tl.constexpr,
    record: tl.constexpr,
    chunk: tl.constexpr,
):
    """One program: chunk `program_id(0)` of entry `program_id(1)`, if its row is here."""
    entry = tl.program_id(1)
    row = tl.load(src + entry).to(tl.int64) - first
    slot = tl.load(dst + entry).to(tl.int64)
    if (row >= 0) & (row < rows) & (slot >= 0) & (slot < slots):
        # The last chunk is moved back to end with the record: it copies some bytes a second time.
        start = tl.multiple_of(tl.minimum(tl.program_id(0) * chunk, record - chunk), 128)
        within = start + tl.arange(0, chunk)
        tl.store(pool + slot * record + within, tl.load(segment + row * record + within))
