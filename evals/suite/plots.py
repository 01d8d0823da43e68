"""Pictures of a run. Needs matplotlib (the extra `plot`)."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from evals.suite.summary import AVERAGES, Line
from evals.suite.variants import UNBOUNDED, Variant

_Series = dict[str, list[Line]]  # by label

SWEEPS = ("lookahead", "page_entries", "threshold", "recall_gate", "ensemble", "fallback")
_OFF = ("recall_gate", "fallback")  # whose None is a value: off
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
    """All pictures of a run by name, those of all tasks again with their averages only; none where
    nothing was answered."""
    averages = [line for line in lines if line.task in AVERAGES]
    for name, shown in (("accuracy", lines), ("averages", averages)):
        for length in sorted({line.length for line in shown}):
            yield f"{name}_by_bytes_{length}", by_bytes(shown, length)
        if shown:
            yield f"{name}_by_length", by_length(shown)
    for name, figure in sweeps(lines):
        yield f"accuracy_by_{name}", figure


def by_bytes(lines: Sequence[Line], length: int, *, dpi: int = 120) -> Figure:
    """Accuracy over the KV share on the device, at one length, a panel for each task that an arm
    has answered with several budgets (for all, if there is none); full attention and its ablation
    are horizontal lines. An arm that has several settings is shown with the first."""
    lines = [line for line in lines if line.length == length]
    tasks = _with_curves(lines) or _tasks(lines)
    figure, panels = _panels(len(tasks), dpi)
    for axes, task in zip(panels, tasks, strict=True):
        own = [line for line in lines if line.task == task]
        for line in own:
            if line.variant.arm in UNBOUNDED:
                arm = line.variant.arm
                height = 100 * line.accuracy.value
                axes.axhline(height, color=_COLOURS[arm], label=arm, linestyle="--", linewidth=1)
        for label, first in _curves(own).items():
            points = [(100 * line.device, line) for line in first]
            _draw(axes, points, label, linestyle=":" if "threshold" in label else "-")
        axes.set(xlabel="KV bytes on the device (% of all)", ylabel="accuracy (%)", title=task)
    panels[0].legend(fontsize="x-small")
    figure.suptitle(f"{length:,} tokens")
    return figure


def _curves(lines: Sequence[Line]) -> _Series:
    """The lines of each arm with its first settings; how much may be on the device differs."""
    chosen = [line for line in lines if line.variant.arm not in UNBOUNDED]
    return {label: first for label, (first, *_) in _groups(chosen, _without_bound).items()}


def _with_curves(lines: Sequence[Line]) -> list[str]:
    """The tasks that an arm has answered with several budgets."""
    curves = {t: _curves([line for line in lines if line.task == t]) for t in _tasks(lines)}
    return [task for task, found in curves.items() if max(map(len, found.values()), default=0) > 1]


def by_length(lines: Sequence[Line], *, dpi: int = 120) -> Figure:
    """Accuracy over the length, a panel per task, each arm with its first settings and the most
    bytes that it may have at a length; what these are is written at the points of `lsa`."""
    tasks, lengths = _tasks(lines), sorted({line.length for line in lines})
    figure, panels = _panels(len(tasks), dpi)
    for axes, task in zip(panels, tasks, strict=True):
        own = [line for line in lines if line.task == task]
        points: dict[str, list[tuple[float, Line]]] = {}
        for label, (first, *_) in _groups(own, _without_bound).items():
            for at, length in enumerate(lengths):
                here = [line for line in first if line.length == length]
                if here:
                    most = max(here, key=lambda line: line.device)
                    points.setdefault(label, []).append((float(at), most))
        for label, found in points.items():
            _draw(axes, found, label)
        for at, line in points.get("lsa", []):
            place, share = (at, 100 * line.accuracy.value), f"{100 * line.device:.0f} %"
            axes.annotate(share, place, (0, -14), textcoords="offset points", ha="center")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set(xlabel="tokens", ylabel="accuracy (%)", title=task)
        axes.legend(fontsize="x-small")
    return figure


def _groups(
    lines: Sequence[Line], rest: Callable[[Variant], Variant]
) -> dict[str, list[list[Line]]]:
    """The lines of each label in groups whose variants are the same by `rest`, in their order."""
    found: dict[str, dict[Variant, list[Line]]] = {}
    for line in lines:
        groups = found.setdefault(_label(line.variant), {})
        groups.setdefault(rest(line.variant), []).append(line)
    return {label: list(groups.values()) for label, groups in found.items()}


def _without_bound(variant: Variant) -> Variant:
    """Without what says how much may be on the device."""
    free = "threshold" if variant.policy == "threshold" else "budget"
    return dataclasses.replace(variant, **{free: None})


def _bounded(label: str, variant: Variant) -> str:
    return label if variant.budget is None else f"{label} {variant.budget}"


def sweeps(lines: Sequence[Line], *, dpi: int = 120) -> Iterator[tuple[str, Figure]]:
    """A picture for each setting that lines differ in: accuracy over it, a panel per task and
    length that have several values of it; of averages only, where these have."""
    lengths = sorted({line.length for line in lines})
    for name in SWEEPS:
        panels: dict[tuple[str, int], _Series] = {}
        for task, length in itertools.product(_tasks(lines), lengths):
            own = [line for line in lines if (line.task, line.length) == (task, length)]
            if series := _series(own, name):
                panels[task, length] = series
        averages = {at: series for at, series in panels.items() if at[0] in AVERAGES}
        if panels:
            yield name, _sweep(averages or panels, name, dpi)


def _series(lines: Sequence[Line], name: str) -> _Series:
    """For each label the lines that differ in one setting only, where there are several. Where
    other settings tell several such series apart, the one with the most values, else the first."""
    chosen = [line for line in lines if line.variant.arm not in UNBOUNDED]
    if name not in _OFF:
        chosen = [line for line in chosen if getattr(line.variant, name) is not None]
    rest: dict[str, None] = {name: None}
    if name == "fallback":
        chosen, rest = _of_one_patience(chosen), {"fallback": None, "patience": None}
    groups = _groups(chosen, lambda variant: dataclasses.replace(variant, **rest))
    widest = {label: max(found, key=len) for label, found in groups.items()}
    return {label: own for label, own in widest.items() if len(own) > 1}


def _of_one_patience(lines: Sequence[Line]) -> list[Line]:
    """Lines with the first patience of a fallback that there is, and those without any fallback."""
    with_one = [line.variant for line in lines if line.variant.fallback is not None]
    first = with_one[0].patience if with_one else None
    return [
        line for line in lines if line.variant.fallback is None or line.variant.patience == first
    ]


def _sweep(panels: Mapping[tuple[str, int], _Series], name: str, dpi: int) -> Figure:
    """Accuracy over the values of a setting, with the same distance between any two."""
    all_series = [own for series in panels.values() for own in series.values()]
    found = {getattr(line.variant, name) for own in all_series for line in own}
    values = sorted(found, key=lambda value: (value is not None, value))
    figure, axes_of = _panels(len(panels), dpi)
    for axes, ((task, length), series) in zip(axes_of, panels.items(), strict=True):
        for label, own in series.items():
            points = [(float(values.index(getattr(line.variant, name))), line) for line in own]
            _draw(axes, points, _bounded(label, own[0].variant))
        axes.set_xticks(range(len(values)), ["off" if v is None else str(v) for v in values])
        axes.set(xlabel=name, ylabel="accuracy (%)", title=f"{task}, {length:,} tokens")
        axes.legend(fontsize="x-small")
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
