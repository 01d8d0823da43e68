"""Where pages are: the host store, the device pool in front of it, and what a cycle can read."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, UInt8

from lsa_jax.lsa.boundary import Choice
from lsa_jax.lsa.devices import replicate
from lsa_jax.lsa.host_memory import HostMemory
from lsa_jax.lsa.host_store import HostStore
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.pool_map import Table, empty_pool
from lsa_jax.lsa.recall import Recall
from pallas_kernels.page_recall import reads_host_memory


class Tiers:
    """One host copy of every page, and a pool of `slots` pages on the device for all rows.

    `pages` are the resident pages of each row; `table` is what the next steps read by. On the path
    "mask" all pages are in the decode state: there is no store, and the pool is one unused slot.
    Every device of a mesh has the whole pool; the host store is one, pinned by the first of them.
    """

    def __init__(
        self,
        plan: Level2,
        *,
        rows: int,
        pages: int,
        host_limit: int,
        mesh: Mesh | None = None,
    ):
        self.plan, self.simulated, self.mesh = plan, plan.path == "mask", mesh
        self.row_count, self.row_pages = rows, pages
        device = jax.local_devices()[0] if mesh is None else mesh.local_devices[0]
        memory = HostMemory(plan.layout.shape, host_limit, device=device)
        self.store = HostStore(memory)
        alone = (mesh is None or mesh.size == 1) and reads_host_memory(device)
        self.recall = Recall(memory, in_place=memory.kind == "pinned" and alone, mesh=mesh)
        self.set_pool(1)

    def set_pool(self, slots: int) -> None:
        """An empty pool."""
        rows, pages = self.row_count, self.row_pages
        self.width = pages if self.simulated else min(slots, pages)
        if self.plan.path == "gathered":
            slots = rows * self.width
        self.slots = 1 if self.simulated else slots
        records = jnp.zeros((self.slots, *self.plan.layout.shape), jnp.uint8)
        self.records: UInt8[Array, "S r 128"] = replicate(records, self.mesh)
        self.pool = empty_pool(self.slots)
        self.pages: Bool[Array, "B P"] = jnp.zeros((rows, pages), bool)
        nothing = jnp.full((rows, self.width), -1, jnp.int32)
        self.table = Table(nothing, nothing)

    def set_rows(self, pages: int, slots: int) -> None:
        """Room for rows of `pages` pages, with the resident pages that there are."""
        kept = np.asarray(self.pages)
        self.row_pages = pages
        self.records.delete()  # the old pool and the new one are never there together
        self.set_pool(slots)
        self.pages = self.pages.at[:, : kept.shape[1]].set(kept)

    def host_rows(self, owners: Sequence[int | None]) -> np.ndarray:
        """Host row of each page of each row, int32 [B, P], -1 where there is none."""
        out = np.full((self.row_count, self.row_pages), -1, np.int32)
        for b, owner in enumerate(owners):
            if owner is not None and not self.simulated:
                rows = self.store.rows(owner)
                out[b, : len(rows)] = rows
        return out

    def generations(self) -> np.ndarray:
        """Of the host rows, with zeros up to a power of two: few shapes."""
        now = self.store.generations
        out = np.zeros(1 << max(0, len(now) - 1).bit_length(), np.int32)
        out[: len(now)] = now
        return out

    def take(self, choice: Choice) -> int:
        """Makes a choice true; returns how many pages moved.

        A recall in place follows the choice on the device before the host has read any of it.
        """
        self.records, moved = self.recall(self.records, choice.copies)
        self.pool, self.table, self.pages = choice.pool, choice.table, choice.pages
        unplaced = int(choice.unplaced)
        if unplaced:
            raise AssertionError(f"{unplaced} pages were granted that have no slot")
        return moved

    def forget(self, b: int, owner: int, *, keep: bool) -> None:
        """Ends a row's ownership."""
        if not self.simulated:
            jax.block_until_ready(self.records)  # a recall may still be reading these pages
            self.store.finish(owner, keep=keep)
        self.pages = self.pages.at[b].set(False)
        self.table = Table(self.table.pages.at[b].set(-1), self.table.slots.at[b].set(-1))
