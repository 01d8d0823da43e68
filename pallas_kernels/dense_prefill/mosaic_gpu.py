"""Hopper kernel: one query's 64 heads a program, key tiles by TMA, both products on wgmma.

The float32 result of 64 rows of 512 dims takes half the register file, so two warpgroups hold 256
dims each. Each computes all logits of a tile for itself: a third of the work more, but they never
wait for one another, and one's softmax runs beside the other's products. A third warpgroup copies.

Compressed entries and the window's are one array, the former decoded once per chunk by XLA: T * H
query rows read each of them. A tile begins at a multiple of 8 rows, a query's window anywhere: the
array has the window's entries 8 times, shifted by 0 .. 7 rows (8 KB a token, queries being 64).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_prefill import keys
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Rows

SHIFTS = 8  # rows of a swizzled block, at which copies must begin
TILE = 64  # rows of a wgmma: heads of a program, and keys of a tile
LOG2E = math.log2(math.e)


def _refusal(q: Array, window: int) -> str | None:
    heads, dims = q.shape[2:]
    if q.dtype != jnp.bfloat16:
        return f"q must be bfloat16, got {q.dtype}"
    if dims % 128 or dims > 512:
        return f"head_dim must be a multiple of 128 up to 512, got {dims}"
    if heads % TILE:
        return f"heads must be a multiple of {TILE}, got {heads}"
    return None if window else "past must have a window of at least one entry"


def _product(left: Any, right: Any, shape: tuple[int, int]) -> Any:
    """left @ right from zero."""

    def run(ref: Any) -> Any:
        plgpu.wgmma(ref, left, right)
        return ref[...]

    return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))


def _add_product(values: Array, left: Array, right: Any, interpret: bool) -> Any:
    """values + left @ right. (An accumulator that begins with values cannot be interpreted.)"""
    if interpret:
        return values + jnp.dot(left, right[...], preferred_element_type=jnp.float32)
    return pl.run_state(lambda ref: plgpu.wgmma(ref, left, right))(plgpu.ACC.init(values))


def _along(rows: Array, shape: tuple[int, ...]) -> Array:
    return jax.lax.broadcast_in_dim(rows, shape, (0,))


class _Tiles:
    """Where a program's key tiles are and which of their keys its query sees.

    Tiles of the window come first. It ends on the query, so only its first rows may not exist, and
    only its last tile has keys behind it.
    """

    def __init__(self, sizes: dict[str, int], first: Array, t: Array):
        self.window, self.base, self.stride = sizes["window"], sizes["base"], sizes["stride"]
        self.window_tiles = -(-self.window // TILE)
        position = first + t
        self.t, self.before = t, self.window - 1 - position
        visible = jax.lax.div(position + 1, jnp.int32(sizes["ratio"]))
        self.limit = jnp.minimum(visible, sizes["entries"])
        self.count = self.window_tiles + jax.lax.div(self.limit + TILE - 1, jnp.int32(TILE))

    def row(self, c: Array) -> Array:
        """The array's row that tile c begins at."""
        shift = jax.lax.rem(self.t + 1, jnp.int32(SHIFTS))
        near = self.base + shift * self.stride + self.t + 1 - shift + c * TILE
        row = jnp.where(c < self.window_tiles, near, (c - self.window_tiles) * TILE)
        return pl.multiple_of(row, SHIFTS)

    def seen(self, c: Array, key: Array) -> Array:
        """Whether keys `key` of tile c count."""
        near = c < self.window_tiles
        low = jnp.where(near, self.before - c * TILE, 0)
        far = self.limit - (c - self.window_tiles) * TILE
        high = jnp.where(near, self.window - c * TILE, far)
        return (key >= low) & (key < high)


def _consume(refs: Any, tiles: _Tiles, half: Array, scale: float, interpret: bool) -> Array:
    """One warpgroup's half of the result, [64, dims / 2]."""
    q_s, keys_s, sink, full, empty = refs
    slots, width = keys_s.shape[0], keys_s.shape[2] // 2
    layout = plgpu.Layout.WGMMA

    def cast(x: Array, to: Any) -> Array:
        return x if interpret else plgpu.layout_cast(x, to)

    def one(c: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, values = sums
        slot = jax.lax.rem(c, jnp.int32(slots))
        plgpu.barrier_wait(full.at[slot])
        tile = keys_s.at[slot]
        logits = _product(q_s, tile.transpose((1, 0)), (TILE, TILE))
        shape = logits.shape
        key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=layout)
        logits = jnp.where(tiles.seen(c, key), logits * (scale * LOG2E), -jnp.inf)
        new = jnp.maximum(top, jnp.max(logits, axis=1))
        before = jnp.exp2(top - new)
        weights = jnp.exp2(logits - _along(new, shape))
        total = total * before + jnp.sum(weights, axis=1)
        values = values * _along(before, values.shape)
        part = tile.at[:, pl.ds(pl.multiple_of(half * width, width), width)]
        values = _add_product(values, weights.astype(keys_s.dtype), part, interpret)
        plgpu.barrier_arrive(empty.at[slot])
        return new, total, values

    rows = layout.reduce(1)
    top = cast(plgpu.load(sink, layout=rows, optimized=False) * LOG2E, rows)
    total = cast(jnp.ones((TILE,), jnp.float32), rows)
    values = cast(jnp.zeros((TILE, width), jnp.float32), layout)
    _, total, values = jax.lax.fori_loop(0, tiles.count, one, (top, total, values))
    return values * _along(1.0 / total, values.shape)  # a division costs many instructions


def _kernel(sizes: dict[str, int], scale: float, interpret: bool, *refs: Any) -> None:
    """Grid (sequence, query and head tile); threads 0 and 1 compute, thread 2 copies."""
    q, stored, start, sink, out, q_s, keys_s, arrived, full, empty, both = refs
    parts = sizes["heads"] // TILE
    i, b, thread = (jax.lax.axis_index(name) for name in ("tile", "sequence", "thread"))
    # The last queries first: they have the most keys, and short programs fill up the end.
    t = sizes["tokens"] - 1 - jax.lax.div(i, jnp.int32(parts))
    head = jax.lax.rem(i, jnp.int32(parts)) * TILE
    row = pl.multiple_of(t * sizes["heads"] + head, TILE)
    tiles = _Tiles(sizes, start[b], t)
    slots = keys_s.shape[0]

    @pl.when(thread == 2)
    def _copy() -> None:
        plgpu.set_max_registers(40, action="decrease")
        plgpu.copy_gmem_to_smem(q.at[b, pl.ds(row, TILE)], q_s, arrived)

        def one(c: Array, carry: None) -> None:
            slot = jax.lax.rem(c, jnp.int32(slots))
            pl.when(c >= slots)(lambda: plgpu.barrier_wait(empty.at[slot]))
            part = stored.at[b, pl.ds(tiles.row(c), TILE)]
            plgpu.copy_gmem_to_smem(part, keys_s.at[slot], full.at[slot])
            return carry

        jax.lax.fori_loop(0, tiles.count, one, None)

    @pl.when(thread < 2)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(arrived)
        inputs = (q_s, keys_s, sink.at[pl.ds(head, TILE)], full, empty)
        result = _consume(inputs, tiles, thread, scale, interpret)
        plgpu.barrier_arrive(both)  # neither reads the queries any more
        plgpu.barrier_wait(both)
        width = sizes["dims"] // 2
        q_s[:, pl.ds(pl.multiple_of(thread * width, width), width)] = result.astype(q_s.dtype)
        plgpu.commit_smem()
        plgpu.barrier_arrive(both)
        plgpu.barrier_wait(both)

        @pl.when(thread == 0)
        def _store() -> None:
            plgpu.copy_smem_to_gmem(q_s, out.at[b, pl.ds(row, TILE)])
            plgpu.wait_smem_to_gmem(0)


def _stored(
    past: Float[Array, "B W c"],
    kv: Float[Array, "B T c"],
    start: Int[Array, " B"],
    rows: Rows | None,
    group: int,
) -> tuple[Float[Array, "B n c"], dict[str, int]]:
    """Entries and the window's shifted copies in one array, and where in it they are."""
    window, entries, dtype = past.shape[1], keys.count(rows), jnp.bfloat16
    raw = keys.loud(keys.existing(keys.band(past, kv, 0, dtype), start, window))
    stride = raw.shape[1] + TILE + -raw.shape[1] % SHIFTS
    raw = jnp.pad(raw, ((0, 0), (0, stride + SHIFTS - raw.shape[1]), (0, 0)))
    parts = [raw[:, shift : shift + stride] for shift in range(SHIFTS)]
    if rows is not None and entries:
        parts = [keys.plain(rows, kv.shape[-1], group, dtype, TILE), *parts]
    stored = jnp.concatenate(parts, axis=1)
    base = stored.shape[1] - SHIFTS * stride
    return stored, {"window": window, "entries": entries, "base": base, "stride": stride}


def _scratch(dims: int, slots: int) -> list[Any]:
    """Queries and key tiles; barriers: queries here, a tile here, a tile read, both here."""
    tiling: Any = plgpu.TilingTransform
    swizzle: Any = plgpu.SwizzleTransform
    tiled = (tiling((SHIFTS, 64)), swizzle(128))
    return [
        plgpu.SMEM((TILE, dims), jnp.bfloat16, transforms=tiled),
        plgpu.SMEM((slots, TILE, dims), jnp.bfloat16, transforms=tiled),
        plgpu.Barrier(),
        plgpu.Barrier(num_barriers=slots),
        plgpu.Barrier(num_arrivals=2, num_barriers=slots),
        plgpu.Barrier(num_arrivals=2),
    ]


@functools.partial(
    jax.jit, static_argnames=("ratio", "scale", "group", "slots", "interpret"), inline=True
)
def dense_prefill(
    q: Float[Array, "B T H c"],
    past: Float[Array, "B W c"],
    kv: Float[Array, "B T c"],
    start: Int[Array, " B"],
    rows: Rows | None,
    sink: Float[Array, " H"],
    *,
    ratio: int,
    scale: float,
    group: int,
    slots: int = 2,
    interpret: bool = False,
) -> Float[Array, "B T H c"]:
    """See the package's `dense_prefill`. `slots` is key tiles in flight."""
    batch, tokens, heads, dims = q.shape
    why = _refusal(q, past.shape[1])
    if why:
        raise Unsupported(why)
    stored, where = _stored(past, kv, start, rows, group)
    sizes = where | {"tokens": tokens, "heads": heads, "dims": dims, "ratio": ratio}
    kernel = plgpu.kernel(
        functools.partial(_kernel, sizes, scale, interpret),
        out_type=jax.ShapeDtypeStruct((batch, tokens * heads, dims), q.dtype),
        grid=(batch, tokens * heads // TILE),  # only the last axis may exceed 65,535
        grid_names=("sequence", "tile"),
        num_threads=3,
        thread_name="thread",
        scratch_types=_scratch(dims, slots),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, approx_math=True
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="dense_prefill",
    )
    flat = q.reshape(batch, tokens * heads, dims)
    return kernel(flat, stored, start, sink.astype(jnp.float32)).reshape(q.shape)
