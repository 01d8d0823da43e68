"""What a run writes down while it trains: `metrics.jsonl`, TensorBoard."""

import dataclasses
import importlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import ConfigError
from lsa_jax.config_checks import table
from train.run.step import Report

METRICS = "metrics.jsonl"
TRAIN, VALIDATION = "train", "validation"  # kinds of lines


def require(option: str, module: str, extra: str) -> Any:
    """An option's module; ConfigError, saying what to install, where it is not there."""
    try:
        return importlib.import_module(module)
    except ImportError:
        how = f'pip install "lsa_jax[{extra}]"'
        raise ConfigError(f"{option} needs {module}: {how}") from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; one that was cut off at the end is left out.

    CheckpointError where another is not a line of metrics.
    """
    file = Path(run) / METRICS
    raw = file.read_bytes() if file.exists() else b""
    found = []
    for number, line in enumerate(raw.split(b"\n")[:-1], 1):
        try:
            found.append(table("a line", json.loads(line)))
            if not isinstance(found[-1]["kind"], str) or type(found[-1]["step"]) is not int:
                raise ConfigError("must have its kind and step")
        except (ValueError, KeyError, RecursionError) as why:  # JSON's, ConfigError, bad UTF-8
            reason = " ".join(str(why).split())[:120]
            what = f"line {number} is damaged ({reason}); without it the run can go on"
            raise CheckpointError(f"{file}: {what}") from None
    return found


class MetricsLog:
    """Appends a JSON object a line to a run's metrics; each has its "kind" and "step".

    A line is written before a checkpoint of its step begins, so that a run that goes on from a
    checkpoint (`step`, 0: from none) drops the lines of later steps and writes them again.
    """

    def __init__(self, run: Path, *, step: int) -> None:
        kept = [line for line in read_metrics(run) if step and line["step"] <= step]
        file = Path(run) / METRICS
        partial = file.with_name(f"{METRICS}.partial")
        partial.write_text("".join(map(_line, kept)), "utf-8")
        partial.rename(file)
        self._file = file.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line; readers see all of it at once."""
        self._file.write(_line(line))
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _line(value: Mapping[str, Any]) -> str:
    # NaN is no JSON: losses of steps without finite gradients are null.
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


class TensorBoard:
    """The scalars of metrics lines for TensorBoard, in RUN/tensorboard."""

    def __init__(self, run: Path, *, step: int) -> None:
        """ConfigError where the writer is not installed. Events after `step` are superseded."""
        writer = require("tensorboard", "tensorboardX", "tensorboard").SummaryWriter
        self._writer = writer(str(Path(run) / "tensorboard"), purge_step=step + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Adds a line's numbers, named after where they stand in it."""
        for name, value in _scalars(line["kind"], line):
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._writer.close()


def _scalars(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, x in value.items():
            yield from _scalars(f"{name}/{key}", x) if key not in ("kind", "step") else ()
    elif isinstance(value, list | tuple):
        for i, x in enumerate(value):
            yield from _scalars(f"{name}/{i}", x)
    elif isinstance(value, int | float) and np.isfinite(value):
        yield name, value


@dataclasses.dataclass
class Window:
    """The steps since the last line: means of what they report, and where the time went."""

    samples_per_step: int
    reports: list[Report] = dataclasses.field(default_factory=list)
    waited: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, report: Report, waited: float) -> None:
        """Counts a step, and the seconds it waited for its data."""
        self.reports.append(report)
        self.waited += waited

    def line(self, step: int) -> dict[str, Any]:
        """The metrics line, up to and including `step`, of one or more steps; begins anew.

        Losses, terms and norms are means over the steps that changed the parameters.
        """
        seconds, reports = time.monotonic() - self.began, self.reports
        taken = [report for report in reports if report.taken]

        def mean(values: list[Any]) -> Any:
            return np.mean(values, axis=0).tolist() if values else None

        names = reports[-1].terms
        line = {
            "kind": TRAIN,
            "step": step,
            "steps": len(reports),
            "skipped": len(reports) - len(taken),
            "loss": mean([report.loss for report in taken]),
            "terms": {name: mean([report.terms[name] for report in taken]) for name in names},
            "gradient_norm": mean([report.norm for report in taken]),
            "learning_rate": reports[-1].rate,
            "steps_per_second": len(reports) / seconds,
            "samples_per_second": len(reports) * self.samples_per_step / seconds,
            "wait_share": self.waited / seconds,
        }
        self.reports, self.waited, self.began = [], 0.0, time.monotonic()
        return line
