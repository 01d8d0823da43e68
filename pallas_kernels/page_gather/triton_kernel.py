"""The Triton source of `page_gather` and `page_scatter`. Importing it needs the package triton."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _place(slots, chunk: tl.constexpr, record: tl.constexpr):
    """This program's entry, its slot, and the words of its chunk that are in the record."""
    chunks: tl.constexpr = (record + chunk - 1) // chunk
    entry = (tl.program_id(0) // chunks).to(tl.int64)
    within = (tl.program_id(0) % chunks) * chunk + tl.arange(0, chunk)
    return entry, tl.load(slots + entry).to(tl.int64), within, within < record


@triton.jit
def gather(
    slots,  # int32 [M]
    pool,  # uint8 [count, record words of four bytes]
    out,  # uint8 [M, record words]
    count: tl.constexpr,
    record: tl.constexpr,
    chunk: tl.constexpr,
):
    """One program: a chunk of one record. Offsets are 64-bit: pools exceed 2^31 bytes."""
    entry, slot, within, inside = _place(slots, chunk, record)
    exists = (slot >= 0) & (slot < count)
    source = pool.to(tl.pointer_type(tl.int32)) + slot * record + within
    words = tl.load(source, mask=inside & exists, other=0, eviction_policy="evict_first")
    target = out.to(tl.pointer_type(tl.int32)) + entry * record + within
    tl.store(target, words, mask=inside, eviction_policy="evict_first")


@triton.jit
def scatter(
    slots,  # int32 [M]
    records,  # uint8 [M, record words of four bytes]
    _pool_in,  # the same memory as `pool`
    pool,  # uint8 [count, record words]
    count: tl.constexpr,
    record: tl.constexpr,
    chunk: tl.constexpr,
):
    """One program: a chunk of one record, where its slot exists."""
    entry, slot, within, inside = _place(slots, chunk, record)
    if (slot >= 0) & (slot < count):
        source = records.to(tl.pointer_type(tl.int32)) + entry * record + within
        words = tl.load(source, mask=inside, eviction_policy="evict_first")
        target = pool.to(tl.pointer_type(tl.int32)) + slot * record + within
        tl.store(target, words, mask=inside, eviction_policy="evict_first")
