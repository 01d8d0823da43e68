"""A run that stops and goes on is the run that did not: samples, parameters, metrics."""

import json
import os
import shutil
import signal
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
from train.run import checkpoints
from train.run.loop import TrainingError
from train.run.progress import MetricsLog, read_metrics


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


def test_a_run_that_saved_nothing_may_be_begun_anew(root, tmp_path):
    run = tmp_path / "run"
    bad = config(root, init={"kind": "indexer", "path": str(tmp_path / "nowhere")})
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train(bad, run)
    (run / checkpoints.INDEXER).write_bytes(b"of a run whose checkpoints were deleted")
    checkpoints.begin(run, config(root))
    assert checkpoints.read_config(run) == config(root)
    assert not (run / checkpoints.INDEXER).exists()


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


def test_a_directory_with_other_files_is_no_run(root, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds files, but no run with a config.json"):
        train(config(root), tmp_path)
    with pytest.raises(FileNotFoundError, match=r"is no training run: it has no config.json"):
        checkpoints.load_params(tmp_path)


def test_steps_without_finite_gradients_are_skipped_and_end_the_run_when_they_repeat(
    root, unbroken, tmp_path
):
    cfg, run = config(root, run={"max_bad_steps": 3}), tmp_path / "run"

    def observe(step: int, batch: Batch) -> None:
        if step in (2, 3) or step >= 6:
            batch.hidden[:] = np.nan

    with pytest.raises(
        TrainingError, match=r"not finite in [34] steps in a row .*run.max_bad"
    ) as e:
        train(cfg, run, observe)
    assert "steps were skipped; the state is saved in" in str(e.value)
    first = read_metrics(run)[0]
    assert (first["step"], first["steps"], first["skipped"]) == (3, 3, 2)
    # The parameters are those of three good steps of the same schedule.
    saved = checkpoints.finished_steps(run)[-1]
    assert 8 <= saved <= 9
    outcome = train(cfg, run)  # the data are sound again
    assert outcome.step == 12 and outcome.signal is None
    assert 5 <= outcome.skipped <= 6


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
