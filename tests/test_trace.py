"""Traces are read back bit for bit, damage is named, and unfinished ones are never opened."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from lsa_jax.config import ConfigError, YarnConfig
from lsa_jax.config_io import load_config
from lsa_jax.lsa.indexer_config import IndexerConfig
from train.traces import columns
from train.traces.columns import TraceError
from train.traces.trace import MANIFEST, TraceWriter, finished_traces, open_trace
from train.traces.trace_info import (
    KeyRope,
    Keys,
    TraceInfo,
    digest,
    fingerprint,
    formation_steps,
    indexer_fields,
)
from train.traces.votes import SparseRows, VoteConfig

T, L, D, N, K = 37, 2, 6, 30, 8
INFO = TraceInfo(
    name="doc-1",
    source="a test",
    model="0" * 64,
    target_layers=(1, 3),
    csa_layers=5,
    csa_ratio=4,
    page_entries=8,
    prompt_tokens=83,
    rope=KeyRope(rope_head_dim=4, rope_theta=1e4, yarn=YarnConfig(factor=2), norm_eps=1e-5),
    votes=VoteConfig(),
)


def sparse(rng, dtype, most=5):
    pointers = np.concatenate([[0], np.cumsum(rng.integers(0, 4, T))])
    values = rng.integers(1, most + 1, pointers[-1]).astype(dtype)
    return SparseRows(rng.integers(0, N, pointers[-1]).astype(np.int32), values, pointers)


def rows_of(rows, start, stop):
    ends = rows.pointers[start : stop + 1]
    span = slice(ends[0], ends[-1])
    return SparseRows(rows.indices[span], rows.values[span], ends - ends[0])


def recording(seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 126, (N, L, K)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    return {
        "hidden": rng.normal(size=(T, L, D)).astype(ml_dtypes.bfloat16),
        "positions": 83 + np.arange(T),
        "votes": sparse(rng, np.uint8),
        "mass": sparse(rng, np.float32),
        "keys": Keys(codes, rng.random((N, L)).astype(np.float32)),
        "golden": np.where(rng.random((3, L, 21)) < 0.1, np.nan, 1).astype(np.float32),
    }


def record(root, data, *, blocks=(T,), mass=True, info=INFO):
    dtype = data["hidden"].dtype
    with TraceWriter(root, info, hidden_size=D, hidden_dtype=dtype, mass=mass) as writer:
        for start, stop in zip((0, *np.cumsum(blocks)[:-1]), np.cumsum(blocks), strict=True):
            part = slice(start, stop)
            votes, weights = (rows_of(data[name], start, stop) for name in ("votes", "mass"))
            arrays = (data["hidden"][part], data["positions"][part], votes)
            writer.append(*arrays, weights if mass else None)
        return open_trace(writer.finish(data["keys"], data["golden"]))


def same(trace, data, mass=True):
    np.testing.assert_array_equal(trace.read("hidden"), data["hidden"])
    np.testing.assert_array_equal(trace.read("positions"), data["positions"])
    for got, want in ((trace.votes(), data["votes"]), *([(trace.mass(), data["mass"])] * mass)):
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.pointers, want.pointers)
        np.testing.assert_array_equal(got.values, want.values.astype(got.values.dtype))
    np.testing.assert_array_equal(trace.keys().dequantised(), data["keys"].dequantised())
    np.testing.assert_array_equal(trace.golden_logits(), data["golden"])


def test_a_streamed_trace_is_read_back_bit_for_bit(tmp_path):
    data = recording()
    trace = record(tmp_path, data, blocks=(1, 1, 20, 14, 1))
    same(trace, data)
    assert (trace.info, trace.tokens, trace.entries) == (INFO, T, N)
    assert trace.read("hidden").dtype == ml_dtypes.bfloat16
    assert trace.columns == record(tmp_path / "at once", data).columns
    order = np.array([30, 2, 36, 2])
    np.testing.assert_array_equal(trace.read("hidden", order), data["hidden"][order])
    some = trace.keys(order[:2] - 2)
    np.testing.assert_array_equal(some.dequantised(), data["keys"].dequantised()[order[:2] - 2])


def test_an_array_over_several_files_is_read_back_bit_for_bit(tmp_path, monkeypatch):
    data = recording()
    want = record(tmp_path / "whole", data).columns
    monkeypatch.setattr(columns, "CHUNK_BYTES", 64)
    monkeypatch.setattr(columns, "SHARD_BYTES", 256)
    trace = record(tmp_path / "parts", data, blocks=(3, 30, 4))
    same(trace, data)
    assert trace.columns == want
    shards = [path for path in (trace.path / "hidden" / "c").rglob("*") if path.is_file()]
    assert len(shards) == 4  # of 10 rows of 24 bytes, two to a chunk


def test_a_small_document_makes_few_small_files(tmp_path):
    trace = record(tmp_path, recording())
    files = [path for path in trace.path.rglob("*") if path.is_file()]
    assert len(files) == 2 * len(trace.columns) + 1 == 25
    payload = sum(np.prod(c.shape) * c.numpy_dtype.itemsize for c in trace.columns.values())
    shards = sum(path.stat().st_size for path in files if not path.name.endswith(".json"))
    # Of its only chunk a checksum, and where it is with another.
    assert shards == payload + len(trace.columns) * (4 + 16 + 4)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_keys_and_states_of_other_formats_need_no_scale_and_mass_no_recording(tmp_path, dtype):
    data = recording()
    data |= {"keys": Keys(data["keys"].dequantised().astype(dtype), None), "golden": None}
    data["hidden"] = data["hidden"].astype(np.float32) + np.float32(1e-6)
    trace = record(tmp_path, data, mass=False)
    assert trace.keys().format == np.dtype(dtype).name and "key_scale" not in trace.columns
    assert trace.mass() is None and trace.golden_logits() is None
    data["golden"] = trace.golden_logits()
    np.testing.assert_array_equal(trace.read("hidden"), data["hidden"])
    np.testing.assert_array_equal(trace.keys().values, data["keys"].values)


def test_an_entry_is_formed_at_the_token_that_completes_it():
    for ratio, first, entries in ((4, 83, 30), (4, 0, 12), (1, 5, 50), (4, 82, 21)):
        positions = first + np.arange(T)
        formed = formation_steps(positions, entries, ratio)
        assert formed.dtype == np.int32 and len(formed) == entries
        for t, position in enumerate(positions):
            exist = min((position + 1) // ratio, entries)  # what attention sees at the token
            assert np.sum(formed <= t) == exist
        assert formed.max() <= T


# Damage


def shard_files(trace):
    files = [path for path in trace.path.rglob("c/**/*") if path.is_file()]
    assert len(files) == len(trace.columns)
    return files


def test_a_flipped_bit_is_refused_and_named(tmp_path):
    trace = record(tmp_path, recording())
    for file in shard_files(trace):
        whole = file.read_bytes()
        name = file.relative_to(trace.path).parts[0]
        for at in (0, trace.columns[name].shape[0] // 2, len(whole) - 1):
            damaged = bytearray(whole)
            damaged[at] ^= 16
            file.write_bytes(damaged)
            with pytest.raises(TraceError, match=f"1 damaged\n  .*doc-1/{name} ") as caught:
                open_trace(trace.path)
            assert len(str(caught.value).splitlines()) == 2
        file.write_bytes(whole)
    same(open_trace(trace.path), recording())


def test_arrays_that_are_missing_or_cut_short_are_all_named(tmp_path):
    trace = record(tmp_path, recording())
    (trace.path / "hidden" / "zarr.json").unlink()
    for file in shard_files(trace):
        if "votes" in str(file) or "vote_scores" in str(file):
            file.unlink()
        elif "positions" in str(file):
            file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(TraceError, match="3 damaged") as caught:
        open_trace(trace.path)
    for name in ("hidden", "positions", "vote_scores"):
        assert f"doc-1/{name} " in str(caught.value)
    assert open_trace(trace.path, verify=False).tokens == T
    with pytest.raises(TraceError, match="doc-1/hidden is missing or damaged"):
        open_trace(trace.path, verify=False).read("hidden")


def test_damage_is_noticed_by_whoever_reads_it_without_verification(tmp_path):
    path = record(tmp_path, recording()).path
    for file in shard_files(open_trace(path)):
        name, whole = file.relative_to(path).parts[0], file.read_bytes()
        for damaged in (bytes([whole[0] ^ 16]) + whole[1:], whole[:-30], None):
            file.unlink()
            if damaged is not None:
                file.write_bytes(damaged)
            with pytest.raises(TraceError, match=f"doc-1/{name} is missing or damaged"):
                open_trace(path, verify=False).read(name)
        file.write_bytes(whole)
    open_trace(path)


def test_labels_of_entries_that_are_not_there_are_refused(tmp_path):
    trace = record(tmp_path, recording())
    few = dataclasses.replace(trace.columns["formed_at"], shape=(3,))
    short = dataclasses.replace(trace, columns={**trace.columns, "formed_at": few})
    for read in (short.votes, short.mass):
        with pytest.raises(TraceError, match=r"_indices must be in 0\.\.2, got"):
            read()


def test_a_trace_set_may_be_named_by_a_path_with_dots(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    same(record(Path("../set"), recording()), recording())
    assert [path.name for path in finished_traces(Path("../set"))] == ["doc-1"]


def test_a_damaged_or_foreign_manifest_is_refused(tmp_path):
    trace = record(tmp_path, recording())
    file = trace.path / MANIFEST
    text = file.read_text()
    for old, new, message in (
        ('"prompt_tokens": 83', '"prompt_tokens": 84', "another digest than it says"),
        ('"schema": 1', '"schema": 2', "must be of schema 1, got 2"),
        ('"info"', '"inf0"', "KeyError"),
        ("{", "", "JSONDecodeError"),
    ):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(TraceError, match=message):
            open_trace(trace.path, verify=False)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        open_trace(trace.path)


def rewritten(trace, change):
    """The manifest with a change that its digest covers, as another writer could make it."""
    contents = json.loads((trace.path / MANIFEST).read_text())
    del contents["sha256"]
    change(contents["columns"], contents["info"])
    (trace.path / MANIFEST).write_text(json.dumps({**contents, "sha256": digest(contents)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, i: c.pop("formed_at"), "must have the arrays .*formed_at"),
        (lambda c, i: c.pop("key_scale"), "must have the arrays .*key_scale"),
        (lambda c, i: c.pop("mass_values"), "must have the arrays .*mass_values"),
        (lambda c, i: c.update(extra=c["hidden"]), "got .*extra"),
        (lambda c, i: c["hidden"].update(shape=[T - 1, L, D]), "hidden must be .*37, 2, 6"),
        (lambda c, i: c["keys"].update(shape=[N, L + 1, K]), "keys must be .*30, 2, 8"),
        (lambda c, i: c["vote_pointers"].update(shape=[T]), "vote_pointers must be int64.38"),
        (lambda c, i: c["positions"].update(dtype="int64"), "positions must be int32"),
        (lambda c, i: c["positions"].update(dtype="object"), "dtype must be one of"),
        (lambda c, i: c["hidden"].update(shape=[-1]), "shape must be sizes"),
        (lambda c, i: c["golden_logits"].update(shape=[3, L, N + 1]), "golden_logits must be"),
        (lambda c, i: i.update(target_layers=[3, 1]), "target_layers must be distinct ascending"),
        (lambda c, i: i.update(target_layers=[1, 3, 4]), "hidden must be .*37, 3, 6"),
        (lambda c, i: i.update(votes={"top_p": 2.0}), "votes.top_p must be"),
        (lambda c, i: i.pop("source"), "source"),
    ],
)
def test_a_trace_whose_parts_do_not_fit_is_refused(tmp_path, change, message):
    trace = record(tmp_path, recording())
    rewritten(trace, change)
    with pytest.raises(TraceError, match=message):
        open_trace(trace.path, verify=False)


# Unfinished documents


def test_what_was_not_finished_is_never_opened_and_begun_again(tmp_path):
    data = recording()
    options = {"hidden_size": D, "hidden_dtype": ml_dtypes.bfloat16, "mass": False}
    writer = TraceWriter(tmp_path, INFO, **options)
    writer.append(data["hidden"], data["positions"], data["votes"])
    (left,) = tmp_path.iterdir()
    (left / "stale").write_text("of the last run")
    assert finished_traces(tmp_path) == []
    with pytest.raises(TraceError, match="is unfinished"):
        open_trace(left)
    with pytest.raises(FileNotFoundError):
        open_trace(tmp_path / INFO.name)
    trace = record(tmp_path, data)
    same(trace, data)
    assert finished_traces(tmp_path) == [trace.path] == list(tmp_path.iterdir())
    assert not (trace.path / "stale").exists()
    with pytest.raises(FileExistsError, match="exists already"):
        TraceWriter(tmp_path, INFO, **options)
    other = dataclasses.replace(INFO, name="doc-2")
    with pytest.raises(KeyError), TraceWriter(tmp_path, other, **options):
        raise KeyError("the model failed")
    assert list(tmp_path.iterdir()) == [trace.path]


KILLED = """
import sys
from pathlib import Path
import dataclasses
from train.traces import columns
from tests.test_trace import INFO, record, recording
columns.CHUNK_BYTES, columns.SHARD_BYTES = 64, 256
data, root = recording(), Path(sys.argv[1])
for n in range(1000):
    record(root, data, blocks=(30, 7), info=dataclasses.replace(INFO, name=f"doc-{n}"))
    print(n, flush=True)
"""


def test_a_recorder_killed_at_any_moment_leaves_only_whole_traces(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) as run:
        assert run.stdout is not None
        for _ in range(2):
            assert run.stdout.readline()
        run.send_signal(signal.SIGKILL)
    whole = finished_traces(tmp_path)
    assert len(whole) >= 2
    for path in whole:
        same(open_trace(path), recording())
    assert len(list(tmp_path.iterdir())) - len(whole) <= 1


# What a writer refuses


def test_tokens_that_do_not_fit_are_refused_and_leave_the_trace_as_it_was(tmp_path):
    data = recording()
    hidden, positions, votes = data["hidden"], data["positions"], data["votes"]
    options = {"hidden_size": D, "hidden_dtype": ml_dtypes.bfloat16, "mass": False}
    high = dataclasses.replace(votes, values=np.full(len(votes.values), 6, np.uint8))
    below = dataclasses.replace(votes, indices=votes.indices - N)
    with TraceWriter(tmp_path, INFO, **options) as writer:
        for arguments, message in (
            ((hidden[1:], positions, votes), r"one row each for \(37,\) positions, got \[36, 37\]"),
            ((hidden, positions[::-1], votes), "positions must ascend from -1 to below"),
            ((hidden, positions, votes, votes), "mass must come with all tokens or with none"),
            ((hidden, positions, high), r"votes must be integer in \[1, 5\], got uint8 up to 6"),
            ((hidden, positions, below), "votes must be of entries >= 0"),
            ((hidden[..., 1:], positions, votes), "hidden must be bfloat16"),
            ((hidden.astype(np.float32), positions, votes), "hidden must be bfloat16"),
        ):
            with pytest.raises(TraceError, match=message):
                writer.append(*arguments)
        writer.append(hidden, positions, votes)
        with pytest.raises(TraceError, match="positions must ascend from 119"):
            writer.append(hidden, positions, votes)
        few = Keys(data["keys"].values[:20], data["keys"].scale[:20])
        with pytest.raises(TraceError, match="has votes or mass, of 20 keys"):
            writer.finish(few)
    assert list(tmp_path.iterdir()) == []
    with TraceWriter(tmp_path, INFO, **options) as writer:
        writer.append(hidden, positions, votes)
        same(open_trace(writer.finish(data["keys"], data["golden"])), data, mass=False)


def test_keys_that_are_no_keys_are_refused(tmp_path):
    keys = recording()["keys"]
    nan, scale = keys.values.copy(), keys.scale.copy()
    nan.view(np.uint8)[2, 1, 3], scale[4, 1] = 0x7F, -1
    for values, scales, message in (
        (nan, keys.scale, "keys must be finite"),
        (keys.values, scale, "key_scale must be finite and >= 0"),
        (np.full((1, 1, 1), np.inf, np.float32), None, "keys must be finite"),
    ):
        with pytest.raises(TraceError, match=message):
            Keys(values, scales).check()
    for values, scales, message in (
        (keys.values, None, "key_scale must have shape"),
        (keys.values, keys.scale[1:], "key_scale must have shape"),
        (keys.values.view(np.uint8), keys.scale, "got uint8"),
    ):
        with pytest.raises(TraceError, match=message):
            Keys(values, scales)
    options = {"hidden_size": D, "hidden_dtype": np.float32, "mass": False}
    writer = TraceWriter(tmp_path, INFO, **options)
    with writer, pytest.raises(TraceError, match="at least one token"):
        writer.finish(keys)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "../doc"),
        ("name", "doc.partial"),
        ("target_layers", ()),
        ("target_layers", (1, 5)),
        ("csa_layers", 256),
        ("csa_ratio", 0),
        ("prompt_tokens", -1),
    ],
)
def test_a_description_out_of_range_is_refused_and_named(field, value):
    with pytest.raises(ConfigError, match=f"trace.{field} must be"):
        dataclasses.replace(INFO, **{field: value})


def test_fingerprints_tell_configurations_apart():
    model = load_config("v4_flash")
    assert fingerprint(model) == fingerprint(load_config("v4_flash"))
    assert fingerprint(model) != fingerprint(dataclasses.replace(model, index_topk=511))


def test_the_rope_of_the_keys_is_kept_and_becomes_the_indexers(tmp_path):
    read = record(tmp_path, recording()).info
    assert read.rope == INFO.rope
    cfg = IndexerConfig(**indexer_fields(read, hidden_size=D, head_dim=K))
    assert (cfg.target_layers, cfg.hidden_size, cfg.head_dim) == ((1, 3), D, K)
    assert (cfg.rope_head_dim, cfg.rope_theta, cfg.yarn) == (4, 1e4, YarnConfig(factor=2))
    assert cfg.norm_eps == 1e-5
    model = load_config("v4_flash")
    info = dataclasses.replace(INFO, rope=KeyRope.of_model(model), target_layers=(0, 2))
    fields = indexer_fields(
        TraceInfo.from_json(dataclasses.asdict(info)), hidden_size=4096, head_dim=128
    )
    assert IndexerConfig(**fields) == IndexerConfig.for_model(model, target_layers=(0, 2))


@pytest.mark.parametrize(
    ("field", "value"), [("rope_head_dim", 0), ("rope_theta", 0.0), ("norm_eps", -1.0)]
)
def test_a_rope_out_of_range_is_refused_and_named(field, value):
    with pytest.raises(ConfigError, match=f"trace.rope.{field} must be"):
        dataclasses.replace(INFO.rope, **{field: value})
