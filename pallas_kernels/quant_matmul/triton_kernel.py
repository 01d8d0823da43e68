"""The Triton source of `quant_matmul`. Importing this module needs the package triton."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

from pallas_kernels.quant_matmul.triton_fp4 import fp4_product


@triton.jit
def members(experts, me, expert, pairs: tl.constexpr, part: tl.constexpr, rows: tl.constexpr):
    """Which pairs this program multiplies: [rows] of them, -1 where there are fewer.

    Pair `me` speaks for the first `rows` pairs of its expert from itself on, where its rank among
    them is a multiple of `rows`; otherwise another pair does, and there are none.
    """
    rank = 0
    for i in range(0, pairs, part):
        at = i + tl.arange(0, part)
        other = tl.load(experts + at, mask=at < pairs, other=-1)
        rank += tl.sum(((other == expert) & (at < me)).to(tl.int32), 0)
    found = tl.full((rows,), -1, tl.int32)
    if rank % rows == 0:
        wanted, before = rank + tl.arange(0, rows), 0
        for i in range(0, pairs, part):
            at = i + tl.arange(0, part)
            other = tl.load(experts + at, mask=at < pairs, other=-1)
            same = ((other == expert) & (at < pairs)).to(tl.int32)
            place = before + tl.cumsum(same, 0) - 1
            hit = (same[:, None] > 0) & (place[:, None] == wanted[None, :])
            found = tl.maximum(found, tl.max(tl.where(hit, at[:, None], -1), 0))
            before += tl.sum(same, 0)
    return found


@triton.jit
def fp8_product(
    x,  # bfloat16 [rows, k]
    w,  # e4m3 [n, k], of one expert
    scale,  # uint8 [n / 128, k / 128]
    row,  # int64 [block_m]
    live,
    column,  # int32 [block_n]
    first_k,
    n: tl.constexpr,
    k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    steps: tl.constexpr,
):
    """Sums [block_n, block_m] over steps * block_k inputs. The weights are the left operand: they
    are many where rows are few, and fill the matrix unit's larger side."""
    acc = tl.zeros((block_n, block_m), tl.float32)
    there = (column < n)[:, None]
    within = tl.arange(0, block_k)
    blocks: tl.constexpr = (k + 127) // 128
    scale += tl.min(column, 0) // 128 * blocks  # one for a whole tile
    for i in range(steps):
        at = first_k + i * block_k
        xs = tl.load(x + row[None, :] * k + (at + within)[:, None], mask=live[None, :], other=0.0)
        codes = tl.load(w + column[:, None] * k + (at + within)[None, :], mask=there, other=0.0)
        byte = tl.load(scale + at // 128).to(tl.int32)
        bits = tl.where(byte == 0, 1 << 22, byte << 23)  # byte 0: 2^-127, subnormal
        factor = tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
        # By way of float32: the direct conversion takes one slow instruction an element.
        acc += tl.dot(codes.to(tl.float32).to(tl.bfloat16), xs) * factor
    return acc


@triton.jit
def quant_matmul(
    x,  # bfloat16 [R, k]; where `apart`, every fourth input together, [4, R, k / 4]
    experts,  # int32 [pairs]; not read for a plain product
    w,  # [G, n, k] as stored
    scale,
    out,  # float32 [splits, pairs, n]
    n: tl.constexpr,
    k: tl.constexpr,
    pairs: tl.constexpr,
    part: tl.constexpr,
    share: tl.constexpr,
    groups: tl.constexpr,
    fp4: tl.constexpr,
    apart: tl.constexpr,
    ragged: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    steps: tl.constexpr,
):
    """One program: block_n outputs of up to block_m pairs of one expert, over a part of k."""
    column = tl.program_id(0) * block_n + tl.arange(0, block_n)
    pid, split = tl.program_id(1), tl.program_id(2)
    expert = 0
    if ragged:
        expert = tl.load(experts + pid)
        pair = members(experts, pid, expert, pairs, part, block_m)
    else:
        pair = pid * block_m + tl.arange(0, block_m)
        pair = tl.where(pair < pairs, pair, -1)
    live = pair >= 0
    if tl.max(pair, 0) >= 0:
        known = (expert >= 0) & (expert < groups)
        of = tl.where(known, expert, 0).to(tl.int64)
        row = (tl.maximum(pair, 0) // share).to(tl.int64)
        first = split * steps * block_k
        if fp4:
            w += of * n * (k // 2)
            scale += of * n * (k // 32)
            rows: tl.constexpr = pairs // share
            acc = fp4_product(
                x, w, scale, row, live, column, first, rows, apart, n, k, block_m, block_n, block_k,
                steps,
            )  # fmt: skip
        else:
            w += of * n * k
            scale += of * ((n + 127) // 128) * ((k + 127) // 128)
            acc = fp8_product(
                x, w, scale, row, live, column, first, n, k, block_m, block_n, block_k, steps
            )
        acc = tl.where(known, acc, 0.0)
        at = (split * pairs + tl.maximum(pair, 0)).to(tl.int64)
        mask = live[None, :] & (column < n)[:, None]
        tl.store(out + at[None, :] * n + column[:, None], acc, mask=mask)
