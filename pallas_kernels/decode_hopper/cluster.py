"""PTX by which a cluster's blocks combine what they have of a row, each some of its heads.

As in `ptx`; a block has averages over its keys, in bfloat16 as shared-memory tiles, and
their softmax's tops (in base 2) and totals.
"""

from typing import Any

from pallas_kernels.dispatch import Unsupported

BLOCKS = 8  # of a cluster at most
DIMS = 512  # that the texts are written for
_GIVEN = "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n"
# What was read has been stored by then; nothing was written after `_GIVEN` that others read.
_TAKEN = "barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;\n"
_REGISTERS = """
.reg .b32 t, rank, piece, at, x, lo, hi, to, part<{splits}>, stat<{splits}>, head<{rounds}>;
.reg .f32 f, l, h, m<{rounds}>, z<{rounds}>, a<8>;
.reg .b64 g;
mov.u32 t, %tid.x;
mov.u32 rank, %cluster_ctarank;
and.b32 piece, t, 63;
"""
# A round's head, and its sink.
_HEAD = """
shr.u32 x, t, 6;
mad.lo.u32 x, rank, {share}, x;
add.u32 x, x, {first};
min.u32 head{r}, x, 63;
mad.wide.u32 g, head{r}, 4, $2;
ld.global.nc.f32 m{r}, [g];
"""
# Where this thread's 16 bytes of the dims are.
_PLACE = """
shr.u32 x, piece, 5;
mul.lo.u32 at, x, 32768;
shr.u32 x, head{r}, 3;
mad.lo.u32 at, x, 4096, at;
shr.u32 x, piece, 3;
and.b32 x, x, 3;
mad.lo.u32 at, x, 1024, at;
and.b32 x, head{r}, 7;
mad.lo.u32 at, x, 128, at;
xor.b32 x, x, piece;
and.b32 x, x, 7;
mad.lo.u32 at, x, 16, at;
"""
_OWN = ".reg .b32 v{r}_{i}_<4>;\n.reg .f32 top{r}_{i}, total{r}_{i};\n"
_LOAD = """
mad.lo.u32 x, head{r}, 4, stat{i};
ld.shared::cluster.f32 top{r}_{i}, [x];
ld.shared::cluster.f32 total{r}_{i}, [x+256];
add.u32 x, at, part{i};
ld.shared::cluster.v4.b32 {{v{r}_{i}_0, v{r}_{i}_1, v{r}_{i}_2, v{r}_{i}_3}}, [x];
"""
_TOTAL = """
sub.f32 f, top{r}_{i}, m{r};
ex2.approx.f32 f, f;
mul.f32 total{r}_{i}, total{r}_{i}, f;
add.f32 z{r}, z{r}, total{r}_{i};
"""
_PAIR = """
shl.b32 lo, v{r}_{i}_{j}, 16;
and.b32 hi, v{r}_{i}_{j}, 0xffff0000;
mov.b32 l, lo;
mov.b32 h, hi;
fma.rn.f32 a{even}, l, f, a{even};
fma.rn.f32 a{odd}, h, f, a{odd};
"""
_STORE = """
mad.lo.u32 to, head{r}, 64, piece;
mad.wide.u32 g, to, 16, $3;
st.global.v4.b32 [g], {{v{r}_0_0, v{r}_0_1, v{r}_0_2, v{r}_0_3}};
"""
_AT_ONCE = 16  # rounds times blocks whose values are on their way: 96 registers


def require(splits: int, dims: int) -> None:
    """Raises Unsupported for blocks that no cluster can combine."""
    if splits > BLOCKS:
        raise Unsupported(f"needs clusters of at most {BLOCKS} blocks, got {splits}")
    if dims != DIMS:
        raise Unsupported(f"clusters need {DIMS} dims, got {dims}")


def launch(programs: int, splits: int, fused: bool) -> dict[str, Any]:
    """How `plgpu.kernel` is to run `splits` blocks for each program, as a cluster where `fused`."""
    if fused:
        across = {"cluster": (splits,), "cluster_names": ("split",)}
        return {"grid": (programs,), "grid_names": ("row",), **across}
    return {"grid": (programs, splits), "grid_names": ("row", "split")}


def combined(splits: int) -> str:
    """The output $3 [64, 512] from what `splits` blocks have at $0 (averages [2, 64, 256]) and $1
    (tops and totals, 64 each), and the sink's logits $2; by 256 threads of each.

    Each block has some heads, four at a time. Memory of other blocks is far: all of several rounds'
    loads come before the first store, which the assembler would not move them across.
    """
    share = -(-16 // splits) * 4  # what is beyond the last head computes that one again
    rounds = range(share // 4)
    out = _REGISTERS.format(splits=splits, rounds=len(rounds))
    for r in rounds:
        out += "".join(_OWN.format(r=r, i=i) for i in range(splits))
        out += _HEAD.format(r=r, share=share, first=4 * r)
    out += _GIVEN
    for i in range(splits):
        out += f"mapa.shared::cluster.u32 part{i}, $0, {i};\n"
        out += f"mapa.shared::cluster.u32 stat{i}, $1, {i};\n"
    together = max(1, _AT_ONCE // splits)
    for first in range(0, len(rounds), together):
        group = rounds[first : first + together]
        for r in group:
            out += _PLACE.format(r=r) + "".join(_LOAD.format(r=r, i=i) for i in range(splits))
        out += "".join(_joined(r, splits) for r in group)
        out += "".join(_STORE.format(r=r) for r in group)
    return out + _TAKEN


def _joined(r: int, splits: int) -> str:
    """A round's output as pairs of bfloat16, where the first block's values were."""
    out = f"mul.f32 z{r}, m{r}, 0f3FB8AA3B;\nmov.f32 m{r}, z{r};\n"
    out += "".join(f"max.f32 m{r}, m{r}, top{r}_{i};\n" for i in range(splits))
    out += f"sub.f32 z{r}, z{r}, m{r};\nex2.approx.f32 z{r}, z{r};\n"
    out += "".join(_TOTAL.format(r=r, i=i) for i in range(splits))
    out += f"rcp.approx.f32 z{r}, z{r};\n"
    out += "".join(f"mov.f32 a{i}, 0f00000000;\n" for i in range(8))
    for i in range(splits):
        out += f"mul.f32 f, total{r}_{i}, z{r};\n"
        out += "".join(_PAIR.format(r=r, i=i, j=j, even=2 * j, odd=2 * j + 1) for j in range(4))
    for j in range(4):
        out += f"cvt.rn.bf16x2.f32 v{r}_0_{j}, a{2 * j + 1}, a{2 * j};\n"
    return out


def met() -> str:
    """What the block's other threads do meanwhile: all meet at the cluster's barriers."""
    return 2 * _TAKEN
