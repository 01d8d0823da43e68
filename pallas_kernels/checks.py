"""Every backend that the present device can run, on an operation's small cases, against the
definition on the CPU."""

import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from pallas_kernels import casebook, dispatch, timing

RUNS = 3  # of each case: an error that moves is a race


class Check(NamedTuple):
    """One case on one backend."""

    case: casebook.Case
    backend: str
    outcome: str  # "pass", "FAIL", "declined" (as the case says it must be)
    error: float
    why: str = ""

    def __str__(self) -> str:
        told = f": {self.why}" if self.why else ""
        return f"{self.outcome:8} {self.backend:10} {self.case}  error {self.error:.3g}{told}"


def definition_device() -> Any:
    """The CPU, which rounds as the definition says; else the default device."""
    try:
        return jax.devices("cpu")[0]
    except RuntimeError:
        return jax.devices()[0]


Given = tuple[tuple[Any, ...], Any]  # arguments and what the definition makes of them, on the host


def check(case: casebook.Case, backend: str, given: Callable[[], Given] | None = None) -> Check:
    """Runs a case, and compares; a kernel must also be in the compiled program."""
    try:
        args, want = given() if given else definition(case)
        args = jax.device_put(args, jax.devices()[0])
        runner = timing.Runner(case, backend, timing.Arguments([args]))
    except dispatch.Unsupported as why:
        known = backend in case.declined
        return Check(case, backend, "declined" if known else "FAIL", 0.0, f"Unsupported: {why}")
    except Exception as error:  # the next case is checked all the same
        return Check(case, backend, "FAIL", float("nan"), casebook.error_line(error))
    if backend in case.declined:
        return Check(case, backend, "FAIL", 0.0, "the case says that this backend declines it")
    names = [call.name for call in runner.kernels]
    if backend != dispatch.XLA and not any(case.kernel_name in name for name in names):
        why = f"no kernel named {case.kernel_name} in the compiled program, which has {names}"
        return Check(case, backend, "FAIL", 0.0, why)
    worst = casebook.Comparison(True, 0.0)
    try:
        for _ in range(RUNS):
            runner.restore()
            got = case.view(args, runner(0))
            result = casebook.compare(case.tolerance, jax.device_get(got), want)
            worst = max(worst, result, key=lambda r: (not r.ok, r.error))
    except Exception as error:  # an illegal address, say
        return Check(case, backend, "FAIL", float("nan"), casebook.error_line(error))
    return Check(case, backend, "pass" if worst.ok else "FAIL", worst.error, worst.why)


def definition(case: casebook.Case) -> Given:
    """Arguments, drawn there too since devices round random numbers differently, and the result."""
    with jax.default_device(definition_device()):
        args = case.arguments(jax.random.key(0))
        result = jax.jit(lambda *a: case.run(a, dispatch.XLA))(*args)
        return jax.device_get((args, case.view(args, result)))


def planned(
    ops: Sequence[str], backends: Sequence[str], part: str = ""
) -> Iterator[tuple[str, str]]:
    """Lines of cases and backends of what `checks` does."""
    for case, names in _planned(ops, backends, part):
        yield from ((str(case), name) for name in names)


def _planned(
    ops: Sequence[str], backends: Sequence[str], part: str
) -> Iterator[tuple[casebook.Case, list[str]]]:
    for op in ops:
        names = [n for n in casebook.backends(op) if not backends or n in backends]
        names = [n for n in names if dispatch.refusal(n) is None]
        yield from ((case, names) for case in casebook.correctness(op) if part in str(case))


def checks(
    ops: Sequence[str],
    backends: Sequence[str],
    part: str = "",
    skip: Collection[tuple[str, str]] = (),
    begin: Callable[[str, str], None] = lambda _case, _backend: None,
) -> Iterator[Check]:
    """The operations' cases whose line has `part`, on all backends (or these) that run here, but
    for pairs of line and backend in `skip`. `begin` is told of each before it runs."""
    for case, names in _planned(ops, backends, part):
        # Once for all backends: it takes longer than they do.
        given = functools.cache(functools.partial(definition, case))
        for backend in names:
            if (str(case), backend) not in skip:
                begin(str(case), backend)
                yield check(case, backend, given)
