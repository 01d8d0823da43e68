"""Indexer files for tests of their readers; torch archives by hand, sound and unsound."""

import dataclasses
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config_io import load_config
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, IndexerConfig
from lsa_jax.lsa.indexer_io import save_indexer
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves

V4 = load_config("v4_flash")
MODEL = dataclasses.replace(V4, hidden_size=16, index_head_dim=64, o_groups=8)  # of the goldens
STORAGES = {"float32": "Float", "float16": "Half", "int64": "Long", "complex64": "ComplexFloat"}


def same(got, want):
    assert list(got) == list(want)
    for name, values in want.items():
        np.testing.assert_array_equal(np.asarray(got[name], np.float32), values, err_msg=name)


def refused(path, model=None, **options) -> str:
    """The one line that refuses a file; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        read_indexer(path, model, **options)
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    return message


def own_file(tmp_path, dtype=jnp.float32):
    cfg = IndexerConfig.for_model(
        MODEL,
        target_layers=(0, 3),
        n_heads=2,
        q_lora_rank=8,
        ensemble="learned",
        query_mode="fp8",
        norm_eps=5e-7,
    )
    leaves = random_leaves(cfg, jax.random.key(0), dtype)
    leaves[ENSEMBLE_LEAF] = jnp.array([0.5, -2.0], jnp.float32)
    calibration = {"threshold": [[65536, 0.5], [1048576, 0.61]], "note": "µ"}
    module = MemoryIndexer(cfg, leaves)
    save_indexer(tmp_path / "own.safetensors", module, calibration)
    return tmp_path / "own.safetensors", module, calibration


class Global:
    """Pickled as a bare name, which need not exist."""

    def __init__(self, name: str):
        self.module, _, self.attribute = name.rpartition(".")


class Call:
    """Pickled as a call of a name with arguments."""

    def __init__(self, name: str, *arguments: object):
        self.name, self.arguments = name, arguments


class Reference(tuple):
    """Pickled as a persistent id."""


class _Pickler(pickle._Pickler):
    """Python's pickler, which writes the marker classes above as opcodes."""

    def persistent_id(self, obj):
        return tuple(obj) if isinstance(obj, Reference) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            text = f"{obj.module}\n{obj.attribute}\n"
            self.write(pickle.GLOBAL + text.encode())
        elif isinstance(obj, Call):
            self.save(Global(obj.name))
            self.save(obj.arguments)
            self.write(pickle.REDUCE)
        else:
            super().save(obj, save_persistent_id)


def pickled(value: object) -> bytes:
    """A pickle in torch's protocol."""
    out = io.BytesIO()
    _Pickler(out, 2).dump(value)
    return out.getvalue()


def tensor(key: str, array: np.ndarray, **changes: object) -> Call:
    """A tensor as torch pickles it; `changes` falsify numel, offset, shape, strides or kind."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    fields = {"numel": array.size, "offset": 0, "shape": array.shape, "strides": strides}
    fields |= {"kind": STORAGES[array.dtype.name]} | changes
    storage = Global(f"torch.{fields['kind']}Storage")
    where = Reference(("storage", storage, key, "cpu", fields["numel"]))
    view = (fields["offset"], fields["shape"], fields["strides"])
    hooks = Call("collections.OrderedDict")
    return Call("torch._utils._rebuild_tensor_v2", where, *view, False, hooks)


def write_archive(
    path: Path,
    structure: bytes,
    storages: Mapping[str, bytes] = {},
    *,
    byteorder: bytes = b"little",
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """An archive as torch.save lays it out."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", structure)
        archive.writestr("archive/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_state(path: Path, arrays: Mapping[str, np.ndarray], **wrong: Mapping) -> Path:
    """A state dict; `wrong` maps a tensor's name, dots as `__`, to what `tensor` falsifies."""
    state, storages = {}, {}
    for i, (name, array) in enumerate(arrays.items()):
        state[name] = tensor(str(i), array, **wrong.get(name.replace(".", "__"), {}))
        storages[str(i)] = array.tobytes()
    return write_archive(path, pickled(state), storages)
