"""The suite without a model: what is compared, what is kept, what is counted."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

from evals.suite import tables
from evals.suite.cases import Cell, draw
from evals.suite.cells import Block
from evals.suite.measure import Measure, evidence_entries, recalled
from evals.suite.records import Log, Part, read
from evals.suite.replies import Cycle, Reply
from evals.suite.running import Machine, Progress, groups, run
from evals.suite.summary import FULL, summarise
from evals.suite.variants import ARMS, Axes, Variant
from lsa_jax.config import ConfigError
from tests.suite_knowing import (
    BASE,
    BLOCK,
    GRID,
    LSA,
    RECENCY,
    VARIANTS,
    Interrupted,
    Knowing,
    listed,
    planted,
    results,
)
from train.quality.intervals import RESAMPLES

# What is compared


def axes(**settings):
    fields = {"arms": ARMS, "budgets": ("0.1", "0.2"), "lookaheads": (16,), "page_entries": (4,)}
    return Axes(**fields | settings)


def test_only_what_changes_an_arm_makes_variants_of_it():
    found = axes(
        policies=("budget", "threshold"), thresholds=(0.3, 0.6), ensembles=("max", "mean")
    ).variants()
    count = {arm: sum(variant.arm == arm for variant in found) for arm in ARMS}
    assert count["full"] == count["no_csa"] == 1
    assert count["recency"] == count["oracle"] == 2  # the budgets
    assert count["lsa"] == 2 * 2 * 2 + 2 * 2  # the policy threshold has no budget
    free = [variant for variant in found if variant.policy == "threshold"]
    assert {variant.budget for variant in free} == {None} and len(found) == len(set(found))


def test_a_budget_below_the_floor_is_refused_with_the_floor():
    enough = axes(arms=("lsa", "recency")).variants()
    BASE.check(enough, [8192, 16384])
    with pytest.raises(ConfigError, match=r"kv_budget must be at least the floor of \d+ bytes"):
        BASE.check(axes(arms=("full", "recency"), budgets=("0.02",)).variants(), [8192])
    BASE.check(axes(arms=("full", "no_csa"), budgets=("0.02",)).variants(), [8192])


def test_an_arm_that_is_none_is_refused_by_name():
    with pytest.raises(ConfigError, match="arms must be among full"):
        Variant(arm="fulll")  # pyright: ignore[reportArgumentType]


# What is counted


def test_evidence_is_counted_by_the_entries_whose_own_tokens_it_is():
    (question, *_) = draw(Cell(task="niah_single_2", length=640, seed=0, haystack=0), 1).questions
    question = dataclasses.replace(question, evidence=((7, 9), (11, 12), (40, 48)))
    entries = evidence_entries(question, ratio=4)
    assert entries.tolist() == [1, 2, 10, 11]
    one = Cycle(complete=6, pages=(0,), above=0, wanted=1, over_budget=0, due=60)
    assert recalled(entries, [one], page_entries=2) == [4, 1, 1]  # entry 1 is in page 0
    later = one._replace(pages=(1,))  # entry 2
    assert recalled(entries, [one, later], page_entries=2) == [4, 1, 2]
    assert recalled(entries, [one._replace(complete=5, pages=())], 2) == [4, 2, 2]  # in no page yet
    assert recalled(entries, [], page_entries=2) == [4, 0, 0]


def test_bytes_of_a_budget_that_is_kept_and_of_one_that_is_not():
    case = draw(Cell(task="niah_single_2", length=8192, seed=0, haystack=0), 1)
    start = len(case.haystack) + len(case.questions[0].prompt)
    variant = dataclasses.replace(LSA, budget="0.10")
    room, due = BASE.room(variant), start + 16
    forming = room.complete_pages(due) - room.complete_pages(start)
    pages = room.allowed((due,), due, forming=forming)
    cycle = Cycle(
        complete=start // 16, pages=tuple(range(pages)), above=0, wanted=99, over_budget=9, due=0
    )
    cycle = cycle._replace(due=due, end=start + 3)
    (kept,) = Measure(BASE).records(case, variant, [Reply([1, 2, 3], [cycle], 0)])
    assert not kept["exceeded"] and kept["slack"] == 0
    assert 0.095 < kept["device"] / kept["full"] <= 0.1
    more = cycle._replace(pages=tuple(range(pages + 2)))
    (over,) = Measure(BASE).records(case, variant, [Reply([1, 2, 3], [cycle, more], 1)])
    assert over["exceeded"] and over["device"] > kept["device"] and over["growth"] == 1
    less = cycle._replace(pages=tuple(range(pages - 5)))
    (under,) = Measure(BASE).records(case, variant, [Reply([1, 2, 3], [less], 0)])
    assert under["slack"] == 5


def test_full_attention_has_everything_and_its_ablation_reads_none_of_it():
    case = draw(Cell(task="vt", length=640, seed=0, haystack=0), 1)
    reply = Reply(case.questions[0].answer.tolist(), [], 0)
    (full,) = Measure(BASE).records(case, FULL, [reply])
    (none,) = Measure(BASE).records(case, Variant(arm="no_csa"), [reply])
    assert full["device"] == full["full"] and full["score"] == 1.0
    total = full["evidence"][0]
    assert total > 0 and full["evidence"] == [total] * 3 and none["evidence"] == [total, 0, 0]


# A run, with a machine that knows the answers


def test_all_arms_share_one_prefill_of_each_haystack(tmp_path):
    machine = Knowing()
    results(tmp_path, machine)
    assert len(machine.prefills) == len(set(machine.prefills)) == len(listed(GRID))
    assert len(machine.asked) == len(VARIANTS) * len(machine.prefills)


def test_parts_answer_every_haystack_once_and_make_the_tables_of_the_whole(tmp_path):
    whole, machines = results(tmp_path / "whole", Knowing()), [Knowing() for _ in range(3)]
    for index, machine in enumerate(machines, start=1):
        results(tmp_path / "parts", machine, part=Part(index, 3))
    cells = [cell for machine in machines for cell in machine.prefills]
    assert len(cells) == len(set(cells)) == len(listed(GRID)) and all(m.prefills for m in machines)
    quiet = Knowing()
    assert results(tmp_path / "parts", quiet)[1:] == whole[1:] and not quiet.asked
    again = Knowing()
    results(tmp_path / "parts", again, part=Part(1, 2))  # other parts know what the first did
    assert not again.asked
    names = {path.name for path in (tmp_path / "parts").glob("answers*")}
    assert names >= {"answers.jsonl", *(f"answers-{i}-of-3.jsonl" for i in (1, 2, 3))}


def test_haystacks_go_together_where_programs_seeds_and_what_is_missing_are_the_same():
    made = [
        (0, 0, "ab"),
        (0, 1, "ab"),
        (0, 2, "ab"),
        (0, 3, "b"),
        (1, 4, "b"),
        (1, 5, ""),
        (1, 6, ""),
    ]
    cases = [
        SimpleNamespace(cell=Cell(task="vt", length=640, seed=s, haystack=n), most_tokens=9, left=m)
        for s, n, m in made
    ]
    cases.append(SimpleNamespace(cell=cases[-1].cell, most_tokens=999, left=""))
    found = [
        ([made[cases.index(case)][1] if case.most_tokens == 9 else 7 for case in group], variants)
        for group, variants in groups(cases, lambda case: case.left, 2)
    ]
    wanted = [([0, 1], "ab"), ([2], "ab"), ([3], "b"), ([4], "b"), ([5, 6], ""), ([7], "")]
    assert found == [(numbers, list(missing)) for numbers, missing in wanted]


@pytest.mark.parametrize(("cut", "together"), [(0, 1), (1, 1), (40, 2), (1500, 1), (1500, 2)])
def test_a_run_that_was_cut_off_goes_on_to_the_same_tables(tmp_path, cut, together):
    whole, machine = results(tmp_path / "whole", Knowing()), Interrupted(after=2)
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path / "cut", machine, together=together)
    path = tmp_path / "cut" / "answers.jsonl"
    path.write_bytes(path.read_bytes()[: -cut or None])  # as a machine that lost power leaves it
    before, again = read(path), Knowing()
    resumed = results(tmp_path / "cut", again, together=together)
    assert resumed[1:] == whole[1:]
    done = {(r["task"], r["length"], r["seed"], r["haystack"], str(r["variant"])) for r in before}
    for cell, variant in again.asked:
        assert (*dataclasses.astuple(cell), str(variant.as_dict())) not in done
    assert len(read(path)) == len(whole[0].records)
    quiet = Knowing()
    assert results(tmp_path / "cut", quiet)[1:] == whole[1:] and not quiet.asked


def test_more_arms_and_questions_are_added_to_what_is_there(tmp_path):
    fewer = Block(dataclasses.replace(GRID, questions=3), VARIANTS[:2])
    results(tmp_path, Knowing(), fewer)
    machine = Knowing()
    _, text, _ = results(tmp_path, machine)
    assert text == results(tmp_path / "other", Knowing())[1]
    assert len(machine.asked) < len(VARIANTS) * len(listed(GRID))


def test_answers_of_another_checkpoint_are_refused(tmp_path):
    Log(tmp_path, {"checkpoint": "one", "recency": 16})
    with pytest.raises(ConfigError, match="answers with checkpoint 'one', got 'two'"):
        Log(tmp_path, {"checkpoint": "two", "recency": 16})


def test_a_damaged_line_is_named_and_nothing_is_lost(tmp_path):
    log, *_ = results(tmp_path, Knowing(), Block(dataclasses.replace(GRID, seeds=1), VARIANTS))
    lines = log.path.read_text().splitlines()
    log.path.write_text("\n".join([lines[0], lines[1][:50], *lines[2:], ""]))
    before = log.path.read_bytes()
    with pytest.raises(ConfigError, match=r"answers\.jsonl line 2 must be a record"):
        Log(tmp_path, {"checkpoint": "one"})
    assert log.path.read_bytes() == before


# Figures


def by_haystack(records):
    out = {}
    for record in records:
        out.setdefault((record["seed"], record["haystack"]), []).append(record["score"])
    return [out[key] for key in sorted(out)]


def test_paired_differences_and_intervals_are_those_of_an_independent_computation():
    rng = np.random.default_rng(5)
    full, lsa = planted(rng, FULL), planted(rng, LSA)
    (_, line) = summarise(full + lsa, [FULL, LSA], {})
    mine, others = by_haystack(lsa), by_haystack(full)
    mean = lambda groups: np.mean([x for group in groups for x in group])  # noqa: E731
    assert line.accuracy.value == pytest.approx(mean(mine))
    assert line.minus_full.value == pytest.approx(mean(mine) - mean(others))
    draws = np.random.default_rng(9)
    gaps, values = [], []
    for _ in range(4 * RESAMPLES):
        which = draws.integers(0, len(mine), len(mine))
        first = mean([mine[i] for i in which])
        gaps.append(first - mean([others[i] for i in which]))
        values.append(first)
    for found, want in ((line.minus_full, gaps), (line.accuracy, values)):
        low, high = np.quantile(want, (0.025, 0.975))
        # Two bootstraps of 2,000 and 8,000: their quantiles differ by about 0.01.
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)
        assert found.low < found.value < found.high


def test_only_questions_that_both_have_answered_are_compared():
    rng = np.random.default_rng(6)
    full, lsa = planted(rng, FULL, haystacks=6), planted(rng, LSA, haystacks=12)
    (_, line) = summarise(full + lsa, [FULL, LSA], {})
    shared = [
        r for r in lsa if (r["seed"], r["haystack"]) in {(f["seed"], f["haystack"]) for f in full}
    ]
    want = np.mean([r["score"] for r in shared]) - np.mean([r["score"] for r in full])
    assert line.minus_full.value == pytest.approx(want)
    assert line.questions == len(lsa)


def test_averages_weigh_tasks_alike_and_want_all_of_them():
    rng = np.random.default_rng(7)
    records = planted(rng, FULL, "vt", 3) + planted(rng, FULL, "niah_single_1", 12)
    records += planted(rng, LSA, "vt", 3)
    lines = summarise(records, [FULL, LSA], {640: ("vt", "niah_single_1")})
    tasks = {line.task: line for line in lines if line.variant == FULL}
    want = (tasks["vt"].accuracy.value + tasks["niah_single_1"].accuracy.value) / 2
    assert tasks["retrieval"].accuracy.value == pytest.approx(want)
    assert tasks["all"].accuracy.value == pytest.approx(want)
    assert [line.task for line in lines if line.variant == LSA] == ["vt"]


def test_the_table_says_what_was_asked_and_json_has_no_nan():
    rng = np.random.default_rng(8)
    records = planted(rng, FULL, haystacks=1) + planted(rng, LSA, haystacks=1)
    lines = summarise(records, [FULL, LSA], {640: ("vt",)})
    text = tables.markdown(lines, heading="# Mini", source="Here.")
    assert "### vt" in text and "| 25.0, 50.0 |" in text and "10.0 | 100.0 | 10.0 | 10.9" in text
    content = json.loads(tables.to_text(tables.as_json(lines, device="cpu")))
    assert content["device"] == "cpu" and content["lines"][1]["variant"] == LSA.as_dict()
    assert content["lines"][0]["accuracy"][1] is None  # one haystack has no interval


def test_a_block_is_replaced_between_its_marks_only():
    (begin, end), (first, last) = tables.MARKS["tables"], tables.MARKS["overview"]
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    blocks = {"tables": "new\n", "overview": "means\n"}
    assert tables.into(text, blocks, "it.md") == text.replace("old", "new")
    both = f"{first}\n{last}\n{text}"
    assert tables.into(both, blocks, "it.md") == f"{first}\nmeans\n{last}\n{text}".replace(
        "old", "new"
    )
    for wrong in ("before\nafter\n", f"{end}\n{begin}\n", f"{text}{first}\n", text + text):
        with pytest.raises(ConfigError, match=r"it\.md must have the lines"):
            tables.into(wrong, blocks, "it.md")


def test_what_all_variants_share_is_said_once():
    rng = np.random.default_rng(9)
    other = dataclasses.replace(LSA, budget="0.20")
    records = [r for v in (FULL, LSA, other) for r in planted(rng, v, haystacks=3)]
    records += [r for v in (FULL, LSA, other) for r in planted(rng, v, "niah_single_1", 3)]
    lines = summarise(records, [FULL, LSA, other], {640: ("vt", "niah_single_1")})
    same = {name: value for name, value in LSA.as_dict().items() if name not in ("arm", "budget")}
    assert tables.shared(lines) == same and same
    text = tables.overview(lines, source="Here.")
    told = ", ".join(f"{name} {value}" for name, value in sorted(same.items()))
    assert text.startswith(f"Here. Everywhere: {told}.\n")
    rows = [row.split(" | ")[1] for row in text.splitlines() if row.startswith("| 640")]
    assert rows == ["full", f"lsa, budget {LSA.budget}", "lsa, budget 0.20"]
    lacking = dataclasses.replace(LSA, fallback=0.1)
    two = summarise(records + planted(rng, lacking), [FULL, LSA, other, lacking], {})
    assert "fallback" not in tables.shared(two)
    assert "fallback 0.1" in tables.markdown(two, heading="#", source="")
    # All of recency has one, and LSA none: neither goes without saying.
    recency = dataclasses.replace(RECENCY, fallback=0.1)
    apart = summarise(planted(rng, LSA) + planted(rng, recency), [LSA, recency], {})
    assert "fallback" not in tables.shared(apart)
    assert "| recency, budget 0.5, fallback 0.1 |" in tables.markdown(apart, heading="#", source="")


def test_answers_say_what_made_them(tmp_path):
    rng = np.random.default_rng(10)
    for made, task in (("one", "vt"), ("two", "qa_1")):
        Log(tmp_path, {}, made=made).append(planted(rng, FULL, task, haystacks=1))
    found = Log(tmp_path, {}, made="three").records
    assert {(r["task"], r["made"]) for r in found} == {("vt", "one"), ("qa_1", "two")}


def test_progress_counts_what_was_there_but_not_its_time():
    case = draw(Cell(task="vt", length=640, seed=0, haystack=0), 3)
    progress = Progress(100, began=0.0)
    progress.add(50, new=False)
    assert progress.line(case) == "50 % (vt, 640 tokens)"
    progress.add(25, new=True)
    assert progress.line(case).startswith("75 % (vt, 640 tokens), ")
    assert progress.line(case).endswith(" left")


def test_a_machine_is_loaded_only_where_an_answer_is_missing(tmp_path):
    results(tmp_path, Knowing())
    log = Log(tmp_path, {"checkpoint": "one"})

    def load() -> Machine:
        raise AssertionError("nothing is missing")

    run([BLOCK], log, load, lambda line: None)
