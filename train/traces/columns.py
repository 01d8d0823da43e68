"""Arrays on disk that grow along their first axis, with a digest: zarr3, sharded, by tensorstore.

A row is the smallest thing that is read: a chunk holds few rows, and a shard, one file, many
chunks with an index. So a small array is two files (metadata and a shard), a large one a file more
for every 16 MiB, and a row of it can be read alone. Every chunk has a checksum, which reading holds
it to. Nothing is packed: bfloat16 states and e4m3 codes hardly shrink. Other zarr readers read the
directories too.
"""

import dataclasses
import hashlib
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from lsa_jax.checkpoint.leaf import CheckpointError
from train.traces.votes import SparseRows

CHUNK_BYTES = 64 << 10
SHARD_BYTES = 16 << 20

_DTYPES = ("bfloat16", "float32", "float16", "uint8", "int32", "int64")


class TraceError(CheckpointError):
    """A trace, or a document to make one of, that cannot be used; says where, what and why."""


@dataclasses.dataclass(frozen=True)
class Column:
    """What a finished array holds: `sha256` is of its elements, C order, little-endian."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise TraceError(f"dtype must be one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        if not self.shape or not all(type(n) is int and n >= 0 for n in self.shape):
            raise TraceError(f"shape must be sizes, at least one, got {self.shape!r}")

    @property
    def numpy_dtype(self) -> np.dtype:
        """The element type in memory."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)


def _row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return max(1, math.prod(shape[1:]) * dtype.itemsize)


def _spec(path: Path) -> dict[str, Any]:
    where = os.path.abspath(path)  # the store takes no ".."
    return {"driver": "zarr3", "kvstore": {"driver": "file", "path": where}}


def _metadata(shape: tuple[int, ...], dtype: np.dtype, chunk: int, shard: int) -> dict[str, Any]:
    """Zarr metadata with `chunk` rows to a chunk and `shard` rows to a file."""
    plain = {"name": "bytes", "configuration": {"endian": "little"}}
    rest = [max(1, n) for n in shape[1:]]
    sharding = {
        "chunk_shape": [chunk, *rest],
        "codecs": [plain, {"name": "crc32c"}],
        "index_codecs": [plain, {"name": "crc32c"}],
    }
    grid = {"chunk_shape": [shard, *rest]}
    return {
        "shape": list(shape),
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }


class ColumnWriter:
    """Appends rows to a new array; at most a shard of them waits in memory."""

    def __init__(self, path: Path, dtype: np.dtype, row_shape: tuple[int, ...]) -> None:
        self.path, self.dtype, self.row_shape = path, np.dtype(dtype), row_shape
        row = _row_bytes((0, *row_shape), self.dtype)
        self._chunk = max(1, CHUNK_BYTES // row)
        self._shard = self._chunk * max(1, SHARD_BYTES // (self._chunk * row))
        self._waiting: list[np.ndarray] = []
        self._rows = self._written = 0
        self._store: ts.TensorStore | None = None
        self._digest = hashlib.sha256()

    def append(self, rows: np.ndarray) -> None:
        """Adds rows [n, *row_shape] of the array's dtype, which are copied."""
        if rows.dtype != self.dtype or rows.shape[1:] != self.row_shape:
            wanted = f"{self.dtype}[n, {', '.join(map(str, self.row_shape))}]"
            raise TraceError(f"{self.path.name} must be {wanted}, got {rows.dtype}{rows.shape}")
        rows = np.array(rows, order="C", ndmin=1)
        self._digest.update(rows.reshape(-1).view(np.uint8))
        self._rows += len(rows)
        self._waiting.append(rows)
        while self._rows - self._written >= self._shard:
            self._write(self._shard)

    def close(self) -> Column:
        """Writes what still waits. The array is complete, and fully on disk, afterwards."""
        if self._store is None or self._rows > self._written:
            self._write(self._rows - self._written)
        shape = (self._rows, *self.row_shape)
        return Column(self.dtype.name, shape, self._digest.hexdigest())

    def _write(self, count: int) -> None:
        """Moves the first `count` waiting rows into a shard of their own."""
        waiting = self._waiting or [np.zeros((0, *self.row_shape), self.dtype)]
        rows = np.concatenate(waiting) if len(waiting) > 1 else waiting[0]
        shape = (self._written + count, *self.row_shape)
        store = self._store
        if store is None:
            chunk, shard = self._chunk, self._shard
            if count < shard:  # all there will be: nothing to fill up, and a short index
                chunk = max(1, min(chunk, count))
                shard = chunk * max(1, -(-count // chunk))
            metadata = _metadata(shape, self.dtype, chunk, shard)
            # All of it is stored, zeros too: what a reader does not find is missing.
            spec = {
                **_spec(self.path),
                "metadata": metadata,
                "store_data_equal_to_fill_value": True,
            }
            store = ts.open(spec, create=True).result()
        else:
            store = store.resize(exclusive_max=shape, expand_only=True).result()
        if count:
            store[self._written : self._written + count].write(rows[:count]).result()
        self._store, self._waiting = store, [rows[count:]]
        self._written += count


class SparseWriter:
    """Sparse rows as three growing arrays: columns, values, and where each row ends."""

    def __init__(self, directory: Path, dtypes: Mapping[str, str]) -> None:
        """`dtypes` of columns, values and ends, by the names of the arrays."""
        self._columns = [ColumnWriter(directory / n, np.dtype(t), ()) for n, t in dtypes.items()]
        self._columns[2].append(np.zeros(1, np.int64))
        self._count = 0
        self.last = -1  # the highest column

    def append(self, rows: SparseRows) -> None:
        """Adds rows."""
        indices, values, pointers = self._columns
        indices.append(rows.indices.astype(np.int32))
        values.append(rows.values.astype(values.dtype))
        pointers.append(rows.pointers[1:].astype(np.int64) + self._count)
        self._count += len(rows.indices)
        self.last = max(self.last, int(rows.indices.max(initial=-1)))

    def close(self) -> dict[str, Column]:
        """Completes the arrays."""
        return {column.path.name: column.close() for column in self._columns}


def open_column(path: Path, column: Column) -> ts.TensorStore:
    """The array to read from. TraceError where it is not there or not what `column` says."""
    try:
        spec = {**_spec(path), "fill_missing_data_reads": False}
        store = ts.open(spec, read=True, open=True).result()
    except ValueError as why:
        raise _unreadable(path, why) from None
    if store.dtype.name != column.dtype or store.shape != column.shape:
        got = f"{store.dtype.name}{list(store.shape)}"
        raise TraceError(f"{path} must be {column.dtype}{list(column.shape)}, got {got}")
    return store


def read(path: Path, store: ts.TensorStore, rows: slice | np.ndarray = np.s_[:]) -> np.ndarray:
    """Rows of an open array, by a slice or by their numbers in any order."""
    try:
        return np.asarray(store.oindex[rows].read().result())
    except ValueError as why:
        raise _unreadable(path, why) from None


def damage(path: Path, column: Column) -> str | None:
    """What is wrong with an array as it is on disk, in a few words; None where it is as written."""
    try:
        store = open_column(path, column)
        found = hashlib.sha256()
        for rows in _blocks(column):
            found.update(np.ascontiguousarray(read(path, store, rows)).reshape(-1).view(np.uint8))
    except TraceError as why:
        return str(why)
    if found.hexdigest() == column.sha256:
        return None
    return f"{path} has digest {found.hexdigest()[:16]}..., wanted {column.sha256[:16]}..."


def _blocks(column: Column) -> Iterator[slice]:
    step = max(1, SHARD_BYTES // _row_bytes(column.shape, column.numpy_dtype))
    for start in range(0, column.shape[0], step):
        yield slice(start, min(start + step, column.shape[0]))


def _unreadable(path: Path, why: Exception) -> TraceError:
    """Tensorstore's errors run on; the first sentence says it."""
    reason = " ".join(str(why).split()).split(" [", 1)[0]
    return TraceError(f"{path} is missing or damaged ({reason[:200]})")
