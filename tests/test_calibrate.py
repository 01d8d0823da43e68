"""Thresholds that are fitted to bytes come to these bytes on other documents."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from infer.lsa_options import _calibration
from lsa_jax.config import ConfigError
from lsa_jax.lsa.budget import Calibration, parse_budget
from lsa_jax.lsa.indexer_reader import read_indexer
from tests.evaluation_cases import MODEL, TARGETS, indexer, write_case, write_run
from train import calibrate, evaluate
from train.calibrate import Sample, fit, kept_share, outcome, split, usual_edges
from train.data.labels import ResidentRule
from train.quality.evaluation import open_traces
from train.quality.pareto import DeviceRoom, Sizes

RULE = ResidentRule(recency=12, page_entries=8)


def drawn(seed: int, documents: int, entries: int, power: float, forced: int = 4) -> list[Sample]:
    """Ten decisions a document; scores of pages are uniform draws to some power."""
    rng = np.random.default_rng(seed)
    pages = entries // 64
    sizes = Sizes(full=pages * 1000, fixed=pages * 40, page=900)
    return [
        Sample(d, entries, forced, rng.random(pages - forced).astype(np.float32) ** power, sizes)
        for d in range(documents)
        for _ in range(10)
    ]


def test_thresholds_obtain_what_was_requested_on_other_documents() -> None:
    """Lengths whose scores differ: one threshold for both would be off by far."""
    limit, edges = parse_budget("0.10"), (16384,)
    fitted = drawn(0, 20, 8192, 1.0) + drawn(1, 20, 65536, 0.2)
    held = drawn(2, 20, 8192, 1.0) + drawn(3, 20, 65536, 0.2)
    found = fit(fitted, edges, limit)
    short, long = found.thresholds
    # 10 % of 128,000 bytes less the fixed 4 % leave 8 pages, 4 of them forced: of 124, 4 are kept.
    assert short == pytest.approx(1 - 4 / 124, abs=0.01)
    # 68 of 1,024 pages, 4 forced: 64 of 1,020.
    assert long == pytest.approx((1 - 64 / 1020) ** 0.2, abs=0.003)
    for row, name in zip(outcome(held, found, limit), ("0-16384", "16384-", "all"), strict=True):
        assert row.bucket == name and row.requested == pytest.approx(0.1, abs=1e-4)
        # Rounding down to pages takes up to 0.7 points of a short history; drawing adds 0.3.
        assert row.obtained.value == pytest.approx(0.1, abs=0.01), name
        assert row.obtained.low <= row.obtained.value <= row.obtained.high
    one = outcome(held, fit(fitted, (), limit), limit)[0]
    assert one.requested == pytest.approx(0.1, abs=1e-4)


def test_no_more_than_requested_is_kept_of_what_was_fitted_on() -> None:
    for text in ("0.06", "0.3", "0.9", "1.0"):
        fitted = drawn(5, 4, 8192, 0.7, forced=1)
        rows = outcome(fitted, fit(fitted, (), parse_budget(text)), parse_budget(text))
        assert all(row.obtained.value <= row.requested + 1e-12 for row in rows)
        assert rows[0].requested == pytest.approx(float(text))


def test_shares_of_free_pages_worked_by_hand() -> None:
    sizes = Sizes(full=1000, fixed=100, page=90)
    one = Sample(0, 80, 2, np.zeros(8, np.float32), sizes)
    other = one._replace(forced=5, maxima=np.zeros(5, np.float32))
    # 460 bytes: 4 pages; of those beside the forced, 2 of 8.
    assert kept_share([one], parse_budget("0.46")) == 2 / 8
    assert kept_share([one], parse_budget("1.0")) == 1
    with pytest.raises(ConfigError, match="floor of 550 bytes"):
        kept_share([one, other], parse_budget("0.46"))
    with pytest.raises(ConfigError, match="room for a page that is not forced"):
        fit([other], (), parse_budget("0.55"))


def test_a_bucket_without_decisions_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="length bucket 9000-10000 must have a decision"):
        fit(drawn(0, 2, 8192, 1.0), (9000, 10000), parse_budget("0.5"))


def test_usual_edges_leave_no_bucket_small() -> None:
    assert usual_edges([100] * 10) == ()
    assert usual_edges([100] * 9 + [300]) == (128,)
    assert usual_edges([100] * 50 + [300] * 45 + [5000] * 5) == (128,)
    assert usual_edges([100] * 40 + [130] * 30 + [5000] * 30) == (128, 256)


def test_documents_are_fitted_on_or_tested_on() -> None:
    whole = [*range(10)]
    fitted, held = split(whole, 0.2, 0)
    assert len(held) == 2 and sorted(fitted + held) == whole
    assert split(whole, 0.2, 0) == (fitted, held) != split(whole, 0.2, 1)
    assert [len(part) for part in split([1, 2], 0.01, 0)] == [1, 1]
    assert [len(part) for part in split([1, 2], 0.99, 0)] == [1, 1]
    with pytest.raises(ConfigError, match="two or more without --holdout, got 1"):
        split([1], 0.2, 0)


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    sizes = {"documents": 5, "tokens": 64, "prompt_entries": 120}
    return write_case(tmp_path_factory.mktemp("calibrate") / "case", indexers=1, **sizes)


def command(case: Path, out: Path, *extra: str) -> list[str]:
    return [
        *("--indexer", str(case / "i0.safetensors"), "--traces", str(case / "traces")),
        *("--config", str(case / "config.json"), "--out", str(out), "--recency", "12"),
        *("--interval", "16", "--window", "16", *extra),
    ]


def test_a_sample_is_the_best_score_of_every_page_that_can_be_evicted(case: Path) -> None:
    fields = {"layout": "bf16", "targets": TARGETS, "page_entries": 8, "lookahead": 16}
    room = DeviceRoom(cfg=MODEL, **fields)
    traces = open_traces([case / "traces"])
    found = calibrate.samples(indexer(), traces, room, RULE, 16)
    assert [one.document for one in found] == [d for d in range(5) for _ in range(4)]
    assert [one.entries for one in found[:4]] == [120, 124, 128, 132]
    for one in found[:4]:
        free = (one.entries - 12) // 8
        assert len(one.maxima) == free and one.forced == one.entries // 8 - free
        assert one.maxima.dtype == np.float32
    with pytest.raises(ConfigError, match=r"more than the forced entries \(recency 999\)"):
        calibrate.samples(indexer(), traces, room, ResidentRule(recency=999, page_entries=8), 16)


def test_a_file_for_each_budget_that_decoding_and_evaluation_read(case, tmp_path, capsys) -> None:
    out = tmp_path / "c-{budget}.safetensors"
    assert calibrate.main(command(case, out, "--budgets", "0.5,0.8", "--length-edges", "124")) == 0
    printed = capsys.readouterr().out
    assert printed.count("requested 50.00 %") == printed.count("requested 80.00 %") == 3
    assert "fitted on 4 documents, tested on 1 others" in printed
    source = read_indexer(case / "i0.safetensors", MODEL)
    kept = []
    for budget in ("0.5", "0.8"):
        path = tmp_path / f"c-{budget}.safetensors"
        file = read_indexer(path, MODEL)
        assert file.config == source.config
        for name, leaf in source.leaves.items():
            np.testing.assert_array_equal(file.leaves[name], leaf)
        found = _calibration(path, file)
        assert found == Calibration.from_json(json.dumps(file.calibration))
        assert found.edges == (124,) and f"threshold {found.thresholds[0]:.4f}" in printed
        kept.append(found.kept_pages)
    assert kept[0] < kept[1]
    command_line = command(case, tmp_path / "report", "--budgets", "0.5", "--no-plots")
    assert evaluate.main([*command_line, "--indexer", str(path)]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["indexers"]["c-0.8"]["threshold"] == file.calibration
    assert not (tmp_path / "report" / "pareto.png").exists()


def test_a_run_is_calibrated_by_its_directory(case, tmp_path, capsys) -> None:
    run, out = write_run(tmp_path / "run", indexer(), step=3), tmp_path / "out.safetensors"
    given = ("--indexer", str(run), "--budgets", "0.5")
    assert calibrate.main(command(case, tmp_path / "none" / "out.safetensors", *given)) == 2
    assert "--out must be in a directory that is there" in capsys.readouterr().err
    assert calibrate.main(command(case, out, *given)) == 0
    got, want = read_indexer(out, MODEL), read_indexer(case / "i0.safetensors", MODEL)
    assert got.calibration is not None
    for name, leaf in want.leaves.items():
        np.testing.assert_array_equal(got.leaves[name], leaf)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--budgets", "0.5,0.6"), "--out must be a name with {budget} for several budgets"),
        (("--budgets", "0.01"), "kv_budget must be at least the floor of"),
        (("--budgets", "ten"), "kv_budget must be a share such as 0.10"),
        (("--budgets", "0.5", "--length-edges", "9"), "length bucket 0-9 must have a decision"),
        (("--budgets", "0.5", "--recency", "4096"), "more than the forced entries"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    case, tmp_path, extra: tuple[str, ...], message: str, capsys
) -> None:
    out = tmp_path / "out.safetensors"
    assert calibrate.main(command(case, out, *extra)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert list(tmp_path.iterdir()) == []


def test_documents_that_are_fitted_on_cannot_be_held_out(case, tmp_path, capsys) -> None:
    both = ("--budgets", "0.5", "--holdout", str(case / "traces" / "doc-0-3"))
    assert calibrate.main(command(case, tmp_path / "out.safetensors", *both)) == 2
    error = capsys.readouterr().err
    assert "--holdout must be traces that are not fitted on, got" in error and "doc-0-3" in error
    assert list(tmp_path.iterdir()) == []


def test_a_copy_of_a_document_that_is_fitted_on_cannot_be_held_out(case, tmp_path, capsys) -> None:
    shutil.copytree(case / "traces" / "doc-0-3", tmp_path / "held" / "doc-0-3")
    both = ("--budgets", "0.5", "--holdout", str(tmp_path / "held"))
    assert calibrate.main(command(case, tmp_path / "out.safetensors", *both)) == 2
    assert "traces must be of different documents" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["held"]


def test_an_indexer_is_never_written_over(case: Path, capsys) -> None:
    path = case / "i0.safetensors"
    before = path.read_bytes()
    assert calibrate.main(command(case, path, "--budgets", "0.5")) == 2
    assert "exists already" in capsys.readouterr().err and path.read_bytes() == before
