"""Pictures of the suite: which lines become the points of a series."""

import dataclasses
import importlib

import pytest

from evals.suite.summary import FULL, Line
from evals.suite.variants import Variant
from train.quality.intervals import Interval

pytest.importorskip("matplotlib")
plots = importlib.import_module("evals.suite.plots")

LSA = Variant(arm="lsa", budget="0.10", lookahead=16, page_entries=4, policy="budget")
LOOSE = dataclasses.replace(LSA, budget="0.135")
RECENCY = Variant(arm="recency", budget="0.10", lookahead=16, page_entries=4)
TABLE = (FULL, LSA, LOOSE, RECENCY)
TASKS = ("all", "mrcr", "retrieval", "vt")


def line(variant, task="mrcr", length=16384, accuracy=0.5):
    bytes_ = dict.fromkeys(("logical", "device", "both", "reserved"), 0.1)
    bytes_ |= dict.fromkeys(("device_bytes", "reserved_bytes", "full_bytes"), 1e6)
    if variant.budget is not None:
        bytes_["device"] = float(variant.budget)
    return Line(
        task=task,
        length=length,
        variant=variant,
        questions=8,
        haystacks=1,
        accuracy=Interval(accuracy, accuracy - 0.1, accuracy + 0.1),
        minus_full=None,
        evidence=None,
        fallbacks=0,
        exceeded=0,
        slack=0,
        **bytes_,
    )


def table(*lengths):
    return [line(v, task, length) for length in lengths for task in TASKS for v in TABLE]


def drawn(figure):
    """Of each panel: the title, and the points of each series."""
    out = {}
    for axes in figure.axes:
        series = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        points = {label: bars.lines[0].get_xydata().tolist() for label, bars in series.items()}
        out[axes.get_title()] = points
    return out


def ticks(figure):
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_a_sweep_is_of_the_budget_that_has_it_and_not_of_the_table_s_first():
    """The table has lookahead 16 at both budgets; the ablation has others at the second."""
    others = [dataclasses.replace(LOOSE, lookahead=n) for n in (64, 256)]
    lines = table(8192, 16384)
    for task in ("mrcr", "vt"):
        lines += [line(v, task, accuracy=a) for v, a in zip(others, (0.4, 0.3), strict=True)]
    ((name, figure),) = plots.sweeps(lines)
    assert name == "lookahead" and ticks(figure) == ["16", "64", "256"]
    points = {"lsa 0.135": [[0.0, 50.0], [1.0, 40.0], [2.0, 30.0]]}
    assert drawn(figure) == {f"{task}, 16,384 tokens": points for task in ("mrcr", "vt")}


def test_a_sweep_of_averages_shows_no_single_tasks():
    pages = [dataclasses.replace(v, page_entries=2) for v in (LSA, RECENCY)]
    lines = [*table(8192), *(line(v, task, 8192) for task in TASKS for v in pages)]
    ((name, figure),) = plots.sweeps(lines)
    assert name == "page_entries" and ticks(figure) == ["2", "4"]
    assert list(drawn(figure)) == ["retrieval, 8,192 tokens", "all, 8,192 tokens"]
    assert all(set(series) == {"lsa 0.10", "recency 0.10"} for series in drawn(figure).values())


def test_a_fallback_that_is_off_is_a_value_and_a_threshold_that_is_not_given_is_none():
    bound = dataclasses.replace(LSA, fallback=0.05)
    one = dataclasses.replace(LOOSE, threshold=0.3)
    ((name, figure),) = plots.sweeps([*table(16384), line(bound), line(one)])
    assert name == "fallback" and ticks(figure) == ["off", "0.05"]
    assert drawn(figure) == {
        "mrcr, 16,384 tokens": {"lsa 0.10": [[0.0, 50.0], [1.0, 50.0]]},
    }
    patient = [dataclasses.replace(LSA, fallback=x, patience=6) for x in (0.05, 0.06)]
    lines = [*table(16384), *map(line, patient)]
    ((name, figure),) = plots.sweeps(lines)
    assert name == "fallback" and ticks(figure) == ["off", "0.05", "0.06"]
    assert len(drawn(figure)["mrcr, 16,384 tokens"]["lsa 0.10"]) == 3
    two = dataclasses.replace(one, threshold=0.6)
    names = [name for name, _ in plots.sweeps([*table(16384), line(one), line(two)])]
    assert names == ["threshold"]


def test_a_table_without_ablations_has_no_sweep():
    assert list(plots.sweeps(table(8192, 16384))) == []


def test_by_bytes_shows_the_table_and_not_what_an_ablation_has_at_other_settings():
    others = [dataclasses.replace(v, fallback=0.05) for v in (LSA, LOOSE)]
    others += [dataclasses.replace(LOOSE, threshold=0.3), dataclasses.replace(LOOSE, lookahead=64)]
    lines = [*table(16384), *(line(v, accuracy=0.9) for v in others)]
    panel = drawn_by_bytes(plots.by_bytes(lines, 16384))["mrcr"]
    assert panel == {"lsa": [[10.0, 50.0], [13.5, 50.0]], "recency": [[10.0, 50.0]]}


def drawn_by_bytes(figure):
    """As `drawn`, without the horizontal lines, which are no bars."""
    out = {}
    for axes in figure.axes:
        if axes.get_title():
            out[axes.get_title()] = {
                bars.get_label(): bars.lines[0].get_xydata().round(6).tolist()
                for bars in axes.containers
            }
    return out


def test_by_bytes_leaves_out_tasks_that_have_one_budget_only():
    threshold = dataclasses.replace(LSA, budget=None, policy="threshold")
    lines = [*table(16384), line(FULL, "qa_1"), line(LSA, "qa_1"), line(threshold, "qa_1")]
    assert set(drawn_by_bytes(plots.by_bytes(lines, 16384))) == set(TASKS)
    alone = [line for line in lines if line.task == "qa_1"]
    assert set(drawn_by_bytes(plots.by_bytes(alone, 16384))) == {"qa_1"}


def test_by_length_shows_the_most_bytes_of_each_length_and_writes_them_at_the_points():
    """The shortest has a budget of its own, as a tenth of its bytes is little."""
    wide = dataclasses.replace(LSA, budget="0.25")
    patient = dataclasses.replace(LOOSE, fallback=0.05, patience=5)
    lines = [line(wide, length=4096), *table(8192, 16384), line(LSA, length=32768)]
    figure = plots.by_length([*lines, line(patient, length=8192, accuracy=0.9)])
    panel = drawn(figure)["mrcr"]
    assert panel["lsa"] == [[0.0, 50.0], [1.0, 50.0], [2.0, 50.0], [3.0, 50.0]]
    assert [x for x, _ in panel["full"]] == [1, 2]
    (axes,) = [axes for axes in figure.axes if axes.get_title() == "mrcr"]
    assert [text.get_text() for text in axes.texts] == ["25 %", "14 %", "14 %", "10 %"]
    assert ticks(figure) == ["4,096", "8,192", "16,384", "32,768"]


def test_pictures_of_averages_are_drawn_beside_those_of_all_tasks():
    names = [name for name, _ in plots.every(table(8192))]
    kinds = ("accuracy", "averages")
    assert names == [f"{kind}_by_{x}" for kind in kinds for x in ("bytes_8192", "length")]
    alone = [line for line in table(8192) if line.task == "vt"]
    assert [name for name, _ in plots.every(alone)] == names[:2]
    assert list(plots.every([])) == []
