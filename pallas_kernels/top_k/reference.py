"""The definition in plain XLA: `lax.top_k`, which takes the lower column at equal scores.

On CPUs this is 2 to 25 times as fast as finding the k-th score by counting and compacting a mask.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def seen(visible: Int[Array, " R"] | Bool[Array, "R N"], columns: int) -> Bool[Array, "R N"]:
    """Which columns are visible, from a mask or from counts."""
    return visible if visible.ndim == 2 else jnp.arange(columns) < visible[:, None]


def top_k(
    scores: Float[Array, "R N"],
    visible: Int[Array, " R"] | Bool[Array, "R N"],
    k: int,
    *,
    limit: Int[Array, " R"] | None = None,
) -> tuple[Int[Array, "R k"], Bool[Array, "R k"]]:
    """See the package's `top_k`. Places are in order of falling score."""
    columns = scores.shape[1]
    eligible = seen(visible, columns) & (scores > -jnp.inf)  # not NaN either
    # Compilers fold x + 0.0 away, which would turn -0.0 into 0.0 as well.
    order = jnp.where(eligible, jnp.where(scores == 0, 0.0, scores), -jnp.inf)
    values, index = jax.lax.top_k(order, min(k, columns))
    valid = values > -jnp.inf
    if limit is not None:
        valid &= jnp.arange(index.shape[1]) < limit[:, None]
    missing = ((0, 0), (0, k - index.shape[1]))
    return jnp.pad(jnp.where(valid, index, 0), missing), jnp.pad(valid, missing)
