"""Reads the arrays of a plain pickle of torch tensors and NumPy arrays; nothing in it is executed.

`pickle.dump` of a tensor nests bytes that torch writes in its oldest format, whatever its version:
three pickles of preamble, one with a reference to a storage, one with a list of its key, the number
of elements, the elements. These are read by the same machine, with a checkpoint's names only. NumPy
arrays come in two forms, with their state set afterwards or all in one call (protocol 5).
"""

import dataclasses
import io
import math
import mmap
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lsa_jax.config_checks import shown
from lsa_jax.lsa import torch_reader
from lsa_jax.lsa.torch_pickle import (
    CHECKPOINT_NAMES,
    Name,
    PickleError,
    Stateful,
    Storage,
    StoredTensor,
    read_stream,
    require,
)
from train.traces.columns import TraceError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # with which torch's oldest format begins
_DTYPE = re.compile(r"b1|[iu][1248]|f[248]")
_BYTES = (bytes, bytearray)
_ORDERS = ("C", "F", "K")  # K: laid out in an order of axes of its own


@dataclasses.dataclass(frozen=True)
class _LoadedStorage(Storage):
    """A storage with its elements."""

    data: memoryview


class _Dtype(Stateful):
    """A NumPy element type; its byte order is set afterwards."""

    def __init__(self, code: object, *_: object) -> None:
        known = type(code) is str and _DTYPE.fullmatch(code) is not None
        require(known, f"has an array of dtype {shown(code)}, which is no number's")
        self.dtype = np.dtype(str(code))

    def set_state(self, state: object) -> None:
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        if order not in ("<", ">", "|", "="):
            raise PickleError("has a malformed dtype")
        self.dtype = self.dtype.newbyteorder(order)


class _Array(Stateful):
    """A NumPy array, whose parts are put together when the pickle has been read."""

    def __init__(
        self, data: object, dtype: object, shape: object, order: object, axes: object = None
    ) -> None:
        self.parts = (data, dtype, shape, order)
        self.axes = axes

    def set_state(self, state: object) -> None:
        require(type(state) is tuple and len(state) == 5, "has a malformed array")
        assert isinstance(state, tuple)
        _, shape, dtype, columns_first, data = state
        self.parts = (data, dtype, shape, "F" if columns_first else "C")

    def array(self) -> np.ndarray:
        """Read-only where it can be. Raises ValueError where the parts do not fit."""
        data, dtype, shape, order = self.parts
        if not isinstance(data, _BYTES) or not isinstance(dtype, _Dtype) or order not in _ORDERS:
            raise ValueError("is a malformed array")
        if not isinstance(shape, tuple) or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("is an array of malformed shape")
        want = math.prod(shape) * dtype.dtype.itemsize
        if len(data) != want:
            raise ValueError(f"must have {want} bytes for shape {shape}, got {len(data)}")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
        if order != "K":
            return array
        axes = self.axes if isinstance(self.axes, tuple) else ()
        if sorted(map(repr, axes)) != sorted(map(repr, range(array.ndim))):
            raise ValueError(f"is an array of malformed axes {shown(self.axes)}")
        return array.transpose(axes)


def _reconstruct(*_: object) -> _Array:
    return _Array(b"", None, (), "C")  # its state says the rest


def _encoded(text: object, encoding: object) -> bytes:
    """How protocols without bytes write them."""
    require(type(text) is str and encoding == "latin1", "encodes something that is not bytes")
    try:
        return str(text).encode("latin1")
    except UnicodeEncodeError:
        raise PickleError("encodes something that is not bytes") from None


def _no_bytes(*arguments: object) -> bytes:
    require(not arguments, "makes bytes from arguments")
    return b""


def _storage(data: object) -> _LoadedStorage:
    """The storage that a tensor's nested bytes hold."""
    require(isinstance(data, _BYTES), "has a tensor whose storage is not bytes")
    assert isinstance(data, _BYTES)
    stream = io.BytesIO(data)
    magic, protocol = read_stream(stream), read_stream(stream)
    known = (magic, protocol) == (_MAGIC, _PROTOCOL)
    require(known, "has a tensor whose storage is not in torch's format for it")
    system, storage, keys = (read_stream(stream) for _ in range(3))
    little = isinstance(system, dict) and system.get("little_endian") is True
    require(little, "has a tensor that is not little-endian")
    good = type(storage) is Storage and keys == [storage.key]
    require(good, "has a tensor whose storage is malformed")
    assert isinstance(storage, Storage)
    count = int.from_bytes(stream.read(8), "little")
    require(count == storage.numel, f"has a storage of {count} elements, wanted {storage.numel}")
    rest = memoryview(data)[stream.tell() :]
    return _LoadedStorage(storage.kind, storage.key, storage.numel, rest)


_NUMPY = ("numpy.core", "numpy._core")  # before NumPy 2, and since

DOCUMENT_NAMES: Mapping[str, Name] = dict(CHECKPOINT_NAMES) | {
    name: Name(name, build)
    for name, build in (
        ("torch.storage._load_from_bytes", _storage),
        ("numpy.dtype", _Dtype),
        ("numpy.ndarray", None),
        *((f"{core}.multiarray._reconstruct", _reconstruct) for core in _NUMPY),
        *((f"{core}.numeric._frombuffer", _Array) for core in _NUMPY),
        ("_codecs.encode", _encoded),
        ("builtins.bytes", _no_bytes),
        ("__builtin__.bytes", _no_bytes),
    )
}


@dataclasses.dataclass(frozen=True)
class Document:
    """The items of a pickled dictionary by their keys; arrays are made when asked for."""

    path: Path
    items: Mapping[str, object]

    def error(self, key: str, what: str) -> TraceError:
        """The error about one item; the caller raises it."""
        return TraceError(f"{self.path}: {key} {what}")

    def array(self, key: str) -> np.ndarray:
        """An item that is a tensor or an array. TraceError, naming the key, where it is not."""
        if key not in self.items:
            raise self.error(key, "is missing")
        item = self.items[key]
        if isinstance(item, StoredTensor):
            if not isinstance(item.storage, _LoadedStorage):
                raise self.error(key, "is a tensor without elements")
            where = f"{self.path}: {key}"
            return torch_reader.elements(item, item.storage.data, where)
        if not isinstance(item, _Array):
            raise self.error(key, f"must be a tensor or an array, got a {type(item).__name__}")
        try:
            return item.array()
        except ValueError as why:
            raise self.error(key, str(why)) from None


def read_document(path: Path) -> Document:
    """A pickled dictionary with string keys.

    Raises FileNotFoundError, or TraceError where the pickle is cut short or damaged, is of another
    kind of file, or names anything but tensors and arrays, none of which is ever executed.
    """
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        if size == 0:
            raise TraceError(f"{path}: is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:4] == torch_reader.ZIP_MAGIC:
                raise TraceError(f"{path}: must be a plain pickle, got an archive of torch.save")
            try:
                value = read_stream(data, DOCUMENT_NAMES)
            except PickleError as why:
                raise TraceError(f"{path}: its pickle {why}") from None
            if data.tell() != size:
                raise TraceError(f"{path}: {size - data.tell()} bytes follow its pickle")
    if not isinstance(value, dict) or not all(type(key) is str for key in value):
        raise TraceError(f"{path}: must hold a dictionary with names, got a {type(value).__name__}")
    return Document(path, value)
