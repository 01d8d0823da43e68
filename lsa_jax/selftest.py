"""Checks this installation on the device at hand: `python -m lsa_jax.selftest`.

Parity of the tiny model with HuggingFace's logits, the identities of two-level decoding, memory
kinds and bandwidth, kernels. Three minutes on two CPU cores; the report is fit for an issue.
Exit codes: 0, 1 where something does not hold, 2 after an error (one line), 130 after Ctrl-C.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax

from lsa_jax import cli
from lsa_jax.checks import kernels, memory, parity
from lsa_jax.checks.finding import Finding
from lsa_jax.checks.identities import identities

CHECKS: Mapping[str, Callable[[], Iterable[Finding]]] = {
    "parity": parity.parity,
    "identities": lambda: identities(None, ("paged",)),
    "memory kinds": memory.kinds,
    "host store": memory.store,
    "bandwidth": memory.bandwidth,
    "kernels": kernels.kernels,
}
_PACKAGES = ("lsa_jax", "jax", "jaxlib", "flax", "numpy", "libtpu", "jax-cuda13-plugin")


@dataclasses.dataclass(frozen=True)
class Result:
    """One check: what it found, and how long it took."""

    name: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def holds(self) -> bool:
        """Whether everything was as it must be; a check that found nothing has checked nothing."""
        return bool(self.findings) and all(finding.holds for finding in self.findings)


def environment() -> dict[str, str]:
    """What this ran on."""
    device = jax.devices()[0]
    found = {"device": f"{jax.device_count()} x {device.device_kind} ({device.platform})"}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue  # compilers for other devices are not always there
    found["python"] = platform.python_version()
    found["system"] = f"{platform.system()} {platform.release()} {platform.machine()}"
    return found


def run(name: str, check: Callable[[], Iterable[Finding]]) -> Result:
    """One check. One that ends in an error does not hold, and the next is run all the same."""
    begin = time.perf_counter()
    findings: list[Finding] = []
    try:
        findings.extend(check())
    except Exception as error:
        line = (str(error).splitlines() or [""])[0]
        findings.append(Finding(f"{type(error).__name__}: {line[:300]}", False))
    return Result(name, tuple(findings), time.perf_counter() - begin)


def show(result: Result) -> None:
    """Prints a check's part of the report."""
    print(f"{'ok  ' if result.holds else 'FAIL'} {result.name} ({result.seconds:.1f} s)")
    for finding in result.findings:
        print(f"     {'ok  ' if finding.holds else 'FAIL'} {finding.said}", flush=True)


def selftest(names: Iterable[str], file: Path | None) -> bool:
    """Runs checks, prints the report, and says whether all of them hold."""
    found, results = environment(), []
    print("lsa_jax selftest")
    for name, value in found.items():
        print(f"  {name}: {value}", flush=True)
    for name in names:
        results.append(run(name, CHECKS[name]))
        show(results[-1])
    good = all(result.holds for result in results)
    seconds = sum(result.seconds for result in results)
    print(f"{'all checks hold' if good else 'SOMETHING DOES NOT HOLD'} ({seconds:.1f} s)")
    if file is not None:
        checks = [
            {
                "name": result.name,
                "holds": result.holds,
                "seconds": result.seconds,
                "findings": [finding._asdict() for finding in result.findings],
            }
            for result in results
        ]
        report = {"environment": found, "holds": good, "checks": checks}
        file.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
    return good


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = cli.Parser(
        prog="python -m lsa_jax.selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=tuple(CHECKS), metavar="CHECK")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the report as JSON")
    args = parser.parse_args(argv)
    good: list[bool] = []
    code = cli.exit_code(
        lambda: good.append(selftest(args.only, args.json)), interrupted="interrupted"
    )
    return code if code or good[0] else 1


if __name__ == "__main__":
    sys.exit(main())
