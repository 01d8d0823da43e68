"""Dumped documents become traces; those that are damaged or would execute code are refused."""

import copyreg
import itertools
import os
import pickle
import random

import ml_dtypes
import numpy as np
import pytest

from lsa_jax.checkpoint.leaf import CheckpointError
from tests.doc_cases import GOLDENS, check_golden, write_doc
from tests.golden import doc_values
from tests.golden.doc_values import ENTRIES, LAYERS, PROMPT, TOKENS
from tests.test_torch_reader import ATTACKS, Evil, Slotted, Stateful
from train.import_docs import Backbone, import_document
from train.traces.doc_pickle import read_document
from train.traces.trace import open_trace


def imported(path, dst):
    return open_trace(import_document(path, dst, Backbone()).path)


def refused(path, dst):
    """The one line of the refusal, which names the file; nothing is left of the trace."""
    with pytest.raises(CheckpointError) as caught:
        import_document(path, dst, Backbone())
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not dst.exists() or list(dst.iterdir()) == []
    return str(caught.value)


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
def test_a_document_that_torch_pickled_is_imported_bit_for_bit(path, tmp_path):
    trace = imported(path, tmp_path)
    check_golden(trace)
    assert trace.read("hidden").dtype == ml_dtypes.bfloat16
    assert path.stat().st_size < 100_000 and len(GOLDENS) == 2


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_document_of_numpy_arrays_is_imported_from_every_binary_protocol(protocol, tmp_path):
    changes = {
        "hidden_layer_10": np.asfortranarray(doc_values.hidden(10)),
        "positions_layer_12": np.arange(PROMPT, PROMPT + TOKENS, dtype=">i4"),
        "note": {"nested": [1.5, (None, True), b"", np.float32(2), np.zeros(0)]},
    }
    trace = imported(write_doc(tmp_path / "doc_7.pkl", protocol, **changes), tmp_path / "set")
    check_golden(trace)
    assert trace.read("hidden").dtype == np.float32


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_of_any_layout_and_number_type_are_read_as_they_were(protocol, tmp_path):
    base = np.arange(24).reshape(2, 3, 4)
    items = {f"axes {axes}": base.transpose(axes) for axes in itertools.permutations(range(3))}
    items |= {code: base.astype(code) for code in ("?", "i1", ">u2", "<i8", "f2", ">f8")}
    items |= {
        "cut": base[:, ::2],
        "none": base[:0],
        "scalar": np.array(3),
        "twice": base,
        "at": base,
    }
    path = tmp_path / "doc_1.pkl"
    path.write_bytes(pickle.dumps(items, protocol))
    document = read_document(path)
    for key, want in items.items():
        got = document.array(key)
        np.testing.assert_array_equal(got, want, strict=True)
        assert got.dtype == want.dtype


def test_a_document_without_labels_or_logits_is_imported(tmp_path):
    none = {"label_indices": np.zeros(0, np.int32), "label_scores": np.zeros(0, np.int32)}
    none["label_pointers"] = np.zeros(TOKENS + 1, np.int32)
    logits = {key: None for key in doc_values.items() if key.startswith("logits_")}
    for protocol in (2, 5):
        path = write_doc(tmp_path / f"doc_{protocol}.pkl", protocol, **none, **logits)
        trace = imported(path, tmp_path / "set")
        assert len(trace.votes()) == TOKENS and trace.votes().indices.size == 0
        assert trace.golden_logits() is None


def with_item(array, at, value):
    array = array.copy()
    array[at] = value
    return array


HIDDEN, ROWS = doc_values.hidden(12), doc_values.key_rows(12)
INDICES, SCORES, POINTERS = doc_values.labels()
INCONSISTENT = [
    ({"hidden_layer_12": None}, None),  # a layer less; its other items are not looked at
    ({"hidden_layer_12": HIDDEN[1:]}, "hidden_layer_12 must be bfloat16 or float32 [70, 8]"),
    ({"hidden_layer_12": HIDDEN.astype("f8")}, "hidden_layer_12 must be bfloat16 or float32"),
    ({"hidden_layer_12": with_item(HIDDEN, (3, 3), np.nan)}, "hidden_layer_12 must be finite"),
    (
        {"hidden_layer_12": HIDDEN.tolist()},
        "hidden_layer_12 must be a tensor or an array, got a list",
    ),
    ({"hidden_layer_10": HIDDEN[:0]}, "hidden_layer_10 is empty"),
    ({"hidden_layer_21": HIDDEN}, "compk_layer_21 is missing"),
    ({"compk_layer_20": None}, "compk_layer_20 is missing"),
    ({"compk_layer_12": ROWS[:-1]}, "compk_layer_12 must be uint8 [27, 132], got uint8[26, 132]"),
    ({"compk_layer_10": ROWS[:, :4]}, "compk_layer_10 must have rows of codes"),
    ({"compk_layer_12": ROWS.astype(np.int8)}, "compk_layer_12 must be uint8"),
    ({"compk_layer_12": with_item(ROWS, (4, 5), 0xFF)}, "compk_layer_12 is no table of keys: keys"),
    (
        {"compk_layer_12": with_item(ROWS, (4, 131), 0xFF)},
        "compk_layer_12 is no table of keys: key_",
    ),
    ({"positions_layer_20": np.arange(TOKENS)}, "positions_layer_20 must equal positions_layer_10"),
    ({"positions_layer_20": None}, "positions_layer_20 is missing"),
    (
        {f"positions_layer_{i}": np.zeros(TOKENS, np.int64) for i in LAYERS},
        "positions_layer_10 must ascend",
    ),
    ({"label_indices": INDICES[1:]}, "label_scores must be integers"),
    ({"label_indices": with_item(INDICES, 4, -1)}, "label_indices must be in [0, 2^31), got -1"),
    ({"label_indices": INDICES * 0}, "label_indices has an entry twice at one token"),
    (
        {"label_scores": with_item(SCORES, 4, 22)},
        "label_scores must be votes in [3, 21], got 3..22",
    ),
    ({"label_scores": with_item(SCORES, 4, 2)}, "label_scores must be votes in [3, 21], got 2"),
    ({"label_pointers": POINTERS[1:]}, "label_pointers must be integers [71], got int32[70]"),
    ({"label_pointers": POINTERS + 1}, "label_pointers does not fit the labels: pointers must run"),
    ({"label_pointers": with_item(POINTERS, 9, 0)}, "label_pointers does not fit the labels"),
    ({"logits_layer_12_token_1": None}, "logits_layer_12_token_1 is missing"),
    (
        {f"logits_layer_{i}_token_0": np.zeros(ENTRIES + 1, np.float32) for i in LAYERS},
        "logits_layer_10_token_0 must be of at most 27 entries",
    ),
]


@pytest.mark.parametrize(("changes", "message"), INCONSISTENT)
def test_an_inconsistent_document_is_refused_by_file_key_and_reason(changes, message, tmp_path):
    path = write_doc(tmp_path / "doc_1.pkl", **changes)
    if message is None:
        assert imported(path, tmp_path / "set").info.target_layers == (10, 20)
    else:
        assert f"doc_1.pkl: {message}" in refused(path, tmp_path / "set")


def test_a_file_that_is_no_document_is_refused(tmp_path):
    path = tmp_path / "doc_1.pkl"
    for data, message in (
        (b"", "is empty"),
        (pickle.dumps([1]), "must hold a dictionary with names, got a list"),
        (pickle.dumps({1: 2}), "must hold a dictionary with names"),
        (pickle.dumps({"a": 1}), "hidden_layer_* is missing for every layer"),
        (pickle.dumps({}) + b"more", "4 bytes follow its pickle"),
        (b"PK\x03\x04....", "got an archive of torch.save"),
        (pickle.dumps({"hidden_layer_10": np.array([{}])}), "has a malformed array|dtype 'O8'"),
        (pickle.dumps({"hidden_layer_10": np.array(["a"])}), "dtype 'U1', which is no number's"),
    ):
        path.write_bytes(data)
        assert any(part in refused(path, tmp_path / "set") for part in message.split("|"))
    with pytest.raises(FileNotFoundError):
        import_document(tmp_path / "doc_2.pkl", tmp_path / "set", Backbone())


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda path: path.stem)
def test_a_document_cut_anywhere_is_refused(golden, tmp_path):
    data, path, near = golden.read_bytes(), tmp_path / "doc_1.pkl", set()
    for size in [0, 1, 2, 9, *range(10, len(data), 397), len(data) - 1]:
        path.write_bytes(data[:size])
        message = refused(path, tmp_path / "set")
        near |= {message.split("near '")[1].split("'")[0]} if "near '" in message else set()
    keys = {f"{part}_layer_{i}" for part in ("hidden", "compk") for i in LAYERS}
    assert keys <= near and near <= read_document(golden).items.keys()


def test_a_damaged_document_is_refused_or_a_document(tmp_path):
    """Elements have no checksum in a pickle; everything else is looked at."""
    rng, refusals = random.Random(0), 0
    for n in range(100):
        damaged = bytearray(GOLDENS[n % 2].read_bytes())
        for _ in range(3):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path = tmp_path / f"doc_{n}.pkl"
        path.write_bytes(damaged)
        try:
            document = read_document(path)
            for key in document.items:
                document.array(key)
        except CheckpointError as why:
            assert str(path) in str(why) and "\n" not in str(why)
            refusals += 1
        path.unlink()
    assert refusals > 10


# Documents that would execute code


@pytest.mark.parametrize("name", ATTACKS)
def test_a_document_that_would_execute_code_is_refused_and_nothing_runs(
    name, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(copyreg._extension_cache, 0xF0, os.mkdir)
    path = tmp_path / "doc_1.pkl"
    nested = pickle.dumps(ATTACKS[name])[2:-1]  # its bytes, without the protocol and the end
    inside = b"\x80\x04}\x8c\x01actorch.storage\n_load_from_bytes\n(" + nested + b"tRs."
    for data in (ATTACKS[name], inside):
        path.write_bytes(data)
        refused(path, tmp_path / "set")
        assert os.listdir(tmp_path) == ["doc_1.pkl"]


@pytest.mark.parametrize("protocol", range(6))
def test_objects_of_python_are_refused_by_name_in_every_protocol(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in (Evil("executed"), Stateful(), Slotted()):
        for items in ({"a": value}, {**doc_values.items(), "doc": [{"deep": (1, value)}]}):
            path = tmp_path / "doc_1.pkl"
            path.write_bytes(pickle.dumps(items, protocol))
            # Protocols 0 and 1 write opcodes that a document never has, refused before the name.
            named = ("mkdir", "Stateful", "Slotted", "_reconstructor", "opcode", "partial")
            assert any(word in refused(path, tmp_path / "set") for word in named)
            assert os.listdir(tmp_path) == ["doc_1.pkl"]


@pytest.mark.parametrize("name", ["os.system", "builtins.exec", "torch.load", "numpy.load"])
def test_code_in_place_of_an_array_is_refused_by_the_name_it_calls(name, tmp_path):
    """Beside sound arrays, in the arguments of a tensor, and in the bytes of its storage."""
    module, function = name.split(".")
    call = f"c{module}\n{function}\n".encode() + b"(X\x04\x00\x00\x00truetR"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + call + b"tR"
    nested = pickle.dumps(b"\x80\x02" + call + b".", 4)[2:-1]
    storage = b"ctorch.storage\n_load_from_bytes\n(" + nested + b"tR"
    path = tmp_path / "doc_1.pkl"
    for attack in (call, tensor, storage):
        path.write_bytes(
            pickle.dumps(doc_values.items(), 4)[:-1] + b"X\x01\x00\x00\x00a" + attack + b"s."
        )
        assert f"its pickle names '{name}', which is refused" in refused(path, tmp_path / "set")


def test_a_storage_within_a_storage_is_refused_so_that_nesting_has_an_end(tmp_path):
    data = b"\x80\x02N."
    for _ in range(2):
        inner = pickle.dumps(data, 4)[2:-1]
        data = b"\x80\x04ctorch.storage\n_load_from_bytes\n(" + inner + b"tR."
    path = tmp_path / "doc_1.pkl"
    path.write_bytes(data)
    message = "its pickle names 'torch.storage._load_from_bytes', which is refused"
    assert message in refused(path, tmp_path / "set")
