"""Torch archives that are damaged, or would execute code, are refused; nothing of them runs."""

import copyreg
import os
import pickle
import random
import zipfile

import numpy as np
import pytest

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.torch_pickle import Opaque, PickleError, read_pickle
from tests.golden.indexer_values import FOLDER, joint_values, layer_values
from tests.indexer_files import (
    Call,
    Global,
    own_file,
    pickled,
    refused,
    same,
    tensor,
    write_archive,
    write_state,
)


def test_an_archive_written_by_hand_loads(tmp_path):
    """So that the refusals below are for what each changes."""
    same(read_indexer(write_state(tmp_path / "x.pt", joint_values())).leaves, joint_values())


Q_NORM = "retrievers__l12__q_norm_weight"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"numel": 5}, "storage 1 must have 20 bytes, got 16"),
        ({"numel": 3}, "storage 1 must have 12 bytes, got 16"),
        ({"offset": 1}, "do not fit a storage of 4"),
        ({"strides": (2,)}, "strides (2,) offset 0 do not fit a storage of 4"),
        ({"strides": (-1,)}, "its pickle has a malformed tensor"),
        ({"offset": -1}, "its pickle has a malformed tensor"),
        ({"shape": (4, 1)}, "its pickle has a malformed tensor"),
        ({"shape": [4]}, "its pickle has a malformed tensor"),
        ({"shape": (1 << 40,), "strides": (0,)}, "shape must be (4,)"),
        ({"numel": "4"}, "malformed reference to a storage"),
        ({"kind": "QInt8"}, "names 'torch.QInt8Storage', which is refused"),
        ({"kind": "Double", "numel": 2}, "l12.q_norm_weight: dtype must be float32"),
    ],
)
def test_a_tensor_that_its_storage_does_not_hold_is_refused(tmp_path, wrong, message):
    first = "retrievers.l10.q_norm_weight"  # so that the tensor in question is storage 1
    second = "retrievers.l12.q_norm_weight"
    values = joint_values()
    values = {first: values.pop(first), second: values.pop(second), **values}
    path = write_state(tmp_path / "x.pt", values, **{Q_NORM: wrong})
    assert message in refused(path)


def test_an_expanded_view_is_not_blown_up(tmp_path):
    """A storage of one element as any number of them."""
    values = layer_values(0) | {"q_norm_weight": np.ones(1, np.float32)}
    view = {"shape": (4,), "strides": (0,)}
    path = write_state(tmp_path / "x.pt", values, q_norm_weight=view)
    assert "do not fit a storage of 1" in refused(path, layer=0)


def test_archives_that_torch_would_not_write_are_refused(tmp_path):
    state = pickled({"a": tensor("0", np.zeros(2, np.float32))})
    path = tmp_path / "x.pt"
    write_archive(path, state, byteorder=b"big")
    assert "byteorder must be little" in refused(path)
    write_archive(path, state, compression=zipfile.ZIP_DEFLATED)
    assert "must be stored as it is" in refused(path)
    write_archive(path, pickled([1, 2]))
    assert "must hold names and tensors, got a list" in refused(path)
    write_archive(path, pickled({"weights": {}, "epoch": 3}))
    assert "under 'model_state'; no tensors: epoch, weights" in refused(path)
    write_archive(path, pickled({"model_state": 3}))
    assert "got a int" in refused(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/other", b"")
    assert "with one data.pkl" in refused(path)
    values = layer_values(0)
    names = {name: tensor(str(i), v) for i, (name, v) in enumerate(values.items())}
    write_archive(path, pickled(names))
    assert "wq_a.weight: the archive has no archive/data/0" in refused(path, layer=0)


def test_a_file_cut_anywhere_is_refused(tmp_path):
    whole = {
        "x.pt": (FOLDER / "joint.pt").read_bytes(),
        "x.safetensors": own_file(tmp_path)[0].read_bytes(),
    }
    for name, data in whole.items():
        for size in [0, 1, 8, 9, *range(10, len(data), 331), len(data) - 1]:
            (tmp_path / name).write_bytes(data[:size])
            refused(tmp_path / name)


def test_a_damaged_byte_is_refused_or_harmless(tmp_path):
    """Every storage has a checksum; what is left are names of members that are not read."""
    data, rng = (FOLDER / "joint.pt").read_bytes(), random.Random(0)
    want, refusals = joint_values(), 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        (tmp_path / "x.pt").write_bytes(damaged)
        try:
            same(read_indexer(tmp_path / "x.pt").leaves, want)
        except CheckpointError as why:
            assert "\n" not in str(why)
            refusals += 1
    assert refusals > 30


def test_a_scrambled_pickle_is_a_value_or_a_pickle_error():
    rng = random.Random(1)
    with zipfile.ZipFile(FOLDER / "training.pt") as archive:
        data = archive.read("training/data.pkl")
    for _ in range(1000):
        damaged = bytearray(data)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(data))] = rng.randrange(256)
        try:
            read_pickle(bytes(damaged))
        except PickleError as why:
            assert "\n" not in str(why)


# Archives that would execute code


class Evil:
    """Pickles as a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Stateful:
    def __setstate__(self, state):
        os.mkdir(state)

    def __getstate__(self):
        return "executed"


class Slotted:
    def __getnewargs_ex__(self):
        return ("executed",), {}

    def __new__(cls, path=None):
        if path:
            os.mkdir(path)
        return super().__new__(cls)


PATH = b"executed"
CALL = b"(X\x08\x00\x00\x00executedtR."  # tuple of the path, REDUCE, STOP
ATTACKS = {
    "global": b"cposix\nmkdir\n" + CALL,
    "global of a builtin": b"cbuiltins\neval\n" + CALL,
    "stack global": b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93\x8c\x08executed\x85R.",
    "dotted stack global": b"\x80\x04\x8c\x0bcollections\x8c\x14OrderedDict.fromkeys\x93" + CALL,
    "memoised stack global": b"\x80\x04\x8c\x05posix\x94\x8c\x05mkdir\x94h\x00h\x01\x93" + CALL,
    "inst": b"(X\x08\x00\x00\x00executediposix\nmkdir\n.",
    "obj": b"(cposix\nmkdir\nX\x08\x00\x00\x00executedo.",
    "newobj": b"\x80\x02cposix\nmkdir\nX\x08\x00\x00\x00executed\x85\x81.",
    "newobj of a known name": b"\x80\x02ccollections\nOrderedDict\n)\x81.",
    "newobj_ex": b"\x80\x04ctorch\nSize\n)}\x92.",
    "ext1": b"\x80\x02\x82\xf0" + CALL,
    "ext2": b"\x80\x02\x83\xf0\x00" + CALL,
    "ext4": b"\x80\x02\x84\xf0\x00\x00\x00" + CALL,
    "torch's own loader": b"ctorch.storage\n_load_from_bytes\n" + CALL,
    "numpy's object arrays": b"cnumpy.core.multiarray\n_reconstruct\n" + CALL,
    "getattr of a known name": b"cbuiltins\ngetattr\n(ccollections\nOrderedDict\ntR.",
    "a call of a string": b"X\x08\x00\x00\x00executed)R.",
    "a call of a result": b"ccollections\nOrderedDict\n)R)R.",
    "state of a name": b"ccollections\nOrderedDict\n}b.",
    "state of a list": b"]}b.",
    "a known name with arguments": b"ccollections\nOrderedDict\n" + CALL,
    "a text persistent id": b"Pstorage\n.",
    "a persistent id of another kind": b"X\x08\x00\x00\x00executedQ.",
    "an unhashable key": b"}]Ns.",
    "a buffer": b"\x80\x05\x97.",
    "pop from nothing": b"0.",
    "a mark never opened": b"t.",
    "an unknown memo": b"h\x07.",
    "no end": b"}",
    "no opcode": b"\xff.",
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_pickle_that_would_execute_code_is_refused_and_nothing_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.mkdir)
    path = write_archive(tmp_path / "x.pt", ATTACKS[name])
    assert "its pickle" in refused(path)
    assert os.listdir(tmp_path) == ["x.pt"]


def test_the_attacks_above_do_execute_where_nothing_refuses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("global", "stack global", "memoised stack global", "inst", "obj"):
        pickle.loads(ATTACKS[name])
        assert os.path.isdir("executed"), name
        os.rmdir("executed")


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_python_are_refused_by_name_in_every_protocol(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (Evil("executed"), Stateful(), Slotted()):
        state = {"epoch": 1, "nested": [{"deep": (1, value)}]}
        path = write_archive(tmp_path / "x.pt", pickle.dumps(state, protocol))
        # Protocol 0 writes even numbers in opcodes that torch never uses, refused before the name.
        named = ("mkdir", "Stateful", "Slotted", "_reconstructor", "opcode", "partial")
        assert any(word in refused(path) for word in named)
        assert os.listdir(tmp_path) == ["x.pt"]


def test_code_hidden_in_the_optimizer_of_a_sound_checkpoint_is_refused(tmp_path):
    values = joint_values()
    state = {name: tensor(str(i), v) for i, (name, v) in enumerate(values.items())}
    storages = {str(i): v.tobytes() for i, v in enumerate(values.values())}
    for hidden in (Call("os.system", "true"), Global("builtins.exec")):
        whole = {"model_state": state, "optimizer": {"state": [hidden]}}
        path = write_archive(tmp_path / "x.pt", pickled(whole), storages)
        name = "os.system" if isinstance(hidden, Call) else "builtins.exec"
        assert f"its pickle names '{name}', which is refused" in refused(path)
    whole["optimizer"] = {"state": {0: {"step": 1.0}}}
    same(read_indexer(write_archive(path, pickled(whole), storages)).leaves, values)


def test_plain_values_of_a_training_checkpoint_are_read_as_values_or_left_opaque():
    with zipfile.ZipFile(FOLDER / "training.pt") as archive:
        value = read_pickle(archive.read("training/data.pkl"))
    assert isinstance(value, dict)
    assert (value["epoch"], value["optimizer_state"]["param_groups"][0]["lr"]) == (3, 1e-4)
    assert value["args"] == Opaque("argparse.Namespace")
    assert value["best_f1"] == Opaque("numpy._core.multiarray.scalar")
