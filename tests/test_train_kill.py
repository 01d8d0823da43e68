"""A run killed twenty times, and gone on with each time, is the run that was never killed."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import train_runs
from tests.train_runs import assert_same_run, config
from train.run import checkpoints

ROOT = Path(__file__).parents[1]
MOMENTS, STEPS_APART = 20, 3
STEPS = MOMENTS * STEPS_APART + 60  # a busy machine kills late


def child(file: Path, run: Path, audit: Path) -> subprocess.Popen:
    cache = train_runs.shared_programs(file.parent / "programs")
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | cache
    script = [sys.executable, str(ROOT / "tests" / "train_killed.py"), file, run, audit]
    errors = (file.parent / "stderr").open("ab")
    with errors:
        return subprocess.Popen(
            [*map(str, script)], env=env, stdout=subprocess.PIPE, stderr=errors, text=True
        )


def kill_at(process: subprocess.Popen, what: str, step: int, delay: float) -> str:
    """Kills the process so many seconds after it says `what` of a step from `step` on."""
    assert process.stdout is not None
    if what == "start":
        time.sleep(delay)
    for line in process.stdout if what != "start" else ():
        said, number = line.split()
        if said == what and int(number) >= step:
            time.sleep(delay)
            break
    else:
        line = "start"
    assert process.poll() is None, "ended before it was killed"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return line.strip()


def unfinished(run: Path) -> list[str]:
    """Checkpoints that were being written."""
    root = run / checkpoints.CHECKPOINTS
    return [path.name for path in root.glob("*tmp*")] if root.is_dir() else []


def audited(file: Path) -> list[tuple[int, list[list[int]]]]:
    """What was trained on, batch by batch; a line may be cut off where the process was killed."""
    lines = file.read_text().splitlines(keepends=True)
    return [tuple(json.loads(line)) for line in lines if line.endswith("\n")]


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_as_the_unbroken_one(tmp_path):
    root = train_runs.traces(tmp_path / "traces")
    options = {"steps": STEPS, "checkpoint_every": STEPS_APART, "validate_every": 24}
    cfg = config(root, data={"validation": [str(root / "validation")]}, run=options)
    file = train_runs.toml(cfg, tmp_path / "config.toml")
    want, whole = tmp_path / "unbroken", tmp_path / "unbroken.jsonl"
    process = child(file, want, whole)
    process.communicate()
    assert process.returncode == 0, (tmp_path / "stderr").read_text()

    run, audit, rng = tmp_path / "run", tmp_path / "run.jsonl", np.random.default_rng(0)
    moments, saves, steps, finished = [], 0, 0, []
    for moment in range(MOMENTS):
        what = ("save", "step", "save", "step", "start")[moment % 5]
        longest = {"save": 0.12, "step": 0.004, "start": 3.0}[what]
        # From where the run must get to anyway: later and later in its life.
        said = kill_at(
            child(file, run, audit), what, moment * STEPS_APART + 1, longest * rng.random()
        )
        # At the start there may be one that the run before left, which is about to be removed.
        writing = unfinished(run) if said != "start" else []
        saves += bool(writing)
        steps += not writing and said.startswith("step")
        moments.append(f"{said}{' while writing ' + writing[0].split('.')[0] if writing else ''}")
        finished.append(checkpoints.finished_steps(run)[-1:])
        if finished[-1]:  # whatever has a name is whole
            assert checkpoints.load_params(run, finished[-1][0])[2] == finished[-1][0]
    print(f"killed at: {'; '.join(moments)}; newest checkpoints: {finished}")
    assert saves + steps >= 10 and saves >= 3

    process = child(file, run, audit)
    process.communicate()
    assert process.returncode == 0, (tmp_path / "stderr").read_text()
    assert_same_run(run, want)
    unbroken = dict(audited(whole))
    assert list(unbroken) == list(range(1, STEPS + 1))
    found = audited(audit)
    assert {step for step, _ in found} == unbroken.keys()
    assert all(samples == unbroken[step] for step, samples in found)
    assert not unfinished(run)
    # Each life goes on where a checkpoint was: never later than one after the last step seen.
    for (before, _), (after, _) in itertools.pairwise(found):
        assert after == before + 1 or (after <= before and (after - 1) % STEPS_APART == 0)
