"""The process behind `pallas_kernels.aot`: compiles for devices of one platform.

    python -m pallas_kernels.aot_worker OUT TARGET [TARGET ...] [--op OP] [--backend NAME] [--all]
        [--tunings TEXT]

Appends one line of JSON to OUT per program.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pallas_kernels import casebook, dispatch, targets, verdicts

KERNELS = {"tpu": (dispatch.MOSAIC_TPU,), "gpu": (dispatch.MOSAIC_GPU, dispatch.TRITON)}


def chosen(op: str, every: bool) -> tuple[casebook.Case, ...]:
    """An operation's cases that are compiled: those marked `aot`."""
    return tuple(case for case in casebook.benchmarks(op) if every or case.aot)


def tunings(
    case: casebook.Case, backend: str, text: str | None
) -> Iterator[tuple[str, casebook.Case]]:
    """The case in those tunings of a backend whose name contains this, and their names."""
    for name, (of, tuning) in casebook.tunings(case.op).items():
        if text is not None and text in name and of == backend:
            yield name, case.tuned(tuning)


def compile_case(target: str, case: casebook.Case, backend: str) -> dict[str, Any]:
    """A row of the report."""
    row: dict[str, Any] = {"target": target, "op": case.op, "case": str(case), "backend": backend}
    row |= {"error": "", "problems": [], "kernels": []}
    begin = time.perf_counter()
    try:
        args = case.abstract()
        chip, call = targets.CHIPS[target], functools.partial(_call, case, backend)
        program = targets.compile_for(chip, call, args, case.in_place)
    except dispatch.Unsupported as why:
        outcome = "declined" if backend in case.declined else "failed"
        row |= {"outcome": outcome, "error": f"Unsupported: {why}"}
    except Exception as error:  # a report goes on with the next program
        row |= {"outcome": "failed", "error": f"{type(error).__name__}: {error}"}
    else:
        found = list(verdicts.problems(chip, case, args, program))
        row |= {
            "outcome": "failed" if found else "compiled",
            "problems": found,
            "error": "; ".join(found),
            "temp_bytes": program.temp_bytes,
            "resident_bytes": program.resident_bytes,
            "calls": [call._asdict() for call in program.calls],
            "kernels": [vars(kernel) for kernel in program.kernels],
        }
    return row | {"seconds": time.perf_counter() - begin}


def _call(case: casebook.Case, backend: str, *args: Any) -> Any:
    return case.run(args, backend)


def rows(names: Sequence[str], args: argparse.Namespace) -> Any:
    """Rows of the report as they come."""
    for op in args.op or casebook.operations():
        for target in names:
            wanted = args.backend or KERNELS[targets.CHIPS[target].platform]
            for backend in (b for b in wanted if b in casebook.backends(op)):
                for case in chosen(op, args.all):
                    yield compile_case(target, case, backend)
                    for name, tuned in tunings(case, backend, args.tunings):
                        row = compile_case(target, tuned, backend)
                        yield row | {"case": f"{case}, {name}"}


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("targets", nargs="+")
    parser.add_argument("--op", action="append", default=[])
    parser.add_argument("--backend", action="append", default=[])
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--tunings")
    args = parser.parse_args(argv)
    with args.out.open("a") as file:
        for row in rows(args.targets, args):
            file.write(json.dumps(row) + "\n")
            file.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
