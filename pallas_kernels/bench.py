"""Checks and times every operation's backends on the present device.

    python -m pallas_kernels.bench --check [--op ...] [--backend ...]
    python -m pallas_kernels.bench [--op ...] [--backend ...] [--json F] [--plot F] [--budget-s S]
    python -m pallas_kernels.bench --apart 120 --json F ...  # outlives crashes and hangs

`--check` runs the small cases against the definition. Otherwise the true DeepSeek-V4-Flash shapes
are timed: floor, time, share of the floor, and how many times the definition in plain XLA and a
peer take. Floors use what the device does in the same run. Exit codes: 0; 1 where a check fails, or
where processes of `--apart` get no further; 2 after bad input (one line); 3 where a kernel took the
device from this process.
"""

import argparse
import datetime
import functools
import importlib.util
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax

from pallas_kernels import apart, casebook, checks, dispatch, measured, record, roofline, timing
from pallas_kernels.record import Record

LARGE = (1 << 30, 8192)  # elements of 4 GiB, and the width of a product, for the ceilings
SMALL = (1 << 18, 256)  # on a CPU, where they only show that the command works
APART = "in other processes, begun anew where one dies or writes nothing for S seconds"
TUNINGS = "time kernels in other tunings too: those whose name contains this ('' for all)"
LOST = 3  # exit status of a process that lost its device


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, and exit with 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"error: {message}\n")


def listed(text: str) -> list[str]:
    """Names between commas."""
    return [name for name in text.split(",") if name]


def seconds(text: str) -> float:
    """A length of time."""
    value = float(text)
    if math.isnan(value) or value < 0:
        raise ValueError
    return value


def parser() -> Parser:
    """The command line."""
    out = Parser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    out.add_argument("--op", type=listed, default=[], help="operations (default: all)")
    out.add_argument("--backend", type=listed, default=[], help="default: all that run here")
    out.add_argument("--check", action="store_true", help="right or wrong, on the small cases")
    out.add_argument("--small", action="store_true", help="time the small cases instead")
    out.add_argument("--case", default="", help="only cases whose line contains this")
    out.add_argument("--tunings", metavar="TEXT", help=TUNINGS)
    out.add_argument("--peers", metavar="MODULE", help="peers to time: evals.torch_kernel_peers")
    out.add_argument("--budget-s", type=seconds, default=math.inf, help="seconds in all")
    out.add_argument("--json", type=Path, metavar="FILE", help="written after every line")
    out.add_argument("--resume", action="store_true", help="go on with what --json holds")
    out.add_argument("--apart", type=seconds, default=0.0, metavar="S", help=APART)
    out.add_argument("--plot", type=Path, metavar="FILE", help="roofline (extra `plot`)")
    return out


def started(args: argparse.Namespace, kind: str) -> Record:
    """A record of this device, with what an earlier process found."""
    here = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    found = Record(args.json, kind, here, resume=args.resume)
    if found.died:
        print(f"{found.died['backend']} {found.died['case']}: {record.DIED}", flush=True)
    return found


def keep(found: Record, row: dict[str, Any]) -> None:
    """Adds a row; ends the process if it lost its device, since all further rows would fail."""
    found.add(row)
    if ("failed" in row or row.get("outcome") == "FAIL") and not timing.alive():
        print("the device is lost to this process; --resume goes on in another", flush=True)
        os._exit(LOST)  # what is left to destroy would only wait for the device


def run_checks(ops: Sequence[str], args: argparse.Namespace) -> int:
    """Prints a line per case; the number of failures."""
    end = time.monotonic() + args.budget_s
    found = started(args, "checks")
    for op in ops:
        for backend in casebook.backends(op):
            if why := dispatch.refusal(backend):
                print(f"not run  {backend:10} {op}: {why}")
    done = {(row["case"], row["backend"]) for row in found.rows}
    left = [pair for pair in checks.planned(ops, args.backend, args.case) if pair not in done]
    for check in checks.checks(ops, args.backend, args.case, done, found.begin):
        print(check, flush=True)
        keep(found, {**check._asdict(), "op": check.case.op, "case": str(check.case)})
        left.remove((str(check.case), check.backend))
        if left and time.monotonic() > end:
            named = "; ".join(f"{backend} {case}" for case, backend in left)
            print(f"not checked within {args.budget_s:.0f} s: {named}")
            break
    found.finish()
    print(f"{len(found.rows)} checks, {failures(found.result)} failed")
    return failures(found.result)


def failures(result: dict[str, Any]) -> int:
    """Checks that failed."""
    return sum(row["outcome"] == "FAIL" for row in result.get("checks", ()))


def in_turn(ops: Sequence[str], args: argparse.Namespace) -> Iterator[casebook.Case]:
    """Every operation's first case, then every operation's second: the important ones first."""
    small = args.small or args.check
    cases = [casebook.correctness(op) if small else casebook.benchmarks(op) for op in ops]
    for i in range(max(map(len, cases), default=0)):
        for case in (own[i] for own in cases if i < len(own)):
            if args.case in str(case):
                yield case


def ceilings_of(result: dict[str, Any]) -> timing.Ceilings:
    """What the device does at most, measured once for all processes that share a record."""
    if "ceilings" not in result:
        sizes = SMALL if jax.default_backend() == "cpu" else LARGE
        result["ceilings"] = timing.measure_ceilings(*sizes)._asdict()
    return timing.Ceilings(**result["ceilings"])


def run_timings(ops: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Prints a line per case and backend, and returns them all."""
    end = time.monotonic() + args.budget_s
    found = started(args, "rows")
    ceilings, result = ceilings_of(found.result), found.result
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    result |= {"date": today, "not_measured": []}
    print(f"{result['device']}, JAX {result['jax']}, {today}")
    print(
        f"copy {ceilings.copy / 1e9:,.0f} GB/s, read {ceilings.read / 1e9:,.0f} GB/s, bfloat16 "
        f"matmul {ceilings.matmul / 1e12:,.1f} TFLOP/s, from host {ceilings.host / 1e9:,.1f} GB/s"
    )
    for case in in_turn(ops, args):
        name = str(case)
        earlier = {row["backend"]: row for row in found.rows if row["case"] == name}
        if time.monotonic() > end:
            result["not_measured"] += [] if earlier else [name]
            continue
        begin = functools.partial(found.begin, name)
        more = (args.backend, args.tunings, args.peers)
        for row in measured.rows(case, ceilings, *more, earlier, begin):
            print(measured.line(row), flush=True)
            keep(found, row)
            if time.monotonic() > end:
                break
    if result["not_measured"]:
        print(f"not measured within {args.budget_s:.0f} s: {'; '.join(result['not_measured'])}")
    found.finish()
    return result


def run_apart(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """The same command in other processes. This one starts no device: it would keep its memory."""
    if args.resume:
        record.reopen(args.json)
    else:
        args.json.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pallas_kernels.bench", *argv]
    command += ["--apart", "0", "--resume", "--budget-s"]
    code = apart.run(command, args.json, args.apart, args.budget_s)
    result = record.read(args.json)
    if not result.get(record.FINISHED):
        print(f"the last process ended with {code} and got no further", flush=True)
        return 2 if code == 2 else 1
    return 1 if args.check and failures(result) else 0


def run(args: argparse.Namespace, argv: Sequence[str]) -> int:
    """What the command line asks for; its exit code."""
    if args.apart:
        return run_apart(args, argv)
    ops = args.op or casebook.operations()
    if args.check:
        return 1 if run_checks(ops, args) else 0
    result = run_timings(ops, args)
    if args.plot:
        roofline.draw(result, args.plot)
    return 0


def absent(module: str) -> bool:
    """Whether a module cannot be found. It is not imported: it may take hold of the device."""
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError:  # what should contain it
        return True


def refusal(args: argparse.Namespace) -> str | None:
    """Why this command line cannot be run; None if it can. Starts no device for `--apart`."""
    known = casebook.operations()
    for op in args.op:
        if op not in known:
            return f"--op must be of {known}, got {op!r}"
    if not any(in_turn(args.op or known, args)):
        return f"--case: no line of a case contains {args.case!r}"
    for flag in ("apart", "resume"):
        if getattr(args, flag) and not args.json:
            return f"--{flag} needs --json"
    for flag in ("json", "plot"):
        if (file := getattr(args, flag)) and not file.parent.is_dir():
            return f"--{flag}: there is no folder {file.parent}"
    if args.plot and absent("matplotlib"):
        return "--plot needs matplotlib (extra `plot`)"
    if args.peers and absent(args.peers):
        return f"--peers: there is no module {args.peers}"
    for backend in () if args.apart else args.backend:
        if why := dispatch.refusal(backend):
            return f"--backend {backend}: {why}"
    return None


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    made, argv = parser(), sys.argv[1:] if argv is None else argv
    args = made.parse_args(argv)
    if why := refusal(args):
        made.error(why)
    try:
        return run(args, argv)
    except (record.Refused, OSError) as error:
        made.error(str(error))


if __name__ == "__main__":
    sys.exit(main())
