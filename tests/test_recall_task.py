"""The recall task: rows are what they say, answers follow from facts, tests keep their strings."""

import numpy as np
import pytest

from evals.alphabet import Alphabet
from evals.recall import ANSWER, FIRST, RecallConfig, draw_rows
from lsa_jax.config import ConfigError

LETTERS = Alphabet(words=40, syllables=32)
CONFIG = RecallConfig(tokens=200, facts=(4, 9), gap=(0, 5), questions=3, asked=(1, 3))


def rows(seed: int = 0, *, test: bool = False, cfg: RecallConfig = CONFIG):
    return draw_rows(np.random.default_rng(seed), LETTERS, cfg, 32, test=test)


def facts_of(ids: np.ndarray) -> dict[tuple[int, int], tuple[int, int]]:
    """Keys and values, read from the text of a row alone."""
    found, start = {}, LETTERS.first_word + LETTERS.words
    for at in np.flatnonzero(ids == LETTERS.fact):
        end = at + int(np.argmax(ids[at:] == LETTERS.end))
        syllables = [int(t) for t in ids[at + 1 : end] if t >= start]
        found[tuple(syllables[:2])] = tuple(syllables[2:])
    return found


def questions_of(ids: np.ndarray, start: int) -> list[list[int]]:
    """Tokens of each question and its answer, between the marks around them."""
    parts = ids[start:].tolist()
    starts = [i for i, token in enumerate(parts) if token == LETTERS.ask]
    return [parts[i + 1 : i + parts[i:].index(LETTERS.end)] for i in starts]


def answers_of(ids: np.ndarray, start: int) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Keys and values as the questions of a row answer them, read from its text alone."""
    out = []
    for question in questions_of(ids, start):
        asked, reply = question[:2], question
        if LETTERS.answer in question:
            place = question.index(LETTERS.answer)
            asked, reply = question[:place], question[place + 1 :]
            assert len(asked) > 2
        pairs = [tuple(reply[i : i + 2]) for i in range(0, len(reply), 2)]
        assert [token for pair in pairs[::2] for token in pair] == asked
        out += list(zip(pairs[::2], pairs[1::2], strict=True))
    return out


@pytest.mark.parametrize("test", [False, True])
def test_every_answer_is_the_value_of_its_key_and_every_fact_stands_in_the_haystack(test):
    drawn = rows(test=test)
    for ids, start, at in zip(drawn.ids, drawn.questions_at, drawn.fact_at, strict=True):
        facts = facts_of(ids[:start])
        assert len(facts) == np.sum(at >= 0) >= CONFIG.facts[0]
        assert all(len(value) == 2 for value in facts.values())
        answers = answers_of(ids, start)
        assert len(answers) >= CONFIG.questions
        assert all(facts[key] == value for key, value in answers)


def test_kinds_mark_answers_and_the_first_token_of_each_value():
    drawn = rows()
    for ids, kinds, start in zip(drawn.ids, drawn.kinds, drawn.questions_at, strict=True):
        assert not kinds[:start].any()
        answers = answers_of(ids, start)
        assert np.sum(kinds == FIRST) == len(answers)
        several = [q for q in questions_of(ids, start) if LETTERS.answer in q]
        repeated = sum(q.index(LETTERS.answer) for q in several)  # tokens of the keys they name
        # And the second token of each value, and the end of each answer.
        assert np.sum(kinds == ANSWER) == repeated + len(answers) + CONFIG.questions
        firsts = [value[0] for _, value in answers]
        assert ids[kinds == FIRST].tolist() == firsts


def test_tests_and_training_share_syllables_but_no_string():
    train, test = (LETTERS.strings(test=t) for t in (False, True))
    assert not np.intersect1d(train, test).size
    assert len(train) + len(test) == LETTERS.syllables**2 and len(test) == len(train) / 15
    for part in np.divmod(test, LETTERS.syllables):
        assert np.array_equal(np.unique(part), np.arange(LETTERS.syllables))
    for split in (False, True):
        strings = [
            s for row in rows(test=split).ids for pair in facts_of(row).items() for s in pair
        ]
        first = LETTERS.first_word + LETTERS.words
        codes = [
            (a - first) * LETTERS.syllables + b - first - LETTERS.syllables for a, b in strings
        ]
        assert np.all(LETTERS.is_test(np.array(codes)) == split)


def test_rows_follow_from_the_generator_and_gaps_and_counts_spread_over_their_ranges():
    np.testing.assert_array_equal(rows(3).ids, rows(3).ids)
    assert not np.array_equal(rows(3).ids, rows(4).ids)
    count = [np.sum(at >= 0) for seed in range(8) for at in rows(seed).fact_at]
    assert set(count) == set(range(CONFIG.facts[0], CONFIG.facts[1] + 1))
    first = LETTERS.first_word + LETTERS.words
    gaps = []
    for row in rows().ids:
        for at in np.flatnonzero(row == LETTERS.fact):
            gaps.append(int(np.argmax(row[at + 3 :] >= first)))
    assert set(gaps) == set(range(CONFIG.gap[1] + 1))
    share = np.mean(np.array(gaps) == 0)  # half of them, and a sixth of the others
    assert abs(share - (0.5 + 0.5 / 6)) < 0.1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": 60}, r"recall.tokens must be >= \d+, got 60"),
        ({"facts": (3, 2)}, r"recall.facts must be ascending from at least 1, got \(3, 2\)"),
        ({"facts": (2, 9)}, r"recall.asked must be <= the fewest facts, 2, got \(1, 3\)"),
        ({"adjacent": 1.5}, r"recall.adjacent must be in \[0, 1\], got 1.5"),
    ],
)
def test_rows_that_cannot_be_are_refused(fields, message):
    sizes = {"tokens": 200, "facts": (4, 9), "gap": (0, 5), "questions": 3, "asked": (1, 3)}
    with pytest.raises(ConfigError, match=message):
        RecallConfig(**{**sizes, **fields})
