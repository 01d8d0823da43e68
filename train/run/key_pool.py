"""Index keys on the devices: of the documents that samples come from, in pages of a pool.

A batch says which entries of which documents it is of; a step gathers their keys itself. So keys
cross to the devices once per document, not once per sample, and documents of any length share the
pool. Every device has the whole of it.
"""

import concurrent.futures
import math
from collections import OrderedDict
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, DTypeLike, Float, Int

from lsa_jax.config_checks import refusal
from train.data.corpus import Corpus
from train.data.dataset import DataConfig, Demand
from train.data.documents import load_keys
from train.data.order import SampleTable
from train.traces.trace_info import E4M3, Keys

PAGE_ENTRIES = 4096  # of a page, at most: what is uploaded at once
_AHEAD = 8  # documents that are being read, or have been, and are not on the devices yet
_READERS = 4


class KeyPlanes(NamedTuple):
    """Pages of keys: an array for each of L target layers, each of P entries a page."""

    keys: tuple[Array, ...]  # [pages, P, K] each
    scale: tuple[Array, ...]  # float32 [pages, P] each; none without scales
    table: Array  # int32 [documents, M]: pages of each document that is there


def gather(
    planes: KeyPlanes, documents: Int[Array, " B"], index: Int[Array, "B C"]
) -> tuple[list[Float[Array, "B C K"]], list[Float[Array, "B C"]] | None]:
    """Keys and scales, a layer each, of entries `index` of documents.

    Keys and scales are 0 where the index is -1. Numbers of entries in the pool are below 2^31, as
    the pool sees to; XLA itself takes wider offsets of elements where an array has more.
    """
    size, valid = planes.keys[0].shape[1], index >= 0
    entry = jnp.maximum(index, 0)
    pages = planes.table[jnp.maximum(documents, 0)]
    row = jnp.take_along_axis(pages, entry // size, axis=1) * size + entry % size

    def take(plane: Array) -> Array:
        flat = plane.reshape(-1, *plane.shape[2:])
        found = flat.at[row].get(mode="clip")
        return jnp.where(valid.reshape(valid.shape + (1,) * (found.ndim - 2)), found, 0)

    return [take(x) for x in planes.keys], [take(x) for x in planes.scale] or None


def _write(planes: KeyPlanes, page: Array, keys: Array, scale: Array | None) -> KeyPlanes:
    """The planes with a page's keys [P, L, K] and scale [P, L]."""

    def put(plane: Array, part: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(plane, part, page, 0)

    scales = () if scale is None else (scale[:, i] for i in range(scale.shape[1]))
    return planes._replace(
        keys=tuple(put(plane, keys[:, i]) for i, plane in enumerate(planes.keys)),
        scale=tuple(map(put, planes.scale, scales)),
    )


def most_pages(pages: np.ndarray, samples: np.ndarray, data: DataConfig) -> int:
    """The most pages that documents mixed at a time can have, of documents with such numbers.

    The first batch of a group may begin with samples of documents before it.
    """
    used = samples > 0
    before = math.ceil((data.batch_size - 1) / samples[used].min())
    return int(np.sort(pages[used])[::-1][: data.mixed_documents + before].sum())


class KeyPool:
    """The pool of a corpus; `planes` are what a step gathers from.

    `supply` before a batch's step puts the batch's documents into it, and those that are due. What
    it overwrites was of steps that come before: a program that is given (donated) the planes runs
    after those that read them. The same calls in all processes of a run leave the same in all.
    """

    def __init__(self, corpus: Corpus, data: DataConfig, table: SampleTable, mesh: Mesh) -> None:
        """ConfigError where it would be too small for the documents that are mixed at a time."""
        self._corpus = corpus
        first = corpus.traces[0].columns
        scaled, column = "key_scale" in first, first["keys"]
        entries = np.array([trace.entries for trace in corpus.traces], np.int64)
        self.page_entries = min(PAGE_ENTRIES, int(entries.max()))
        self._pages_of = -(-entries // self.page_entries)
        row = column.shape[2] * column.numpy_dtype.itemsize + 4 * scaled
        page_bytes = self.page_entries * len(corpus.target_layers) * row
        samples = np.bincount(table.documents, minlength=len(entries))
        needed = most_pages(self._pages_of, samples, data)
        limit = min(data.pool_bytes // page_bytes, (2**31 - 1) // self.page_entries)
        if needed > limit:
            mixed = f"the keys of data.mixed_documents={data.mixed_documents}"
            wanted = f">= {needed * page_bytes:,} bytes, {mixed} and of one more batch's"
            raise refusal("data.pool_bytes", data.pool_bytes, wanted)
        self.pages = min(limit, int(self._pages_of.sum()))
        self._free = list(range(self.pages))
        self._held: OrderedDict[int, None] = OrderedDict()  # the least recently used first
        self._table = np.zeros((len(entries), int(self._pages_of.max())), np.int32)
        self._everywhere = NamedSharding(mesh, PartitionSpec())
        self._reader = concurrent.futures.ThreadPoolExecutor(_READERS, "keys-ahead")
        self._reading: dict[int, concurrent.futures.Future[Keys]] = {}
        self._put = jax.jit(_write, donate_argnums=0, out_shardings=self._everywhere)
        dtype = E4M3 if scaled else column.numpy_dtype
        self.planes = self._empty(column.shape[2], dtype, scaled=scaled)
        self.uploads = 0

    def _empty(self, head_dim: int, dtype: DTypeLike, *, scaled: bool) -> KeyPlanes:
        shape, layers = (self.pages, self.page_entries), len(self._corpus.target_layers)

        def make() -> KeyPlanes:
            keys = tuple(jnp.zeros((*shape, head_dim), dtype) for _ in range(layers))
            scale = tuple(jnp.zeros(shape) for _ in range(scaled * layers))
            return KeyPlanes(keys, scale, jnp.zeros(self._table.shape, jnp.int32))

        return jax.jit(make, out_shardings=self._everywhere)()

    def supply(self, demand: Demand) -> None:
        """Puts what a batch needs into the pool, and what is due where there is room."""
        uploads = self.uploads
        batch, group, coming = (part.tolist() for part in demand[:3])
        kept = {*batch, *group}
        for at, document in enumerate(batch):
            self._read(batch[at:])
            self._ensure(document, kept)
        kept |= set(coming)
        if sum(int(self._pages_of[d]) for d in kept) <= self.pages:
            self._read([*(d for d in group if d not in self._held), *coming])
            for document in coming[: demand.due]:
                self._ensure(document, kept)
        if self.uploads > uploads:
            table = self._table.copy()  # which may be read later, or never copied
            table = jax.make_array_from_process_local_data(self._everywhere, table)
            self.planes = self.planes._replace(table=table)

    def _ensure(self, document: int, kept: set[int]) -> None:
        """Uploads a document that is not there, giving up others, but none of those to be kept."""
        if document in self._held:
            self._held.move_to_end(document)
            return
        self._read([document])
        keys, count = self._reading.pop(document).result(), int(self._pages_of[document])
        for other in [d for d in self._held if d not in kept]:
            if len(self._free) >= count:
                break
            del self._held[other]
            self._free += self._table[other, : self._pages_of[other]].tolist()
        pages, self._free = self._free[:count], self._free[count:]
        self._held[document] = None
        self._table[document, :count] = pages
        for at, page in enumerate(pages):
            self._upload(keys, at * self.page_entries, page)
        self.uploads += 1

    def _upload(self, keys: Keys, first: int, page: int) -> None:
        """Writes a page's entries, from `first` on."""

        def put(part: np.ndarray) -> Array:
            part = part[first : first + self.page_entries]
            if len(part) < self.page_entries:
                rest = np.zeros((self.page_entries - len(part), *part.shape[1:]), part.dtype)
                part = np.concatenate([part, rest])
            return jax.make_array_from_process_local_data(self._everywhere, part)

        scale = None if keys.scale is None else put(keys.scale)
        self.planes = self._put(self.planes, np.int32(page), put(keys.values), scale)

    def _read(self, documents: list[int]) -> None:
        """Begins to read the first few of some documents that are neither there nor being read."""
        missing = [d for d in documents if d not in self._held][:_AHEAD]
        for document in missing:
            if document not in self._reading:
                trace, layers = self._corpus.traces[document], self._corpus.target_layers
                self._reading[document] = self._reader.submit(load_keys, trace, layers)

    def close(self) -> None:
        """Ends the threads; the pool is of no use afterwards."""
        self._reader.shutdown(cancel_futures=True)
