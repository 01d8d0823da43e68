"""Figures of a study with their intervals: as JSON, as rows of CSV, and as a table for people."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from train.quality.intervals import Interval, bootstrap, resampled
from train.quality.metrics import Tally, by_bucket, compare, summarise
from train.quality.study import CANDIDATES, WINDOW, ArmResult, Study

SCHEMA = 1
ALL_LENGTHS = "all"
NO_INTERVALS = "figures are without intervals, which want two documents or more"
NO_PROBABILITIES = "no calibration curve: its scores are shares of attention, not probabilities"
_DEVICE = ("share", "pages", "below_floor")
Figures = dict[str, Interval]


class Curve(NamedTuple):
    """Observed share of positives by mean score, in bins; `error` is the expected gap."""

    count: np.ndarray
    expected: list[Interval]
    observed: list[Interval]
    error: Interval


class Summary(NamedTuple):
    """Of one indexer: figures by length bucket and arm, and what sets took by length bucket."""

    deployed: str
    documents: dict[str, int]
    arms: dict[str, dict[str, Figures]]
    device: dict[str, Figures]
    curves: dict[str, dict[str, Curve]]


def _by_length(
    tallies: Sequence[Tally], entries: Sequence[int], edges: Sequence[int]
) -> dict[str, list[Tally]]:
    """All documents, and those of each bucket where there are several."""
    buckets = by_bucket(tallies, entries, edges)
    return {ALL_LENGTHS: list(tallies)} | (buckets if len(buckets) > 1 else {})


def curve(sums: np.ndarray) -> Curve:
    """Calibration with intervals from `calibration_sums` of documents, [D, bins, 3]."""
    count, scores, positives = np.moveaxis(sums, 2, 0)
    total = np.broadcast_to(count.sum(axis=1, keepdims=True), count.shape)
    gaps = np.stack([scores - positives, total], axis=2)
    value, again = (np.abs(x).sum(axis=-1) for x in resampled(gaps))
    known = again[~np.isnan(again)]
    low, high = np.quantile(known, (0.025, 0.975)) if len(known) else (math.nan, math.nan)
    return Curve(
        count.sum(axis=0),
        bootstrap(np.stack([scores, count], axis=2)),
        bootstrap(np.stack([positives, count], axis=2)),
        Interval(float(value), float(low), float(high)),
    )


def _curves(result: ArmResult) -> dict[str, Curve]:
    sums = np.stack(result.calibration)
    return {name: curve(sums[:, i]) for i, name in enumerate(CANDIDATES)}


def summary(found: Study, edges: Sequence[int]) -> Summary:
    """Every figure with its 95 % interval over documents."""
    arms: dict[str, dict[str, Figures]] = {}
    for arm, result in found.arms.items():
        for bucket, part in _by_length(result.tallies, found.entries, edges).items():
            arms.setdefault(bucket, {})[arm] = summarise(part)
    device = _by_length(found.device, found.entries, edges)
    return Summary(
        deployed=found.deployed,
        documents={bucket: len(part) for bucket, part in device.items()},
        arms=arms,
        device={bucket: summarise(part) for bucket, part in device.items()},
        curves={n: _curves(result) for n, result in found.arms.items() if result.calibration},
    )


def differences(studies: Mapping[str, Study], baselines: Iterable[str]) -> dict[str, Figures]:
    """Paired differences: each indexer's deployed arm less its baselines, and less the first's."""
    found: dict[str, Figures] = {}
    first = next(iter(studies))
    for name, of in studies.items():
        mine = of.arms[of.deployed].tallies
        for arm in baselines:
            found[f"{name} - {arm}"] = compare(mine, of.arms[arm].tallies)
        if name != first:
            other = studies[first]
            found[f"{name} - {first}"] = compare(mine, other.arms[other.deployed].tallies)
    return found


def _number(x: float) -> float | None:
    return x if math.isfinite(x) else None


def as_json(value: Any) -> Any:
    """For `json.dumps`: intervals and tuples as lists, NaN as null."""
    if isinstance(value, Mapping):
        return {str(name): as_json(item) for name, item in value.items()}
    if isinstance(value, float | np.floating):
        return _number(float(value))
    if isinstance(value, list | tuple | np.ndarray):
        return [as_json(item) for item in value]
    return value


def summary_json(found: Summary) -> dict[str, Any]:
    """A summary as the report has it; figures are [value, low, high]."""
    calibration = {
        arm: {name: curve._asdict() for name, curve in curves.items()}
        for arm, curves in found.curves.items()
    }
    return as_json({**found._asdict(), "curves": calibration})


def _cells(figure: Interval | None) -> list[str]:
    return ["" if math.isnan(x) else f"{x:.6g}" for x in figure] if figure else [""] * 3


def pareto_rows(summaries: Mapping[str, Summary], budgets: Iterable[str]) -> list[list[str]]:
    """A heading and a row for each indexer, length, arm, horizon, candidates and budget."""
    names = [f"{figure}{end}" for figure in ("recall", "mass") for end in ("", "_low", "_high")]
    fixed = "indexer lengths documents arm horizon candidates budget kv_share pages below_floor"
    rows: list[list[str]] = [[*fixed.split(), *names]]
    budgets = list(budgets)
    for indexer, found in summaries.items():
        for bucket, arms in found.arms.items():
            device, documents = found.device[bucket], str(found.documents[bucket])
            for arm, figures in arms.items():
                for where in _places(figures):
                    horizon, candidates = where.split("/")
                    for budget in budgets:
                        took = [
                            device[f"{n}@{budget}"].value for n in ("share", "pages", "below_floor")
                        ]
                        cells = [indexer, bucket, documents, arm, horizon, candidates, budget]
                        cells += [f"{x:.6g}" for x in took]
                        for metric in ("recall", "mass"):
                            cells += _cells(figures.get(f"{where}/{metric}@{budget}"))
                        rows.append(cells)
    return rows


def _places(figures: Figures) -> list[str]:
    """The "<horizon>/<candidates>" of an arm's figures, in their order of time."""
    places = {name.rpartition("/")[0] for name in figures}
    return sorted(places, key=lambda place: (_start(place), place))


def _start(place: str) -> int:
    digits = place.split("/")[0].removeprefix("tau ").split("-")[0]
    return int(digits) if digits.isdecimal() else 0


def calibration_rows(summaries: Mapping[str, Summary]) -> list[list[str]]:
    """A heading and a row for each indexer, arm, candidates and bin."""
    heading = "indexer arm candidates from to count expected observed observed_low observed_high"
    rows: list[list[str]] = [[*heading.split()]]
    for indexer, found in summaries.items():
        for arm, curves in found.curves.items():
            for candidates, curve in curves.items():
                bins = len(curve.count)
                for i in range(bins):
                    cells = [indexer, arm, candidates, f"{i / bins:g}", f"{(i + 1) / bins:g}"]
                    cells += [f"{curve.count[i]:.0f}", _cells(curve.expected[i])[0]]
                    rows.append([*cells, *_cells(curve.observed[i])])
    return rows


def as_csv(rows: Iterable[Sequence[str]]) -> str:
    """Rows as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def table(found: Summary, budgets: Sequence[str], k: int) -> list[str]:
    """Figures of the window and evictable entries in percent: a line for each arm, and one with
    what their sets took, "(floor)" where decoding would refuse a budget at some decision."""
    metrics = ["f1", f"recall@{k}", *(f"{m}@{b}" for m in ("recall", "mass") for b in budgets)]
    arms, device = found.arms[ALL_LENGTHS], found.device[ALL_LENGTHS]
    names = [m for m in metrics if any(_of_window(m) in figures for figures in arms.values())]
    rows = [["", *names]]
    for arm, figures in arms.items():
        mark = " *" if arm == found.deployed else ""
        rows.append([arm + mark, *(_percent(figures.get(_of_window(name))) for name in names)])
    shares = {f"{m}@{b}": _share(device, b) for m in ("recall", "mass") for b in budgets}
    rows.append(["KV bytes", *(shares.get(name, "") for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def difference_lines(differences: Mapping[str, Any], budgets: Sequence[str]) -> list[str]:
    """Paired differences at every budget in points; those whose interval is beyond 0 have a *."""
    lines = []
    for pair, figures in differences.items():
        cells = []
        for metric in (f"{m}@{b}" for m in ("recall", "mass") for b in budgets):
            value, low, high = figures.get(_of_window(metric), (None, None, None))
            if value is not None:  # bounds are not there with a single document
                sure = low is not None and high is not None and (low > 0 or high < 0)
                mark = "*" if sure else ""
                cells.append(f"{metric} {100 * value:+.1f}{mark}")
        lines.append(f"{pair}: {', '.join(cells)}")
    return ["differences of the deployed scores (*: interval without 0):", *lines] if lines else []


def _of_window(metric: str) -> str:
    return f"{WINDOW}/evictable/{metric}"


def _share(device: Figures, budget: str) -> str:
    mark = " (floor)" if device[f"below_floor@{budget}"].value > 0 else ""
    return f"{100 * device[f'share@{budget}'].value:.1f}{mark}"


def _percent(figure: Interval | None) -> str:
    return "-" if figure is None else figure.percent()
