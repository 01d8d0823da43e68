"""Pictures of an evaluation. Needs matplotlib (the extra `plot`)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from train.quality.evaluation_report import ALL_LENGTHS, Figures, Summary
from train.quality.intervals import Interval

_UNTRAINED = {
    "recency": (":", "#7a7f87"),
    "random": (":", "#b58900"),
    "lagged": ("--", "#2a7f62"),
    "oracle.recall": ("-.", "#1b1f24"),
    "oracle.mass": ("-.", "#6b4ea0"),
}


def _line(axes: Axes, shares: Sequence[float], points: Sequence[Interval], **style: Any) -> None:
    """Values over shares, in percent, with a band from low to high."""
    drawn = [(s, *p) for s, p in zip(shares, points, strict=True) if not math.isnan(p[0])]
    if not drawn:
        return
    x, value, low, high = ([100 * number for number in part] for part in zip(*drawn, strict=True))
    (line,) = axes.plot(x, value, marker=".", **style)
    axes.fill_between(x, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def _curve(
    axes: Axes, figures: Figures, device: Figures, metric: str, budgets: Sequence[str], **style: Any
) -> None:
    names = [f"window/evictable/{metric}@{budget}" for budget in budgets]
    if all(name in figures for name in names):
        shares = [device[f"share@{budget}"].value for budget in budgets]
        pairs = sorted(zip(shares, (figures[n] for n in names), strict=True))
        _line(axes, [share for share, _ in pairs], [point for _, point in pairs], **style)


def pareto(summaries: Mapping[str, Summary], budgets: Sequence[str], *, dpi: int = 150) -> Figure:
    """Recall and captured mass of evictable entries over the KV share: each indexer's deployed
    scores, and the untrained arms with the first one's bytes."""
    figure = Figure(figsize=(10, 4.5), dpi=dpi, layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric, words in zip(
        panels,
        ("recall", "mass"),
        ("recall of golden entries (%)", "captured attention mass (%)"),
        strict=True,
    ):
        for i, (name, found) in enumerate(summaries.items()):
            arms, device = found.arms[ALL_LENGTHS], found.device[ALL_LENGTHS]
            _curve(axes, arms[found.deployed], device, metric, budgets, label=name)
            for arm, (dashes, colour) in _UNTRAINED.items() if i == 0 else ():
                style = {"linestyle": dashes, "color": colour, "label": arm}
                _curve(axes, arms.get(arm, {}), device, metric, budgets, **style)
        axes.set(xlabel="KV bytes on the device (% of all)", ylabel=words, ylim=(0, 102))
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "not recorded", ha="center", transform=axes.transAxes)
    figure.suptitle("evictable entries, next window; bands are 95 % intervals over documents")
    return figure


def calibration(summaries: Mapping[str, Summary], *, dpi: int = 150) -> Figure:
    """Observed share of positives by mean score, of each indexer's deployed scores and layers."""
    figure = Figure(figsize=(5 * len(summaries), 4.5), dpi=dpi, layout="constrained")
    panels = figure.subplots(1, len(summaries), squeeze=False)[0]
    for axes, (name, found) in zip(panels, summaries.items(), strict=True):
        axes.plot([0, 100], [0, 100], color="#7a7f87", linewidth=0.8)
        for arm, curves in found.curves.items():
            if arm != found.deployed and not arm.startswith("layer."):
                continue
            curve = curves["evictable"]
            expected = [point.value for point in curve.expected]
            _line(axes, expected, curve.observed, label=f"{arm}, gap {100 * curve.error.value:.1f}")
        axes.set(xlabel="mean score (%)", ylabel="golden (%)", title=name)
        axes.grid(alpha=0.3)
        if found.curves:
            axes.legend(fontsize="small")
        else:
            axes.text(0.5, 0.5, "shares, not probabilities", ha="center", transform=axes.transAxes)
    return figure
