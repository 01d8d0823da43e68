"""What the Hopper kernel does below Pallas: 16-byte asynchronous copies of rows, and decoding.

Hopper's copy engine cannot gather, nor put single rows into the tiles that its matrix instructions
read. So a warpgroup computes addresses itself. Such a tile ("atom", 1,024 bytes) has 8 rows of 64
bfloat16; piece p (16 bytes) of row r lies at r * 128 + (p ^ r) * 16. A chunk of 64 keys of 512 dims
is [2 halves, 8 rows of atoms, 4 atoms]; warp w owns keys 16 w to 16 w + 15. In the texts `$i` are
operands, addresses of shared memory 32 bits wide; they have no loops.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.decode_hopper import steps

WARPGROUP = 128
HALF = 32768  # bytes of half of the dims of a chunk, or of 64 heads
LINE = 128  # bytes that memory gives at once
ARRIVALS = 2 * WARPGROUP  # at a chunk's barrier: every thread of the warpgroup that copies, twice
PAIRS = 8  # of a warp's rows
FIRST, SECOND = 512, 26 * 16  # bytes of a pair of rows: dims 0 to 255 of both, then the others
SECONDS = 4 * PAIRS * FIRST  # where those others begin
RAW = SECONDS + 4 * PAIRS * SECOND  # bytes of a chunk's codes and scales

_LANE = """
.reg .b32 lane, warp, x;
mov.u32 x, %tid.x;
and.b32 lane, x, 31;
shr.u32 warp, x, 5;
and.b32 warp, warp, 3;
"""
# A row's address from its number; what is not there is filled with zeros, and not read.
_ROW = """
setp.ge.s32 there, {number}, 0;
selp.b32 n, 16, 0, there;
max.s32 {number}, {number}, 0;
mad.wide.u32 at, {number}, {size}, from;
"""
# The next chunk's codes are a group; the one before it, the rotary dims, must be there.
_DECODED = f"""
cp.async.commit_group;
cp.async.wait_group 1;
fence.proxy.async.shared::cta;
mbarrier.arrive.shared.b64 _, [$4], {ARRIVALS // WARPGROUP};
"""
_ARRIVE = """
cp.async.mbarrier.arrive.noinc.shared.b64 [{barrier}];
mbarrier.arrive.shared.b64 _, [{barrier}];
"""


def posted(count: int) -> str:
    """Writes `count` numbers of rows, -1 for none, to $0: those of $5 slots, from $4 on, then from
    place $3 on the indices in $1, plus $8, that $2 calls valid, of $7 picks from the $6th on."""
    rounds = -(-count // WARPGROUP)
    regs = ".reg .b32 t, e<{0}>, i<{0}>, v<{0}>, to;\n.reg .b64 a, b;\n.reg .pred p<{0}>, w, o;\n"
    out = regs.format(rounds)
    out += f"mov.u32 t, %tid.x;\nand.b32 t, t, {WARPGROUP - 1};\nmad.lo.u32 to, t, 4, $0;\n"
    for k in range(rounds):
        out += f"""
add.s32 e{k}, t, {k * WARPGROUP};
sub.s32 i{k}, e{k}, $3;
setp.ge.s32 w, i{k}, 0;
setp.lt.and.s32 p{k}, i{k}, $7, w;
add.s32 i{k}, i{k}, $6;
mad.wide.s32 a, i{k}, 4, $1;
mad.wide.s32 b, i{k}, 1, $2;
mov.b32 v{k}, 0;
@p{k} ld.global.nc.b32 i{k}, [a];
@p{k} ld.global.nc.u8 v{k}, [b];
"""
    for k in range(rounds):
        out += f"""
setp.ne.s32 o, v{k}, 0;
add.s32 i{k}, i{k}, $8;
selp.b32 i{k}, i{k}, -1, o;
setp.lt.s32 w, e{k}, $3;
setp.lt.and.s32 o, e{k}, $5, w;
add.s32 v{k}, e{k}, $4;
selp.b32 i{k}, v{k}, i{k}, o;
setp.lt.s32 w, e{k}, {count};
@w st.shared.b32 [to+{k * WARPGROUP * 4}], i{k};
"""
    return out


def rows() -> str:
    """Starts copies of the bfloat16 rows of $2 that the list $1 names into the chunk $0; they and
    the thread arrive at the barrier $3. Two copies of a warp are a row: conflict-free."""
    out = f"{_LANE}.reg .b32 to, d, list, e<16>, n;\n.reg .b64 from, at;\n.reg .pred there;\n"
    out += """
mad.lo.u32 to, warp, 8192, $0;
shr.u32 x, lane, 3;
mad.lo.u32 to, x, 1024, to;
and.b32 x, lane, 7;
mad.lo.u32 to, x, 16, to;
mad.lo.u32 list, warp, 64, $1;
mad.wide.u32 from, lane, 16, $2;
"""
    for j in range(0, 16, 4):
        out += f"ld.shared.v4.b32 {{e{j}, e{j + 1}, e{j + 2}, e{j + 3}}}, [list+{4 * j}];\n"
    for j in range(16):
        out += _ROW.format(number=f"e{j}", size=1024)
        place = j // 8 * 4096 + j % 8 * 128
        out += f"""
xor.b32 d, to, {j % 8 * 16};
cp.async.cg.shared.global [d+{place}], [at], 16, n;
cp.async.cg.shared.global [d+{place + HALF}], [at+512], 16, n;
"""
    return out + _ARRIVE.format(barrier="$3")


def rope() -> str:
    """Starts copies of 128-byte rows of $2 that the list $1 names to the last 64 dims of the chunk
    $0, as a group."""
    out = f"{_LANE}.reg .b32 to, d, row, list, e<4>, n;\n.reg .b64 from, at;\n.reg .pred there;\n"
    out += f"""
mad.lo.u32 to, warp, 8192, $0;
shr.u32 row, lane, 3;
mad.lo.u32 to, row, 128, to;
and.b32 x, lane, 7;
mad.wide.u32 from, x, 16, $2;
xor.b32 x, x, row;
mad.lo.u32 to, x, 16, to;
add.u32 to, to, {HALF + 3 * 1024};
mad.lo.u32 list, warp, 64, $1;
mad.lo.u32 list, row, 4, list;
"""
    out += "".join(f"ld.shared.b32 e{k}, [list+{16 * k}];\n" for k in range(4))
    for k in range(4):  # rows 4 k to 4 k + 3 of the warp's
        out += _ROW.format(number=f"e{k}", size=128)
        out += f"xor.b32 d, to, {k % 2 * 64};\n"
        out += f"cp.async.cg.shared.global [d+{k // 2 * 4096 + k % 2 * 512}], [at], 16, n;\n"
    return out + "cp.async.commit_group;\n"


# Of a pair of rows a lane has the piece `lane & 3` of a group, of the row `lane >> 2 & 1`; groups
# are `lane >> 3` and four more. With both rows, the 16-byte stores of a quarter of a warp reach all
# banks. The lanes of group 7, which there is not, fetch the scales.
_PAIRS = f"""{_LANE}
.reg .b32 second, first, last, odd, list, e, n, e<{PAIRS}>;
.reg .b64 from, at;
.reg .pred there, extra, coded;
and.b32 x, lane, 3;
setp.lt.u32 coded, lane, 24;
setp.eq.u32 extra, x, 0;
or.pred extra, extra, coded;
shr.u32 odd, lane, 2;
and.b32 odd, odd, 1;
shl.b32 e, x, 4;
shr.u32 n, lane, 3;
mad.lo.u32 e, n, 64, e;
cvt.u64.u32 from, e;
add.u64 from, from, $2;
mad.lo.u32 list, warp, 64, $1;
mad.lo.u32 list, odd, 4, list;
mad.lo.u32 first, warp, {PAIRS * FIRST}, $3;
mad.lo.u32 first, lane, 16, first;
mad.lo.u32 last, warp, {PAIRS * SECOND}, $3;
add.u32 last, last, {SECONDS};
add.u32 n, odd, 24;
selp.b32 second, lane, n, coded;
mad.lo.u32 second, second, 16, last;
"""
_PAIRS += "".join(f"ld.shared.b32 e{j}, [list+{8 * j}];\n" for j in range(PAIRS))


def _pair(j: int, when: str, whenever: str) -> str:
    return (
        _ROW.format(number=f"e{j}", size=512)
        + f"{when}cp.async.cg.shared.global [first+{j * FIRST}], [at], 16, n;\n"
        + f"{whenever}cp.async.cg.shared.global [second+{j * SECOND}], [at+256], 16, n;\n"
    )


def codes() -> str:
    """Starts copies of codes and scales of rows of $2 that the list $1 names to $3, as a group."""
    pairs = "".join(_pair(j, "", "@extra ") for j in range(PAIRS))
    return _PAIRS + pairs + "cp.async.commit_group;\n"


def _decoded(word: str, pair: int, scale: str) -> str:
    """Four codes as bfloat16 in two registers: moved bits are the value times 2^-120."""
    out = ""
    for i, order in enumerate(("0x1404", "0x3424")):
        v = f"v{2 * pair + i}"
        out += f"prmt.b32 {v}, {word}, 0, {order};\n"
        out += f"shr.u32 x, {v}, 4;\nand.b32 x, x, 0x07f007f0;\n"
        out += f"and.b32 {v}, {v}, 0x80008000;\nor.b32 {v}, {v}, x;\n"
        out += f"mul.bf16x2 {v}, {v}, big;\nmul.bf16x2 {v}, {v}, {scale};\n"
    return out


def decoded() -> str:
    """Decodes the codes in $3 that this warp's copies brought, into the chunk $0, and arrives at
    the barrier $4; where $5 is not 0, starts copies of the next chunk's, that the list $1 names.

    Scales are bytes moved to bfloat16's exponent: 2^-127 counts as zero, 255 as infinity. The two
    codes that are NaN count as 480: a row that is there has none.
    """
    out = f"cp.async.wait_group 1;\nbar.warp.sync 0xffffffff;\n{_PAIRS}"
    out += f".reg .b32 to, d, y, byte, big, one, s<{PAIRS}>, w<8>, v<8>;\n.reg .pred more, m;\n"
    out += """
setp.ne.s32 more, $5, 0;
and.pred m, more, extra;
mov.b32 big, 0x7b807b80;
mad.lo.u32 to, warp, 8192, $0;
shr.u32 x, lane, 3;
mad.lo.u32 to, x, 1024, to;
mad.lo.u32 to, odd, 144, to;
add.u32 byte, last, x;
mad.lo.u32 byte, odd, 16, byte;
and.b32 x, lane, 3;
mad.lo.u32 to, x, 32, to;
"""
    for j in range(PAIRS):
        at = 24 * 16 + j * SECOND
        out += f"ld.shared.u8 s{j}, [byte+{at}];\nld.shared.u8 x, [byte+{at + 4}];\n"
        out += f"shl.b32 x, x, 23;\nshl.b32 s{j}, s{j}, 7;\nor.b32 s{j}, s{j}, x;\n"
    out += "bar.warp.sync 0xffffffff;\n"
    for j in range(PAIRS):
        out += f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [first+{j * FIRST}];\n"
        out += f"@coded ld.shared.v4.b32 {{w4, w5, w6, w7}}, [second+{j * SECOND}];\n"
        out += _pair(j, "@more ", "@m ") + f"xor.b32 d, to, {j % 4 * 32};\nxor.b32 y, d, 16;\n"
        for half, (order, when) in enumerate((("0x1010", ""), ("0x3232", "@coded "))):
            out += f"prmt.b32 one, s{j}, 0, {order};\n"
            out += "".join(_decoded(f"w{4 * half + i}", i, "one") for i in range(4))
            place = half * HALF + j // 4 * 4096 + j % 4 * 256
            out += f"{when}st.shared.v4.b32 [d+{place}], {{v0, v1, v2, v3}};\n"
            out += f"{when}st.shared.v4.b32 [y+{place}], {{v4, v5, v6, v7}};\n"
    return out + _DECODED


def waits() -> str:
    """Waits for the phase $1 of the barrier $0, for what the matrix instructions read."""
    return """.reg .pred done;
again:
mbarrier.try_wait.parity.shared.b64 done, [$0], $1;
@!done bra again;
fence.proxy.async.shared::cta;
"""


def barriers(count: int) -> str:
    """Makes the barriers $0, by all threads of the block, which then meet."""
    out = ".reg .b32 t;\n.reg .pred first;\nmov.u32 t, %tid.x;\nsetp.eq.u32 first, t, 0;\n"
    for i in range(count):
        out += f"@first mbarrier.init.shared.b64 [$0+{8 * i}], {ARRIVALS};\n"
    return out + "bar.sync 0;\n"


def nearer(picks: int) -> str:
    """Brings row $2 of the lists $0 and $1 nearer: which part of it is needed takes another fetch
    to know."""
    out = ".reg .b32 t;\n.reg .b64 a;\n.reg .pred p;\nmov.u32 t, %tid.x;\n"
    for operand, size in ((0, 4), (1, 1)):
        out += f"setp.lt.u32 p, t, {-(-picks * size // LINE)};\n"
        out += f"mad.wide.s32 a, $2, {picks * size}, ${operand};\nmad.wide.u32 a, t, {LINE}, a;\n"
        out += "@p prefetch.global.L2 [a];\n"
    return out


def counted() -> str:
    """Writes the numbers from $1 on to the list $0 of a chunk. A warp reads what it wrote alone."""
    return f"""{_LANE}.reg .b32 to, e;\n.reg .pred p;
bar.warp.sync 0xffffffff;
setp.lt.u32 p, lane, 16;
mad.lo.u32 e, warp, 16, lane;
mad.lo.u32 to, e, 4, $0;
add.s32 e, e, $1;
@p st.shared.b32 [to], e;
bar.warp.sync 0xffffffff;
"""


def run(text: str, arrays: Sequence[Any], numbers: Sequence[Any] = (), tiles: int = 0) -> None:
    """Runs a text. Operands are where the arrays begin, the first `tiles` of them tiles as
    `decode_hopper.steps` has them, then the numbers."""

    def emit(_: Any, *operands: Any) -> None:
        mgpu.utils.inline_ptx(
            "{\n" + text + "}", *map(_operand, operands), has_side_effects=True, convergent=True
        )

    kinds = [plgpu.RefType(steps.transforms() if i < tiles else ()) for i in range(len(arrays))]
    types = (*kinds, *(plgpu.Layout.WG_SPLAT for _ in numbers))
    plgpu.inline_mgpu(arg_types=types)(emit)(*arrays, *(jnp.int32(x) for x in numbers))


def _operand(x: Any) -> Any:
    if isinstance(x, mgpu.FragmentedArray):
        return x.registers.item()
    width = 32 if mgpu.utils.is_smem_ref(x) else 64
    return llvm.ptrtoint(ir.IntegerType.get_signless(width), mgpu.utils.memref_ptr(x))
