"""Products with packed fp4 weights in Triton: decoded four codes apart, two at a time.

Two neighbouring 16-bit words in a register hold codes 0 to 3 and 4 to 7 of a row. One mask takes
the same nibble of both, and one shift moves both into bfloat16's bits: exponent and mantissa end up
in its lowest exponent bits, which is 2^-126 of the value, zero and 0.5 (a subnormal) included, and
a multiplication by a power of two puts it right. So nibble j of all words is a matrix of every
fourth input from j on, already in the order that the matrix unit wants, and four products make one.
The scale is part of that power of two.
"""

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]

# A nibble s ee m in bits 0 to 3 times 2^12 + 2^6: s in bit 15, and ee m in bits 6 to 8.
NIBBLE_0 = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $1, 0x000F000F; mul.lo.u32 t, t, 4160; and.b32 $0, t, 0x81C081C0; }"
)
NIBBLE_1 = tl.constexpr(
    "{ .reg .b32 t; and.b32 t, $1, 0x00F000F0; mul.lo.u32 t, t, 260; and.b32 $0, t, 0x81C081C0; }"
)
NIBBLE_2 = tl.constexpr(
    "{ .reg .b32 t; shr.u32 t, $1, 8; and.b32 t, t, 0x000F000F; mul.lo.u32 t, t, 4160; "
    "and.b32 $0, t, 0x81C081C0; }"
)
NIBBLE_3 = tl.constexpr(  # its sign is in place
    "{ .reg .b32 s, t; shr.u32 t, $1, 6; and.b32 t, t, 0x01C001C0; and.b32 s, $1, 0x80008000; "
    "or.b32 $0, s, t; }"
)
# Weights are kept 2^-60 of what they are, so that 2^126 times a scale is a bfloat16.
SHRINK = tl.constexpr(60)
GROW = tl.constexpr(2.0**60)


@triton.jit
def nibble(words, j: tl.constexpr):
    """Codes j of int16 words, as bfloat16 times 2^-126. In assembly, for two words at once: what
    Triton makes of 16-bit shifts takes one. With one operand, or Triton decodes before it has moved
    the words to the threads that multiply, and moves four times as much."""
    if j == 0:
        asm: tl.constexpr = NIBBLE_0
    elif j == 1:
        asm: tl.constexpr = NIBBLE_1
    elif j == 2:
        asm: tl.constexpr = NIBBLE_2
    else:
        asm: tl.constexpr = NIBBLE_3
    return tl.inline_asm_elementwise(asm, "=r,r", [words], tl.bfloat16, True, 2)


@triton.jit
def fp4_product(
    x,  # bfloat16 [rows, k]; where `apart`, every fourth input together, [4, rows, k / 4]
    w,  # uint8 [n, k / 2], of one expert
    scale,  # uint8 [n, k / 32]
    row,  # int64 [block_m]
    live,
    column,  # int32 [block_n]
    first_k,
    rows: tl.constexpr,
    apart: tl.constexpr,
    n: tl.constexpr,
    k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    block_k: tl.constexpr,
    steps: tl.constexpr,
):
    """Sums [block_n, block_m] over steps * block_k inputs. Scales of 2^62 and more give NaN."""
    words: tl.constexpr = block_k // 4
    groups: tl.constexpr = block_k // 32
    word, group = tl.arange(0, words), tl.arange(0, groups)
    line = column[:, None]
    if n % block_n:  # a row beyond the last is not stored, whatever it holds
        line = tl.minimum(line, n - 1)
    codes_at = w.to(tl.pointer_type(tl.int16)) + line * (k // 4) + (first_k // 4 + word)[None, :]
    power_at = scale + line * (k // 32) + (first_k // 32 + group)[None, :]
    x_at = row[None, :] * (k // 4) + (first_k // 4 + word)[:, None]
    four_at = x.to(tl.pointer_type(tl.int64)) + x_at
    acc = tl.zeros((block_n, block_m), tl.float32)
    for i in range(steps):
        codes = tl.load(codes_at + i * words)
        power = tl.minimum(tl.load(power_at + i * groups), 127 + SHRINK + 2).to(tl.int16)
        # 2^126 scale 2^-60: the exponent's field is 127 + 126 + (power - 127) - 60.
        factor = ((power + (126 - SHRINK)) << 7).to(tl.bfloat16, bitcast=True)
        factor = tl.broadcast_to(factor[:, :, None], (block_n, groups, 8))
        factor = factor.reshape(block_n, words)
        if not apart:  # four neighbouring inputs, one for each nibble of a word
            four = tl.load(four_at + i * words, mask=live[None, :], other=0)
        for j in tl.static_range(4):
            if apart:
                xs_at = x + j * (rows * (k // 4)) + i * words
                xs = tl.load(xs_at + x_at, mask=live[None, :], other=0.0)
            else:
                xs = (four >> (16 * j)).to(tl.int16).to(tl.bfloat16, bitcast=True)
            acc = tl.dot(nibble(codes, j) * factor, xs, acc)
    return acc * GROW
