"""Checks and times every operation's backends on the present device.

    python -m pallas_kernels.bench --check [--op ...] [--backend ...]
    python -m pallas_kernels.bench [--op ...] [--backend ...] [--json F] [--plot F] [--budget-s S]

`--check` runs the small cases against the definition and exits with 1 where one fails. Otherwise
the true DeepSeek-V4-Flash shapes are timed: floor, time, share of the floor, and how many times the
definition in plain XLA and a peer take. Floors use what the device does in the same run.
"""

import argparse
import datetime
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from pallas_kernels import casebook, checks, dispatch, measured, timing

LARGE = (1 << 30, 8192)  # elements of 4 GiB, and the width of a product, for the ceilings
SMALL = (1 << 18, 256)  # on a CPU, where they only show that the command works


def listed(text: str) -> list[str]:
    """Names between commas."""
    return [name for name in text.split(",") if name]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    out.add_argument("--op", type=listed, default=[], help="operations (default: all)")
    out.add_argument("--backend", type=listed, default=[], help="default: all that run here")
    out.add_argument("--check", action="store_true", help="right or wrong, on the small cases")
    out.add_argument("--small", action="store_true", help="time the small cases instead")
    out.add_argument("--case", default="", help="only cases whose line contains this")
    out.add_argument("--peers", metavar="MODULE", help="peers to time: evals.torch_kernel_peers")
    out.add_argument("--budget-s", type=float, default=float("inf"), help="seconds in all")
    out.add_argument("--json", type=Path, metavar="FILE", help="written after every line")
    out.add_argument("--plot", type=Path, metavar="FILE", help="roofline (extra `plot`)")
    return out


def run_checks(ops: Sequence[str], args: argparse.Namespace) -> int:
    """Prints a line per case; the number of failures."""
    rows: list[dict[str, Any]] = []
    for op in ops:
        for backend in casebook.backends(op):
            if why := dispatch.refusal(backend):
                print(f"not run  {backend:10} {op}: {why}")
    for check in checks.checks(ops, args.backend, args.case):
        print(check, flush=True)
        rows.append({**check._asdict(), "op": check.case.op, "case": str(check.case)})
        write(args.json, {"checks": rows})
    failed = sum(row["outcome"] == "FAIL" for row in rows)
    print(f"{len(rows)} checks, {failed} failed")
    return failed


def in_turn(ops: Sequence[str], args: argparse.Namespace) -> Iterator[casebook.Case]:
    """Every operation's first case, then every operation's second: the important ones first."""
    cases = [casebook.correctness(op) if args.small else casebook.benchmarks(op) for op in ops]
    for i in range(max(map(len, cases), default=0)):
        for case in (own[i] for own in cases if i < len(own)):
            if args.case in str(case):
                yield case


def run_timings(ops: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Prints a line per case and backend, and returns them all."""
    end = time.monotonic() + args.budget_s
    device = jax.devices()[0]
    ceilings = timing.measure_ceilings(*(SMALL if device.platform == "cpu" else LARGE))
    result: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "ceilings": ceilings._asdict(),
        "rows": [],
        "not_measured": [],
    }
    print(f"{result['device']}, JAX {result['jax']}, {result['date']}")
    print(
        f"copy {ceilings.copy / 1e9:,.0f} GB/s, read {ceilings.read / 1e9:,.0f} GB/s, bfloat16 "
        f"matmul {ceilings.matmul / 1e12:,.1f} TFLOP/s, from host {ceilings.host / 1e9:,.1f} GB/s"
    )
    for case in in_turn(ops, args):
        if time.monotonic() > end:
            result["not_measured"].append(str(case))
            continue
        for row in measured.rows(case, ceilings, args.backend, args.peers):
            print(measured.line(row), flush=True)
            result["rows"].append(row)
            write(args.json, result)
            if time.monotonic() > end:
                break
    if result["not_measured"]:
        print(f"not measured within {args.budget_s:.0f} s: {'; '.join(result['not_measured'])}")
    write(args.json, result)
    return result


def write(file: Path | None, result: dict[str, Any]) -> None:
    """Replaces the file, so that whoever kills this command keeps what it had."""
    if file:
        fresh = file.with_name(file.name + ".tmp")
        fresh.write_text(json.dumps(result, indent=1, default=str) + "\n")
        fresh.replace(file)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    args, known = parser().parse_args(argv), casebook.operations()
    for op in args.op:
        if op not in known:
            sys.exit(f"error: --op must be of {known}, got {op!r}")
    for backend in args.backend:
        why = dispatch.refusal(backend)
        if why:
            sys.exit(f"error: --backend {backend}: {why}")
    ops = args.op or known
    if args.check:
        return 1 if run_checks(ops, args) else 0
    result = run_timings(ops, args)
    if args.plot:
        from pallas_kernels import roofline

        roofline.draw(result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
