"""Host memory for page records: uint8 [rows, record_rows, 128] in segments that programs can read.

A row holds one record and has a global id. Rows live in segments of under 2^31 bytes, so that
inside a segment a kernel's 32-bit byte offset is right, and the pool as a whole has no such bound:
a record is found by (segment, row in segment), never by a flat byte offset.

A pinned segment is one buffer known twice: as a `jax.Array` in `pinned_host` memory, which a GPU
kernel reads in place, and as a writable NumPy view, through which the host fills it. Writing below
an array that JAX takes to be immutable is sound here, because

* XLA reads an argument's buffer when a program runs and keeps no copy of it between runs;
* the array is never donated, so no program writes to the buffer or gives it back;
* the view keeps the array alive, and the array its buffer, so the pointer cannot dangle;
* nobody reads a row while it is written: one thread writes, and before it writes a row, every
  program that reads this row must have ended (`HostStore` gives out only rows that nobody owns).
"""

import ctypes
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np

from lsa_jax.config import ConfigError

Kind = Literal["auto", "pageable", "pinned"]
Device = Any  # a jax.Device; jax binds that name so that type checkers see a variable
_KINDS = ("auto", "pageable", "pinned")
_LANES = 128
_SEGMENT_END = 2**31  # kernels address a segment with signed 32-bit byte offsets
_MAX_ROWS = 2**31  # row ids are int32
_PROBE = 0x5A


# Pinned memory is taken whole, so a large segment would cost a small request many times its bytes;
# a recall launches once per segment, so a small one would cost a large request time.
SEGMENT_BYTES = 2**28


class HostLimitError(ConfigError):
    """More host memory asked for than is available; `needed` and `available` are bytes."""

    def __init__(self, what: str, *, needed: int, available: int, limit: int) -> None:
        super().__init__(
            f"{what} needs {needed} bytes of host memory, "
            f"got {available} bytes available within the limit of {limit}"
        )
        self.needed = needed
        self.available = available


@dataclasses.dataclass(frozen=True, eq=False)
class Segment:
    """One allocation, uint8 [rows, record_rows, 128]. `array` is the same memory, if pinned."""

    view: np.ndarray
    array: jax.Array | None


Allocate = Callable[[tuple[int, int, int]], Segment]


class HostMemory:
    """Rows of records in host memory that grows by segments, up to `limit_bytes`.

    All segments have `rows_per_segment` rows, but for the last below the limit, which may have
    fewer. A new row is zeros. Not thread-safe.

    Args:
      record_shape: (record_rows, 128), the bytes of one record.
      limit_bytes: never exceeded by the bytes allocated.
      kind: "pinned" memory is read by kernels in place, "pageable" is plain NumPy; "auto" is
        pinned on a GPU or TPU and pageable on a CPU.
      segment_bytes: size of a segment, rounded down to whole records; below 2^31.
      device: whose pinned memory it is; the first local one by default.
      allocate: makes a segment of a shape instead of `kind`'s own allocator.

    Raises:
      ConfigError: an argument is off, or the device has no pinned memory that can be written.
    """

    def __init__(
        self,
        record_shape: tuple[int, int],
        limit_bytes: int,
        *,
        kind: Kind = "auto",
        segment_bytes: int = SEGMENT_BYTES,
        device: Device | None = None,
        allocate: Allocate | None = None,
    ) -> None:
        _check_record_shape(record_shape)
        self.record_shape = record_shape
        self.record_nbytes = math.prod(record_shape)
        _check_sizes(self.record_nbytes, limit_bytes, segment_bytes)
        device = jax.local_devices()[0] if device is None else device
        self.kind = _resolve(kind, device)
        self.limit_bytes = limit_bytes
        self.max_rows = limit_bytes // self.record_nbytes
        self.rows_per_segment = min(segment_bytes // self.record_nbytes, self.max_rows)
        self._allocate = allocate or _allocator(self.kind, device)
        self._segments: list[Segment] = []
        self._rows = 0

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What is allocated so far. A program that reads them in place takes their arrays."""
        return tuple(self._segments)

    @property
    def rows(self) -> int:
        """Rows allocated; row ids are below it."""
        return self._rows

    @property
    def nbytes(self) -> int:
        """Bytes allocated, whether or not a row is in use."""
        return self._rows * self.record_nbytes

    def grow(self, rows: int) -> None:
        """Allocates whole segments until there are at least `rows` rows.

        Raises:
          HostLimitError: `rows` would pass the limit; nothing was allocated.
          ConfigError: the system refused a segment; those before it stay.
        """
        if rows > self.max_rows:
            more, room = rows - self._rows, self.max_rows - self._rows
            size = self.record_nbytes
            raise HostLimitError(
                f"growing to {rows} pages",
                needed=more * size,
                available=room * size,
                limit=self.limit_bytes,
            )
        while self._rows < rows:
            count = min(self.rows_per_segment, self.max_rows - self._rows)
            self._segments.append(self._allocated((count, *self.record_shape)))
            self._rows += count

    def locate(self, row_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Row ids, int [n] -> segment, and row in that segment, both int32 [n]."""
        return np.divmod(self._checked(row_ids), np.int32(self.rows_per_segment))

    def write(self, row_ids: np.ndarray, records: np.ndarray) -> None:
        """Copies records, uint8 [n, record_rows, 128], into rows [n]."""
        self._check_records("records", records, len(row_ids))
        for part, view, rows in self._runs(row_ids):
            view[rows] = records[part]

    def read(self, row_ids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copies rows [n] into `out`, or a new array: uint8 [n, record_rows, 128], C-contiguous.

        One gather for every run of ids in the same segment: for sorted ids, one per segment.
        """
        shape = (len(row_ids), *self.record_shape)
        out = np.empty(shape, np.uint8) if out is None else out
        self._check_records("out", out, len(row_ids))
        for part, view, rows in self._runs(row_ids):
            # The ids are in range; with mode="raise" NumPy would gather into a buffer of its own.
            view.take(rows, axis=0, out=out[part], mode="clip")
        return out

    def read_parts(self, row_ids: np.ndarray, parts: Sequence[slice]) -> np.ndarray:
        """Those record rows of rows [n], one slice after the other: uint8 [n, r, 128]."""
        sizes = [part.stop - part.start for part in parts]
        out = np.empty((len(row_ids), sum(sizes), _LANES), np.uint8)
        for where, view, rows in self._runs(row_ids):
            at = 0
            for part, size in zip(parts, sizes, strict=True):
                out[where, at : at + size] = view[rows, part]
                at += size
        return out

    def _runs(self, row_ids: np.ndarray) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
        """Cuts ids where the segment changes: (their place in `row_ids`, segment, rows in it)."""
        segment, row = self.locate(row_ids)
        (ends,) = (segment[1:] != segment[:-1]).nonzero()
        bounds = [0, *(ends + 1).tolist(), len(row)] if len(row) else []
        for start, stop in itertools.pairwise(bounds):
            part = slice(start, stop)
            yield part, self._segments[segment[start]].view, row[part]

    def _allocated(self, shape: tuple[int, int, int]) -> Segment:
        try:
            return self._allocate(shape)
        except (MemoryError, jax.errors.JaxRuntimeError) as why:
            detail = str(why).partition("\n")[0]
            raise ConfigError(
                f"host memory must have room for {math.prod(shape)} bytes more after "
                f"{self.nbytes} of {self.limit_bytes}, but the system refused: {detail}"
            ) from why

    def _checked(self, row_ids: np.ndarray) -> np.ndarray:
        ids = np.asarray(row_ids)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise ConfigError(f"row ids must be integers [n], got {ids.dtype.name} {ids.shape}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self._rows:
            wanted = f"in [0, {self._rows}), the rows allocated"
            raise ConfigError(f"row ids must be {wanted}, got {ids.min()} to {ids.max()}")
        return ids.astype(np.int32, copy=False)

    def _check_records(self, name: str, records: np.ndarray, count: int) -> None:
        wanted = (count, *self.record_shape)
        if records.dtype != np.uint8 or records.shape != wanted:
            got = f"{records.dtype.name} {records.shape}"
            raise ConfigError(f"{name} must be uint8 {wanted}, got {got}")


def _check_record_shape(shape: tuple[int, int]) -> None:
    if len(shape) != 2 or shape[0] < 1 or shape[1] != _LANES:
        raise ConfigError(f"record_shape must be (rows, {_LANES}) with rows >= 1, got {shape}")


def _check_sizes(record: int, limit: int, segment: int) -> None:
    if not record <= segment < _SEGMENT_END:
        wanted = f"at least a record of {record} bytes and below {_SEGMENT_END}"
        raise ConfigError(f"segment_bytes must be {wanted}, got {segment}")
    if not record <= limit < record * _MAX_ROWS:
        wanted = f"at least a record of {record} bytes and below {_MAX_ROWS} of them"
        raise ConfigError(f"limit_bytes must be {wanted}, got {limit}")


def _resolve(kind: Kind, device: Device) -> Literal["pageable", "pinned"]:
    if kind not in _KINDS:
        raise ConfigError(f"kind must be one of {_KINDS}, got {kind!r}")
    if kind == "auto":
        kind = "pageable" if device.platform == "cpu" else "pinned"
    kinds = {memory.kind for memory in device.addressable_memories()}
    if kind == "pinned" and "pinned_host" not in kinds:
        wanted = "a device with pinned_host memory (kind 'pageable' needs none)"
        raise ConfigError(f"kind 'pinned' must have {wanted}, got {device} with {sorted(kinds)}")
    return kind


def _allocator(kind: Literal["pageable", "pinned"], device: Device) -> Allocate:
    if kind == "pageable":
        return lambda shape: Segment(np.zeros(shape, np.uint8), None)
    return lambda shape: _allocate_pinned(shape, device)


def _allocate_pinned(shape: tuple[int, int, int], device: Device) -> Segment:
    """A pinned array and its writable view; the module's docstring says why this is sound."""
    sharding = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    # On a CPU the array may take over the zeros' memory; nobody else holds them.
    array = jax.device_put(np.zeros(shape, np.uint8), sharding).block_until_ready()
    buffer: Any = (ctypes.c_uint8 * math.prod(shape)).from_address(array.unsafe_buffer_pointer())
    buffer.array = array  # the view holds the buffer object, which now holds the array
    view = np.frombuffer(buffer, np.uint8).reshape(shape)
    _check_same_memory(view, array)
    return Segment(view, array)


def _check_same_memory(view: np.ndarray, array: jax.Array) -> None:
    """Two writes must both be seen: an array that copies at its first read sees only one."""
    for corner in ((0, 0, 0), (-1, -1, -1)):
        view[corner] = _PROBE
        seen = np.asarray(array)[corner]
        view[corner] = 0
        if seen != _PROBE:
            wanted = f"its array to see {_PROBE} written through its view"
            raise ConfigError(f"pinned memory must allow {wanted}, got {seen}: use 'pageable'")
