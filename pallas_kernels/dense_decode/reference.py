"""The definition in plain XLA (DeepSeek-V4 spec 3.1), a block of entries at a time."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels.rows import Rows, decode

BLOCK = 2048  # entries whose scores and decoded values exist at once


def dense_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    count: Int[Array, " B"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    block: int = BLOCK,
) -> Float[Array, "B H c"]:
    """See the package's `dense_decode`."""
    dims, n = q.shape[-1], soft.lead(rows)[1]
    rows = soft.as_vectors(rows, dims)
    recent = jnp.arange(window.shape[1]) < window_count[:, None]
    whole = soft.part(q, window, recent, scale)
    block = min(block, n)

    def step(i: Array, so_far: soft.Part) -> soft.Part:
        start = jnp.minimum(i * block, n - block)  # the last block is moved back to end with them
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, start, block, axis=1)  # noqa: E731
        entries = decode(jax.tree.map(take, rows), dims, group, q.dtype)
        at = start + jnp.arange(block)
        valid = (at >= i * block) & (at < count[:, None])
        return soft.join(so_far, soft.part(q, entries, valid, scale))

    if n == block and n:
        whole = step(jnp.int32(0), whole)
    elif n:
        # All of them, also where fewer are visible: a GPU would ask its host after each whether
        # to go on, and a mesh would have to agree on it.
        whole = jax.lax.fori_loop(0, -(-n // block), step, whole)
    return soft.finish(whole, sink, q.dtype)
