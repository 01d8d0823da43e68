"""What the suite asks: the same every time, each cell its own, scored by what was planted."""

import dataclasses

import pytest

from evals.suite.cases import TASKS, Cell, cases, check_tasks, draw
from evals.tasks.question import score
from lsa_jax.config import ConfigError
from lsa_jax.config_io import load_config

MINI = load_config("mini_model")


def test_a_longer_run_begins_with_the_questions_of_a_shorter_one():
    short = list(cases("vt", 640, 1, total=4, each=3))
    long = list(cases("vt", 640, 1, total=9, each=3))
    assert sum(len(case.questions) for case in short) >= 4
    assert len(long) > len(short)
    for a, b in zip(short, long, strict=False):
        assert a.cell == b.cell and a.haystack == b.haystack
        assert [q.answer.tolist() for q in a.questions] == [q.answer.tolist() for q in b.questions]
    assert len({case.haystack for case in long}) == len(long)


@pytest.mark.parametrize("field", ["seed", "length", "task", "haystack"])
def test_every_cell_has_a_text_of_its_own(field):
    at = Cell(task="vt", length=640, seed=0, haystack=0)
    other = dataclasses.replace(at, **{field: {"length": 641, "task": "fwe"}.get(field, 1)})
    assert draw(at, 2).haystack != draw(other, 2).haystack
    assert draw(at, 2).haystack == draw(at, 2).haystack


def test_a_model_that_does_not_know_the_vocabulary_is_refused():
    small = dataclasses.replace(MINI, vocab_size=2047)
    with pytest.raises(ConfigError, match=r"vocab_size must be at least the 2048 ids"):
        check_tasks(small, TASKS, [8192])
    with pytest.raises(ConfigError, match="lengths must be at most 131072"):
        check_tasks(MINI, TASKS, [131072])
    with pytest.raises(ConfigError, match="tasks must be one of"):
        check_tasks(MINI, ["niah"], [8192])


@pytest.mark.parametrize("task", TASKS)
def test_planted_answers_score_one_and_others_do_not(task):
    case = draw(Cell(task=task, length=1024, seed=0, haystack=0), 4)
    right = [question.answer.tolist() for question in case.questions]
    assert [score(q, answer) for q, answer in zip(case.questions, right, strict=True)] == [
        1.0
    ] * len(right)
    # The answer to nothing: EOS at once, and the question said again.
    assert [score(q, [1]) for q in case.questions] == [0.0] * len(right)
    assert all(len(answer) < new for answer, new in zip(right, case.new_tokens, strict=True))
