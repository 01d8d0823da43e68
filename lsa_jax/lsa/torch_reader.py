"""Tensors of a torch checkpoint (`torch.save` since 1.6, a zip archive), without torch.

The archive holds `NAME/data.pkl`, the structure; `NAME/data/KEY`, the bytes of each storage,
uncompressed; and `NAME/byteorder`. The structure is read as data by `torch_pickle`; a storage is
read when a tensor in it is asked for, so the optimizer's part of a checkpoint costs nothing.
"""

import contextlib
import dataclasses
import math
import zipfile
import zlib
from collections.abc import Buffer, Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.lsa import torch_pickle
from lsa_jax.lsa.torch_pickle import StoredTensor

ZIP_MAGIC = b"PK\x03\x04"
STATE_KEY = "model_state"  # where a training checkpoint keeps the state dict

DTYPES: Mapping[str, np.dtype] = {
    "Float": np.dtype("<f4"),
    "Half": np.dtype("<f2"),
    "BFloat16": np.dtype(ml_dtypes.bfloat16),
    "Double": np.dtype("<f8"),
    "ComplexFloat": np.dtype("<c8"),
    "ComplexDouble": np.dtype("<c16"),
    "Long": np.dtype("<i8"),
    "Int": np.dtype("<i4"),
    "Short": np.dtype("<i2"),
    "Char": np.dtype("i1"),
    "Byte": np.dtype("u1"),
    "Bool": np.dtype("?"),
}


@dataclasses.dataclass(frozen=True)
class TorchFile:
    """A checkpoint's tensors by name; `root` is the archive's folder ("archive/")."""

    path: Path
    root: str
    tensors: Mapping[str, StoredTensor]

    def dtype(self, name: str) -> np.dtype:
        """Element type of a tensor."""
        return DTYPES[self.tensors[name].storage.kind]

    def read(self, name: str) -> np.ndarray:
        """A tensor's elements, contiguous. Raises CheckpointError where the archive lacks them."""
        tensor = self.tensors[name]
        storage = tensor.storage
        where = f"{self.path}: {name}"
        with _archive(self.path) as archive:
            data = _member(archive, f"{self.root}data/{storage.key}", where)
        return elements(tensor, data, where)


def elements(tensor: StoredTensor, data: Buffer, where: str) -> np.ndarray:
    """A tensor's elements, contiguous, out of the bytes of its storage.

    Raises CheckpointError, beginning with `where`, if these are not the storage's or the tensor
    reaches beyond them.
    """
    storage, dtype = tensor.storage, DTYPES[tensor.storage.kind]
    data = memoryview(data)
    want = storage.numel * dtype.itemsize
    if len(data) != want:
        got = f"got {len(data)}"
        raise CheckpointError(f"{where}: storage {storage.key} must have {want} bytes, {got}")
    steps = zip(tensor.shape, tensor.strides, strict=True)
    last = tensor.offset + sum((n - 1) * stride for n, stride in steps)
    # More elements than the storage: an expanded view, which could be of any size.
    count = math.prod(tensor.shape)
    if count and (last >= storage.numel or count > storage.numel):
        fault = f"{tensor.shape} strides {tensor.strides} offset {tensor.offset}"
        raise CheckpointError(f"{where}: {fault} do not fit a storage of {storage.numel}")
    flat = np.frombuffer(data, dtype)[tensor.offset :]
    strides = [stride * flat.itemsize for stride in tensor.strides]
    view = np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)
    return np.ascontiguousarray(view)


@contextlib.contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as why:
        reason = " ".join(str(why).split())
        raise CheckpointError(f"{path}: is cut short or damaged ({reason})") from None


def _member(archive: zipfile.ZipFile, name: str, where: str) -> bytes:
    """The bytes of a member, checked against its checksum. Compressed ones could be of any size."""
    try:
        info = archive.getinfo(name)
    except KeyError:
        raise CheckpointError(f"{where}: the archive has no {name}") from None
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
        raise CheckpointError(f"{where}: {name} must be stored as it is, not packed or encrypted")
    return archive.read(info)


def _root(archive: zipfile.ZipFile, path: Path) -> str:
    """The folder of the one data.pkl."""
    names = archive.namelist()
    found = [name for name in names if name.split("/", 1)[-1] == "data.pkl"]
    if len(found) != 1 or len(set(names)) < len(names):
        raise CheckpointError(f"{path}: must be an archive of torch.save with one data.pkl")
    return found[0].removesuffix("data.pkl")


def _named_tensors(value: object, path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict, or of the one in a training checkpoint."""
    state = value.get(STATE_KEY, value) if isinstance(value, dict) else value
    if not isinstance(state, dict):
        kind = type(state).__name__
        raise CheckpointError(f"{path}: must hold names and tensors, got a {kind}")
    others = [str(key) for key, item in state.items() if not isinstance(item, StoredTensor)]
    if others or not state:
        shown = ", ".join(sorted(others)[:8]) or "nothing"
        wanted = f"only tensors, or such a state dict under {STATE_KEY!r}"
        raise CheckpointError(f"{path}: must hold {wanted}; no tensors: {shown}")
    return {str(name): tensor for name, tensor in state.items()}


def open_torch(path: Path) -> TorchFile:
    """The tensors of a checkpoint by name: of a state dict, or of a full training checkpoint's.

    Raises CheckpointError, in one line that names the file, where it is damaged, of the other byte
    order, or names anything but tensors and plain values, none of which is ever executed.
    """
    with _archive(path) as archive:
        root = _root(archive, path)
        order = f"{root}byteorder"
        if order in archive.namelist() and _member(archive, order, str(path)) != b"little":
            raise CheckpointError(f"{path}: byteorder must be little")
        if archive.getinfo(f"{root}data.pkl").file_size > torch_pickle.MAX_PICKLE_BYTES:
            most = f"at most {torch_pickle.MAX_PICKLE_BYTES} bytes"
            raise CheckpointError(f"{path}: data.pkl must have {most}")
        pickled = _member(archive, f"{root}data.pkl", str(path))
    try:
        value = torch_pickle.read_pickle(pickled)
    except torch_pickle.PickleError as why:
        raise CheckpointError(f"{path}: its pickle {why}") from None
    return TorchFile(path, root, _named_tensors(value, path))
