"""Compiles every operation's kernels ahead of time, on any machine, for TPUs and for Hopper.

    python -m pallas_kernels.aot --target v5e,v5p,v6e,tpu7x [--op ...] [--json FILE]
    python -m pallas_kernels.aot --target h100 [--op ...] [--json FILE]

Prints one line per program: memory that the compiler needs, and on Hopper each kernel's registers,
spills and shared memory. Exits with 1 where a program does not compile, lacks its kernel, copies a
pool, or needs more memory than the chip has. Needs no TPU and no GPU but their compilers: the extra
`tpu`, and `aot` for Hopper. Compilers read the environment, so each kind of device has processes of
its own.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TPUS = ("v5e", "v5p", "v6e", "tpu7x")
TUNINGS = "kernels in other tunings too: those whose name contains this ('' for all)"


def describe(row: dict[str, Any]) -> str:
    """One line of a report."""
    head = f"{row['target']:6} {row['backend']:10} {row['case']}"
    if "temp_bytes" not in row:
        return f"{head}: {row['outcome'].upper()}: {row['error'].strip().splitlines()[0][:300]}"
    memory = f"temp {row['temp_bytes']:,} B, resident {row['resident_bytes'] / 1e6:,.1f} MB"
    kernels = [
        f"{k['name']}: {k['registers']} registers, {k['spill_bytes']} B spilled, "
        f"{k['shared_bytes']:,} B shared"
        for k in row["kernels"]
    ]
    wrong = [f"FAILED: {problem}" for problem in row["problems"]]
    return "; ".join([f"{head}: {memory}", *kernels, f"{row['seconds']:.1f} s", *wrong])


def start(targets: Sequence[str], ops: Sequence[str], args: argparse.Namespace, out: Path) -> Any:
    """A process that compiles for devices of one platform."""
    from pallas_kernels import targets as known

    environment = os.environ | known.environment(known.CHIPS[targets[0]])
    command = [sys.executable, "-m", "pallas_kernels.aot_worker", str(out), *targets]
    for flag, names in (("--op", ops), ("--backend", args.backend)):
        command += [item for name in names for item in (flag, name)]
    if args.all:
        command.append("--all")
    if args.tunings is not None:
        command.append(f"--tunings={args.tunings}")
    return subprocess.Popen(command, env=environment)


def grouped(args: argparse.Namespace) -> list[tuple[list[str], list[str]]]:
    """Targets and operations of each process: one platform each, shared out evenly."""
    from pallas_kernels import casebook
    from pallas_kernels import targets as known

    ops, count = args.op or list(casebook.operations()), max(1, args.processes)
    out: list[tuple[list[str], list[str]]] = []
    for platform in ("tpu", "gpu"):
        names = [name for name in args.target if known.CHIPS[name].platform == platform]
        if len(names) > 1:
            out += [(names[i::count], ops) for i in range(min(count, len(names)))]
        elif names:
            out += [(names, ops[i::count]) for i in range(min(count, len(ops)))]
    return out


def listed(text: str) -> list[str]:
    """Names between commas."""
    return [name for name in text.split(",") if name]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    out.add_argument(
        "--target", type=listed, default=[*TPUS], help="of " + ",".join(TPUS) + ",h100"
    )
    out.add_argument("--op", type=listed, default=[], help="operations (default: all)")
    out.add_argument("--backend", type=listed, default=[], help="default: the device's kernels")
    out.add_argument("--all", action="store_true", help="every BENCH case, not only the distinct")
    out.add_argument("--tunings", metavar="TEXT", help=TUNINGS)
    out.add_argument("--processes", type=int, default=2, help="at once (default: 2)")
    out.add_argument("--json", type=Path, metavar="FILE")
    return out


def refusal(args: argparse.Namespace) -> str | None:
    """Why these cannot be compiled, in a line."""
    from pallas_kernels import casebook, dispatch
    from pallas_kernels import targets as known

    choices = {
        "target": (*TPUS, "h100"),
        "op": tuple(casebook.operations()),
        "backend": dispatch.BACKENDS,
    }
    for name, among in choices.items():
        for got in getattr(args, name):
            if got not in among:
                return f"--{name} must be of {', '.join(among)}, got {got!r}"
    missing = {name: known.missing(known.CHIPS[name]) for name in args.target}
    return next((f"--target {name}: {why}" for name, why in missing.items() if why), None)


def main(argv: list[str] | None = None) -> int:
    """Command line. Exit codes: 0, 1 where a program failed, 2 for bad input (one line)."""
    args = parser().parse_args(argv)
    if why := refusal(args):
        print(f"error: {why}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        groups = grouped(args)
        outs = [Path(folder, str(i)) for i in range(len(groups))]
        running = []
        codes = []
        for (targets, ops), out in zip(groups, outs, strict=True):
            if len(running) >= args.processes:
                codes.append(running.pop(0).wait())
            running.append(start(targets, ops, args, out))
        codes += [process.wait() for process in running]
        for out in outs:
            if out.exists():
                rows += [json.loads(line) for line in out.read_text().splitlines()]
    failed = [row for row in rows if row["outcome"] == "failed"]
    for row in rows:
        print(describe(row))
    print(f"{len(rows)} programs, {len(failed)} failed")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if failed or any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
