"""The definition in plain XLA (DeepSeek-V4 spec 3.1, 3.3, 5.1), in blocks of queries.

Memory is linear in the chunk and in the history: a block holds the entries its queries selected.
Reverse mode recomputes a block at a time.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_prefill import keys
from pallas_kernels.rows import Rows, decode

GATHERED = 1 << 16  # entries that a block gathers
QUERY_BLOCK = 128


def take(rows: Rows, index: Int[Array, "B T k"], valid: Bool[Array, "B T k"]) -> Rows:
    """Each query's entries [B, T, k, ...]; any entry where a selection is not valid."""
    index = jnp.where(valid, index, 0)

    def one(x: Array) -> Array:
        return jax.vmap(lambda plane, i: jnp.take(plane, i, axis=0, mode="clip"))(x, index)

    return jax.tree.map(one, rows)


def query_block(batch: int, tokens: int, selected: int) -> int:
    """Queries of a block."""
    return min(tokens, QUERY_BLOCK, max(1, GATHERED // (batch * selected)))


def sparse_prefill(
    q: Float[Array, "B T H c"],
    past: Float[Array, "B W c"],
    kv: Float[Array, "B T c"],
    start: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B T k"],
    valid: Bool[Array, "B T k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
) -> Float[Array, "B T H c"]:
    """See the package's `sparse_prefill`."""
    batch, tokens, _, dims = q.shape
    window = past.shape[1]
    size = query_block(batch, tokens, index.shape[-1])
    blocks = -(-tokens // size)
    raw = keys.band(past, kv, blocks * size - tokens, q.dtype)

    def attend(block: tuple[Array, Array, Array, Array]) -> Array:
        part, first, chosen, real = block
        sums = keys.first_sums(part, sink)
        sums = keys.absorb_window(sums, part, raw, start, first, window, scale)
        picked = decode(take(rows, chosen, real), dims, group, q.dtype)
        return keys.finish(keys.absorb(sums, part, picked, real, scale), q.dtype)

    firsts = jnp.arange(0, blocks * size, size)
    parts = (keys.in_blocks(x, blocks, size) for x in (q, index, valid))
    split, chosen, real = parts
    out = jax.lax.map(jax.checkpoint(attend), (split, firsts, chosen, real))
    return keys.joined(out, tokens)
