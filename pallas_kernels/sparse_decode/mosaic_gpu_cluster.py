"""PTX by which a cluster's blocks combine what they have of a row, each some of its heads.

As in `mosaic_gpu_ptx`; a block has averages over its keys, in bfloat16 as shared-memory tiles, and
their softmax's tops (in base 2) and totals.
"""

_GIVEN = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
# What was read has been stored by then, and nothing was written that others read.
_TAKEN = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n"
_REGISTERS = """
.reg .b32 t, rank, head, piece, at, d, x, w<4>, lo, hi, to, part<{0}>, stat<{0}>;
.reg .f32 top<{0}>, total<{0}>, m, z, f, l, h, a<8>;
.reg .b64 g;
mov.u32 t, %tid.x;
mov.u32 rank, %cluster_ctarank;
"""
# A thread's head and its 16 bytes of the dims.
_HEAD = """
shr.u32 head, t, 6;
mad.lo.u32 head, rank, {share}, head;
add.u32 head, head, {first};
and.b32 piece, t, 63;
mad.wide.u32 g, head, 4, $2;
ld.global.nc.f32 m, [g];
mul.f32 z, m, 0f3FB8AA3B;
mov.f32 m, z;
"""
_TOP = """
mad.lo.u32 at, head, 4, stat{i};
ld.shared::cluster.f32 top{i}, [at];
ld.shared::cluster.f32 total{i}, [at+256];
max.f32 m, m, top{i};
"""
_TOTAL = """
sub.f32 f, top{i}, m;
ex2.approx.f32 f, f;
mul.f32 total{i}, total{i}, f;
add.f32 z, z, total{i};
"""
_PLACE = """
rcp.approx.f32 z, z;
shr.u32 x, piece, 5;
mul.lo.u32 at, x, 32768;
shr.u32 x, head, 3;
mad.lo.u32 at, x, 4096, at;
shr.u32 x, piece, 3;
and.b32 x, x, 3;
mad.lo.u32 at, x, 1024, at;
and.b32 x, head, 7;
mad.lo.u32 at, x, 128, at;
xor.b32 x, x, piece;
and.b32 x, x, 7;
mad.lo.u32 at, x, 16, at;
"""
_VALUES = """
mul.f32 f, total{i}, z;
add.u32 d, at, part{i};
ld.shared::cluster.v4.b32 {{w0, w1, w2, w3}}, [d];
"""
_PAIR = """
shl.b32 lo, w{j}, 16;
and.b32 hi, w{j}, 0xffff0000;
mov.b32 l, lo;
mov.b32 h, hi;
fma.rn.f32 a{even}, l, f, a{even};
fma.rn.f32 a{odd}, h, f, a{odd};
"""
_STORE = """
mad.lo.u32 to, head, 64, piece;
mad.wide.u32 g, to, 16, $3;
st.global.v4.b32 [g], {w0, w1, w2, w3};
"""


def combined(splits: int) -> str:
    """The output $3 [64, 512] from what `splits` blocks have at $0 (averages [2, 64, 256]) and $1
    (tops and totals, 64 each), and the sink's logits $2; by 256 threads of each."""
    out = _GIVEN + _REGISTERS.format(splits)
    for i in range(splits):
        out += f"mapa.shared::cluster.u32 part{i}, $0, {i};\n"
        out += f"mapa.shared::cluster.u32 stat{i}, $1, {i};\n"
    share = 64 // splits
    for first in range(0, share, 4):
        out += _HEAD.format(share=share, first=first)
        out += "".join(_TOP.format(i=i) for i in range(splits))
        out += "sub.f32 z, z, m;\nex2.approx.f32 z, z;\n"
        out += "".join(_TOTAL.format(i=i) for i in range(splits)) + _PLACE
        out += "".join(f"mov.f32 a{i}, 0f00000000;\n" for i in range(8))
        for i in range(splits):
            out += _VALUES.format(i=i)
            out += "".join(_PAIR.format(j=j, even=2 * j, odd=2 * j + 1) for j in range(4))
        out += "".join(f"cvt.rn.bf16x2.f32 w{j}, a{2 * j + 1}, a{2 * j};\n" for j in range(4))
        out += _STORE
    return out + _TAKEN


def met() -> str:
    """What the block's other threads do meanwhile: all meet at the cluster's barriers."""
    return 2 * _TAKEN
