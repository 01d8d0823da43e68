"""The Triton source of `compress`. Importing this module needs the package triton."""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

EMPTY = tl.constexpr(-1e30)  # gate maximum of no tokens
BITS_448 = tl.constexpr(0x43E00000)  # the float32 448, e4m3's largest


@triton.jit
def merge(top_a, sum_a, acc_a, top_b, sum_b, acc_b):
    """Softmax statistics of the union of two disjoint token sets."""
    top = tl.maximum(top_a, top_b)
    of_a, of_b = tl.exp(top_a - top), tl.exp(top_b - top)
    return top, sum_a * of_a + sum_b * of_b, acc_a * of_a + acc_b * of_b


@triton.jit
def kept(stats, channel, width: tl.constexpr, wanted):
    """Statistics that the tail carries, or those of no tokens where they are not wanted."""
    top = tl.load(stats + channel, mask=wanted, other=EMPTY)
    total = tl.load(stats + width + channel, mask=wanted, other=0.0)
    return top, total, tl.load(stats + 2 * width + channel, mask=wanted, other=0.0)


@triton.jit
def window(
    value,  # [T, width], one row's tokens
    gate,
    ape,  # [ratio, width]
    count,
    begin,  # the window's first token; negative where it began before the chunk
    channel,  # [dim], int32
    wanted,
    width: tl.constexpr,
    ratio: tl.constexpr,
    span: tl.constexpr,  # tokens that a window may have in the chunk, a power of two
    step: tl.constexpr,  # tokens loaded at once
    has_ape: tl.constexpr,
):
    """Statistics over the tokens of one window that are in the chunk."""
    top = tl.full(channel.shape, EMPTY, tl.float32)
    total = tl.zeros(channel.shape, tl.float32)
    acc = tl.zeros(channel.shape, tl.float32)
    low = tl.maximum(begin, 0)
    for i in range(0, span, step):
        token = low + i + tl.arange(0, step)
        seen = ((token < tl.minimum(count, begin + ratio)) & wanted)[:, None]
        at = token.to(tl.int64)[:, None] * width + channel[None, :]
        g = tl.load(gate + at, mask=seen, other=0.0).to(tl.float32)
        v = tl.load(value + at, mask=seen, other=0.0).to(tl.float32)
        if has_ape:
            place = (token - begin)[:, None] * width + channel[None, :]
            g += tl.load(ape + place, mask=seen, other=0.0)
        g = tl.where(seen, g, EMPTY)
        higher = tl.maximum(top, tl.max(g, 0))
        weight = tl.where(seen, tl.exp(g - higher[None, :]), 0.0)
        scale = tl.exp(top - higher)
        total = total * scale + tl.sum(weight, 0)
        acc = acc * scale + tl.sum(weight * v, 0)
        top = higher
    return top, total, acc


@triton.jit
def put_fp8(
    y,  # float32 [dim], a whole entry
    rows,  # uint8, this entry's row
    ropes,  # bfloat16, this entry's rotary dims
    dim: tl.constexpr,
    rope: tl.constexpr,
    group: tl.constexpr,
    row: tl.constexpr,  # bytes
    spare: tl.constexpr,  # a power of two that covers the row's bytes behind the scales
):
    """Codes, one scale byte per group, zeros; rotary dims beside them."""
    nope: tl.constexpr = dim - rope
    groups: tl.constexpr = nope // group
    grid = tl.reshape(y, (dim // group, group))
    amax = tl.maximum(tl.max(tl.abs(grid), 1), 1e-4)
    byte = ((amax.to(tl.int32, bitcast=True) - BITS_448 + 0x7FFFFF) >> 23) + 127
    inverse = ((254 - byte) << 23).to(tl.float32, bitcast=True)
    scaled = tl.minimum(tl.maximum(grid * inverse[:, None], -448.0), 448.0)
    codes = scaled.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    index = tl.arange(0, dim // group)
    within = index[:, None] * group + tl.arange(0, group)[None, :]
    tl.store(rows + within, codes, mask=within < nope)
    tl.store(rows + nope + index, byte.to(tl.uint8), mask=index < groups)
    after = nope + groups + tl.arange(0, spare)
    tl.store(rows + after, tl.zeros((spare,), tl.uint8), mask=after < row)
    tl.store(ropes + within - nope, grid.to(tl.bfloat16), mask=within >= nope)


@triton.jit
def normed_and_turned(pooled, norm, cos, sin, eps, dim: tl.constexpr, rope: tl.constexpr):
    """RMS norm with a gain, then adjacent pairs of the last `rope` channels rotated."""
    mean = tl.sum(pooled * pooled, 0) / dim
    y = pooled * tl.rsqrt(mean + eps) * tl.load(norm + tl.arange(0, dim)).to(tl.float32)
    even, odd = tl.split(tl.reshape(y, (dim // 2, 2)))
    pair = tl.arange(0, dim // 2) - (dim - rope) // 2
    c = tl.load(cos + pair, mask=pair >= 0, other=1.0)
    s = tl.load(sin + pair, mask=pair >= 0, other=0.0)
    turned = tl.join(even * c - odd * s, even * s + odd * c)
    return tl.reshape(turned, (dim,))


@triton.jit
def compress_windows(
    value,  # [B, T, width]
    gate,
    ape,  # float32 [ratio, width]
    start,  # int32 [B]
    count,
    current,  # float32 [B, 3, width]
    previous,  # float32 [B, 3, dim]
    norm,  # [dim]
    cos,  # float32 [B, windows, rope / 2]
    sin,
    rows,  # [B, windows, dim], or uint8 [B, windows, row]
    ropes,  # bfloat16 [B, windows, rope], of fp8 rows
    next_current,  # float32 [B, 3, width]
    next_previous,
    eps: tl.constexpr,
    tokens: tl.constexpr,
    windows: tl.constexpr,
    ratio: tl.constexpr,
    dim: tl.constexpr,
    rope: tl.constexpr,
    group: tl.constexpr,
    row: tl.constexpr,
    spare: tl.constexpr,
    overlap: tl.constexpr,
    has_ape: tl.constexpr,
    fp8: tl.constexpr,
    span: tl.constexpr,
    step: tl.constexpr,
):
    """One program: slot `program_id(0)` of row `program_id(1)`; the last one does the tail."""
    j, b = tl.program_id(0), tl.program_id(1)
    width: tl.constexpr = 2 * dim if overlap else dim
    n, offset = tl.load(count + b), tl.load(start + b) % ratio
    done = (offset + n) // ratio
    channel = tl.arange(0, dim)
    value += b.to(tl.int64) * tokens * width
    gate += b.to(tl.int64) * tokens * width
    current += b.to(tl.int64) * 3 * width
    previous += b.to(tl.int64) * 3 * dim
    if j < windows:
        last, owned = channel + (width - dim), j < done
        begin = j * ratio - offset
        top, total, acc = window(
            value, gate, ape, n, begin, last, owned, width, ratio, span, step, has_ape
        )
        a, s, v = kept(current, last, width, owned & (j == 0))
        top, total, acc = merge(a, s, v, top, total, acc)
        if overlap:  # the first half of the window before; of window -1, what the tail kept
            before = begin - ratio
            there = owned & (j > 0)
            a, s, v = window(
                value, gate, ape, n, before, channel, there, width, ratio, span, step, has_ape
            )
            p, q, r = kept(current, channel, width, owned & (j == 1))
            a, s, v = merge(p, q, r, a, s, v)
            p, q, r = kept(previous, channel, dim, owned & (j == 0))
            a, s, v = merge(p, q, r, a, s, v)
            top, total, acc = merge(a, s, v, top, total, acc)
        at = b.to(tl.int64) * windows + j
        turn = at * (rope // 2)
        pooled = acc / tl.maximum(total, 1e-30)
        y = normed_and_turned(pooled, norm, cos + turn, sin + turn, eps, dim, rope)
        y = tl.where(owned, y, 0.0)
        if fp8:
            put_fp8(y, rows + at * row, ropes + at * rope, dim, rope, group, row, spare)
        else:
            tl.store(rows + at * dim + channel, y.to(rows.dtype.element_ty))
    else:
        begin = done * ratio - offset
        for half in tl.static_range(width // dim):
            part = channel + half * dim
            top, total, acc = window(
                value, gate, ape, n, begin, part, True, width, ratio, span, step, has_ape
            )
            a, s, v = kept(current, part, width, done == 0)
            top, total, acc = merge(a, s, v, top, total, acc)
            out = next_current + b.to(tl.int64) * 3 * width + part
            tl.store(out, top)
            tl.store(out + width, total)
            tl.store(out + 2 * width, acc)
        if overlap:
            top, total, acc = window(
                value, gate, ape, n, begin - ratio, channel, done > 0, width, ratio, span, step,
                has_ape,
            )  # fmt: skip
            a, s, v = kept(current, channel, width, done == 1)
            top, total, acc = merge(a, s, v, top, total, acc)
            a, s, v = kept(previous, channel, dim, done == 0)
            top, total, acc = merge(a, s, v, top, total, acc)
            out = next_previous + b.to(tl.int64) * 3 * dim + channel
            tl.store(out, top)
            tl.store(out + dim, total)
            tl.store(out + 2 * dim, acc)
