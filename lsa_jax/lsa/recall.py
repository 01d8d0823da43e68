"""Recall: host rows -> slots of the device pool, by the best path that the platform has.

On a GPU a kernel reads pinned host memory in place, and the host is not in the loop. Elsewhere the
host gathers the rows into one slab, which one transfer brings to the device, or to all of a mesh.
"""

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, UInt8

from lsa_jax.lsa.devices import send
from lsa_jax.lsa.host_memory import HostMemory
from lsa_jax.lsa.pool_map import Copies
from pallas_kernels.page_recall import page_recall


class Recall:
    """Copies pages of one host memory; counts the pages and bytes that moved."""

    def __init__(self, memory: HostMemory, *, in_place: bool, mesh: Mesh | None = None):
        self.memory, self.in_place, self.mesh = memory, in_place, mesh
        self.pages = 0

    @property
    def nbytes(self) -> int:
        """Bytes recalled so far."""
        return self.pages * self.memory.record_nbytes

    def __call__(
        self, records: UInt8[Array, "S r 128"], copies: Copies
    ) -> tuple[UInt8[Array, "S r 128"], int]:
        """The pool with `copies` made, and how many those were. The pool is donated."""
        if self.in_place:
            segments = tuple(s.array for s in self.memory.segments if s.array is not None)
            if segments:  # before the first page is complete there are none, and none to copy
                records = page_recall(records, segments, copies.src, copies.dst)
            count = int(copies.count)
        else:
            count = int(copies.count)
            if count:
                records = self._from_slab(records, copies, count)
        self.pages += count
        return records, count

    def _from_slab(self, records: Array, copies: Copies, count: int) -> Array:
        size = min(1 << (count - 1).bit_length(), copies.src.shape[0])  # few shapes
        slab = np.zeros((size, *self.memory.record_shape), np.uint8)
        self.memory.read(np.asarray(copies.src)[:count], out=slab[:count])
        src = jnp.where(jnp.arange(size) < count, jnp.arange(size), -1).astype(jnp.int32)
        return page_recall(records, (send(slab, self.mesh),), src, copies.dst[:size], backend="xla")
