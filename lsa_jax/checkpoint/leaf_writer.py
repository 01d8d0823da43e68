"""Writes one leaf through TensorStore, chunk by chunk, and the digests of its files."""

import collections
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from lsa_jax.checkpoint import layout
from lsa_jax.checkpoint.leaf import CheckpointError, LeafInfo
from lsa_jax.checkpoint.manifest import Digests, file_digest

Read = Callable[[str, int, int], np.ndarray]
"""(leaf path, start, stop) -> rows [start, stop) of the leaf's first axis."""


def write_leaf(
    directory: Path,
    info: LeafInfo,
    read: Read,
    report: Callable[[int], None],
    chunk_bytes: int,
) -> Digests:
    """Creates the zarr3 array `directory`; it is on disk when this returns.

    One chunk is written while the next is read, so a few chunks are in memory at a time; `report`
    is told the bytes of each chunk once written. Raises CheckpointError naming the leaf; no write
    goes on after an error.
    """
    chunk = layout.chunk_shape(info, chunk_bytes)
    array = _result(info, ts.open(layout.zarr_spec(directory, info, chunk)))
    # Digests of chunks come from memory, not from the disk: damage on the way there shows as well.
    digests = {"zarr.json": file_digest(directory / "zarr.json")}
    pending: collections.deque[tuple[ts.WriteFutures, int]] = collections.deque()
    try:
        for first, second, block in _blocks(info, read, chunk):
            write = array[_region(first, second, block)].write(block)
            pending.append((write, block.nbytes))
            digests[_chunk_file(first, second, chunk)] = _chunk_digest(block, chunk)
            if len(pending) > 1:
                _finish(info, pending, report)
        while pending:
            _finish(info, pending, report)
    finally:
        for write, _ in pending:
            write.exception()  # waits; what went wrong first is already on its way
    return digests


def _finish(
    info: LeafInfo,
    pending: collections.deque[tuple[ts.WriteFutures, int]],
    report: Callable[[int], None],
) -> None:
    """Waits for the oldest write."""
    write, size = pending.popleft()
    _result(info, write)
    report(size)


def _result(info: LeafInfo, future: Any) -> Any:
    """What a TensorStore future holds. ValueError is its word for a full disk, among others."""
    try:
        return future.result()
    except ValueError as why:
        raise CheckpointError(f"leaf {info.path}: cannot be written: {why}") from why


def _blocks(
    info: LeafInfo, read: Read, chunk: tuple[int, ...]
) -> Iterator[tuple[int, int, np.ndarray]]:
    """(start on axis 0, start on axis 1, elements) of every chunk, in file order."""
    for first in range(0, info.shape[0], chunk[0]):
        stop = min(first + chunk[0], info.shape[0])
        rows = read(info.path, first, stop)
        want = (stop - first, *info.shape[1:])
        if rows.shape != want or rows.dtype != info.dtype:
            problem = f"rows must be {info.dtype} {want}, got {rows.dtype} {rows.shape}"
            raise CheckpointError(f"leaf {info.path}: {problem}")
        if len(chunk) == 1:
            yield first, 0, rows
            continue
        for second in range(0, info.shape[1], chunk[1]):
            yield first, second, rows[:, second : second + chunk[1]]


def _region(first: int, second: int, block: np.ndarray) -> tuple[slice, ...]:
    starts = (first, second)[: block.ndim]
    sizes = block.shape
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=False))


def _chunk_file(first: int, second: int, chunk: tuple[int, ...]) -> str:
    """zarr3's default name of the chunk that starts at (first, second, 0, ...)."""
    grid = (first // chunk[0], second // chunk[1] if len(chunk) > 1 else 0, 0)
    zeros = (0,) * (len(chunk) - 3)
    return "/".join(("c", *map(str, (*grid, *zeros)[: len(chunk)])))


def _chunk_digest(block: np.ndarray, chunk: tuple[int, ...]) -> str:
    """Digest of the chunk file: the block's little-endian bytes, zeros where it is ragged."""
    if block.shape != chunk:
        padded = np.zeros(chunk, block.dtype)
        padded[tuple(map(slice, block.shape))] = block
        block = padded
    little = block.astype(block.dtype.newbyteorder("<"), copy=False)
    return hashlib.sha256(np.ascontiguousarray(little).view(np.uint8)).hexdigest()
