"""What a CSA layer's own indexer may pick from when part of its history is elsewhere.

A *column* is one entry that the layer can read in this step; columns are in ascending order of
entry, so that equal scores go to the earliest entry, as with everything resident.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Shaped

from lsa_jax.cache import codec
from lsa_jax.cache.state import LayerState, flat_entries


@dataclasses.dataclass(frozen=True)
class Resident:
    """One layer's columns. Lives while a step is traced.

    `entry[b, n]` is the entry in column n of row b, -1 where it must not be read. The layer's
    `entries` planes begin at entry `base[b]`, its `index_keys` planes at `key_base[b]`: new ones
    are written there. `keys` and `entries` fetch from wherever the bytes are, given the layer's
    state after this step's new entries were written.
    """

    entry: Int[Array, "B N"]
    base: Int[Array, " B"]
    key_base: Int[Array, " B"]
    keys: Callable[[LayerState], codec.Planes]  # -> [B, N, ...]
    entries: Callable[[LayerState, Int[Array, "B T k"]], codec.Planes]  # columns -> [B, T, k, ...]
    # Where the layer notes the columns that it picked, and which of them count.
    picked: list[tuple[Int[Array, "B T k"], Bool[Array, "B T k"]]] = dataclasses.field(
        default_factory=list
    )

    def visible(self, positions: Int[Array, "B T"], ratio: int) -> Bool[Array, "B T N"]:
        """Columns whose entry may be read and is complete at a position (4.4)."""
        entry = self.entry[:, None]
        return (entry >= 0) & (entry < ((positions + 1) // ratio)[..., None])


def take_entries(planes: codec.Planes, index: Int[Array, "B T k"]) -> codec.Planes:
    """Entries [B, N, ...] at indices of their own row -> [B, T, k, ...]."""
    return jax.tree.map(lambda plane: _take(plane, index), planes)


@jax.custom_vjp
def _take(plane: Shaped[Array, "B N *c"], index: Int[Array, "B T k"]) -> Shaped[Array, "B T k *c"]:
    """One plane of `take_entries`. Gradients are summed in float32: thousands of queries may have
    read the same entry."""
    return plane[jnp.arange(index.shape[0])[:, None, None], index]


def _taken(plane: Array, index: Array) -> tuple[Array, tuple[Array, Array]]:
    return _take(plane, index), (plane, index)


def _spread(kept: tuple[Array, Array], gradient: Array) -> tuple[Array, None]:
    plane, index = kept
    rows = jnp.arange(index.shape[0])[:, None, None]
    total = jnp.zeros(plane.shape, jnp.float32).at[rows, index].add(gradient.astype(jnp.float32))
    return total.astype(plane.dtype), None


_take.defvjp(_taken, _spread)


def masked(readable: Bool[Array, "B N"]) -> Resident:
    """Everything is in the layer's state; entries that are not readable are left out."""
    index = jnp.arange(readable.shape[1], dtype=jnp.int32)
    zeros = jnp.zeros((readable.shape[0],), jnp.int32)
    return Resident(
        entry=jnp.where(readable, index, -1),
        base=zeros,
        key_base=zeros,
        keys=lambda state: flat_entries(_some(state.index_keys)),
        entries=lambda state, column: take_entries(flat_entries(_some(state.entries)), column),
    )


def _some(planes: codec.Planes | None) -> codec.Planes:
    assert planes is not None
    return planes
