"""The command `evals.indexers`: its stages are the commands', its figures a study's."""

import json
from pathlib import Path

import numpy as np
import pytest

from evals import indexers
from evals.indexers_checks import check_sets
from evals.indexers_documents import SPLITS, dump, key, lengths, prompts
from evals.indexers_report import pooled
from evals.tasks.examples import example
from lsa_jax import model_io
from lsa_jax.config import ConfigError
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.indexer_reader import read_indexer
from tests import suite_models
from tests.train_runs import compiled_once
from train.data.labels import ResidentRule
from train.quality.baselines import BASELINES
from train.quality.evaluation import open_traces
from train.quality.metrics import MetricsConfig
from train.quality.pareto import DeviceRoom, parse_budgets
from train.quality.study import ArmResult, Protocol, Study, study
from train.traces.trace import finished_traces

BUDGETS = ("0.50", "0.80")
NAME = "window/evictable/recall@0.80"
TASKS = ("niah_multikey_1", "context_free")


def command(root: Path, out: Path, *extra: str) -> list[str]:
    options = {
        "ckpt": root / "ckpt",
        "out": out,
        "documents": 2,
        "held-out": 2,
        "tokens": suite_models.LENGTH,
        "tasks": ",".join(TASKS),
        "questions": 2,
        "targets": 0,
        "page-entries": 2,
        "prefill-chunk": suite_models.CHUNK,
        "recency": 2,
        "lookahead": suite_models.LOOKAHEAD,
        "heads": 4,
        "rank": 16,
        "steps": 3,
        "batch-size": 4,
        "seeds": 2,
        "budgets": ",".join(BUDGETS),
        "set": "run.compute_dtype=float32",
    }
    return [str(x) for name, value in options.items() for x in (f"--{name}", value)] + [*extra]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("indexers")
    suite_models.write_checkpoint(root)
    with compiled_once(root / "programs"):
        assert indexers.main(command(root, root / "out")) == 0
    return root


@pytest.fixture(scope="module")
def content(root: Path) -> dict:
    return json.loads((root / "out" / "report.json").read_text())


def test_documents_are_haystacks_with_all_questions_and_answers_of_their_split(root) -> None:
    for name, split in SPLITS.items():
        lines = (root / "out" / "prompts" / f"{name}.jsonl").read_text().splitlines()
        assert [json.loads(line)["task"] for line in lines] == [*TASKS]
        for index, line in enumerate(map(json.loads, lines)):
            rng = np.random.default_rng(key(split, suite_models.LENGTH, 0, index))
            made = example(TASKS[index], rng, suite_models.LENGTH, 2, split)
            assert line["ids"] == made.haystack.tolist()
            asked = [*map(int, np.concatenate([(*q.prompt, *q.answer) for q in made.questions]))]
            assert line["answer"] == asked and len(made.questions) == 2


def test_a_length_is_of_a_whole_round_so_few_documents_have_the_first_only() -> None:
    assert lengths((480, 600), 5, 2) == [480, 480, 600, 600, 480]
    assert set(lengths((480, 600), 20, 20)) == {480}


def test_rounds_of_training_have_more_of_some_tasks_and_lengths_in_turn(root: Path) -> None:
    options = ("--tokens", "480,600", "--more", "vt,vt", "--documents", "9", "--held-out", "4")
    args = indexers._parse(command(root, root / "none", *options))
    lines = {name: [*map(json.loads, prompts(args, name).splitlines())] for name in SPLITS}
    round_of_training = [*TASKS, "vt", "vt"]
    assert [line["task"] for line in lines["train"]] == [*round_of_training * 2, TASKS[0]]
    assert [line["task"] for line in lines["held_out"]] == [*TASKS, *TASKS]
    for name, each in (("train", 4), ("held_out", 2)):
        for index, line in enumerate(lines[name]):
            tokens = (480, 600)[index // each % 2]
            rng = np.random.default_rng(key(SPLITS[name], tokens, 0, index))
            made = example(line["task"], rng, tokens, 2, SPLITS[name])
            assert line["ids"] == made.haystack.tolist()


def test_processes_with_a_part_each_make_the_traces_of_one(root: Path, capsys) -> None:
    out = root / "parts"
    with compiled_once(root / "programs"):
        for index in (1, 2, 3):  # of two documents: one has none
            assert indexers.main(command(root, out, "--part", f"{index}/3")) == 0
    assert not (out / "runs").exists() and "part 3 of 3 is done" in capsys.readouterr().out
    args = indexers._parse(command(root, out))
    for name in SPLITS:
        dump(args, name, prompts(args, name))
        for path in finished_traces(out / "traces" / name):
            whole = root / "out" / "traces" / name / path.name / "trace.json"
            assert (path / "trace.json").read_bytes() == whole.read_bytes()
    assert "loading" not in capsys.readouterr().err  # nothing was left to make


def test_what_is_recorded_is_the_replayed_text(root: Path) -> None:
    for name in SPLITS:
        lines = (root / "out" / "prompts" / f"{name}.jsonl").read_text().splitlines()
        traces = open_traces([root / "out" / "traces" / name])
        assert len(traces) == 2
        for line, trace in zip(map(json.loads, lines), traces, strict=True):
            assert trace.tokens == len(line["answer"])
            assert trace.read("positions")[0] == len(line["ids"])
            said = json.loads(
                (trace.path.parent / "answers" / f"{trace.path.name}.json").read_text()
            )
            assert said["ids"] == line["answer"]


def test_recipes_differ_in_what_they_set_and_seeds_in_seeds_only(root: Path) -> None:
    begun = {
        path.parent.name: json.loads(path.read_text())["config"]
        for path in (root / "out" / "runs").glob("*/config.json")
    }
    assert sorted(begun) == ["authors_0", "authors_1", "ours_0", "ours_1"]

    def changed(one: dict, other: dict, prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in one.items():
            if isinstance(value, dict):
                found |= changed(value, other[name], f"{prefix}{name}.")
            elif value != other[name]:
                found.add(prefix + name)
        return found

    seeds = {"run.seed", "data.seed", "sampling.seed"}
    assert changed(begun["ours_0"], begun["ours_1"]) == seeds
    own = {"sampling.causal", "objective.focal", "objective.share", "indexer.score"}
    assert changed(begun["authors_0"], begun["ours_0"]) == own


def test_the_figures_are_those_of_studies_with_seeds_added_up(root: Path, content: dict) -> None:
    cfg = model_io.read_config(root / "ckpt")
    traces = open_traces([root / "out" / "traces" / "held_out"])
    rule = ResidentRule(recency=2, page_entries=2)
    room = DeviceRoom(cfg=cfg, layout="planes640", targets=(0,), page_entries=2, lookahead=8)
    for recipe in ("authors", "ours"):
        sums = []
        for seed in range(2):
            file = root / "out" / "runs" / f"{recipe}_{seed}" / "indexer.safetensors"
            protocol = Protocol(
                metrics=MetricsConfig(ks=(), resident=rule),
                budgets=parse_budgets(",".join(BUDGETS)),
                interval=8,
                window=8,
                taus=(8,),
                baselines=BASELINES,
                seed=seed,
            )
            found = study(from_file(read_indexer(file, cfg)), traces, room, protocol)
            sums.append(sum(tally[NAME] for tally in found.arms["ensemble.max"].tallies))
            one = content["recipes"][recipe]["seeds"][seed][NAME][0]
            assert one == pytest.approx(sums[-1][0] / sums[-1][1])
        got = content["recipes"][recipe]["arms"]["all"]["ensemble.max"][NAME]
        assert got[0] == pytest.approx(np.sum(sums, 0)[0] / np.sum(sums, 0)[1])
        assert got[1] <= got[0] <= got[2]
    ours, authors = (
        content["recipes"][recipe]["arms"]["all"]["ensemble.max"][NAME][0]
        for recipe in ("ours", "authors")
    )
    assert content["differences"]["ours - authors"][NAME][0] == pytest.approx(ours - authors)
    assert {"ours - random", "ours - recency", "ours - lagged"} <= content["differences"].keys()


def test_the_table_has_a_row_for_every_arm_and_a_column_for_every_budget(root, content) -> None:
    lines = (root / "out" / "report.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "Recall of golden entries, evict" in line)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start : start + 10]]
    assert rows[0][1:] == ["at 0.50", "at 0.80"]
    names = [row[0] for row in rows[2:] if row]
    wanted = ["KV bytes on the device", "**authors**", "**ours**", "recency", "random", "lagged"]
    assert names[:8] == [*wanted, "oracle.recall", "oracle.mass"]
    value = content["recipes"]["ours"]["arms"]["all"]["ensemble.max"][NAME][0]
    assert rows[4][2].startswith(f"{100 * value:.1f} [")


def test_a_second_call_makes_nothing_again_and_finds_the_same(root: Path, capsys) -> None:
    out = root / "out"
    made = [*out.glob("prompts/*"), *out.glob("runs/*/indexer.safetensors")]
    made += [path / "trace.json" for name in SPLITS
             for path in finished_traces(out / "traces" / name)]  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in made}
    report = (out / "report.json").read_text()
    assert len(before) == 2 + 4 + 4
    assert indexers.main(command(root, out)) == 0
    assert {path: path.stat().st_mtime_ns for path in made} == before
    assert (out / "report.json").read_text() == report
    assert "loading" not in capsys.readouterr().err  # the backbone


def refusal(capsys, argv: list[str]) -> str:
    capsys.readouterr()
    try:
        assert indexers.main(argv) == 2
    except SystemExit as stop:  # the parser's
        assert stop.code == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    return line


def test_other_documents_and_other_training_are_refused_by_name(root: Path, capsys) -> None:
    line = refusal(capsys, command(root, root / "out", "--tokens", "500"))
    assert "tokens = [480], now [500]" in line
    line = refusal(capsys, command(root, root / "out", "--steps", "4"))
    assert "run.steps = 3, now 4" in line


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--recipes", "theirs"), "theirs"),
        (("--tasks", "plain"), "plain"),
        (("--targets", "1"), "1"),
        (("--budgets", "much"), "much"),
        (("--tokens", "64"), "tokens"),
        (("--tokens", "9000"), "4096"),
        (("--set", "run.nothing=1"), "nothing"),
        (("--learning-rate", "0"), "0"),
        (("--set", "run.seed=7"), "--set must leave run.seed to --seeds, got 'run.seed=7'"),
        (("--set", "sampling.causal=false"), "leave sampling.causal to --recipes ours, got"),
        (("--set", "run.log_n_reference=9"), "indexer.score must be sigmoid with run.log_n_ref"),
        (("--set", "data.mass=false"), "data.mass must be true with objective.share"),
        (("--set", "optimizer.accumulate=3"), "data.batch_size must be a multiple of"),
        (
            ("--set", "init.kind=indexer", "--set", "init.path=no"),
            "init.path must be a file or directory that is there, got 'no'",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(root, tmp_path, capsys, extra, words) -> None:
    assert words in refusal(capsys, command(root, tmp_path / "out", *extra))
    assert not (tmp_path / "out").exists()


def test_whatever_the_command_sets_itself_is_left_to_its_options(root: Path) -> None:
    """But for the workers, which change nothing of a run."""
    args = indexers._parse(command(root, root / "out"))
    args.set = []
    for recipe, own in indexers.RECIPES.items():
        for text in indexers.overrides(args, recipe, 3):
            if not text.startswith("data.workers="):
                with pytest.raises(ConfigError, match=r"--set must leave "):
                    check_sets([f" {text}"], {recipe: own})
    check_sets(["sampling.causal=true", "data.workers=2"], {"authors": ()})


def test_a_report_is_not_replaced_by_one_with_less(root: Path, capsys) -> None:
    out = root / "out"
    before = (out / "report.json").read_bytes()
    for extra, lost in (
        (("--recipes", "ours"), "--recipes authors,ours"),
        (("--recipes", "ours,mass"), "--recipes authors,ours"),
        (("--budgets", "0.50"), "--budgets 0.50,0.80"),
        (("--seeds", "1"), "--seeds 2"),
        (("--policy", "top"), "--policy budget"),
    ):
        line = refusal(capsys, command(root, out, *extra))
        assert line == (
            f"error: {out / 'report.json'} is of {lost}, which would be lost: give these too, or"
            " replace it by --overwrite"
        )
    assert (out / "report.json").read_bytes() == before
    args = indexers._parse(command(root, out, "--recipes", "ours,authors,mass", "--seeds", "3"))
    indexers.check(args)  # has more: it may
    indexers.check(indexers._parse(command(root, out, "--seeds", "1", "--overwrite")))
    (root / "bad").mkdir()
    (root / "bad" / "report.json").write_text("{}")
    assert "a report of this command (KeyError)" in refusal(capsys, command(root, root / "bad"))


def test_pooled_seeds_are_sums_of_each_document() -> None:
    def of(hits: float) -> Study:
        tallies = [{"x": np.array([hits, 4.0])}, {"x": np.array([1.0, 2.0])}]
        bins = [np.full((2, 3, 3), hits)] * 2
        return Study("a", {"a": ArmResult(tallies, bins), "b": ArmResult(tallies)}, [], [3, 4], 5)

    found = pooled([of(1), of(2)])
    np.testing.assert_array_equal(found.arms["a"].tallies[0]["x"], [3, 8])
    np.testing.assert_array_equal(found.arms["a"].tallies[1]["x"], [2, 4])
    np.testing.assert_array_equal(found.arms["a"].calibration[1], np.full((2, 3, 3), 3))
    assert found.arms["b"].calibration == [] and found.entries == [3, 4] and found.decisions == 5
