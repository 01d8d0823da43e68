"""The definition in plain XLA (DeepSeek-V4 spec 3.1): gather the picked entries, then attend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels.rows import Rows, decode


def sparse_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B k"] | None,
    valid: Bool[Array, "B k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    own: bool,
) -> Float[Array, "B H c"]:
    """See the package's `sparse_decode`."""
    dims, rows = q.shape[-1], soft.as_vectors(rows, q.shape[-1])
    recent = jnp.arange(window.shape[1]) < window_count[:, None]
    whole = soft.part(q, window, recent, scale)
    if valid.shape[1]:
        if index is not None:
            rows = _take(rows, index, own=own)
        picked = decode(rows, dims, group, q.dtype)
        whole = soft.join(whole, soft.part(q, picked, valid, scale))
    return soft.finish(whole, sink, q.dtype)


def _take(rows: Rows, index: Int[Array, "B k"], *, own: bool) -> Rows:
    """Entries [B, k, ...]. Those not valid may name no entry at all: any will do, they weigh 0.

    Each row takes its own by itself, so that a compiler can partition the batch.
    """

    def take(x: Array, index: Array) -> Array:
        return jnp.take(x, index, axis=0, mode="clip")

    if own:
        return jax.tree.map(lambda x: jax.vmap(take)(x, index), rows)
    return jax.tree.map(lambda x: take(x, index), soft.flat(rows))


def pool_index(rows: Rows, index: Int[Array, "B k"], *, own: bool) -> Int[Array, "B k"]:
    """Indices into `split_softmax.flat(rows)`."""
    if not own:
        return index
    per_row = soft.lead(rows)[1]
    return index + per_row * jnp.arange(index.shape[0], dtype=index.dtype)[:, None]
