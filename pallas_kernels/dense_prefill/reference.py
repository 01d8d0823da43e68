"""The definition in plain XLA (DeepSeek-V4 spec 3.1, 3.3, 4.4), in blocks of queries and keys.

Memory is linear in the chunk and in the history: no mask or score matrix is larger than a block.
Reverse mode recomputes a block of queries at a time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.dense_prefill import keys
from pallas_kernels.rows import Rows, decode, lead_shape

QUERY_ROWS = 1 << 14  # (sequence, query, head) triples of a block
KEY_BLOCK = 1024


def _absorb_entries(
    sums: keys.Sums,
    q: Float[Array, "B T H c"],
    rows: Rows,
    limit: Int[Array, "B T 1"],
    size: int,
    scale: float,
    group: int,
) -> keys.Sums:
    """Adds each query's first `limit` entries, `size` at a time, but blocks that none sees."""

    def add(sums: keys.Sums, at: Array) -> keys.Sums:
        part = decode(keys.slice_rows(rows, at, size), q.shape[-1], group, q.dtype)
        return keys.absorb(sums, q, part, at + jnp.arange(size) < limit, scale)

    def step(sums: keys.Sums, at: Array) -> tuple[keys.Sums, None]:
        return jax.lax.cond(at < jnp.max(limit), add, lambda sums, _: sums, sums, at), None

    return jax.lax.scan(step, sums, jnp.arange(0, lead_shape(rows)[1], size))[0]


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
    query_block: int | None = None,
    key_block: int = KEY_BLOCK,
) -> Float[Array, "B T H c"]:
    """See the package's `dense_prefill`."""
    batch, tokens, heads, _ = q.shape
    window, entries = past.shape[1], keys.count(rows)
    size = query_block or min(256, max(16, QUERY_ROWS // (batch * heads)))
    size = min(size, tokens)
    blocks = -(-tokens // size)
    raw = keys.band(past, kv, blocks * size - tokens, q.dtype)
    key_block = min(key_block, entries)
    stored = keys.pad_rows(rows, key_block) if rows is not None and entries else None

    def attend(block: tuple[Array, Array]) -> Array:
        part, first = block
        sums = keys.first_sums(part, sink)
        sums = keys.absorb_window(sums, part, raw, start, first, window, scale)
        if stored is not None:
            seen = (start[:, None] + first + jnp.arange(size) + 1) // ratio
            limit = jnp.minimum(seen, entries)[..., None]
            sums = _absorb_entries(sums, part, stored, limit, key_block, scale, group)
        return keys.finish(sums, q.dtype)

    parts = (keys.in_blocks(q, blocks, size), jnp.arange(0, blocks * size, size))
    return keys.joined(jax.lax.map(jax.checkpoint(attend), parts), tokens)
