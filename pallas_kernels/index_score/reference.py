"""The definition in plain XLA, in blocks of keys so that per-head dot products stay bounded."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

DECODE_BLOCK_BYTES = 32 << 20  # per-head dot products held at once for one query a row,
CHUNK_BLOCK_BYTES = 1 << 30  # and for many: large enough to keep a GPU busy
BLOCK_MULTIPLE = 128  # keys in a block come in multiples of this, for the matrix units


class Keys(NamedTuple):
    """Keys [B, N, K] with scales [B, N], or, with a table [B, pages], a pool of pages [S, P, K]."""

    values: Array
    scale: Array | None
    table: Array | None

    @property
    def page(self) -> int:
        """Keys that are fetched together: a pool's page, or one."""
        return 1 if self.table is None else self.values.shape[1]

    @property
    def count(self) -> int:
        """N."""
        return self.values.shape[1] * (1 if self.table is None else self.table.shape[1])


def rows(plane: Array, start: Int[Array, ""], count: int) -> Array:
    """Rows of axis 1. One-byte floats are cut out as bytes: CPU compilers would otherwise convert
    the whole plane first."""
    if plane.dtype.itemsize == 1:
        codes = jax.lax.bitcast_convert_type(plane, jnp.uint8)
        codes = jax.lax.dynamic_slice_in_dim(codes, start, count, axis=1)
        return jax.lax.bitcast_convert_type(codes, plane.dtype)
    return jax.lax.dynamic_slice_in_dim(plane, start, count, axis=1)


def block(
    keys: Keys, start: Int[Array, ""], count: int
) -> tuple[Float[Array, "B n K"], Float[Array, "B n"] | None, Bool[Array, "B n"]]:
    """Keys start .. start + count - 1 (whole pages), their scales, and which of them exist."""
    if keys.table is None:
        values = rows(keys.values, start, count)
        scale = None if keys.scale is None else rows(keys.scale, start, count)
        return values, scale, jnp.ones(values.shape[:2], bool)
    pages = rows(keys.table, start // keys.page, count // keys.page)
    at, batch = jnp.maximum(pages, 0), pages.shape[0]
    values = keys.values[at].reshape(batch, count, -1)
    scale = None if keys.scale is None else keys.scale[at].reshape(batch, count)
    return values, scale, jnp.repeat(pages >= 0, keys.page, axis=1)


def dots(q: Float[Array, "B T H K"], values: Float[Array, "B n K"]) -> Float[Array, "B H T n"]:
    """q . k in float32, in the order in which a matmul writes them, so that compilers turn the
    queries around and not the products."""
    exact = q.dtype == jnp.float32
    dtype = jnp.float32 if exact else jnp.bfloat16  # holds e4m3 exactly
    return jnp.einsum(
        "bhtk,bnk->bhtn",
        jnp.moveaxis(q.astype(dtype), 2, 1),
        values.astype(dtype),
        precision=jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def head_sum(d: Float[Array, "B H T n"], w: Float[Array, "B T H"]) -> Float[Array, "B T n"]:
    """sum_h w[h] * relu(d[h]).

    Head by head where queries are many: a GPU's compiler then reads the products once, where it
    writes and reads them again, turned around, for a sum over the axis.
    """
    w = jnp.moveaxis(w, 2, 1)[..., None]
    if d.shape[2] == 1:
        return jnp.sum(jax.nn.relu(d) * w, axis=1)
    return functools.reduce(jnp.add, (jax.nn.relu(d[:, h]) * w[:, h] for h in range(d.shape[1])))


def seen(
    start: Int[Array, ""], exists: Bool[Array, "B n"], lengths: Int[Array, "B T"] | None
) -> Bool[Array, "B T n"]:
    """Which keys of a block count for which query."""
    at = start + jnp.arange(exists.shape[1], dtype=jnp.int32)
    inside = True if lengths is None else at < lengths[..., None]
    return exists[:, None] & inside


def block_size(q: Array, keys: Keys, unit: int, block_bytes: int | None) -> int:
    """Keys in a block: a multiple of `unit` and, where there are enough, of BLOCK_MULTIPLE."""
    batch, tokens, heads, _ = q.shape
    # Heads may be spread over devices: then every block ends with a sum over all of them.
    few = tokens == 1 and jax.sharding.get_abstract_mesh().size in (0, 1)
    limit = block_bytes or (DECODE_BLOCK_BYTES if few else CHUNK_BLOCK_BYTES)
    most = max(1, limit // (4 * max(1, batch * tokens * heads)))
    if keys.count <= most:
        return keys.count
    even = -(-keys.count // -(-keys.count // most))  # as many blocks, of about equal size
    step = unit if unit >= BLOCK_MULTIPLE else BLOCK_MULTIPLE // unit * unit
    return min(keys.count, -(-even // step) * step)


def over_blocks(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Keys,
    lengths: Int[Array, "B T"] | None,
    unit: int,
    block_bytes: int | None,
    reduce: Callable[[Float[Array, "B T n"]], tuple[Array, ...]],
) -> tuple[Array, ...]:
    """`reduce` of every block's scores, side by side along the last axis.

    The last block begins early enough to be full: it repeats some of the one before.
    """
    size = block_size(q, keys, unit, block_bytes)

    def scores(start: Int[Array, ""]) -> tuple[Array, ...]:
        values, scale, exists = block(keys, start, size)
        score = head_sum(dots(q, values), w)
        score = score if scale is None else score * scale[:, None]
        return reduce(jnp.where(seen(start, exists, lengths), score, -jnp.inf))

    if size == keys.count:
        return scores(jnp.int32(0))

    def step(i: Int[Array, ""], out: tuple[Array, ...]) -> tuple[Array, ...]:
        start = jnp.minimum(i * size, keys.count - size)
        update = jax.lax.dynamic_update_slice_in_dim
        ratio = keys.count // out[0].shape[-1]  # keys per result: 1, or a page
        parts = scores(start)
        return tuple(update(o, p, start // ratio, -1) for o, p in zip(out, parts, strict=True))

    shapes = jax.eval_shape(scores, jnp.int32(0))
    out = tuple(jnp.zeros((*s.shape[:2], keys.count * s.shape[2] // size), s.dtype) for s in shapes)
    return jax.lax.fori_loop(0, -(-keys.count // size), step, out)


def index_score(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Float[Array, "*n K"],
    scale: Float[Array, "*n"] | None,
    lengths: Int[Array, "B T"] | None,
    table: Int[Array, "B pages"] | None,
    *,
    block_bytes: int | None = None,
) -> Float[Array, "B T N"]:
    """See the package's `index_score`."""
    all_keys = Keys(keys, scale, table)
    (out,) = over_blocks(q, w, all_keys, lengths, all_keys.page, block_bytes, lambda s: (s,))
    return out


def page_sums(
    score: Float[Array, "B T n"], threshold: float, page: int
) -> tuple[Int[Array, "B T pages"], Float[Array, "B T pages"]]:
    """Scores above the threshold, and the highest, of every page."""
    score = score.reshape(*score.shape[:2], -1, page)
    return jnp.sum(score > threshold, axis=-1, dtype=jnp.int32), jnp.max(score, axis=-1)


def pages_of(
    index_score: Callable[..., Array], *args: Any, threshold: float, page: int
) -> tuple[Int[Array, "B T pages"], Float[Array, "B T pages"]]:
    """`page_score` from a kernel's scores."""
    return page_sums(index_score(*args), threshold, page)


def page_score(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Float[Array, "*n K"],
    scale: Float[Array, "*n"] | None,
    lengths: Int[Array, "B T"] | None,
    table: Int[Array, "B pages"] | None,
    *,
    threshold: float,
    page: int,
    block_bytes: int | None = None,
) -> tuple[Int[Array, "B T pages"], Float[Array, "B T pages"]]:
    """See the package's `page_score`."""
    all_keys = Keys(keys, scale, table)
    reduce = functools.partial(page_sums, threshold=threshold, page=page)
    unit = max(page, all_keys.page)
    counts, top = over_blocks(q, w, all_keys, lengths, unit, block_bytes, reduce)
    return counts, top
