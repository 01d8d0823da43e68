"""A run that stops and goes on is the run that did not: samples, parameters, metrics."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import ConfigError
from tests import train_runs
from tests.train_runs import Audit, assert_same_run, config, train
from train.data.batch import Batch
from train.data.dataset import Batches
from train.run import checkpoints, checksums
from train.run.initial import initial_indexer
from train.run.loop import TrainingError
from train.run.progress import MetricsLog, read_metrics
from train.run.splits import open_corpora


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory) -> Iterator[None]:
    with train_runs.compiled_once(tmp_path_factory.mktemp("programs")):
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return train_runs.traces(tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module")
def unbroken(root, tmp_path_factory) -> tuple[Path, Audit]:
    run, audit = tmp_path_factory.mktemp("unbroken") / "run", Audit()
    outcome = train(config(root), run, audit)
    assert (outcome.step, outcome.total, outcome.signal) == (12, 12, None)
    return run, audit


class Crash(Exception):
    """Stands in for whatever ends a process between two steps."""


@pytest.mark.parametrize(
    ("crash", "restored"), [pytest.param(3, 0, marks=pytest.mark.slow), (11, 8)]
)
def test_a_crashed_run_goes_on_from_its_newest_checkpoint_bit_for_bit(
    root, unbroken, tmp_path, crash, restored
):
    want, audit = unbroken
    run, seen = tmp_path / "run", Audit()

    def observe(step: int, batch: Batch) -> None:
        if step == crash:
            raise Crash
        seen(step, batch)

    with pytest.raises(Crash):
        train(config(root), run, observe)
    again = Audit()
    train(config(root), run, again)
    assert list(again.samples) == list(range(restored + 1, 13))
    assert seen.samples | again.samples == audit.samples
    assert all(again.samples[step] == x for step, x in seen.samples.items() if step > restored)
    assert_same_run(run, want)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_at_once_and_the_run_goes_on_bit_for_bit(root, unbroken, tmp_path, number):
    want, audit = unbroken
    run, seen = tmp_path / "run", Audit()
    handlers = [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)]

    def observe(step: int, batch: Batch) -> None:
        seen(step, batch)
        if step == 5:
            os.kill(os.getpid(), number)

    outcome = train(config(root), run, observe)
    assert outcome.signal == number and 5 <= outcome.step <= 7
    assert [signal.getsignal(x) for x in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert not (run / checkpoints.INDEXER).exists()
    assert checkpoints.finished_steps(run)[-1] == outcome.step == max(seen.samples)
    again = Audit()
    assert train(config(root), run, again).step == 12
    assert not seen.samples.keys() & again.samples.keys()
    assert seen.samples | again.samples == audit.samples
    (_, a, _), (_, b, _) = checkpoints.load_params(run), checkpoints.load_params(want)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    # Lines may end at other steps, but every step is in one of them.
    assert sum(line["steps"] for line in read_metrics(run)) == 12


def test_every_sample_comes_once_an_epoch(unbroken):
    _, audit = unbroken
    steps = [audit.samples[step] for step in range(1, 13)]  # 96 samples: one epoch of 12 batches
    flat = [tuple(sample) for batch in steps for sample in batch]
    assert len(flat) == 96 == len(set(flat))


def test_a_finished_run_is_left_as_it_is(root, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")}
    audit = Audit()
    outcome = train(config(root), run, audit)
    assert (outcome.step, outcome.signal, audit.samples) == (12, None, {})
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.safetensors")} == before
    assert_same_run(run, unbroken[0])


def test_another_configuration_is_refused_and_its_fields_named(root, unbroken):
    changed = config(root, run={"seed": 1, "keep": 5}, optimizer={"learning_rate": 0.02})
    with pytest.raises(ConfigError) as caught:
        train(changed, unbroken[0])
    message = str(caught.value)
    assert "optimizer.learning_rate = 0.01, now 0.02; run.seed = 0, now 1" in message
    assert "keep" not in message  # which has no influence on what is trained


def test_other_traces_than_a_run_began_with_are_refused(root, unbroken, tmp_path):
    run, document = tmp_path / "run", root / "train" / "doc-0-1"
    shutil.copytree(unbroken[0], run)
    document.rename(tmp_path / "away")
    try:
        with pytest.raises(ConfigError, match=r"data.train must have the traces .* in .*/train"):
            train(config(root), run)
    finally:
        (tmp_path / "away").rename(document)


def test_a_run_that_saved_nothing_may_be_begun_anew(root, tmp_path):
    run = tmp_path / "run"
    bad = config(root, init={"kind": "indexer", "path": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(bad, run)
    assert not run.exists()
    checkpoints.begin(run, bad)  # as one that was killed before its first checkpoint
    (run / checkpoints.INDEXER).write_bytes(b"of a run whose checkpoints were deleted")
    checkpoints.begin(run, config(root))
    assert checkpoints.read_config(run) == config(root)
    assert not (run / checkpoints.INDEXER).exists()


def test_a_run_may_begin_with_what_another_learned(root, unbroken):
    cfg = config(root, init={"kind": "indexer", "path": str(unbroken[0])})
    got, leaves = initial_indexer(cfg, open_corpora(cfg)["train"])
    want = checkpoints.load_params(unbroken[0])
    assert got == want[0] and leaves.keys() == want[1].keys()
    jax.tree.map(np.testing.assert_array_equal, leaves, want[1])


def test_how_it_is_served_may_differ_from_what_another_run_had(root, unbroken):
    begin = {"kind": "indexer", "path": str(unbroken[0])}
    own = dataclasses.replace(config(root).indexer, dilation=2, query_mode="bfloat16")
    cfg = dataclasses.replace(config(root, init=begin), indexer=own)
    got, _ = initial_indexer(cfg, open_corpora(cfg)["train"])
    want = checkpoints.load_params(unbroken[0])[0]
    assert got == dataclasses.replace(want, dilation=2, query_mode="bfloat16")
    other = dataclasses.replace(cfg, indexer=dataclasses.replace(own, lookback=2))
    with pytest.raises(ConfigError, match=r"init.path: indexer.lookback of .* must be 2, got 1"):
        initial_indexer(other, open_corpora(cfg)["train"])


def test_what_a_killed_save_left_is_removed(root, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    left = [run / "checkpoints" / name for name in ("deleted", "16.orbax-checkpoint-tmp-7")]
    for path in left:
        shutil.copytree(run / "checkpoints" / "12", path)
    assert train(config(root), run).step == 12
    assert not any(path.exists() for path in left)


def test_only_the_newest_checkpoints_are_kept(unbroken):
    assert checkpoints.finished_steps(unbroken[0]) == [8, 12]
    with pytest.raises(FileNotFoundError, match=r"has no checkpoint of step 4, only of .*8, 12"):
        checkpoints.load_params(unbroken[0], 4)
    assert checkpoints.load_params(unbroken[0], 8)[2] == 8


def test_a_damaged_checkpoint_is_refused_and_named(root, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    shutil.rmtree(run / "checkpoints" / "12" / "params")
    with pytest.raises(CheckpointError, match=r"checkpoints/12 is damaged"):
        checkpoints.load_params(run)
    with pytest.raises(CheckpointError, match=r"checkpoints/12 is damaged"):
        train(config(root), run)


def test_a_flipped_bit_in_a_checkpoint_is_refused_and_its_leaf_named(root, unbroken, tmp_path):
    """Orbax keeps files that it reads nothing of; in all others it restores most bits as they are,
    flipped or not."""
    run, said = tmp_path / "run", set()
    shutil.copytree(unbroken[0], run)
    step = run / "checkpoints" / "12"
    want = checkpoints.load_params(run)[1]
    for file in sorted(path for path in (step / "params").rglob("d/*")):
        whole = file.read_bytes()
        for at in range(40, len(whole), max(1, len(whole) // 6)):
            file.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
            try:
                jax.tree.map(np.testing.assert_array_equal, checkpoints.load_params(run)[1], want)
            except CheckpointError as why:
                said.add(str(why).split(" is damaged")[1])
                damaged = file, file.read_bytes()
        file.write_bytes(whole)
    named = {words for words in said if "other checksums than were saved of params/retr" in words}
    assert len(named) >= 2 and len(said) > len(named), said
    damaged[0].write_bytes(damaged[1])
    with pytest.raises(CheckpointError, match=r"checkpoints/12 is damaged"):
        train(config(root), run)


@pytest.mark.parametrize("item", ["progress", "indexer_config", "checksums"])
def test_a_changed_digit_beside_the_arrays_is_refused(root, unbroken, tmp_path, item):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    file = run / "checkpoints" / "12" / item / "metadata"
    text = file.read_text()
    at = re.search(r"[0-9]", text).start()  # pyright: ignore[reportOptionalMemberAccess]
    file.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])
    with pytest.raises(CheckpointError, match=r"checkpoints/12 is damaged"):
        train(config(root), run)


def test_checksums_tell_every_changed_word_and_equal_plain_sums():
    rng = np.random.default_rng(0)
    tree = {"a": {"b": rng.normal(size=(5, 7)).astype(np.float32)}, "n": np.int32(7)}
    words = [int(x) for x in tree["a"]["b"].view(np.uint32).reshape(-1)]
    sums = [sum(words), sum((2 * i + 1) * x for i, x in enumerate(words))]
    want = {"a.b": [x % 2**32 for x in sums], "n": [7, 7]}
    assert checksums.checksums(tree) == want and checksums.damaged(want, want) == []
    for at in range(35):
        for bit in (0, 31):
            other = tree["a"]["b"].copy()
            other.view(np.uint32).reshape(-1)[at] ^= np.uint32(1 << bit)
            assert checksums.damaged(checksums.checksums({"a": {"b": other}}), want) == ["a.b", "n"]
    swapped = tree["a"]["b"][:, ::-1].copy()
    found = checksums.checksums({**tree, "a": {"b": swapped}})
    assert found["a.b"][0] == want["a.b"][0] and checksums.damaged(found, want) == ["a.b"]


def test_a_run_has_one_trainer_at_a_time(root, unbroken, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); "
    hold += "print(flush=True); time.sleep(60)"
    command = [sys.executable, "-c", hold, str(run / checkpoints.LOCK)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline()
        with pytest.raises(CheckpointError, match=r"run is being trained by another process"):
            train(config(root), run)
        assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file()} == before | {
            run / checkpoints.LOCK: (run / checkpoints.LOCK).stat().st_mtime_ns
        }
        other.kill()
    assert train(config(root), run).step == 12  # the lock went with the process


def test_a_directory_with_other_files_is_no_run(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds files, but no run with a config.json"):
        train(config(root), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(FileNotFoundError, match=r"is no training run: it has no config.json"):
        checkpoints.load_params(tmp_path)


def test_steps_without_finite_gradients_are_skipped_and_end_the_run_when_they_repeat(
    root, unbroken, tmp_path, monkeypatch
):
    cfg, run = config(root, run={"max_bad_steps": 3}), tmp_path / "run"
    following = Batches.__next__

    def damaged(self: Batches) -> Batch:
        batch = following(self)
        step = self.get_state()["next_step"]
        if step in (2, 3) or step >= 6:
            batch.hidden[:] = np.nan
        return batch

    with (
        monkeypatch.context() as patch,
        pytest.raises(
            TrainingError,
            match=r"not finite in 3 steps in a row \(run.max_bad_steps\), up to step 8",
        ) as e,
    ):
        patch.setattr(Batches, "__next__", damaged)
        train(cfg, run)
    assert "steps were skipped; the state is saved in" in str(e.value)
    first = read_metrics(run)[0]
    assert (first["step"], first["steps"], first["skipped"]) == (3, 3, 2)
    # The parameters are those of three good steps of the same schedule.
    saved = checkpoints.finished_steps(run)[-1]
    assert saved == 8
    outcome = train(cfg, run)  # the data are sound again
    assert outcome.step == 12 and outcome.signal is None
    assert outcome.skipped == 5


def test_metrics_after_the_restored_step_are_dropped_with_what_was_cut_off(tmp_path):
    lines = [{"kind": "train", "step": step} for step in (0, 3, 4, 6)]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tra'
    for step, kept in ((4, [0, 3, 4, 5]), (0, [5])):
        (tmp_path / "metrics.jsonl").write_text(text)
        log = MetricsLog(tmp_path, step=step)
        log.write({"kind": "train", "step": 5, "loss": float("nan")})
        log.close()
        found = read_metrics(tmp_path)
        assert [line["step"] for line in found] == kept and found[-1]["loss"] is None


@pytest.mark.parametrize(
    "garbage", [b"\x00\x00\x00", b"{}", b"[1]", b'{"kind": "train", "step": "x"}']
)
def test_a_line_that_is_no_metrics_is_refused_and_named(tmp_path, garbage):
    good = b'{"kind": "train", "step": 3}\n'
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(good + garbage + b"\n" + good)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: line 2 is damaged \(") as caught:
        MetricsLog(tmp_path, step=3)
    assert "\n" not in str(caught.value)
    assert file.read_bytes() == good + garbage + b"\n" + good
