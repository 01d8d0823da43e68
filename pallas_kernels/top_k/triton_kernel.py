"""The Triton source of `top_k`. Importing this module needs the package triton.

Scores become uint32 keys of the same order, 0 where nothing may be selected. A program finds the
highest key that `take` of its keys reach, then writes those above it, and of those equal to it the
first ones, in order of column.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _key(score, visible):
    visible = visible & (score > float("-inf"))  # false for NaN
    bits = tl.where(score == 0, 0.0, score).to(tl.uint32, bitcast=True)
    ordered = bits ^ tl.where((bits >> 31) != 0, 0xFFFFFFFF, 0x80000000)
    return tl.where(visible, ordered, 0)


@triton.jit
def _kth_by_counts(keys, seen, take):
    """One bit at a time, until exactly `take` keys are reached; 0 where no more than that exist."""
    kth, count = tl.full([], 0, tl.uint32), seen
    bit = tl.full([], 31, tl.int32)
    while (bit >= 0) & (count > take):
        candidate = kth | (tl.full([], 1, tl.uint32) << bit.to(tl.uint32))
        reached = tl.sum((keys >= candidate).to(tl.int32), 0)
        kth = tl.where(reached >= take, candidate, kth)
        count = tl.where(reached >= take, reached, count)
        bit -= 1
    return kth


@triton.jit
def _kth_by_digits(keys, seen, take, bits: tl.constexpr):
    """The same, some bits at a time, from histograms of the keys that agree with it so far."""
    bins: tl.constexpr = 1 << bits
    bin_ids = tl.arange(0, bins)
    kth, count = tl.full([], 0, tl.uint32), seen
    above, shift = tl.full([], 0, tl.int32), tl.full([], 32 - bits, tl.int32)
    while (shift >= 0) & (count > take):
        digit = (keys ^ kth) >> shift.to(tl.uint32)  # too large where an earlier digit differs
        counts = tl.histogram((digit & (bins - 1)).to(tl.int32), bins, mask=digit < bins)
        reached = above + tl.cumsum(counts, 0, reverse=True)
        best = tl.sum((reached >= take).to(tl.int32), 0) - 1
        count = tl.sum(tl.where(bin_ids == best, reached, 0), 0)
        above = count - tl.sum(tl.where(bin_ids == best, counts, 0), 0)
        kth = kth | (best.to(tl.uint32) << shift.to(tl.uint32))
        shift -= bits
    return kth


@triton.jit
def select(
    source,  # float32 [rows, width] scores, or uint32 keys of candidates
    names,  # their columns, int32 [rows, width]; of scores: `visible`, int32 [rows] or a mask
    limit,  # int32 [rows]; read where `limited`
    index,  # out: int32 [rows, chunks, k]
    rest,  # out: bool [rows, k], places that are filled; or uint32 [rows, chunks, k] keys, 0: none
    width: tl.constexpr,
    k: tl.constexpr,
    places: tl.constexpr,  # k rounded up to a power of two
    size: tl.constexpr,  # columns of a program
    chunks: tl.constexpr,
    bits: tl.constexpr,
    first: tl.constexpr,
    masked: tl.constexpr,
    limited: tl.constexpr,
):
    """Program (r, c) of the grid: columns [size * c, size * (c + 1)) of row r."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = chunk * size + tl.arange(0, size)
    inside = column < width
    if first:
        name = column
        if masked:
            inside = inside & (tl.load(names + row * width + column, mask=inside, other=0) != 0)
        else:
            inside = inside & (column < tl.load(names + row))
        keys = _key(tl.load(source + row * width + column, mask=inside, other=0.0), inside)
    else:
        keys = tl.load(source + row * width + column, mask=inside, other=0)
        name = tl.load(names + row * width + column, mask=inside, other=0)
    take = tl.full([], k, tl.int32)
    if limited:
        take = tl.maximum(tl.minimum(take, tl.load(limit + row)), 0)
    seen = tl.sum((keys > 0).to(tl.int32), 0)
    kth = _kth_by_counts(keys, seen, take) if bits == 1 else _kth_by_digits(keys, seen, take, bits)
    above, equal = (keys > kth).to(tl.int32), ((keys == kth) & (keys > 0)).to(tl.int32)
    room = take - tl.sum(above, 0)
    both = above << 16 | equal  # one scan counts both: a program has fewer than 2^16 of each
    before = tl.cumsum(both, 0) - both
    equal_before = before & 0xFFFF
    keep = (above != 0) | ((equal != 0) & (equal_before < room))
    place = (before >> 16) + tl.minimum(equal_before, room)
    out = (row * chunks + chunk) * k
    tl.store(index + out + place, name, mask=keep)
    kept, slot = tl.minimum(seen, take), tl.arange(0, places)
    empty = (slot >= kept) & (slot < k)
    tl.store(index + out + slot, tl.zeros([places], tl.int32), mask=empty)
    if chunks == 1:
        tl.store(rest + out + slot, slot < kept, mask=slot < k)
    else:
        tl.store(rest + out + place, keys, mask=keep)
        tl.store(rest + out + slot, tl.zeros([places], tl.uint32), mask=empty)
