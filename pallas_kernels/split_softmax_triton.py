"""The Triton source of the decode kernels. Importing this module needs the package triton.

A program takes one row's tile of heads and a contiguous share of the row's blocks of keys: first
blocks of the window, then blocks of entries, contiguous or picked. Scores are kept in base 2, so
`top` of a part is log2(e) times what `split_softmax.Part` calls by that name.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

LOG2E = tl.constexpr(1.4426950408889634)
NO_SCORE = tl.constexpr(-1e30)


@triton.jit
def _fold(dots, ok, top, total, scale: tl.constexpr):
    """Scores of one more block: its weights, how much the sums so far fade, the new top, total."""
    scores = tl.where(ok[None, :], dots * (scale * LOG2E), float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    fade = tl.exp2(top - new)
    weights = tl.exp2(scores - new[:, None])
    return weights, fade, new, total * fade + tl.sum(weights, 1)


@triton.jit
def _share(window_count, seen, slots: tl.constexpr, splits: tl.constexpr, block: tl.constexpr):
    """This program's blocks: filled window slots, blocks of those, first and last of its share."""
    recent = tl.minimum(tl.load(window_count + tl.program_id(0)), slots)
    recent_blocks = tl.cdiv(recent, block)
    blocks = recent_blocks + tl.cdiv(seen, block)
    each = tl.cdiv(blocks, splits)
    first = tl.program_id(1) * each
    return recent, recent_blocks, first, tl.minimum(first + each, blocks)


@triton.jit
def _entries(
    i, seen, index, valid, picks: tl.constexpr, per_row: tl.constexpr, own: tl.constexpr,
    block: tl.constexpr,
):  # fmt: skip
    """Block i of a row's entries: where they are among all rows' entries, and which count."""
    row, at = tl.program_id(0).to(tl.int64), i * block + tl.arange(0, block)
    ok, entry = at < seen, at.to(tl.int64)
    if picks > 0:
        entry = tl.load(index + row * picks + at, mask=ok, other=0).to(tl.int64)
        ok = tl.load(valid + row * picks + at, mask=ok, other=0) != 0
    if own:
        entry += row * per_row
    return entry, ok


@triton.jit
def _ends(total, top, sink, head, splits: tl.constexpr):
    """What to multiply a program's sums with: with one split the sink joins, and that is all."""
    logit = tl.load(sink + head).to(tl.float32) * LOG2E
    whole = tl.maximum(top, logit)
    fade = tl.exp2(top - whole)
    factor = fade / (total * fade + tl.exp2(logit - whole))
    if splits > 1:
        factor = tl.full(factor.shape, 1.0, tl.float32)
    return factor


@triton.jit
def _store_stats(stats, top, total, head, heads: tl.constexpr, splits: tl.constexpr):
    at = stats + (tl.program_id(0) * splits + tl.program_id(1)) * 2 * heads + head
    tl.store(at, top)
    tl.store(at + heads, total)


@triton.jit
def plain_parts(
    q,  # bfloat16 [B, heads, dims]
    window,  # bfloat16 [B, slots, dims]
    window_count,  # int32 [B]
    rows,  # bfloat16 [M, dims]; `per_row` of them for each of the B rows where `own`
    index,  # int32 [B, picks]; not read where picks == 0
    valid,  # bool [B, picks], or int32 [B]: how many entries, where picks == 0
    sink,  # float32 [heads]
    out,  # [B, splits, heads, dims]: the output, or sums where splits > 1
    stats,  # float32 [B, splits, 2, heads]: top and total
    scale: tl.constexpr, heads: tl.constexpr, dims: tl.constexpr, slots: tl.constexpr,
    picks: tl.constexpr, per_row: tl.constexpr, own: tl.constexpr, splits: tl.constexpr,
    tile: tl.constexpr, block: tl.constexpr, stages: tl.constexpr,
):  # fmt: skip
    """Attention to plain rows: program (row, split, tile of heads)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(2) * tile + tl.arange(0, tile)
    dim = tl.arange(0, dims)
    query = tl.load(q + (row * heads + head)[:, None] * dims + dim[None, :])
    seen = picks if picks > 0 else tl.minimum(tl.load(valid + row), per_row)
    recent, recent_blocks, first, last = _share(window_count, seen, slots, splits, block)
    top, total = tl.full([tile], NO_SCORE, tl.float32), tl.zeros([tile], tl.float32)
    sums = tl.zeros([tile, dims], tl.float32)
    for i in tl.range(first, tl.minimum(last, recent_blocks), num_stages=stages):
        at = i * block + tl.arange(0, block)
        ok = at < recent
        place = window + (row * slots + at)[:, None] * dims + dim[None, :]
        keys = tl.load(place, mask=ok[:, None], other=0.0)
        weights, fade, top, total = _fold(tl.dot(query, tl.trans(keys)), ok, top, total, scale)
        sums = tl.dot(weights.to(keys.dtype), keys, sums * fade[:, None])
    for i in tl.range(tl.maximum(first, recent_blocks), last, num_stages=stages):
        entry, ok = _entries(i - recent_blocks, seen, index, valid, picks, per_row, own, block)
        # Entries that do not count are not read: zeros, since they may hold NaN.
        keys = tl.load(rows + entry[:, None] * dims + dim[None, :], mask=ok[:, None], other=0.0)
        weights, fade, top, total = _fold(tl.dot(query, tl.trans(keys)), ok, top, total, scale)
        sums = tl.dot(weights.to(keys.dtype), keys, sums * fade[:, None])
    sums *= _ends(total, top, sink, head, splits)[:, None]
    at = ((row * splits + tl.program_id(1)) * heads + head)[:, None] * dims + dim[None, :]
    tl.store(out + at, sums.to(out.dtype.element_ty))
    _store_stats(stats, top, total, head, heads, splits)


@triton.jit
def _codes(
    codes, words, first: tl.constexpr, width: tl.constexpr, group: tl.constexpr,
    block: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """e4m3 codes [block, width] from dim `first` on, times their groups' scales.

    `words` are a row's scale bytes. Through float16 the product is exact for scales of 2^-15 to
    2^6; through float32 for all that bfloat16 has.
    """
    place = first // group + tl.arange(0, width // group)
    byte = ((words[:, None] >> (8 * place)[None, :].to(tl.int64)) & 255).to(tl.int32)
    values = codes.to(tl.float8e4nv, bitcast=True).to(tl.float16)
    if kind == tl.float16:
        scale = ((byte - 112) << 10).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        bits = tl.where(byte == 0, 1 << 22, byte << 23)  # 2^-127 is subnormal
        scale = tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
        values = values.to(tl.float32)
    values = tl.reshape(values, [block, width // group, group]) * scale[:, :, None]
    return tl.reshape(values, [block, width]).to(kind)


@triton.jit
def _piece(base, at, ok, first: tl.constexpr, width: tl.constexpr):
    """Dims first .. first + width - 1 of rows whose elements begin at `at`; zeros where not ok."""
    dim = first + tl.arange(0, width)
    return tl.load(base + at[:, None] + dim[None, :], mask=ok[:, None], other=0)


@triton.jit
def fp8_parts(
    q, window, window_count,  # as in `plain_parts`
    nope,  # uint8 [M, 512]: 448 codes, 7 scales, filled up
    rope,  # bfloat16 [M, 64]
    index, valid, sink, out, stats,  # as in `plain_parts`
    scale: tl.constexpr, heads: tl.constexpr, slots: tl.constexpr, picks: tl.constexpr,
    per_row: tl.constexpr, own: tl.constexpr, splits: tl.constexpr, tile: tl.constexpr,
    block: tl.constexpr, stages: tl.constexpr, kind: tl.constexpr,
):  # fmt: skip
    """Attention to fp8 planes of V4's sizes: dims in pieces of powers of two, 256+128+64 and 64."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(2) * tile + tl.arange(0, tile)
    at_q, all_heads = (row * heads + head) * 512, head >= 0
    qa = _piece(q, at_q, all_heads, 0, 256).to(kind)
    qb = _piece(q, at_q, all_heads, 256, 128).to(kind)
    qc = _piece(q, at_q, all_heads, 384, 64).to(kind)
    qr = _piece(q, at_q, all_heads, 448, 64).to(kind)
    seen = picks if picks > 0 else tl.minimum(tl.load(valid + row), per_row)
    recent, recent_blocks, first, last = _share(window_count, seen, slots, splits, block)
    top, total = tl.full([tile], NO_SCORE, tl.float32), tl.zeros([tile], tl.float32)
    sa, sb = tl.zeros([tile, 256], tl.float32), tl.zeros([tile, 128], tl.float32)
    sc, sr = tl.zeros([tile, 64], tl.float32), tl.zeros([tile, 64], tl.float32)
    for i in tl.range(first, tl.minimum(last, recent_blocks), num_stages=stages):
        slot = i * block + tl.arange(0, block)
        ok, at = slot < recent, (row * slots + slot) * 512
        a, b = _piece(window, at, ok, 0, 256).to(kind), _piece(window, at, ok, 256, 128).to(kind)
        c, r = _piece(window, at, ok, 384, 64).to(kind), _piece(window, at, ok, 448, 64).to(kind)
        dots = tl.dot(qb, tl.trans(b), tl.dot(qa, tl.trans(a)))
        dots = tl.dot(qr, tl.trans(r), tl.dot(qc, tl.trans(c), dots))
        weights, fade, top, total = _fold(dots, ok, top, total, scale)
        w, fade = weights.to(kind), fade[:, None]
        sa, sb = tl.dot(w, a, sa * fade), tl.dot(w, b, sb * fade)
        sc, sr = tl.dot(w, c, sc * fade), tl.dot(w, r, sr * fade)
    scales = (nope + 448).to(tl.pointer_type(tl.int64))  # seven bytes and one of the fill
    for i in tl.range(tl.maximum(first, recent_blocks), last, num_stages=stages):
        entry, ok = _entries(i - recent_blocks, seen, index, valid, picks, per_row, own, block)
        at = entry * 512
        words = tl.load(scales + entry * 64, mask=ok, other=0)
        a = _codes(_piece(nope, at, ok, 0, 256), words, 0, 256, 64, block, kind)
        b = _codes(_piece(nope, at, ok, 256, 128), words, 256, 128, 64, block, kind)
        c = _codes(_piece(nope, at, ok, 384, 64), words, 384, 64, 64, block, kind)
        r = _piece(rope, entry * 64, ok, 0, 64).to(kind)
        dots = tl.dot(qb, tl.trans(b), tl.dot(qa, tl.trans(a)))
        dots = tl.dot(qr, tl.trans(r), tl.dot(qc, tl.trans(c), dots))
        weights, fade, top, total = _fold(dots, ok, top, total, scale)
        w, fade = weights.to(kind), fade[:, None]
        sa, sb = tl.dot(w, a, sa * fade), tl.dot(w, b, sb * fade)
        sc, sr = tl.dot(w, c, sc * fade), tl.dot(w, r, sr * fade)
    factor = _ends(total, top, sink, head, splits)[:, None]
    at = out + (((row * splits + tl.program_id(1)) * heads + head) * 512)[:, None]
    dtype = out.dtype.element_ty
    tl.store(at + tl.arange(0, 256)[None, :], (sa * factor).to(dtype))
    tl.store(at + 256 + tl.arange(0, 128)[None, :], (sb * factor).to(dtype))
    tl.store(at + 384 + tl.arange(0, 64)[None, :], (sc * factor).to(dtype))
    tl.store(at + 448 + tl.arange(0, 64)[None, :], (sr * factor).to(dtype))
    _store_stats(stats, top, total, head, heads, splits)


@triton.jit
def combine(
    parts,  # [B, splits, heads, dims]: sums
    stats,  # float32 [B, splits, 2, heads]: top and total
    sink,  # float32 [heads]
    out,  # bfloat16 [B, heads, dims]
    heads: tl.constexpr, dims: tl.constexpr, splits: tl.constexpr, padded: tl.constexpr,
    tile: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """`split_softmax.combine`: program (row, `tile` heads, `width` dims); `padded` is a power of
    two."""
    row, head = tl.program_id(0), tl.program_id(1) * tile + tl.arange(0, tile)
    split, dim = tl.arange(0, padded), tl.program_id(2) * width + tl.arange(0, width)
    at = stats + ((row * splits + split) * 2 * heads)[:, None] + head[None, :]
    there = (split < splits)[:, None] & (head >= 0)[None, :]
    top = tl.load(at, mask=there, other=NO_SCORE)
    total = tl.load(at + heads, mask=there, other=0.0)
    logit = tl.load(sink + head).to(tl.float32) * LOG2E
    whole = tl.maximum(tl.max(top, 0), logit)
    fade = tl.where(total > 0, tl.exp2(top - whole[None, :]), 0.0)
    all_of_it = tl.sum(total * fade, 0) + tl.exp2(logit - whole)
    at = ((row * splits + split)[:, None].to(tl.int64) * heads + head[None, :]) * dims
    mask = there[:, :, None] & (dim >= 0)[None, None, :]
    values = tl.load(parts + at[:, :, None] + dim[None, None, :], mask=mask, other=0.0)
    sums = tl.sum(values.to(tl.float32) * fade[:, :, None], 0) / all_of_it[:, None]
    at = out + (row.to(tl.int64) * heads + head)[:, None] * dims + dim[None, :]
    tl.store(at, sums.to(out.dtype.element_ty))
