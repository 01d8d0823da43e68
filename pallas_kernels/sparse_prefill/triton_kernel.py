"""The Triton source of prefill attention. Importing this module needs the package triton.

A program is one query: its heads are the rows of a tensor-core tile, and all of them read the same
keys, so that a key tile is the second operand of both products. Keys that are not there are not
read: whatever their memory holds cannot reach a result.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def _absorb(q, keys, there, top, total, values, scale):
    """Adds one tile of keys to a softmax in progress; logits are in units of log 2."""
    logits = tl.dot(q, tl.trans(keys)) * scale
    logits = tl.where(there[None, :], logits, float("-inf"))
    new = tl.maximum(top, tl.max(logits, axis=1))
    before = tl.exp2(top - new)
    weights = tl.exp2(logits - new[:, None])
    total = total * before + tl.sum(weights, axis=1)
    values = tl.dot(weights.to(keys.dtype), keys, values * before[:, None])
    return new, total, values


@triton.jit
def _decoded(nope, rope, row, there, dims: tl.constexpr, group: tl.constexpr, dtype: tl.constexpr):
    """One tile of fp8 entries [tile, dims]. The last group of dims is the rotary plane's."""
    groups: tl.constexpr = dims // group
    d, g, r = tl.arange(0, dims), tl.arange(0, groups), tl.arange(0, group)
    at = nope + row * dims
    codes = tl.load(at[:, None] + d[None, :], mask=there[:, None], other=0)
    exps = tl.load(at[:, None] + (dims - group + g)[None, :], mask=there[:, None], other=0)
    tail = tl.load(rope + row[:, None] * group + r[None, :], mask=there[:, None], other=0)
    # Byte e is 2^(e - 127). Byte 0 gives zero here, not 2^-127: too little to change a sum.
    powers = (exps.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    powers = tl.where(exps == 255, float("nan"), powers)
    vectors = codes.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    vectors = tl.reshape(vectors, (codes.shape[0], groups, group)) * powers[:, :, None]
    last = (g == groups - 1)[None, :, None]
    vectors = tl.where(last, tail.to(tl.float32)[:, None, :], vectors)
    return tl.reshape(vectors, (codes.shape[0], dims)).to(dtype)


@triton.jit
def prefill(
    q,  # [B, T, H, dims]
    band,  # [B, W + T, dims], row i is position start - W + i; with fp8 planes only
    rows,  # [B, N + W + T, dims], the band last; or the codes of fp8 planes, uint8 [B, N, dims]
    rope,  # [B, N, group]; with fp8 planes only
    index,  # int32 [B, T, chosen], -1 where there is none; not read when `chosen` is 0
    start,  # int32 [B]
    sink,  # float32 [H]
    out,  # [B, T, H, dims]
    scale: tl.constexpr,
    tokens: tl.constexpr,
    window: tl.constexpr,
    entries: tl.constexpr,
    chosen: tl.constexpr,  # 0: every visible entry
    ratio: tl.constexpr,
    heads: tl.constexpr,
    dims: tl.constexpr,
    group: tl.constexpr,
    fp8: tl.constexpr,
    head_tile: tl.constexpr,
    key_tile: tl.constexpr,
):
    """Program (i, b): a tile of the heads of one query of sequence b, the last queries first."""
    log2e: tl.constexpr = 1.4426950408889634
    parts: tl.constexpr = heads // head_tile
    t = tokens - 1 - tl.program_id(0) // parts
    b = tl.program_id(1).to(tl.int64)
    h = (tl.program_id(0) % parts) * head_tile + tl.arange(0, head_tile)
    d, k = tl.arange(0, dims), tl.arange(0, key_tile)
    at = ((b * tokens + t) * heads + h)[:, None] * dims + d[None, :]
    queries = tl.load(q + at)
    top = tl.load(sink + h) * log2e
    total = tl.full([head_tile], 1.0, tl.float32)
    values = tl.zeros([head_tile, dims], tl.float32)
    before = window - 1 - (tl.load(start + b) + t)  # rows of the window before the sequence
    limit = tl.minimum((tl.load(start + b) + t + 1) // ratio, entries)
    count = chosen if chosen > 0 else limit
    raw = band + (b * (window + tokens) + t + 1) * dims
    stored = rows + b * (entries + window + tokens) * dims
    picks = index + (b * tokens + t) * chosen
    if fp8:
        for c in range(0, window, key_tile):
            there = (c + k < window) & (c + k >= before)
            near = raw + (c + k) * dims
            keys = tl.load(near[:, None] + d[None, :], mask=there[:, None], other=0.0)
            top, total, values = _absorb(queries, keys, there, top, total, values, scale * log2e)
        for c in range(0, count, key_tile):
            row = c + k
            if chosen > 0:
                row = tl.load(picks + c + k, mask=c + k < chosen, other=-1)
            there = (row >= 0) & (row < (entries if chosen > 0 else limit))
            far = b * entries + row
            keys = _decoded(rows, rope, far, there, dims, group, queries.dtype)
            top, total, values = _absorb(queries, keys, there, top, total, values, scale * log2e)
    else:
        # One loop over both kinds of keys, so that loads run ahead of the products throughout.
        for c in range(0, window + count, key_tile):
            row = c + k - window
            if chosen > 0:
                row = tl.load(picks + row, mask=(row >= 0) & (row < chosen), other=-1)
            near = c + k < window
            there = (c + k >= window) & (row >= 0) & (row < (entries if chosen > 0 else limit))
            there |= near & (c + k >= before)
            # Offsets of 32 bits: wider ones for a whole tile take registers that values need.
            row = tl.where(near, entries + t + 1 + c + k, row)
            keys = tl.load(
                stored + (row * dims)[:, None] + d[None, :], mask=there[:, None], other=0.0
            )
            top, total, values = _absorb(queries, keys, there, top, total, values, scale * log2e)
    tl.store(out + at, (values / total[:, None]).to(queries.dtype))
