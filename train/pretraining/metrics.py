"""Metrics lines of a pre-training run: means over the steps since the last one."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

_PER_ROW = ("first_right", "first_count")


@dataclasses.dataclass
class Window:
    """Steps since the last line: what they reported, on the device until it is asked for."""

    names: Sequence[str]  # of the groups of rows
    shown: list[Mapping[str, Array]] = dataclasses.field(default_factory=list)
    groups: list[np.ndarray] = dataclasses.field(default_factory=list)
    tokens: int = 0
    waited: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, shown: Mapping[str, Array], groups: np.ndarray, tokens: int) -> None:
        """Counts a step on so many tokens."""
        self.shown.append(shown)
        self.groups.append(groups)
        self.tokens += tokens

    def line(self, step: int, stage: int) -> dict[str, Any]:
        """The line up to and including `step`; waits for the device and begins anew."""
        reports = jax.device_get(self.shown)
        seconds = time.monotonic() - self.began
        names = [name for name in reports[-1] if name not in (*_PER_ROW, "skipped")]
        line: dict[str, Any] = {"kind": "train", "step": step, "stage": stage}
        line["skipped"] = int(sum(bool(report["skipped"]) for report in reports))
        for name in names:
            values = [float(report[name]) for report in reports if name in report]
            line[name] = float(np.mean(values))
        line["first_accuracy"], line["by_group"] = self._accuracies(reports)
        line["tokens_per_second"] = self.tokens / seconds
        line["wait_share"] = self.waited / seconds
        self.shown, self.groups, self.tokens, self.waited = [], [], 0, 0.0
        self.began = time.monotonic()
        return line

    def _accuracies(self, reports: list[Mapping[str, Any]]) -> tuple[float, dict[str, float]]:
        """Share of FIRST targets that were right: of all rows, and of each group that has any."""
        groups = np.concatenate(self.groups)
        right, count = (np.concatenate([report[name] for report in reports]) for name in _PER_ROW)
        size = len(self.names)
        totals = np.bincount(groups, count, size), np.bincount(groups, right, size)
        found = zip(self.names, *totals, strict=True)
        shares = {name: float(hits / of) for name, of, hits in found if of}
        return float(right.sum() / max(count.sum(), 1)), shares
