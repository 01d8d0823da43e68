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
    out.add_argument("--processes", type=int, default=2, help="at once (default: 2)")
    out.add_argument("--json", type=Path, metavar="FILE")
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    from pallas_kernels import targets as known

    args = parser().parse_args(argv)
    for target in args.target:
        if target not in known.CHIPS:
            sys.exit(f"error: --target must be of {(*TPUS, 'h100')}, got {target!r}")
        if why := known.missing(known.CHIPS[target]):
            sys.exit(f"error: --target {target}: {why}")
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
