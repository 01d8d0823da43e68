"""Kernels that run on the device at hand, on their small cases against their definitions."""

import collections
import time
from collections.abc import Iterator

from lsa_jax.checks.finding import Finding
from pallas_kernels import casebook, checks, dispatch

SECONDS = 30.0  # after which no further case is begun; `pallas_kernels.bench --check` runs all


def kernels(seconds: float = SECONDS) -> Iterator[Finding]:
    """The first case of every operation on every backend that runs here, then further ones while
    there is time. A device without kernels, such as a CPU, runs the definitions."""
    end = time.monotonic() + seconds
    ran = [b for b in dispatch.BACKENDS if b != dispatch.XLA and dispatch.refusal(b) is None]
    wanted = ran or [dispatch.XLA]
    yield Finding(f"backends that run here: {', '.join(wanted)}", True)
    cases = [
        (turn, case, backend)
        for op in casebook.operations()
        for backend in casebook.backends(op)
        if backend in wanted
        for turn, case in enumerate(casebook.correctness(op))
    ]
    count: collections.Counter[str] = collections.Counter()
    for turn, case, backend in sorted(cases, key=lambda one: one[0]):  # operations take turns
        if turn and (not ran or time.monotonic() > end):
            break
        result = checks.check(case, backend)
        count[result.outcome] += 1
        if result.outcome == "FAIL":
            yield Finding(str(result), False)
    said = ", ".join(f"{n} {outcome}" for outcome, n in sorted(count.items())) or "none"
    said += f" of {len(cases)}"
    yield Finding(f"cases of {len(casebook.operations())} operations: {said}", bool(count))
