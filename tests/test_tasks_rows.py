"""Training rows: what is supervised, what echoes repeat, and configurations that are refused."""

import dataclasses
import tomllib

import numpy as np
import pytest

from evals.tasks import phrases
from evals.tasks.config import MixtureConfig, TaskConfig, read_mixture
from evals.tasks.families import FAMILIES
from evals.tasks.question import ANSWER, FIRST, REST
from evals.tasks.rows import family_names, labelled_rows, rows
from evals.tasks.show import main
from evals.tasks.source import source
from lsa_jax.config import ConfigError
from tests.test_mini_tokenizer import TABLE, TOKENIZER
from tests.test_tasks_answers import EOS, FACTS, SOLVERS, by_key
from train.pretraining import lm_step

EVEN = MixtureConfig(weights=dict.fromkeys(FAMILIES, 1.0))
ECHOES = dataclasses.replace(EVEN, weights={"plain": 1.0}, echoes=(6, 10))


def draw(mixture: MixtureConfig, seed: int = 0, batch: int = 64, tokens: int = 512):
    return labelled_rows(mixture, np.random.default_rng(seed), batch, tokens)


def test_kinds_are_those_of_the_training_step():
    assert (REST, ANSWER, FIRST) == (lm_step.REST, lm_step.ANSWER, lm_step.FIRST)


@pytest.mark.parametrize("tokens", [256, 512, 2048])
def test_every_family_fills_its_rows_and_rows_follow_from_the_generator(tokens):
    made = draw(EVEN, tokens=tokens, batch=96)
    assert made.ids.shape == made.kinds.shape == (96, tokens)
    assert made.ids.dtype == np.int32 and made.kinds.dtype == np.int8
    assert np.all(made.ids[:, 0] == phrases.BOS_ID) and np.all(made.ids >= 0)
    assert len(np.unique(made.families)) == len(FAMILIES)
    supervised = {family_names()[f] for f, row in zip(made.families, made.kinds, strict=True)
                  if (row == FIRST).any()}  # fmt: skip
    assert supervised == FAMILIES.keys() - {"plain"}
    ids, kinds = rows(EVEN, np.random.default_rng(0), 96, tokens)
    np.testing.assert_array_equal(ids, made.ids)
    np.testing.assert_array_equal(kinds, made.kinds)
    assert not np.array_equal(ids, draw(EVEN, 1, 96, tokens).ids)


def test_rows_are_supervised_on_answers_alone_and_answers_follow_from_the_row():
    families = [name for name in SOLVERS if name not in ("recall", "recite")]
    mixture = MixtureConfig(weights=dict.fromkeys(families, 1.0))
    made = draw(mixture, batch=80)
    solved = 0
    for ids, kinds, family in zip(*made, strict=True):
        start = int(np.argmax(ids == phrases.USER_ID))
        text = TOKENIZER.decode(ids[1:start].tolist())
        assert not kinds[:start].any()
        turns = TOKENIZER.decode(ids[start:].tolist()).split(EOS)[:-1]
        for turn in turns:
            mark = "<think>" if "<think>" in turn else "</think>"
            question, answer = turn.split(mark, 1)
            assert SOLVERS[family_names()[family]](text, question) == answer
            solved += 1
        ends = np.flatnonzero(ids == phrases.EOS_ID)
        assert len(ends) == len(turns) and ends[-1] == len(ids) - 1
        opens = np.flatnonzero(ids == phrases.ASSISTANT_ID) + 1
        inside = np.zeros(len(ids), bool)
        for opened, end in zip(opens, ends, strict=True):
            inside[opened + 1 : end + 1] = True
        np.testing.assert_array_equal(kinds > REST, inside)
    assert solved > 200


def test_the_first_token_to_find_begins_the_value():
    made = draw(MixtureConfig(weights={"niah_multikey_1": 1.0}), batch=16)
    for ids, kinds in zip(made.ids, made.kinds, strict=True):
        facts = by_key(TOKENIZER.decode(ids.tolist()).split("<｜User｜>")[0], FACTS)  # noqa: RUF001
        values = {value for several in facts.values() for value in several}
        for at in np.flatnonzero(kinds == FIRST):
            end = at + int(np.argmax(ids[at:] == phrases.EOS_ID))
            assert TOKENIZER.decode(ids[at:end].tolist()).strip() in values


def test_questions_and_facts_stay_within_their_ranges():
    few = MixtureConfig(weights={"recall": 1.0}, questions=(2, 3), task=TaskConfig(facts=(2, 4)))
    for ids in draw(few).ids:
        opened = np.isin(ids, [TABLE.id_of[" ["], TABLE.id_of[" ("]]).sum()
        assert 2 <= opened <= 4
        assert 1 <= np.sum(ids == phrases.EOS_ID) <= 3
    share = dataclasses.replace(EVEN, weights={"niah_multiquery": 1.0}, question_share=0.1)
    for ids in draw(share).ids:
        assert np.sum(ids == phrases.EOS_ID) <= 3  # 51 tokens, or one question


def test_gaps_are_zero_as_often_as_they_should_be():
    task = TaskConfig(gap=(1, 8), adjacent=0.4)
    made = draw(MixtureConfig(weights={"recall": 1.0}, task=task), batch=200)
    gaps = []
    for ids in made.ids:
        for at in np.flatnonzero(np.isin(ids, [TABLE.id_of[" ["], TABLE.id_of[" ("]])):
            inside = ids[at + 3 : at + 3 + 9]
            gaps.append(int(np.argmax((inside >= TABLE.initial) & (inside < TABLE.final))))
    assert set(gaps) == set(range(9))
    # 4 standard deviations of a share of some 1,500 facts.
    assert abs(np.mean(np.array(gaps) == 0) - 0.4) < 4 * (0.24 / len(gaps)) ** 0.5


@pytest.mark.parametrize("tokens", [512, 2048])
def test_echoes_repeat_an_earlier_stretch_and_grow_with_the_row(tokens):
    made = draw(ECHOES, batch=16, tokens=tokens)
    counts = []
    for ids, kinds in zip(made.ids, made.kinds, strict=True):
        marked = np.flatnonzero((kinds == ANSWER) & (np.roll(kinds, 1) != ANSWER))
        counts.append(len(marked))
        for start in marked:
            end = start + int(np.argmin(kinds[start:] == ANSWER))
            echo = ids[start - 2 : end].tolist()
            assert kinds[start - 2] == kinds[start - 1] == REST
            assert len(echo) >= 8
            earlier = ids[: start - 2].tolist()
            assert any(earlier[i : i + len(echo)] == echo for i in range(len(earlier)))
    per = np.mean(counts) * 512 / tokens
    assert 3 < per <= 11  # some find no room


def test_echoes_leave_facts_and_answers_as_they_are():
    mixture = MixtureConfig(weights={"niah_multikey_1": 1.0}, echoes=(6, 10))
    for ids in draw(mixture, batch=24).ids:
        start = int(np.argmax(ids == phrases.USER_ID))
        text = TOKENIZER.decode(ids[1:start].tolist())
        for turn in TOKENIZER.decode(ids[start:].tolist()).split(EOS)[:-1]:
            question, answer = turn.split("</think>")
            assert SOLVERS["niah_multikey_1"](text, question) == answer
        assert TOKENIZER.encode(TOKENIZER.decode(ids.tolist())) == ids.tolist()


def test_a_mixture_is_read_from_toml_and_follows_its_weights():
    text = """
    questions = [1, 2]
    weights = { recall = 3, vt = 1 }
    [task]
    facts = [2, 3]
    gap = [0, 0]
    """
    mixture = read_mixture(tomllib.loads(text))
    assert mixture.questions == (1, 2) and mixture.task.facts == (2, 3)
    families = draw(mixture, batch=400).families
    names = np.array(family_names())[families]
    assert set(names) == {"recall", "vt"}
    # 4 standard deviations of a share of 400 rows.
    assert abs(np.mean(names == "recall") - 0.75) < 4 * (0.75 * 0.25 / 400) ** 0.5
    assert read_mixture({}) == MixtureConfig()


def test_the_source_of_a_stage_draws_the_mixture_of_its_table():
    table = {"weights": {"vt": 1.0, "recall": 1.0}, "echoes": [6, 10]}
    made = source(table, np.random.default_rng(5), 8, 512)
    want = labelled_rows(read_mixture(table), np.random.default_rng(5), 8, 512)
    for got, expected in zip(made, want, strict=True):
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(ConfigError, match=r"rows.echos is unknown"):
        source({"echos": 1}, np.random.default_rng(5), 8, 512)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"echos": [1, 2]}, r"mixture.echos is unknown; known are weights, questions"),
        ({"task": {"fact": [1, 2]}}, r"mixture.task.fact is unknown; known are facts"),
        ({"task": {"facts": [3, 2]}}, r"task.facts must be two ascending ints from 1 on, got \(3,"),
        ({"task": {"facts": 3}}, r"task.facts must be two ascending ints from 1 on, got 3"),
        ({"task": {"adjacent": 2}}, r"task.adjacent must be in \[0, 1\], got 2"),
        ({"task": {"copies": [2, 9]}}, r"task.copies must be at most 8, got \(2, 9\)"),
        ({"task": 3}, r"mixture.task must be a table"),
        ({"weights": {"recall": -1}}, r"mixture.weights.recall must be >= 0, got -1"),
        ({"weights": {"recall": 0}}, r"mixture.weights must be a table with a positive sum"),
        ({"questions": [0, 2]}, r"mixture.questions must be two ascending ints from 1 on"),
    ],
)
def test_bad_mixtures_are_refused(raw, message):
    with pytest.raises(ConfigError, match=message):
        read_mixture(raw)


def test_an_unknown_family_is_refused_when_rows_are_drawn():
    with pytest.raises(ConfigError, match=r"mixture.weights must be one of recall,.* got 'niah'"):
        draw(MixtureConfig(weights={"niah": 1.0}))


def test_show_prints_an_example_with_its_evidence_and_refuses_what_cannot_be(capsys):
    assert main(["--family", "vt", "--tokens", "512", "--questions", "1"]) == 0
    out = capsys.readouterr().out
    assert out.count(">>>") == out.count("<<<") >= 3 and "phrasing" in out
    assert main(["--family", "vt", "--tokens", "100"]) == 2
    assert main(["--family", "niah"]) == 2
    err = capsys.readouterr().err
    assert "error: --tokens 100: tokens must be" in err and "got 'niah'" in err
