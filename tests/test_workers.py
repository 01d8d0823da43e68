"""Worker processes draw the same batches as threads, and none outlives its run."""

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests import train_runs
from tests.batch_cases import DATA, SAMPLING, equal, taken, two_sets
from tests.train_runs import config
from train.data.dataset import Corpus, batches
from train.data.workers import Taker
from train.run.checkpoints import finished_steps, load_params

ROOT = Path(__file__).parents[1]
SHARED = Path("/dev/shm")


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    return two_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def corpus(sets) -> Corpus:
    return Corpus.open(sets)


def test_two_workers_go_on_as_threads_do_in_the_middle_of_an_epoch(corpus):
    first, second = (
        batches(corpus, dataclasses.replace(DATA, workers=n), SAMPLING, epochs=2) for n in (0, 2)
    )
    for _ in range(9):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    rest = list(second)
    assert len(rest) == 2 * first.steps_per_epoch - 9 and all(map(equal, first, rest))
    first.close()
    second.close()


@pytest.mark.slow
def test_workers_go_back_with_batches_in_flight(corpus):
    want = taken(corpus)
    running = batches(corpus, dataclasses.replace(DATA, workers=2), SAMPLING)
    state = running.get_state()
    for step in (3, 0, 5):
        running.set_state({**state, "next_step": step})
        assert equal(next(running), want[step]) and equal(next(running), want[step + 1])
        assert running.get_state()["next_step"] == step + 2
    running.close()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_draws_the_same(corpus, workers):
    data = dataclasses.replace(DATA, workers=workers, mixed_documents=5, max_offset=9)
    want = taken(corpus, dataclasses.replace(data, workers=0, threads=1, prefetch=0))
    assert all(map(equal, taken(corpus, data), want))


def test_what_is_taken_ahead_is_bounded_in_order_and_ends_with_its_error():
    begun = []

    def source():
        for number in range(5):
            begun.append(number)
            yield number
        raise OSError("gone")

    taker = Taker(source(), ahead=2)
    for number in range(5):
        assert next(taker) == number and len(begun) <= number + 3
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            next(taker)
    taker.close()
    endless = Taker(itertools.count(), ahead=2)
    assert next(endless) == 0
    endless.close()
    assert not any(thread.name == "taker" for thread in threading.enumerate())


def started(script: str, *arguments: object, **variables: str) -> subprocess.Popen:
    """A Python process in a group of its own, as a shell starts it."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"} | variables
    command = [sys.executable, script, *map(str, arguments)]
    out = subprocess.PIPE
    return subprocess.Popen(
        command, env=env, text=True, start_new_session=True, stdout=out, stderr=out
    )


def group(process: subprocess.Popen) -> set[int]:
    """Ids of the living processes of its group."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[2]) == process.pid and fields[0] != "Z":
            found.add(int(path.parent.name))
    return found


def wait_for_none(process: subprocess.Popen, seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while group(process):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


DRAW = """
import sys
from train.data.dataset import Corpus, DataConfig, batches
from train.data.labels import SamplingConfig

if __name__ == "__main__":
    corpus = Corpus.open([sys.argv[1]])
    data = DataConfig(batch_size=4, workers=2)
    stream = batches(corpus, data, SamplingConfig(window=16), epochs=1000)
    for number, _ in enumerate(stream):
        print(number, flush=True)
"""


@pytest.mark.slow
def test_workers_and_shared_memory_are_gone_after_kill_9_of_their_run(sets, tmp_path):
    script = tmp_path / "draw.py"
    script.write_text(DRAW)
    before = set(SHARED.glob("psm_*"))
    process = started(str(script), sets[0])
    assert process.stdout is not None
    while process.stdout.readline().strip() != "5":
        assert process.poll() is None
    assert len(group(process)) >= 3  # the run, two workers, and who keeps track of shared memory
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert wait_for_none(process)
    assert set(SHARED.glob("psm_*")) <= before
    process.communicate()


STEPS = 600  # so many that a signal of a busy machine comes before half of them


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    """A folder with a run by threads in `whole`, the configuration of the same run by two workers,
    and what it compiled."""
    folder = tmp_path_factory.mktemp("unbroken")
    root = train_runs.traces(folder / "traces")
    for name, workers in (("whole", 0), ("run", 2)):
        cfg = config(
            root, data={"workers": workers}, run={"steps": STEPS, "checkpoint_every": STEPS // 2}
        )
        train_runs.toml(cfg, folder / f"{name}.toml")
    whole = trained(folder, "whole", folder)
    assert whole.communicate()[1] is not None and whole.returncode == 0
    return folder


def trained(folder: Path, name: str, out: Path) -> subprocess.Popen:
    """`train_killed.py` on one of these configurations."""
    command, run = str(ROOT / "tests" / "train_killed.py"), (out / name, out / f"{name}.jsonl")
    programs = train_runs.shared_programs(folder / "programs")
    return started(command, folder / f"{name}.toml", *run, **programs)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_run_saves_it_and_it_goes_on(unbroken, tmp_path, number):
    process = trained(unbroken, "run", tmp_path)
    assert process.stdout is not None
    while process.stdout.readline().strip() != "step 20":
        assert process.poll() is None
    os.killpg(process.pid, number)
    _, errors = process.communicate()
    assert process.returncode == 0 and "Traceback" not in errors, errors  # the loop has returned
    assert "leaked" not in errors and wait_for_none(process)
    assert finished_steps(tmp_path / "run")[-1] in range(20, STEPS // 2)
    again = trained(unbroken, "run", tmp_path)
    _, errors = again.communicate()
    assert again.returncode == 0 and wait_for_none(again), errors
    (_, got, step), (_, want, other) = (
        load_params(tmp_path / "run"),
        load_params(unbroken / "whole"),
    )
    assert step == other == STEPS
    for name, leaf in want.items():
        np.testing.assert_array_equal(got[name], leaf, err_msg=name)
