"""What the Hopper kernels share: one tile of 64 keys against the heads of one query.

A tile is the left operand of a wgmma, the heads are its columns, so the sum over heads is a sum
along an accumulator's rows: within a thread, then over the four threads that share a row.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Unsupported

TILE = 64  # keys a tile: the rows of one wgmma
DIM = 128
PER_KEY = plgpu.Layout.WGMMA.reduce(1)  # values of a tile's keys, as an accumulator's rows lie
PER_HEAD = plgpu.Layout.WGMMA.reduce(0)


class Call(NamedTuple):
    """The arguments of a kernel, and what its program depends on."""

    arrays: dict[str, Array]  # q, w, lengths, keys, and scale and table where there are any
    tiles: int  # tiles of keys per row of the batch

    @property
    def mma(self) -> Any:
        """The dtype of the matrix products. Hopper converts e4m3 to float16 in one instruction for
        two codes, and not to bfloat16."""
        q, keys = self.arrays["q"].dtype, self.arrays["keys"].dtype
        return q if q == keys else jnp.float16

    @property
    def converts(self) -> bool:
        """Whether keys are converted on their way to the product."""
        return self.arrays["keys"].dtype != self.mma

    @property
    def tiles_a_page(self) -> int:
        """Tiles of a pool's page."""
        return self.arrays["keys"].shape[1] // TILE


def prepare(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Float[Array, "*n K"],
    scale: Float[Array, "*n"] | None,
    lengths: Int[Array, "B T"] | None,
    table: Int[Array, "B pages"] | None,
) -> Call:
    """Checks what the kernels take. Keys that are no whole tiles are padded, which copies them."""
    kinds = (q.dtype.name, keys.dtype.name)
    takes = (("bfloat16",) * 2, ("float8_e4m3fn",) * 2, ("bfloat16", "float8_e4m3fn"))
    if kinds not in takes:
        raise Unsupported(f"q and keys must be bfloat16 or e4m3, keys no wider, got {kinds}")
    if q.shape[2] not in (64, 128) or q.shape[3] != DIM:
        raise Unsupported(f"needs 64 or 128 heads of {DIM} dims, got {q.shape[2:]}")
    if 0 in q.shape or 0 in keys.shape or (table is not None and 0 in table.shape):
        raise Unsupported(f"needs at least one of everything, got q {q.shape}, keys {keys.shape}")
    count = keys.shape[1] * (1 if table is None else table.shape[1])
    if lengths is None:
        lengths = jnp.full(q.shape[:2], count, jnp.int32)
    if table is not None and keys.shape[1] % TILE:
        raise Unsupported(f"needs pages of a multiple of {TILE} entries, got {keys.shape[1]}")
    short = -keys.shape[1] % TILE
    if short:
        keys = jnp.pad(keys, ((0, 0), (0, short), (0, 0)))
        scale = None if scale is None else jnp.pad(scale, ((0, 0), (0, short)))
        lengths = jnp.minimum(lengths, count)
    arrays = {"q": q, "w": w, "lengths": lengths, "keys": keys, "scale": scale, "table": table}
    return Call({n: x for n, x in arrays.items() if x is not None}, -(-count // TILE))


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    """Shared memory for matrices [..., 128] in the layout that wgmma reads."""
    width = 128 // jnp.dtype(dtype).itemsize  # of a swizzled row of 128 bytes
    transforms: tuple[Any, ...] = (
        plgpu.TilingTransform((8, width)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=transforms)


class Place(NamedTuple):
    """Where a tile lies: its page (or row of the batch) and first entry there, and if it exists."""

    lead: Any
    start: Any
    exists: Any


def place(call: Call, refs: dict[str, Any], batch: Any, tile: Any) -> Place:
    """Finds a tile. An absent page's is page 0: it is read and comes to nothing."""
    if "table" not in refs:
        return Place(batch, pl.multiple_of(tile * TILE, TILE), True)
    page = refs["table"][batch, lax.div(tile, call.tiles_a_page)]
    start = pl.multiple_of(lax.rem(tile, call.tiles_a_page) * TILE, TILE)
    return Place(jnp.maximum(page, 0), start, page >= 0)


def fetch(refs: dict[str, Any], at: Place, keys: Any, scale: Any, barrier: Any) -> None:
    """Starts the copies of a tile's keys and scales; `copies(call)` of them arrive."""
    rows = pl.ds(at.start, TILE)
    plgpu.copy_gmem_to_smem(refs["keys"].at[at.lead, rows], keys, barrier)
    if "scale" in refs:
        plgpu.copy_gmem_to_smem(refs["scale"].at[at.lead, rows], scale, barrier)


def copies(call: Call) -> int:
    """Copies that a tile takes."""
    return 2 if "scale" in call.arrays else 1


def scales(refs: dict[str, Any], scale: Any) -> Array | None:
    """A tile's scales as its scores lie."""
    if "scale" not in refs:
        return None
    return plgpu.load(scale, layout=PER_KEY, optimized=False)


def products(keys: Any, heads: Any, interpret: bool) -> Float[Array, "64 H"]:
    """keys [64, 128] (registers or shared memory) times heads [H, 128], in float32."""
    if interpret:  # the interpreter's wgmma takes no registers
        return jnp.dot(keys[...].astype(jnp.float32), heads[...].astype(jnp.float32).T)

    def multiply(acc: Any) -> Array:
        plgpu.wgmma(acc, keys, heads.transpose((1, 0)))
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((TILE, heads.shape[0]), jnp.float32))


def head_sum(
    dots: Float[Array, "64 H"], w: Float[Array, " H"], scale: Float[Array, "64"] | None
) -> Float[Array, "64"]:
    """scale * sum_h w[h] * relu(dots[h])."""
    weighted = jnp.maximum(dots, 0.0) * lax.broadcast_in_dim(w, dots.shape, (1,))
    total = jnp.sum(weighted, axis=1)
    return total if scale is None else total * scale


def masked(score: Float[Array, "64"], seen: Any) -> Float[Array, "64"]:
    """The scores of a tile's first `seen` keys, and -inf for the others, whatever they hold."""
    row = plgpu.broadcasted_iota(jnp.int32, (TILE,), 0, layout=PER_KEY)
    return jnp.where(row < seen, score, -jnp.inf)


def nothing() -> Float[Array, "64"]:
    """The scores of a tile that a query does not see."""
    return plgpu.layout_cast(jnp.full((TILE,), -jnp.inf, jnp.float32), PER_KEY)


def params(interpret: bool) -> Any:
    """How to run a kernel."""
    return plgpu.InterpretGPUParams() if interpret else False


def named(call: Call, refs: tuple[Any, ...]) -> dict[str, Any]:
    """A kernel's input references by name."""
    return dict(zip(call.arrays, refs, strict=True))
