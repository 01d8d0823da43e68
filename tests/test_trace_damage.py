"""A damaged trace, or one that does not fit together, is refused, and what is wrong is named."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.trace_cases import INFO, D, K, L, N, T, record, recording, same
from train.traces import columns
from train.traces.columns import TraceError
from train.traces.trace import MANIFEST, finished_traces, open_trace
from train.traces.trace_info import digest


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
        ('"schema": 2', '"schema": 3', r"must be of schema \(1, 2\), got 3"),
        ('"info"', '"inf0"', "KeyError"),
        ("{", "", "JSONDecodeError"),
    ):
        file.write_text(text.replace(old, new, 1))
        with pytest.raises(TraceError, match=message):
            open_trace(trace.path, verify=False)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        open_trace(trace.path)


def rewritten(trace, change, **fields):
    """The manifest with a change that its digest covers, as another writer could make it."""
    contents = json.loads((trace.path / MANIFEST).read_text()) | fields
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


def test_a_trace_of_schema_1_is_read_and_its_weights_are_not_known(tmp_path):
    data, info = recording(), dataclasses.replace(INFO, weights="1" * 64)
    trace = record(tmp_path, data, info=info)
    assert open_trace(trace.path).info.weights == "1" * 64
    rewritten(trace, lambda c, i: i.pop("weights"), schema=1)
    old = open_trace(trace.path)
    same(old, data)
    assert old.info == dataclasses.replace(INFO, weights=None)


@pytest.mark.parametrize("name", ["hidden", "keys", "key_scale", "mass_values"])
def test_numbers_that_are_none_are_refused_by_whoever_reads_them(tmp_path, name):
    """Another writer's trace, with digests and checksums that hold."""
    trace = record(tmp_path, recording())
    array = trace.store(name).read().result().copy()
    array.reshape(-1)[len(array) // 2] = 0x7F if name == "keys" else np.nan
    shutil.rmtree(trace.path / name)
    column = columns.ColumnWriter(trace.path / name, array.dtype, array.shape[1:])
    column.append(array)
    rewritten(trace, lambda c, i: c.update({name: dataclasses.asdict(column.close())}))
    read = {"hidden": lambda t: t.read("hidden"), "mass_values": lambda t: t.mass()}
    with pytest.raises(TraceError, match=rf"doc-1: {name} must be finite"):
        read.get(name, lambda t: t.keys())(open_trace(trace.path))
