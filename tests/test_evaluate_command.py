"""The command `train.evaluate`: what it writes is what a study finds; what it refuses."""

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import pytest

from lsa_jax.lsa.indexer_io import save_indexer
from tests.evaluation_cases import (
    KS,
    RULE,
    device_room,
    indexer,
    protocol,
    write_case,
    write_run,
)
from train import evaluate
from train.quality.evaluation import open_traces
from train.quality.metrics import MetricsConfig
from train.quality.pareto import parse_budgets
from train.quality.study import study
from train.traces.trace import Trace


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    sizes = {"documents": 3, "tokens": 80, "prompt_entries": 90}
    return write_case(tmp_path_factory.mktemp("evaluate") / "case", **sizes)


@pytest.fixture(scope="module")
def traces(case: Path) -> list[Trace]:
    return open_traces([case / "traces"])


def command(case: Path, out: Path, *extra: str) -> list[str]:
    given = () if "--indexer" in extra else ("--indexer", str(case / "i0.safetensors"))
    return [
        *(*given, "--traces", str(case / "traces")),
        *("--config", str(case / "config.json"), "--out", str(out), "--recency", "12"),
        *("--interval", "32", "--window", "16", "--ks", "5,20", "--budgets", "0.20,0.80", *extra),
    ]


@pytest.fixture(scope="module")
def out(case: Path, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("evaluate") / "out"
    both = [word for i in range(2) for word in ("--indexer", str(case / f"i{i}.safetensors"))]
    assert evaluate.main(command(case, out, *both, "--length-edges", "50,300", "--no-plots")) == 0
    return out


def test_the_command_reports_what_a_study_finds(out: Path, traces: list[Trace]) -> None:
    report = json.loads((out / "report.json").read_text())
    assert report["schema"] == 1 and report["command"]["interval"] == 32
    assert report["resident"] == {"recency": 12, "sink": 0, "page_entries": 8}
    assert report["traces"]["documents"] == 3 and report["traces"]["decisions"] == 9
    assert "golden sets only" in report["arms"]["lagged"]
    metrics = MetricsConfig(ks=KS, resident=dataclasses.replace(RULE, sink=0))
    fields = {"interval": 32, "metrics": metrics, "taus": (16, 32, 64, 128, 256)}
    cfg = protocol(budgets=parse_budgets("0.20,0.80"), **fields)
    for seed in (0, 1):
        want = study(indexer(seed), traces, device_room(), cfg)
        got = report["indexers"][f"i{seed}"]
        assert got["deployed"] == "ensemble.max" and got["threshold"] == 0.5
        assert got["arms"]["all"].keys() == want.arms.keys()
        for arm, result in want.arms.items():
            for name, figure in got["arms"]["all"][arm].items():
                numerator, denominator = sum(tally.get(name, 0) for tally in result.tallies)
                if denominator == 0:
                    assert figure == [None, None, None]
                else:
                    assert figure[0] == pytest.approx(numerator / denominator)
                    assert figure[1] <= figure[0] + 1e-9 and figure[0] <= figure[2] + 1e-9
    assert "window/all/f1" in report["indexers"]["i0"]["arms"]["all"]["layer.0"]


def test_differences_are_paired_and_of_what_decides(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    arms = report["indexers"]["i1"]["arms"]["all"]
    pairs = {"i1 - lagged": arms["lagged"], "i1 - i0": None}
    pairs["i1 - i0"] = report["indexers"]["i0"]["arms"]["all"]["ensemble.max"]
    for pair, other in pairs.items():
        name = "window/evictable/recall@0.80"
        value, low, high = report["differences"][pair][name]
        assert value == pytest.approx(arms["ensemble.max"][name][0] - other[name][0])
        assert low <= value <= high


def test_curves_and_calibration_are_written_as_csv(out: Path) -> None:
    report = json.loads((out / "report.json").read_text())
    rows = [*csv.DictReader((out / "pareto.csv").read_text().splitlines())]
    one = next(
        row
        for row in rows
        if (row["indexer"], row["arm"], row["horizon"]) == ("i1", "random", "tau 1-16")
        and (row["candidates"], row["budget"], row["lengths"]) == ("evictable", "0.80", "all")
    )
    figures = report["indexers"]["i1"]["arms"]["all"]["random"]
    recall = figures["tau 1-16/evictable/recall@0.80"]
    got = [float(one[name]) for name in ("recall", "recall_low", "recall_high")]
    assert got == pytest.approx(recall, rel=1e-5)
    share = report["indexers"]["i1"]["device"]["all"]["share@0.80"][0]
    assert float(one["kv_share"]) == pytest.approx(share, rel=1e-5) and share <= 0.8
    bins = [*csv.DictReader((out / "calibration.csv").read_text().splitlines())]
    counted = [row for row in bins if (row["indexer"], row["arm"]) == ("i0", "layer.2")]
    assert len(counted) == 2 * 20
    every = sum(int(row["count"]) for row in counted if row["candidates"] == "all")
    assert every == 3 * (90 + 98 + 106)  # entries at tokens 0, 32 and 64


def test_shares_have_no_calibration_curve(case: Path, tmp_path, capsys) -> None:
    path, out = tmp_path / "shares.safetensors", tmp_path / "out"
    save_indexer(path, indexer(0, score="softmax"))
    both = ("--indexer", str(path), str(case / "i0.safetensors"), "--no-plots")
    assert evaluate.main(command(case, out, *both)) == 0
    bins = [*csv.DictReader((out / "calibration.csv").read_text().splitlines())]
    assert {row["indexer"] for row in bins} == {"i0"}
    report = json.loads((out / "report.json").read_text())["indexers"]
    assert report["shares"]["curves"] == {} != report["i0"]["curves"]
    assert capsys.readouterr().out.count("no calibration curve: its scores are shares") == 1


def test_one_document_has_figures_without_intervals_and_the_report_says_so(
    case: Path, tmp_path, capsys
) -> None:
    both = ("--indexer", *(str(case / f"i{i}.safetensors") for i in range(2)), "--no-plots")
    line = command(case, tmp_path / "out", *both)
    line[line.index("--traces") + 1] = str(case / "traces" / "doc-0-0")
    assert evaluate.main(line) == 0
    printed = capsys.readouterr().out
    assert "figures are without intervals, which want two documents or more" in printed
    assert "[" not in printed
    (pair,) = [line for line in printed.splitlines() if line.startswith("i1 - i0: ")]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    value, low, high = report["differences"]["i1 - i0"]["window/evictable/recall@0.80"]
    assert f"recall@0.80 {100 * value:+.1f}" in pair and "*" not in pair and low is high is None


@pytest.mark.slow  # matplotlib takes seconds to import
def test_pictures_are_drawn_unless_they_are_not_wanted(case: Path, out: Path, tmp_path) -> None:
    shares = tmp_path / "shares.safetensors"
    save_indexer(shares, indexer(0, score="softmax"))
    both = ("--indexer", str(shares), str(case / "i0.safetensors"))
    assert evaluate.main(command(case, tmp_path, *both, "--interval", "64")) == 0
    for name in ("pareto.png", "calibration.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
        assert not (out / name).exists()


@pytest.mark.parametrize(("policy", "recency"), [("budget", 8), ("published", 2048), ("top", 8)])
def test_the_newest_entries_stay_as_in_decoding(case, tmp_path, policy: str, recency: int) -> None:
    options = ["--policy", policy, "--interval", "64", "--baselines", "", "--no-plots"]
    line = command(case, tmp_path, *options)
    at = line.index("--recency")
    assert evaluate.main(line[:at] + line[at + 2 :]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["resident"]["recency"] == recency and report["arms"] == {}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--budgets", "0.10,2.0"), "kv_budget must be in (0, 1]"),
        (("--budgets", "0.1,0.1"), "budgets must be distinct"),
        (("--traces", "absent"), "absent must have finished traces, got none"),
        (("--indexer", "absent"), "--indexer must be a run's directory, an indexer file or an"),
        (("--config", "v4_flash"), "the model's 4096, got 16 (the model is --config v4_flash)"),
        (("--threshold", "0.5", "--taus", ""), "exists already: --overwrite replaces it"),
    ],
)
def test_bad_input_is_one_line_and_changes_nothing(
    case: Path, out: Path, extra: tuple[str, ...], message: str, capsys
) -> None:
    before = (out / "report.json").read_bytes()
    again = () if "exists" in message else ("--overwrite",)
    assert evaluate.main(command(case, out, *extra, *again, "--no-plots")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert (out / "report.json").read_bytes() == before


@pytest.mark.parametrize("below", ["", "out"])
def test_a_place_where_nothing_can_be_written_is_refused_before_the_work(
    case, capsys, monkeypatch, below
) -> None:
    monkeypatch.setattr(evaluate, "study", lambda *_: pytest.fail("it worked"))
    file = case / "config.json"
    assert evaluate.main(command(case, file / below, "--no-plots")) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out must be a directory to write to, but {file} is none")


def test_a_run_is_evaluated_by_its_directory(case, out, tmp_path, capsys) -> None:
    run = write_run(tmp_path / "best.run", indexer(0), step=3)
    given = ("--indexer", str(run), "--baselines", "", "--no-plots")
    assert evaluate.main(command(case, tmp_path / "out", *given)) == 0
    (found,) = json.loads((tmp_path / "out" / "report.json").read_text())["indexers"].items()
    want = json.loads((out / "report.json").read_text())["indexers"]["i0"]
    assert found[0] == "best.run" and (found[1]["step"], want["step"]) == (3, None)
    assert found[1]["arms"]["all"]["ensemble.max"] == want["arms"]["all"]["ensemble.max"]
    again = ("--indexer", str(run), "--no-plots", "--config", "v4_flash", "--overwrite")
    assert evaluate.main(command(case, tmp_path / "out", *again)) == 2
    assert "best.run: indexer.hidden_size must be the model's 4096" in capsys.readouterr().err


def test_a_document_in_two_sets_is_refused(case: Path, tmp_path, capsys) -> None:
    """Whatever it is called: intervals would be those of more documents than there are."""
    shutil.copytree(case / "traces" / "doc-0-1", tmp_path / "more" / "other")
    out = tmp_path / "out"
    assert evaluate.main(command(case, out, "--traces", str(tmp_path / "more"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: traces must be of different documents, got the same arrays in")
    assert "traces/doc-0-1 and " in error and error.endswith("more/other\n")
    assert not out.exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--baselines", "luck"), "--baselines: must be some of recency,random,lagged,oracle"),
        (("--ks", "5,5"), "--ks: must be positive and strictly ascending"),
        (("--threshold", "1"), "--threshold: it must be in (0, 1), got 1.0"),
        (("--interval", "0"), "--interval: must be an integer >= 1, got '0'"),
    ],
)
def test_bad_options_are_one_line(case, tmp_path, extra, message: str, capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        evaluate.main(command(case, tmp_path, *extra))
    assert caught.value.code == 2 and message in capsys.readouterr().err
