"""Pictures of a run. Needs matplotlib (the extra `plot`)."""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evals.suite.summary import AVERAGES, Line
from evals.suite.variants import UNBOUNDED, Variant

SWEEPS = ("lookahead", "page_entries", "threshold", "ensemble", "fallback")
_COLOURS = {
    "full": "#1b1f24",
    "no_csa": "#a33b3b",
    "lsa": "#e07b39",
    "recency": "#7a7f87",
    "random": "#b58900",
    "lagged": "#2a7f62",
    "quest": "#3b76af",
    "snapkv": "#6b4ea0",
    "oracle": "#58a65c",
}
_KINDS = (
    ("#d9dee5", "on the host"),
    ("#3b76af", "on the device"),
    ("#2a7f62", "evidence, on the device"),
    ("#a33b3b", "evidence, on the host"),
)


def _label(variant: Variant) -> str:
    return f"{variant.arm}, threshold" if variant.policy == "threshold" else variant.arm


def _draw(axes: Axes, points: Sequence[tuple[float, Line]], label: str, **style: Any) -> None:
    """Accuracy in percent with bars from low to high."""
    at = sorted(points, key=lambda point: point[0])
    x = [position for position, _ in at]
    y = [100 * line.accuracy.value for _, line in at]
    below = [_length(100 * (line.accuracy.value - line.accuracy.low)) for _, line in at]
    above = [_length(100 * (line.accuracy.high - line.accuracy.value)) for _, line in at]
    colour = _COLOURS[at[0][1].variant.arm]
    axes.errorbar(
        x, y, yerr=(below, above), marker=".", capsize=2, color=colour, label=label, **style
    )


def _length(value: float) -> float:
    """Of a bar: none where the interval is undefined."""
    return 0.0 if math.isnan(value) else max(0.0, value)


def _panels(count: int, dpi: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(4 * columns, 3.2 * rows), dpi=dpi, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for axes in panels[count:]:
        axes.set_visible(False)
    for axes in panels[:count]:
        axes.set(ylim=(-2, 102))
        axes.grid(alpha=0.3)
    return figure, panels[:count]


def _tasks(lines: Sequence[Line]) -> list[str]:
    found = {line.task for line in lines}
    return [*(name for name in AVERAGES if name in found), *sorted(found - set(AVERAGES))]


def every(lines: Sequence[Line]) -> Iterator[tuple[str, Figure]]:
    """All pictures of a run by name; none where nothing was answered."""
    for length in sorted({line.length for line in lines}):
        yield f"accuracy_by_bytes_{length}", by_bytes(lines, length)
    if lines:
        yield "accuracy_by_length", by_length(lines)
        for name, figure in sweeps(lines):
            yield f"accuracy_by_{name}", figure


def by_bytes(lines: Sequence[Line], length: int, *, dpi: int = 120) -> Figure:
    """Accuracy over the KV share on the device, a panel per task, at one length; full attention and
    its ablation are horizontal lines."""
    lines = [line for line in lines if line.length == length]
    tasks = _tasks(lines)
    figure, panels = _panels(len(tasks), dpi)
    for axes, task in zip(panels, tasks, strict=True):
        own = [line for line in lines if line.task == task]
        for line in own:
            if line.variant.arm in UNBOUNDED:
                arm = line.variant.arm
                height = 100 * line.accuracy.value
                axes.axhline(height, color=_COLOURS[arm], label=arm, linestyle="--", linewidth=1)
        for label, points in _series(own, lambda line: 100 * line.device, "budget", "threshold"):
            _draw(axes, points, label, linestyle=":" if "threshold" in label else "-")
        axes.set(xlabel="KV bytes on the device (% of all)", ylabel="accuracy (%)", title=task)
    panels[0].legend(fontsize="x-small")
    figure.suptitle(f"{length:,} tokens")
    return figure


def by_length(lines: Sequence[Line], *, dpi: int = 120) -> Figure:
    """Accuracy over the length, a panel per task, with the first budget of each arm."""
    tasks = _tasks(lines)
    figure, panels = _panels(len(tasks), dpi)
    for axes, task in zip(panels, tasks, strict=True):
        own = [line for line in lines if line.task == task]
        first = _first_variants(own)
        for arm, variant in first.items():
            points = [(float(line.length), line) for line in own if line.variant == variant]
            bound = "" if variant.budget is None else f" {variant.budget}"
            _draw(axes, points, arm + bound)
        axes.set(xlabel="tokens", ylabel="accuracy (%)", title=task, xscale="log")
    panels[0].legend(fontsize="x-small")
    return figure


def _first_variants(lines: Sequence[Line]) -> dict[str, Variant]:
    out: dict[str, Variant] = {}
    for line in lines:
        out.setdefault(_label(line.variant), line.variant)
    return out


def _series(
    lines: Sequence[Line], position: Callable[[Line], float], *free: str
) -> Iterator[tuple[str, list[tuple[float, Line]]]]:
    """Points of each label whose variants differ in `free` settings only from the label's first."""
    for label, first in _first_variants(lines).items():
        if first.arm in UNBOUNDED:
            continue
        points = [
            (position(line), line)
            for line in lines
            if _label(line.variant) == label and _same_but(line.variant, first, free)
        ]
        if points:
            yield label, points


def _same_but(a: Variant, b: Variant, free: Sequence[str]) -> bool:
    same = {name: getattr(b, name) for name in free}
    return dataclasses.replace(a, **same) == b


def sweeps(lines: Sequence[Line], *, dpi: int = 120) -> Iterator[tuple[str, Figure]]:
    """A picture for each setting that was given several values: accuracy over it, a panel per
    length, of the average or of the only task."""
    task = _tasks(lines)[0]
    lines = [line for line in lines if line.task == task]
    for name in SWEEPS:
        values = {getattr(line.variant, name) for line in lines} - {None}
        values |= {None} if name == "fallback" and values else set()
        if len(values) > 1:
            yield name, _sweep(lines, name, sorted(values, key=lambda v: (v is not None, v)), dpi)


def _sweep(lines: Sequence[Line], name: str, values: list[Any], dpi: int) -> Figure:
    lengths = sorted({line.length for line in lines})
    figure, panels = _panels(len(lengths), dpi)

    def place(line: Line) -> float:
        return float(values.index(getattr(line.variant, name)))

    lines = [line for line in lines if getattr(line.variant, name) in values]
    for axes, length in zip(panels, lengths, strict=True):
        own = [line for line in lines if line.length == length]
        for label, points in _series(own, place, name):
            _draw(axes, points, label)
        axes.set_xticks(range(len(values)), ["off" if v is None else str(v) for v in values])
        axes.set(xlabel=name, ylabel="accuracy (%)", title=f"{lines[0].task}, {length:,} tokens")
    panels[0].legend(fontsize="x-small")
    return figure


def residency(grid: np.ndarray, *, page_tokens: int, dpi: int = 150) -> Figure:
    """Which pages were on the device for each answer; `grid` is as `infer.demo.residency` says."""
    figure = Figure(figsize=(8, 1.5 + 0.3 * len(grid)), dpi=dpi, layout="constrained")
    axes = figure.subplots()
    axes.imshow(
        grid,
        cmap=ListedColormap([colour for colour, _ in _KINDS]),
        vmin=0,
        vmax=len(_KINDS) - 1,
        aspect="auto",
        interpolation="nearest",
        extent=(0, grid.shape[1] * page_tokens, len(grid) - 0.5, -0.5),
    )
    handles = [Patch(facecolor=colour, label=label) for colour, label in _KINDS]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, fontsize="small")
    axes.set(xlabel="position (tokens)", ylabel="question")
    axes.set_yticks(range(len(grid)))
    return figure
