"""Page records: one page of every CSA layer as one block of bytes, the unit that moves.

A record is uint8 [rows, 128]. It holds, for each CSA layer in order, the planes of `page_entries`
entries, then those of the index keys of every layer whose keys leave the device; every plane is
filled up to whole rows (nothing to fill at V4's sizes). Host and device hold the same bytes, so
recalling a page is one copy, whatever makes it: a kernel, a DMA or NumPy.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

from lsa_jax.cache import codec
from lsa_jax.config import CacheConfig, ModelConfig

ROW = 128  # bytes


@dataclasses.dataclass(frozen=True)
class Plane:
    """Where one plane of a page lies in its record."""

    row: int  # first row of the record
    shape: tuple[int, ...]  # [page_entries, ...]
    dtype: jnp.dtype

    @property
    def nbytes(self) -> int:
        """Bytes without the fill."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def rows(self) -> int:
        """Rows of the record, fill included."""
        return -(-self.nbytes // ROW)


def _to_bytes(x: Array) -> UInt8[Array, "*n b"]:
    """The last axis as bytes, little-endian."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint8)
    return raw if x.dtype.itemsize == 1 else raw.reshape(*x.shape[:-1], -1)


def _from_bytes(raw: UInt8[Array, "*n b"], dtype: jnp.dtype) -> Array:
    if dtype.itemsize > 1:
        raw = raw.reshape(*raw.shape[:-1], -1, dtype.itemsize)
    return jax.lax.bitcast_convert_type(raw, dtype)


class RecordLayout:
    """The planes of a record. `entries[o]` and `keys[o]` are trees of `Plane` in the shape of
    `codec.Planes`, for CSA ordinal o; `keys[o]` is None where index keys stay on the device."""

    def __init__(self, cfg: ModelConfig, cache: CacheConfig, targets: Sequence[int]):
        layers = sum(kind == "csa" for kind in cfg.layer_types)
        self.page_entries, self.rows = cache.page_entries, 0
        lead = (cache.page_entries,)
        entries = functools.partial(codec.empty_entries, cfg, cache, lead)
        keys = functools.partial(codec.empty_keys, cfg, cache, lead)
        self.entries = [self._place(entries) for _ in range(layers)]
        self.keys = [None if o in targets else self._place(keys) for o in range(layers)]

    def _place(self, empty: Callable[[], codec.Planes]) -> Any:
        def place(leaf: jax.ShapeDtypeStruct) -> Plane:
            plane = Plane(self.rows, leaf.shape, jnp.dtype(leaf.dtype))
            self.rows += plane.rows
            return plane

        return jax.tree.map(place, jax.eval_shape(empty))

    @property
    def shape(self) -> tuple[int, int]:
        """Of one record."""
        return self.rows, ROW

    @property
    def nbytes(self) -> int:
        """Bytes of one record."""
        return self.rows * ROW

    def spans(self, ordinal: int) -> list[slice]:
        """The rows of a record that belong to one layer: its entries, its keys."""
        parts = (self.entries[ordinal], self.keys[ordinal])
        planes = [jax.tree.leaves(part) for part in parts if part is not None]
        return [slice(part[0].row, part[-1].row + part[-1].rows) for part in planes]

    def pack(
        self, ordinal: int, entries: codec.Planes, keys: codec.Planes | None
    ) -> UInt8[Array, "*n r 128"]:
        """One layer's pages, planes [..., page_entries, ...], as its rows of their records, those
        of `spans` one after the other. `keys` is not read where keys stay on the device."""

        def raw(plane: Plane, x: Array) -> Array:
            lead = x.shape[: x.ndim - len(plane.shape)]
            data = _to_bytes(x.reshape(*lead, -1))
            data = jnp.pad(data, [(0, 0)] * len(lead) + [(0, plane.rows * ROW - plane.nbytes)])
            return data.reshape(*lead, plane.rows, ROW)

        parts = jax.tree.leaves(jax.tree.map(raw, self.entries[ordinal], entries))
        if self.keys[ordinal] is not None:
            parts += jax.tree.leaves(jax.tree.map(raw, self.keys[ordinal], keys))
        return jnp.concatenate(parts, axis=-2)

    def unpack(
        self, ordinal: int, rows: UInt8[Array, "*n r 128"]
    ) -> tuple[codec.Planes, codec.Planes | None]:
        """The inverse of `pack`."""
        spans = self.spans(ordinal)
        entries = self._read(self.entries[ordinal], rows, spans[0].start)
        if self.keys[ordinal] is None:
            return entries, None
        skipped = spans[1].start - (spans[0].stop - spans[0].start)
        return entries, self._read(self.keys[ordinal], rows, skipped)

    def pack_pages(
        self, layers: Sequence[tuple[codec.Planes, codec.Planes | None]]
    ) -> UInt8[Array, "*n r 128"]:
        """Whole records of pages: entries and keys of every layer, as `pack` takes them."""
        packed = [self.pack(o, *planes) for o, planes in enumerate(layers)]
        ends = [self.spans(o)[0] for o in range(len(packed))]
        entries = [x[..., : e.stop - e.start, :] for x, e in zip(packed, ends, strict=True)]
        keys = [x[..., e.stop - e.start :, :] for x, e in zip(packed, ends, strict=True)]
        return jnp.concatenate(entries + keys, axis=-2)

    def keys_of(self, ordinal: int, records: UInt8[Array, "*n r 128"]) -> codec.Planes:
        """Index keys [..., page_entries, ...] of one layer out of whole records."""
        return self._read(self.keys[ordinal], records, 0)

    @staticmethod
    def _read(planes: Any, rows: UInt8[Array, "*n r 128"], first: int) -> Any:
        def read(plane: Plane) -> Array:
            at = plane.row - first
            raw = rows[..., at : at + plane.rows, :].reshape(*rows.shape[:-2], -1)
            return _from_bytes(raw[..., : plane.nbytes], plane.dtype).reshape(
                *rows.shape[:-2], *plane.shape
            )

        return jax.tree.map(read, planes)

    def take_keys(
        self, ordinal: int, records: UInt8[Array, "S r 128"], slot: Int[Array, "*n"]
    ) -> codec.Planes:
        """`keys_of` the records in these slots."""

        def read(plane: Plane) -> Array:
            start = jnp.full_like(slot, plane.row * ROW)
            raw = _gather(records, slot, start, plane.nbytes)
            return _from_bytes(raw, plane.dtype).reshape(*slot.shape, *plane.shape)

        return jax.tree.map(read, self.keys[ordinal])

    def take(
        self,
        ordinal: int,
        records: UInt8[Array, "S r 128"],
        slot: Int[Array, "*n"],
        offset: Int[Array, "*n"],
    ) -> codec.Planes:
        """Single entries of one layer: entry `offset` of the page in `slot`."""

        def read(plane: Plane) -> Array:
            size = plane.nbytes // self.page_entries
            raw = _gather(records, slot, plane.row * ROW + offset * size, size)
            return _from_bytes(raw, plane.dtype).reshape(*slot.shape, *plane.shape[1:])

        return jax.tree.map(read, self.entries[ordinal])


def _gather(
    records: UInt8[Array, "S r 128"], slot: Int[Array, "*n"], start: Int[Array, "*n"], size: int
) -> UInt8[Array, "*n b"]:
    """`size` bytes of the record in each slot, from byte `start` of it."""
    index = jnp.stack([slot, start], axis=-1)
    return jax.lax.gather(
        records.reshape(records.shape[0], -1),
        index,
        jax.lax.GatherDimensionNumbers(
            offset_dims=(index.ndim - 1,), collapsed_slice_dims=(0,), start_index_map=(0, 1)
        ),
        slice_sizes=(1, size),
        mode=jax.lax.GatherScatterMode.CLIP,
    )
