"""A session's arrays on several devices, and how the host's bytes reach all of them.

Weights are split by `lsa_jax.shardings`. Decode state, pool and tables are the same on every
device: one KV head cannot be split (10.3), and every device reads every resident page. The data
axis must be 1, for rows share one pool. Without a mesh all of this is the default device.
"""

import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, UInt8

from lsa_jax.config import ConfigError


def check_mesh(mesh: Mesh | None) -> None:
    """Refuses a mesh that would split rows."""
    if mesh is not None and mesh.shape["data"] != 1:
        raise ConfigError(f"mesh must have a data axis of 1, got {dict(mesh.shape)}")


def using(mesh: Mesh | None) -> contextlib.AbstractContextManager[object]:
    """Traces what is within for these devices: kernels ask how many there are."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def everywhere(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def replicate[T](tree: T, mesh: Mesh | None) -> T:
    """Arrays on every device of a mesh; those that are stay as they are."""
    return tree if mesh is None else jax.device_put(tree, everywhere(mesh))


def send(pages: np.ndarray, mesh: Mesh | None) -> UInt8[Array, "n r 128"]:
    """Pages of the host, uint8 [n, r, 128], on every device; each byte leaves the host once.

    Every device of a mesh receives an equal share of the bytes and passes it on to the others.
    """
    if mesh is None:
        return jnp.asarray(pages)
    rows = pages.reshape(-1, pages.shape[-1])
    if odd := -len(rows) % mesh.size:
        rows = np.pad(rows, ((0, odd), (0, 0)))
    shares = jax.device_put(rows, NamedSharding(mesh, PartitionSpec(mesh.axis_names)))
    return _gather(shares, everywhere(mesh), pages.shape)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _gather(shares: Array, whole: NamedSharding, shape: tuple[int, ...]) -> Array:
    rows = jax.lax.with_sharding_constraint(shares, whole)
    return rows[: math.prod(shape[:-1])].reshape(shape)
