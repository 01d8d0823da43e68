"""`python -m train.indexer` as processes: signals, several processes, other numbers of devices."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests import train_runs
from tests.train_runs import config, train
from train.run.checkpoints import load_params
from train.run.config import load_train_config
from train.run.progress import read_metrics

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return train_runs.traces(tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module")
def programs(tmp_path_factory) -> dict[str, str]:
    """For commands one after another; two at once would write the same files."""
    return train_runs.shared_programs(tmp_path_factory.mktemp("programs"))


def command(*arguments: object, devices: int = 1, **variables: str) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    env |= variables
    script = [sys.executable, "-W", "error", "-m", "train.indexer", *map(str, arguments)]
    return subprocess.Popen(script, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out.decode(), err.decode()


@pytest.mark.slow
def test_the_command_stops_at_a_signal_and_goes_on_to_a_plot(root, programs, tmp_path):
    run, plot = tmp_path / "run", tmp_path / "curves.png"
    options = {"steps": 100_000, "log_every": 50, "validate_every": 50_000}
    cfg = config(root, data={"validation": [str(root / "validation")]}, run=options)
    file = train_runs.toml(cfg, tmp_path / "config.toml")
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        process = command("--config", file, "--out", run, **programs)
        before = len(read_metrics(run))
        while len(read_metrics(run)) <= before:
            assert process.poll() is None, finish(process)
            time.sleep(0.05)
        process.send_signal(number)
        got, out, err = finish(process)
        assert (got, out) == (code, ""), err
        assert f"{number.name}: saved at step " in err.splitlines()[-1]
        assert "leakage: none found between train, validation" in err
    short = ("--config", file, "--out", tmp_path / "other", "--set", "run.steps=6")
    assert finish(command(*short, **programs))[0] == 0
    code, out, err = finish(command(*short, "--plot", plot, **programs))
    assert code == 0 and out.startswith(
        f"{tmp_path / 'other' / 'indexer.safetensors'}: best at "
    ), err
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("number", "moment"),
    [
        (signal.SIGTERM, "imports"),
        pytest.param(signal.SIGINT, "imports", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "reads", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "reads", marks=pytest.mark.slow),
    ],
)
def test_a_signal_while_it_starts_is_one_line_and_its_exit_code(tmp_path, number, moment):
    """While the slow imports go on, and while it waits for a trace that is a pipe."""
    pipe = tmp_path / "set" / "doc" / "trace.json"
    pipe.parent.mkdir(parents=True)
    os.mkfifo(pipe)
    given = ("--config", "indexer", "--data", pipe.parents[1], "--out", tmp_path / "run")
    process = command(*given)
    maps = Path(f"/proc/{process.pid}/maps")
    while moment == "imports" and "numpy" not in maps.read_text():
        assert process.poll() is None
        time.sleep(0.002)
    # Opened when the other side has, and for it to wait on, or for nobody.
    writer = os.open(pipe, os.O_RDWR if moment == "imports" else os.O_WRONLY)
    process.send_signal(number)
    code, out, err = finish(process)
    os.close(writer)
    assert (code, out) == (128 + number, "")
    assert err.startswith(f"{number.name}: ended at once; ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_cannot_begin_says_so_in_one_line_and_no_thread_adds_to_it(root, tmp_path):
    init = {"kind": "indexer", "path": str(tmp_path / "nowhere.safetensors")}
    file = train_runs.toml(config(root, init=init), tmp_path / "config.toml")
    for _ in range(3):  # threads are not always as late
        code, out, err = finish(command("--config", file, "--out", tmp_path / "run"))
        assert (code, out) == (2, "")
        *statistics, last = err.splitlines()
        assert last.startswith("error: [Errno 2] No such file"), err
        assert all(line.startswith(("train: ", "leakage: ", "  ")) for line in statistics), err


class Enough(Exception):
    """Stops a run between two steps."""


def coordinator() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_two_processes_train_what_one_does_and_stop_together(root, programs, tmp_path):
    options = {"steps": 12, "validate_every": 6}
    cfg = config(root, data={"validation": [str(root / "validation")]}, run=options)
    file = train_runs.toml(cfg, tmp_path / "config.toml")
    one, two = tmp_path / "one", tmp_path / "two"
    assert finish(command("--config", file, "--out", one, **programs))[0] == 0

    def start(run: Path, *more: str) -> list[subprocess.Popen]:
        at = ("--coordinator", coordinator(), "--processes", 2)
        each = ("--config", file, "--out", run, *at, *more, "--process-id")
        return [command(*each, i, devices=2) for i in range(2)]

    results = [finish(process) for process in start(two)]
    assert [code for code, _, _ in results] == [0, 0], results
    (_, want, step), (_, got, other) = load_params(one), load_params(two)
    assert step == other
    for name, leaf in want.items():
        # Gradients are summed over devices in another order; Adam divides them by their size.
        np.testing.assert_allclose(got[name], leaf, atol=1e-4, err_msg=name)
    assert len(read_metrics(two)) == len(read_metrics(one))

    stopped = tmp_path / "stopped"
    processes = start(stopped, "--set", "run.steps=100000", "--set", "run.validate_every=0")
    while not read_metrics(stopped)[1:]:
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)  # one of them is told
    results = [finish(process) for process in processes]
    assert [code for code, _, _ in results] == [143, 143], results


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_devices(root, programs, tmp_path):
    file = train_runs.toml(config(root, run={"checkpoint_every": 6}), tmp_path / "config.toml")
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert finish(command("--config", file, "--out", whole, **programs))[0] == 0
    cfg = load_train_config(file)

    def observe(step, batch):
        if step > 6:
            raise Enough

    with pytest.raises(Enough):  # after six steps, on this process's one device
        train(cfg, run, observe)
    code, _, err = finish(command("--config", file, "--out", run, devices=4))
    assert code == 0, err
    (_, want, _), (_, got, step) = load_params(whole), load_params(run)
    assert step == 12
    for name, leaf in want.items():
        np.testing.assert_allclose(got[name], leaf, atol=1e-4, err_msg=name)
    code, _, err = finish(command("--config", file, "--out", tmp_path / "odd", devices=3))
    assert code == 2
    assert "error: data.batch_size must be a multiple of 3 devices times" in err.splitlines()[-1]
