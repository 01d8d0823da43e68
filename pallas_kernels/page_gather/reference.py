"""The definition in plain XLA: a gather and a scatter."""

import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8


def page_gather(pool: UInt8[Array, "S R 128"], slots: Int[Array, " M"]) -> UInt8[Array, "M R 128"]:
    """See the package's `page_gather`."""
    slots = jnp.where(slots < 0, pool.shape[0], slots)  # negative ones would count from the end
    return jnp.take(pool, slots, axis=0, mode="fill", fill_value=0)


def page_scatter(
    pool: UInt8[Array, "S R 128"], records: UInt8[Array, "M R 128"], slots: Int[Array, " M"]
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_scatter`."""
    slots = jnp.where(slots < 0, pool.shape[0], slots)
    return pool.at[slots].set(records, mode="drop")
