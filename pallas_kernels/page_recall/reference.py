"""The definition in plain XLA: a gather and a scatter, for segments in device memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from pallas_kernels.dispatch import Unsupported


def page_recall(
    pool: UInt8[Array, "S R 128"],
    segments: tuple[UInt8[Array, "n R 128"], ...],
    src: Int[Array, " M"],
    dst: Int[Array, " M"],
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_recall`."""
    slots, first = pool.shape[0], 0
    for segment in segments:
        if jax.typeof(segment).memory_space == jax.memory.Space.Host:
            raise Unsupported("segments must be in device memory: stage the records there first")
        rows = src - first
        here = (rows >= 0) & (rows < segment.shape[0]) & (dst >= 0)
        records = jnp.take(segment, rows, axis=0, mode="clip")
        pool = pool.at[jnp.where(here, dst, slots)].set(records, mode="drop")
        first += segment.shape[0]
    return pool
