"""Traces are read back bit for bit; unfinished ones are never opened; what a writer refuses."""

import dataclasses
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
from tests.trace_cases import INFO, D, K, N, T, record, recording, same
from train.traces import columns
from train.traces.columns import TraceError
from train.traces.trace import TraceWriter, finished_traces, open_trace
from train.traces.trace_info import (
    KeyRope,
    Keys,
    TraceInfo,
    fingerprint,
    formation_steps,
    indexer_fields,
)


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
from tests.trace_cases import INFO, record, recording
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
    bad = hidden.copy()
    bad[3, 1, 2] = np.nan
    with TraceWriter(tmp_path, INFO, **options) as writer:
        for arguments, message in (
            ((hidden[1:], positions, votes), r"one row each for \(37,\) positions, got \[36, 37\]"),
            ((hidden, positions[::-1], votes), "positions must ascend from -1 to below"),
            ((hidden, positions, votes, votes), "mass must come with all tokens or with none"),
            ((hidden, positions, high), r"votes must be integer in \[1, 5\], got uint8 up to 6"),
            ((hidden, positions, below), "votes must be of entries >= 0"),
            ((hidden[..., 1:], positions, votes), "hidden must be bfloat16"),
            ((bad, positions, votes), "hidden must be finite, got NaN or infinity"),
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
        ("weights", 7),
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
