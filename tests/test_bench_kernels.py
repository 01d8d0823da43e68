"""The casebook, what checks and times its cases, and what reads compiled programs."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import (
    bench,
    casebook,
    checks,
    measured,
    programs,
    rows,
    sparse_decode,
    timing,
)
from pallas_kernels.casebook import EXACT, Case, Tolerance, Work
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.page_recall import cases as page_recall_cases
from pallas_kernels.page_recall import page_recall

NAN, INF = float("nan"), float("inf")


def floats(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("tolerance", "got", "want", "ok"),
    [
        (EXACT, floats(1, NAN, INF), floats(1, NAN, INF), True),
        (EXACT, floats(1, 2), floats(1, 2.0000002), False),
        (EXACT, floats(1, NAN), floats(1, 2), False),
        (EXACT, floats(1, 2), floats(1, NAN), False),
        (EXACT, floats(1, -INF), floats(1, INF), False),
        (Tolerance("", absolute=0.1), floats(1.09, -5), floats(1, -5), True),
        (Tolerance("", absolute=0.1), floats(1.11, -5), floats(1, -5), False),
        (Tolerance("", relative=0.01), floats(0.09, 10), floats(0, 10), True),  # of the largest
        (Tolerance("", relative=0.01), floats(0.11, 10), floats(0, 10), False),
        (Tolerance("", each=0.01), floats(0.1, 10.09), floats(0.1, 10), True),  # of its own size
        (Tolerance("", each=0.01), floats(0.11, 10), floats(0.1, 10), False),
        (EXACT, floats(), floats(), True),
    ],
)
def test_a_tolerance_means_the_same_on_the_host_and_on_the_device(
    tolerance: Tolerance, got: np.ndarray, want: np.ndarray, ok: bool
) -> None:
    assert casebook.compare(tolerance, got, want).ok is ok
    assert bool(timing.agree(tolerance, jnp.asarray(got), jnp.asarray(want))[0]) is ok


def test_a_comparison_says_what_is_wrong() -> None:
    result = casebook.compare(EXACT, {"x": floats(1, 2, 9)}, {"x": floats(1, 4, 3)})
    assert not result.ok and result.error == 6.0
    assert "2 of 3 differ, the first at (1,): got 2, want 4" in result.why
    assert "float32 [2], got float32 [1]" in casebook.compare(EXACT, floats(1), floats(1, 2)).why
    assert not casebook.compare(EXACT, (floats(1),), floats(1)).ok


@pytest.mark.parametrize("op", casebook.operations())
def test_every_operation_has_cases_that_say_what_they_cost_and_may_err(op: str) -> None:
    small, true = casebook.correctness(op), casebook.benchmarks(op)
    compiled = {case.kernel_name for case in true if case.aot}
    assert small and compiled
    # Names that programs were seen to have where they are compiled ahead of time.
    assert {case.kernel_name for case in (*small, *true)} == compiled
    for cases in (small, true):
        assert len({str(case) for case in cases}) == len(cases), "two cases have one name"
    for case in (*small, *true):
        assert case.op == op and case.tolerance.reason
        assert set(case.declined) <= set(casebook.backends(op)) - {"xla"}
    for case in true:
        work = case.work()
        assert work.bytes > 0 and work.flops >= 0 and work.host_bytes >= 0, str(case)


def test_random_fp8_entries_are_finite_and_poison_is_not() -> None:
    @jax.jit
    def drawn(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        entries = casebook.fp8_rows(key, (40,))
        spoiled = casebook.poisoned(entries, jnp.arange(40) >= 37)
        values = [rows.decode(e, 512, 64, jnp.float32) for e in (entries, spoiled)]
        return entries.nope, values[0], values[1]

    codes, values, spoiled = drawn(jax.random.key(0))
    assert values.shape == (40, 512) and np.isfinite(values).all()
    assert len(np.unique(np.asarray(codes).reshape(40, -1)[:, :448])) == 254
    assert np.isnan(spoiled[37:]).all() and np.isfinite(spoiled[:37]).all()


def plus_one_if_a_kernel(x: jax.Array, *, backend: str) -> jax.Array:
    if backend == "triton":
        raise Unsupported("not today")
    return x if backend == "xla" else x + 1


def fake(**changes: Any) -> Case:
    case = Case(
        op="fake",
        call=plus_one_if_a_kernel,
        make=lambda key, n: (jax.random.normal(key, (n,)),),
        floor=lambda n: Work(bytes=8 * n),
        shape={"n": 5},
        tolerance=EXACT,
    )
    return case.named("", **changes)


def test_a_check_fails_where_no_kernel_ran_or_one_declined_unasked() -> None:
    assert checks.check(fake(), "xla").outcome == "pass"
    ran = checks.check(fake(), "mosaic_tpu")
    assert ran.outcome == "FAIL" and "no kernel named fake in the compiled program" in ran.why
    declined = checks.check(fake(), "triton")
    assert declined.outcome == "FAIL" and declined.why == "Unsupported: not today"
    assert checks.check(fake(declined=("triton",)), "triton").outcome == "declined"
    assert checks.check(fake(declined=("xla",)), "xla").outcome == "FAIL"


def test_a_wrong_result_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = (programs.KernelCall("tpu_custom_call", "fake_kernel"),)
    monkeypatch.setattr(programs, "kernel_calls", lambda _: calls)
    result = checks.check(fake(), "mosaic_tpu")
    assert result.outcome == "FAIL" and result.error > 0.9 and "5 of 5 differ" in result.why


def test_the_command_checks_and_reports_failure(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(casebook, "correctness", lambda _: (fake(), fake(declined=("xla",))))
    file = tmp_path / "checks.json"
    assert bench.main(["--check", "--op", "hc_mix", "--json", str(file)]) == 1
    said = capsys.readouterr().out
    assert "pass     xla" in said and "2 checks, 1 failed" in said
    assert "mosaic_gpu needs a Hopper GPU, got cpu" in said
    assert [row["outcome"] for row in json.loads(file.read_text())["checks"]] == ["pass", "FAIL"]


class Double:
    """A peer."""

    name = "numpy"

    def take(self, args: tuple[Any, ...]) -> np.ndarray:
        return np.asarray(args[0])

    def call(self, taken: np.ndarray) -> np.ndarray:
        return taken + 0

    def finish(self) -> None:
        pass


def peers(case: Case) -> list[type[Double]]:
    """What `--peers tests.test_bench_kernels` finds."""
    return [Double]


def test_the_command_times_and_writes_what_it_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(casebook, "benchmarks", lambda _: (fake(), fake(shape={"n": 7})))
    monkeypatch.setattr(casebook, "backends", lambda _: ("xla",))
    monkeypatch.setattr(timing, "MOST_BUFFERS", 4)
    file = tmp_path / "times.json"
    command = ["--op", "hc_mix", "--json", str(file), "--peers", "tests.test_bench_kernels"]
    assert bench.main(command) == 0
    result = json.loads(file.read_text())
    assert set(result["ceilings"]) == {"copy", "read", "matmul", "host"}
    ran = [(row["backend"], row["shape"]["n"], row["clock"]) for row in result["rows"]]
    assert ran == [(b, n, "wall") for n in (5, 7) for b in ("xla", "numpy")]
    for row in result["rows"]:
        assert row["share"] == pytest.approx(row["floor"] / row["seconds"]) and row["buffers"] == 4
    assert result["rows"][1]["times_faster_than_xla"] > 0
    assert "of floor" in capsys.readouterr().out
    assert bench.main([*command, "--budget-s", "0"]) == 0
    result = json.loads(file.read_text())
    assert result["rows"] == [] and result["not_measured"] == ["fake n=5", "fake n=7"]


def recalled(*args: Any, backend: str) -> jax.Array:
    """`page_recall`, whose definition has every name."""
    return page_recall(*args, backend="xla")


def test_donated_arguments_are_timed_and_still_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "REPEATS", 3)
    monkeypatch.setattr(timing, "MOST_BUFFERS", 4)
    monkeypatch.setattr(casebook, "backends", lambda _: ("xla", "triton"))
    monkeypatch.setattr(measured.dispatch, "refusal", lambda _: None)
    case = page_recall_cases.given("", 4, src=(1, 2), dst=(3, 0))
    case = case.named("", in_place=(0,), call=recalled)
    first, second = measured.rows(case, timing.Ceilings(1e9, 1e9, 1e12, 1e9))
    assert first["seconds"] > 0 and second["seconds"] > 0
    assert second["right"] is True and second["kernel_in_program"] is False
    assert "THE KERNEL IS NOT IN THE PROGRAM" in measured.line(second)


class Profiler:
    """CUPTI's place: says that every call ran two kernels, of 1 ms and of twice its number."""

    calls = 0

    def __init__(self, *, finalize: bool):
        assert not finalize  # it must stay usable

    def measure(self, f: Any, *, aggregate: bool) -> Any:
        assert isinstance(f, jax.stages.Wrapped) and not aggregate

        def run() -> tuple[Any, list[tuple[str, float]]]:
            before = Profiler.calls
            out = f()
            count = Profiler.calls - before
            return out, [(k, ms) for i in range(count) for k, ms in (("a", 1.0), ("b", 2.0 * i))]

        return run


def test_on_a_gpu_a_time_is_the_median_of_each_calls_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jax.experimental.mosaic.gpu import profiler

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(profiler, "Cupti", Profiler)
    monkeypatch.setattr(timing, "REPEATS", 5)
    finished = []

    def call(i: int) -> int:
        Profiler.calls += 1
        return i

    found = timing.measure(call, finished.append)
    assert (found.clock, found.repeats, found.kernels) == ("device", 5, 2.0)
    assert found.seconds == pytest.approx((1.0 + 2.0 * 2) / 1e3)
    assert finished == [0, 1, 4]  # the warm-up calls, and the last of the measured ones


def test_a_floor_is_bound_by_what_takes_longest() -> None:
    ceilings = timing.Ceilings(copy=2e12, read=3e12, matmul=6e14, host=5e10)
    assert ceilings.floor(Work(bytes=3_000_000, flops=10)) == (1e-6, "memory")
    assert ceilings.floor(Work(bytes=10, flops=6 * 10**8)) == (1e-6, "compute")
    assert ceilings.floor(Work(bytes=10, host_bytes=50_000)) == (1e-6, "host")


def test_arguments_rotate_but_for_shared_pools_and_donated_ones_carry_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "MOST_BUFFERS", 5)
    case = page_recall_cases.given("", 4, src=(1, 2), dst=(3, 0)).named(
        "", shared=(1,), in_place=(0,), host=()
    )
    arguments = timing.Arguments.of(case)
    assert len(arguments.sets) == 5
    assert arguments.sets[0][1][0] is arguments.sets[1][1][0]
    assert not np.array_equal(arguments.sets[0][0], arguments.sets[1][0])
    runner = timing.Runner(case, "xla", timing.Arguments(arguments.sets[:1]))
    first = np.asarray(runner(0))
    np.testing.assert_array_equal(first[3], arguments.sets[0][1][0][1])
    np.testing.assert_array_equal(np.asarray(runner(1)), first)  # the donated pool had it already
    assert not arguments.sets[0][0].is_deleted()


def test_tunings_are_timed_by_their_names_and_call_the_kernel_with_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = casebook.benchmarks("sparse_decode")[0]
    monkeypatch.setattr(measured.dispatch, "refusal", lambda _: None)
    names = measured.runnable(case, ["mosaic_gpu"], "splits=3 scorer")
    assert names[0] == "xla" and "mosaic_gpu splits=3 scorer cluster" in names
    assert measured.runnable(case, ["mosaic_gpu"]) == ["xla", "mosaic_gpu"]
    tuned, backend = measured.called(case, "mosaic_gpu splits=3 scorer cluster")
    seen: dict[str, Any] = {}
    monkeypatch.setitem(sparse_decode.IMPLEMENTATIONS, backend, lambda *_, **kw: seen.update(kw))
    tuned.run((), backend)
    assert (seen["tuning"].splits, seen["tuning"].scorer, seen["own"]) == (3, True, False)


def test_every_tuning_that_is_named_belongs_to_a_backend_and_its_name_begins_so() -> None:
    for op in casebook.operations():
        for name, (backend, _) in casebook.tunings(op).items():
            assert backend in casebook.backends(op) and name.startswith(f"{backend} ")


@pytest.mark.slow
def test_the_roofline_is_drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(casebook, "benchmarks", lambda _: (fake(floor=lambda n: Work(n, 2 * n)),))
    monkeypatch.setattr(casebook, "backends", lambda _: ("xla",))
    plot = tmp_path / "roofline.png"
    assert bench.main(["--op", "hc_mix", "--plot", str(plot)]) == 0
    assert plot.read_bytes()[:4] == b"\x89PNG"
