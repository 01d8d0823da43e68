"""The bench in other processes: what dies or hangs costs one row, and nothing is done twice."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels import apart, bench, casebook, dispatch, record, timing
from pallas_kernels.record import Record
from tests.test_bench_kernels import fake

ROOT = Path(__file__).parents[1]
HERE = {"device": "a device"}
WORKER = """
import os, signal, sys, time
from pathlib import Path
from pallas_kernels.record import Record

file, log, dies, hangs, left = sys.argv[1:]
with open(log, "a") as out:
    out.write(f"{os.getpid()} {left}\\n")
if "start" in (dies, hangs):
    sys.exit(5) if dies else time.sleep(600)
found = Record(Path(file), "rows", {"device": "a device"}, resume=True)
for case in "abcde":
    if case not in [row["case"] for row in found.rows]:
        found.begin(case, "triton")
        with open(log, "a") as out:
            out.write(case + "\\n")
        if case in dies:
            os.kill(os.getpid(), signal.SIGSEGV)
        if case in hangs:
            time.sleep(600)
        found.add({"case": case, "backend": "triton"})
found.finish()
"""


class Worker:
    """A command that keeps a record of five cases, and dies or hangs at some of them."""

    def __init__(self, folder: Path, dies: str = "", hangs: str = ""):
        self.file, self.log = folder / "record.json", folder / "log"
        script = folder / "worker.py"
        script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{WORKER}")
        self.command = list(map(str, (sys.executable, script, self.file, self.log, dies, hangs)))

    def run(self, budget: float = 100.0) -> int:
        """Patient enough for a Python that starts slowly."""
        return apart.run(self.command, self.file, patience=3.0, budget=budget)

    @property
    def starts(self) -> list[tuple[int, float]]:
        """Process id and seconds left, of every start."""
        lines = [line.split() for line in self.log.read_text().splitlines()]
        return [(int(line[0]), float(line[1])) for line in lines if len(line) == 2]

    @property
    def began(self) -> str:
        return "".join(line for line in self.log.read_text().splitlines() if len(line) == 1)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "POLL_S", 0.02)


def test_what_dies_or_hangs_fails_and_everything_else_is_done_once(tmp_path: Path) -> None:
    worker = Worker(tmp_path, dies="be", hangs="c")
    assert worker.run() == 0
    result = json.loads(worker.file.read_text())
    assert worker.began == "abcde"
    assert [(row["case"], row.get("failed")) for row in result["rows"]] == [
        *(("a", None), ("b", record.DIED), ("c", record.DIED), ("d", None), ("e", record.DIED))
    ]
    assert result["finished"] is True and "running" not in result
    assert len(worker.starts) == 4


@pytest.mark.parametrize(("dies", "hangs", "code"), [("start", "", 5), ("", "start", -9)])
def test_a_command_that_comes_no_further_is_not_begun_again(
    tmp_path: Path, dies: str, hangs: str, code: int
) -> None:
    worker = Worker(tmp_path, dies, hangs)
    assert worker.run() == code
    assert len(worker.starts) == 1


def test_all_starts_share_the_seconds(tmp_path: Path) -> None:
    worker = Worker(tmp_path, dies="ad")
    worker.run(budget=50.0)
    left = [seconds for _, seconds in worker.starts]
    assert len(left) == 3 and 50.0 >= left[0] > left[1] > left[2] > 0.0


def test_no_process_outlives_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, sleep = Worker(tmp_path, hangs="a"), apart.time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if worker.log.exists() and worker.began:
            raise KeyboardInterrupt

    monkeypatch.setattr(apart.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        worker.run()
    ((process, _),) = worker.starts
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_a_record_is_gone_on_with_only_if_asked(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    first = Record(file, "rows", HERE)
    first.add({"case": "a"})
    first.begin("op b", "triton")
    again = Record(file, "rows", HERE, resume=True)
    assert again.rows[0] == {"case": "a"} and again.rows[1]["case"] == "op b"
    assert again.rows[1]["op"] == "op" and again.rows[1]["outcome"] == "FAIL"
    assert Record(file, "rows", HERE).rows == []


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    found = Record(file, "rows", HERE)
    found.add({"case": "a"})
    found.result["spoiled"] = {(): 1}  # no key of JSON
    with pytest.raises(TypeError):
        found.add({"case": "b"})
    assert record.read(file)["rows"] == [{"case": "a"}]


REFUSED = {
    "--apart needs --json": ["--apart", "9"],
    "--resume needs --json": ["--resume"],
    "argument --apart: invalid seconds value: '-1'": ["--apart", "-1", "--json", "x"],
    "argument --budget-s: invalid seconds value: 'nan'": ["--budget-s", "nan"],
    "--json: there is no folder nowhere": ["--json", "nowhere/x.json"],
    "--plot: there is no folder nowhere": ["--plot", "nowhere/x.png"],
    "--peers: there is no module evals.no_peers": ["--peers", "evals.no_peers"],
    "--op must be of": ["--op", "matmul"],
    "--case: no line of a case contains 'sizes=(0'": ["--op", "hc_mix", "--case", "sizes=(0"],
    "--backend mosaic_gpu: mosaic_gpu needs a Hopper GPU": ["--backend", "mosaic_gpu"],
    "unrecognized arguments: --js x": ["--js", "x"],
}


def refusal(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """The one line that a command line is refused with."""
    with pytest.raises(SystemExit) as end:
        bench.main(arguments)
    said = capsys.readouterr()
    assert end.value.code == 2 and said.out == ""
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


@pytest.mark.parametrize("why", REFUSED)
def test_bad_input_ends_with_2_and_one_line(why: str, capsys: pytest.CaptureFixture) -> None:
    assert why in refusal(REFUSED[why], capsys)


@pytest.mark.parametrize("check", [["--check"], []])
@pytest.mark.parametrize(
    ("content", "why"),
    [
        ('{"device": "TPU v6"}', "is of {'device': 'TPU v6'"),
        ('{"jax": "0.1"}', "'jax': '0.1'}, and this is"),
        ("{", "must be JSON"),
        ("[]", "must hold a JSON object, got list"),
    ],
)
def test_a_record_of_something_else_is_refused(
    content: str, why: str, check: list[str], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "record.json"
    file.write_text(content)
    said = refusal([*check, "--op", "hc_mix", "--resume", "--json", str(file)], capsys)
    assert why in said
    assert file.read_text() == content


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Arguments for two cases of a definition, and a record."""
    for cases in ("correctness", "benchmarks"):
        monkeypatch.setattr(casebook, cases, lambda _: (fake(), fake(shape={"n": 7})))
    monkeypatch.setattr(casebook, "backends", lambda _: ("xla",))
    monkeypatch.setattr(timing, "MOST_BUFFERS", 4)
    return ["--op", "hc_mix", "--json", str(tmp_path / "record.json")]


def test_a_check_goes_on_after_the_case_that_killed_it(
    command: list[str], capsys: pytest.CaptureFixture
) -> None:
    file = Path(command[-1])
    file.write_text('{"running": {"op": "fake", "case": "fake n=5", "backend": "xla"}}')
    assert bench.main([*command, "--check", "--resume"]) == 1
    said = capsys.readouterr().out
    assert f"xla fake n=5: {record.DIED}" in said and "2 checks, 1 failed" in said
    rows = json.loads(file.read_text())["checks"]
    assert [(row["case"], row["outcome"]) for row in rows] == [
        *(("fake n=5", "FAIL"), ("fake n=7", "pass"))
    ]


def test_a_measurement_goes_on_with_its_ceilings_and_times_nothing_twice(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = Path(command[-1])
    bench.main(command)
    first = json.loads(file.read_text())
    kept = {**first, "rows": first["rows"][:1], "finished": False}
    file.write_text(json.dumps(kept))
    monkeypatch.setattr(timing, "measure_ceilings", lambda *_: pytest.fail("measured again"))
    bench.main([*command, "--resume"])
    again = json.loads(file.read_text())
    assert again["rows"][0] == first["rows"][0]
    assert [row["case"] for row in again["rows"]] == ["fake n=5", "fake n=7"]
    assert again["rows"][1]["seconds"] > 0 and again["finished"] is True


class Ended(Exception):
    """In the place of the process's end."""


def test_a_process_that_lost_its_device_ends_at_once_and_keeps_why(
    command: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(code: int) -> None:
        raise Ended(code)

    wrong = fake(declined=("xla",))
    monkeypatch.setattr(casebook, "correctness", lambda _: (wrong, fake(shape={"n": 7})))
    monkeypatch.setattr(timing, "alive", lambda: False)
    monkeypatch.setattr(os, "_exit", end)
    with pytest.raises(Ended, match=str(bench.LOST)):
        bench.main([*command, "--check"])
    result = json.loads(Path(command[-1]).read_text())
    assert [row["outcome"] for row in result["checks"]] == ["FAIL"] and not result["finished"]


@pytest.mark.parametrize(
    ("found", "child", "code", "said"),
    [
        ({"finished": True, "checks": [{"outcome": "pass"}]}, -6, 0, ""),  # it had all it was to do
        ({"finished": True, "checks": [{"outcome": "FAIL"}]}, 0, 1, ""),
        ({"finished": False, "checks": []}, -9, 1, "ended with -9 and got no further"),
        ({}, 2, 2, "ended with 2 and got no further"),
    ],
)
def test_the_record_says_how_processes_ended(
    found: dict[str, Any],
    child: int,
    code: int,
    said: str,
    command: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    file, given = Path(command[-1]), []
    file.write_text('{"checks": [{"outcome": "FAIL"}]}')

    def run(line: list[str], *rest: Any) -> int:
        given.append((line[-4:], *rest, file.exists()))
        file.write_text(json.dumps(found))
        return child

    monkeypatch.setattr(apart, "run", run)
    assert bench.main([*command, "--check", "--apart", "7", "--budget-s", "60"]) == code
    assert said in capsys.readouterr().out
    assert given == [(["--apart", "0", "--resume", "--budget-s"], file, 7.0, 60.0, False)]


@pytest.mark.slow
def test_checks_run_in_another_process_and_this_one_starts_no_device(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    program = (
        "import sys; from jax._src import xla_bridge; from pallas_kernels import bench\n"
        "code = bench.main(sys.argv[1:]); assert not xla_bridge.backends_are_initialized()\n"
        "sys.exit(code)"
    )
    line = [sys.executable, "-c", program, "--check", "--op", "hc_mix", "--json", str(file)]
    done = subprocess.run(
        [*line, "--apart", "60"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result, cases = json.loads(file.read_text()), casebook.correctness("hc_mix")
    assert [row["case"] for row in result["checks"]] == [str(case) for case in cases]
    assert result["device"] == jax.devices()[0].device_kind
    assert {row["backend"] for row in result["checks"]} == {dispatch.XLA}


def test_a_finished_record_does_not_hide_that_the_next_command_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"device": "another", record.FINISHED: True, "checks": []}))
    monkeypatch.setattr(apart, "run", lambda *_: 2)  # refuses the record, and writes nothing
    command = ["--check", "--op", "hc_mix", "--json", str(file)]
    assert bench.main([*command, "--apart", "9", "--resume"]) == 2


def test_checks_that_the_seconds_did_not_suffice_for_are_named(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = tuple(fake(shape={"n": n}) for n in (3, 4, 5))
    monkeypatch.setattr(casebook, "correctness", lambda _: cases)
    assert bench.main(["--check", "--op", "hc_mix", "--backend", "xla", "--budget-s", "0"]) == 0
    said = capsys.readouterr().out
    assert f"not checked within 0 s: xla {cases[1]}; xla {cases[2]}\n" in said
    assert "1 checks, 0 failed" in said
