"""A patient fallback: misses are judged after every token, and so many in a row end a cycle."""

import functools

import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa.config import LsaConfig, ResidentPath
from lsa_jax.lsa.policy import PolicyConfig
from tests.lsa_models import Run, prompt, session

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PROMPT, STEPS = 165, 12
FEW = PolicyConfig(threshold=1e-6, recency=4, recall_pages=4)  # of 20 pages
BOUND = 0.1  # of missed mass: below what the row's first tokens miss
UNHEARD = 10**6  # tokens in a row: more than there are


def run(patience: int | None, bound: float, path: ResidentPath = "mask", **sizes) -> Run:
    """A row that may have 4 of its 20 pages, after STEPS tokens."""
    options = {"policy": FEW, "budget": None, "fallback": bound, "patience": patience}
    out = Run(session(path, **options, **sizes))
    out.admit(prompt(PROMPT, seed=2), 60)
    out.decode(STEPS)
    return out


@functools.cache
def masses() -> tuple[list[float], list[int]]:
    """What a row misses after each of its tokens while nothing grows, and the streaks counted
    there, at the median of the former."""
    bound = 0.0
    for _ in range(2):  # the first time to learn the median
        of = session("mask", policy=FEW, budget=None, fallback=bound or 0.5, patience=UNHEARD)
        one = Run(of)
        one.admit(prompt(PROMPT, seed=2), 60)
        seen, streaks = [], []
        for _ in range(STEPS):
            one.decode(1)
            seen.append(float(np.asarray(of.batch._misses().mass)[0]))
            streaks.append(int(of.batch.state.streak[0]))
        bound = float(np.median(seen))
    return seen, streaks


def in_a_row(over: list[bool]) -> list[int]:
    """How many of the last ones are true, at each place."""
    out: list[int] = []
    for each in over:
        out.append((out[-1] if out else 0) + 1 if each else 0)
    return out


def test_streaks_count_the_tokens_in_a_row_that_missed_more_than_the_bound():
    seen, streaks = masses()
    want = in_a_row([mass > float(np.median(seen)) for mass in seen])
    assert streaks == want and 0 in want and max(want) > 1


def test_a_streak_goes_on_over_boundaries_that_nobody_heard():
    """Cycles of two tokens are over before three in a row have missed too much."""
    seen, _ = masses()
    events = run(3, BOUND, lookahead=2).session.batch.events
    assert [e.tokens - PROMPT for e in events[:3]] == [0, 2, 3]
    assert [e.growth > 0 for e in events[:3]] == [False, False, True]
    assert events[1].missed_mass > BOUND and min(seen[:2]) > BOUND


@pytest.mark.parametrize("patience", [1, 3])
def test_a_cycle_ends_where_so_many_in_a_row_missed_too_much_and_the_row_grows(patience):
    """Nothing of it at the admission, whatever the prompt's last token misses."""
    seen, _ = masses()
    assert min(seen[:patience]) > BOUND
    first, *later = run(patience, BOUND).session.batch.events
    assert first.tokens == PROMPT and first.growth == 0 and first.lacking_mass > BOUND
    grown = later[0]
    assert grown.tokens == PROMPT + patience and grown.growth >= 1 and grown.above > 0
    assert grown.missed_mass == pytest.approx(seen[patience - 1], abs=1e-5)
    assert grown.lacking_mass <= BOUND or len(grown.pages) == grown.complete


def test_a_patience_that_is_never_spent_changes_nothing():
    plain = Run(session("mask", policy=FEW, budget=None))
    plain.admit(prompt(PROMPT, seed=2), 60)
    plain.decode(STEPS)
    patient = run(UNHEARD, 0.5)
    np.testing.assert_array_equal(patient.drawn(0), plain.drawn(0))
    np.testing.assert_allclose(patient.scores(0), plain.scores(0), atol=1e-6)
    assert len(patient.session.batch.events) == len(plain.session.batch.events) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", ["paged", "gathered"])
def test_it_grows_alike_wherever_pages_are(path: ResidentPath):
    want, got = run(2, BOUND), run(2, BOUND, path)
    np.testing.assert_array_equal(got.drawn(0), want.drawn(0))
    np.testing.assert_allclose(got.scores(0), want.scores(0), atol=1e-5)
    noted = [[(e.tokens, e.growth, e.pages) for e in r.session.batch.events] for r in (want, got)]
    assert noted[0] == noted[1] and noted[0][-1][1] >= 1


@pytest.mark.slow
def test_a_row_beside_one_that_grows_has_its_own_cycles():
    options = {"policy": FEW, "budget": None, "rows": 2, "fallback": BOUND, "patience": 2}
    pair, alone = (Run(session("paged", **options)) for _ in range(2))
    for each in (pair, alone):
        each.admit(prompt(22, seed=1), 60)  # has room for all of its pages, and misses nothing
    pair.admit(prompt(PROMPT, seed=2), 60)
    for each in (pair, alone):
        each.decode(STEPS)
    small = [event for event in pair.session.batch.events if event.row == 0]
    assert [e.tokens for e in small] == [22] and small[0].growth == 0
    assert max(e.growth for e in pair.session.batch.events if e.row == 1) >= 1
    np.testing.assert_allclose(pair.scores(0), alone.scores(0), atol=1e-5)


def test_a_row_that_stopped_where_its_patience_ended_goes_on_with_more_pages():
    want = run(3, BOUND)
    stop = int(want.drawn(0)[3])  # drawn in the step that ends the cycle
    assert stop not in want.drawn(0)[:3]
    options = {"policy": FEW, "budget": None, "fallback": BOUND, "patience": 3}
    got = Run(session("mask", **options))
    got.admit(prompt(PROMPT, seed=2), 60)
    while len(got.tokens[0]) <= STEPS:
        got.decode(STEPS + 1 - len(got.tokens[0]), stop=(stop,))
    np.testing.assert_array_equal(got.drawn(0), want.drawn(0))
    assert [e.growth for e in got.session.batch.events] == [
        e.growth for e in want.session.batch.events
    ]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"patience": 3}, "patience must be given with a fallback only, got 3"),
        (
            {"fallback": 0.1, "patience": 0},
            r"patience must be an int in \[1, 2\^31\), tokens, got 0",
        ),
        ({"fallback": 0.1, "patience": 2**31}, r"patience must be an int in \[1, 2\^31\), tokens"),
        (
            {"fallback": 0.1, "patience": 3, "arm": "oracle", "resident_path": "mask"},
            "patience must be not given with attention oracle, got 3",
        ),
    ],
)
def test_a_patience_that_cannot_be_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        LsaConfig(targets=(0,), **given)
