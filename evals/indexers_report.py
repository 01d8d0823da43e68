"""What `evals.indexers` writes: seeds pooled, figures with intervals, tables and a picture."""

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evals.indexers_documents import lengths
from evals.suite.running import write_text
from train.quality import evaluation_report as report
from train.quality.evaluation_report import ALL_LENGTHS, Figures, Summary
from train.quality.intervals import Interval
from train.quality.metrics import add_tallies
from train.quality.study import ArmResult, Study

SCHEMA = 1
_METRICS = {"recall": "Recall of golden entries", "mass": "Captured attention mass"}


class Judged(NamedTuple):
    """A recipe's studies, one of each seed, and what it sets on top of the authors' recipe."""

    studies: Sequence[Study]
    sets: tuple[str, ...]


class Place(NamedTuple):
    """Where and with which settings a report was made."""

    device: str
    jax: str
    settings: Mapping[str, Any]


def pooled(studies: Sequence[Study]) -> Study:
    """Several indexers' studies of the same documents as one: sums of each document added up.

    A ratio is then the mean over seeds where their denominators are equal, and intervals are over
    documents with the seeds as they are.
    """
    first = studies[0]
    arms = {
        name: ArmResult(
            [add_tallies(of) for of in zip(*(s.arms[name].tallies for s in studies), strict=True)],
            [
                np.sum(of, axis=0)
                for of in zip(*(s.arms[name].calibration for s in studies), strict=True)
            ],
        )
        for name in first.arms
    }
    return Study(first.deployed, arms, first.device, first.entries, first.decisions)


def _metric(name: str, budget: str, candidates: str = "evictable") -> str:
    return f"window/{candidates}/{name}@{budget}"


def _listed(lengths: Sequence[int]) -> str:
    return " and ".join(f"{tokens:,}" for tokens in sorted(set(lengths)))


def _own(found: Summary) -> Figures:
    return found.arms[ALL_LENGTHS][found.deployed]


def _untrained(found: Summary) -> list[str]:
    scores = ("layer.", "ensemble.")
    return [name for name in found.arms[ALL_LENGTHS] if not name.startswith(scores)]


class Tables:
    """The figures of all recipes as Markdown; figures of evictable entries in the next window."""

    def __init__(self, judged: Mapping[str, Judged], budgets: Sequence[str]) -> None:
        self.budgets = budgets
        self.seeds = {
            name: [report.summary(s, ()) for s in of.studies] for name, of in judged.items()
        }
        self.studies = {name: pooled(of.studies) for name, of in judged.items()}
        self.summaries = {name: report.summary(of, ()) for name, of in self.studies.items()}
        self.first = next(iter(self.summaries.values()))
        self.differences = report.differences(self.studies, _untrained(self.first))

    def _seeded(self, recipe: str, metric: str) -> str:
        """The pooled figure, and in parentheses the lowest and the highest seed's."""
        text = _own(self.summaries[recipe])[metric].percent()
        values = [100 * _own(found)[metric].value for found in self.seeds[recipe]]
        return f"{text} ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else text

    def arms(self, name: str, candidates: str) -> list[str]:
        """Rows of one metric: recipes, then what is not trained."""
        metrics = [_metric(name, budget, candidates) for budget in self.budgets]
        rows = [
            [f"**{recipe}**", *(self._seeded(recipe, metric) for metric in metrics)]
            for recipe in self.summaries
        ]
        figures = self.first.arms[ALL_LENGTHS]
        rows += [
            [arm, *(figures[arm][metric].percent() for metric in metrics)]
            for arm in _untrained(self.first)
        ]
        heading = f"{_METRICS[name]}, {candidates}, %"
        return _markdown([heading, *(f"at {b}" for b in self.budgets)], [self._bytes(), *rows])

    def _bytes(self) -> list[str]:
        """What sets really took, and whether decoding would refuse the budget somewhere."""
        device = self.first.device[ALL_LENGTHS]
        cells = []
        for budget in self.budgets:
            below = device[f"below_floor@{budget}"].value
            mark = f", below the floor in {100 * below:.0f} %" if below else ""
            pages = device[f"pages@{budget}"].value
            cells.append(f"{100 * device[f'share@{budget}'].value:.1f} %, {pages:.1f} pages{mark}")
        return ["KV bytes on the device", *cells]

    def pairs(self, name: str) -> list[str]:
        """Rows of paired differences of one metric; an interval without 0 is bold."""
        metrics = [_metric(name, budget) for budget in self.budgets]
        rows = [
            [pair, *(_points(figures[metric]) for metric in metrics)]
            for pair, figures in self.differences.items()
        ]
        heading = f"{_METRICS[name]}, evictable, points"
        return _markdown([heading, *(f"at {b}" for b in self.budgets)], rows)

    def text(self, place: Place) -> str:
        """All tables, with what they are of."""
        documents, settings = self.first.documents[ALL_LENGTHS], place.settings
        tokens, tasks = settings["tokens"], len(settings["tasks"])
        judged = lengths(tokens, settings["held_out"], tasks)
        trained = lengths(tokens, settings["documents"], tasks + len(settings["more"]))
        words = (
            f"{documents} held-out documents of {_listed(judged)} tokens,"
            f" {self.studies[next(iter(self.studies))].decisions:,} decisions; trained on"
            f" {settings['documents']} others of {_listed(trained)} tokens,"
            f" {settings['steps']:,} steps of"
            f" {settings['batch_size']} at {settings['learning_rate']:g},"
            f" {len(next(iter(self.seeds.values())))} seeds; {place.device}, JAX {place.jax}."
        )
        means = "[95 % interval over documents, seeds pooled] (lowest to highest seed)"
        if documents == 1:
            means = f"{report.NO_INTERVALS}; (lowest to highest seed)"
        parts = [self.arms("recall", "evictable"), self.arms("mass", "evictable")]
        parts += [self.pairs("recall"), self.pairs("mass"), self.arms("recall", "all")]
        return "\n".join([words, means, *(line for part in parts for line in ("", *part))]) + "\n"


def _points(figure: Interval) -> str:
    text = "-" if np.isnan(figure.value) else f"{100 * figure.value:+.1f}"
    if np.isnan(figure.low):
        return text
    text += f" [{100 * figure.low:+.1f}, {100 * figure.high:+.1f}]"
    return f"**{text}**" if figure.low > 0 or figure.high < 0 else text


def _markdown(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heading, ["---"] * len(heading), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def as_json(tables: Tables, judged: Mapping[str, Judged], place: Place) -> dict[str, Any]:
    """The content of report.json; figures are [value, low, high], null where undefined."""
    study = next(iter(tables.studies.values()))
    return {
        "schema": SCHEMA,
        **place._asdict(),
        "budgets": list(tables.budgets),
        "held_out": {
            "documents": len(study.entries),
            "decisions": study.decisions,
            "entries": [min(study.entries), max(study.entries)],
        },
        "recipes": {
            name: {
                "sets": list(of.sets),
                **report.summary_json(tables.summaries[name]),
                "seeds": [report.as_json(_own(found)) for found in tables.seeds[name]],
            }
            for name, of in judged.items()
        },
        "differences": report.as_json(tables.differences),
    }


def write(
    out: Path,
    judged: Mapping[str, Judged],
    budgets: Sequence[str],
    place: Place,
    *,
    plot: bool,
) -> str:
    """Writes report.md, a picture if it is wanted, and report.json; returns the Markdown."""
    tables = Tables(judged, budgets)
    text = tables.text(place)
    write_text(out / "report.md", text)
    if plot:
        plots = importlib.import_module("train.quality.evaluation_plots")  # needs matplotlib
        plots.pareto(tables.summaries, list(budgets)).savefig(out / "pareto.png")
    content = json.dumps(as_json(tables, judged, place), indent=1, allow_nan=False)
    write_text(out / "report.json", content + "\n")
    return text
