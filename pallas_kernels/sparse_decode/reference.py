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
    index: Int[Array, "B k"],
    valid: Bool[Array, "B k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    own: bool,
) -> Float[Array, "B H c"]:
    """See the package's `sparse_decode`."""
    dims, index = q.shape[-1], pool_index(rows, index, own=own)
    recent = jnp.arange(window.shape[1]) < window_count[:, None]
    whole = soft.part(q, window, recent, scale)
    if index.shape[1]:
        # Entries that are not valid may name no entry at all: any will do, their weight is zero.
        take = lambda plane: jnp.take(plane, index, axis=0, mode="clip")  # noqa: E731
        pool = soft.flat(soft.as_vectors(rows, dims))
        picked = decode(jax.tree.map(take, pool), dims, group, q.dtype)
        whole = soft.join(whole, soft.part(q, picked, valid, scale))
    return soft.finish(whole, sink, q.dtype)


def pool_index(rows: Rows, index: Int[Array, "B k"], *, own: bool) -> Int[Array, "B k"]:
    """Indices into `split_softmax.flat(rows)`."""
    if not own:
        return index
    per_row = soft.lead(rows)[1]
    return index + per_row * jnp.arange(index.shape[0], dtype=index.dtype)[:, None]
