"""Level 2: three ways to confine it that agree, and with everything resident, full attention."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache.resident import Resident
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from tests import lsa_models
from tests.lsa_models import ALL, CONFIG, PAGE_TOKENS, Run, alone, full_logits, prompt, session

pytestmark = pytest.mark.usefixtures("compiled_quickly")

PROMPT = prompt(45)
STEPS = 70
SLOW = pytest.mark.slow
# Every page. (A budget of 1.0 is not that in fp8: here, unlike at V4's sizes, records have fill.)
EVERYTHING = {"policy": dataclasses.replace(ALL, recall_pages=4096), "budget": None}
# Half of the pages, and scores of which about half are above the threshold.
TIGHT = PolicyConfig(threshold=0.45, recency=4)


def everything(kv) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and logits of full attention, from the state that prefill left on the path "mask"."""
    run = Run(session("mask", kv=kv))
    run.admit(PROMPT, STEPS + 1)
    logits = full_logits(run.session, run.token[0], STEPS, kv)
    return np.argmax(logits, axis=-1), np.concatenate([run.scores(0), logits])


@pytest.mark.parametrize(
    "kv, path",
    [
        ("float32", "paged"),
        pytest.param("float32", "mask", marks=SLOW),
        pytest.param("float32", "gathered", marks=SLOW),
        pytest.param("fp8", "mask", marks=SLOW),
        pytest.param("fp8", "paged", marks=SLOW),
        pytest.param("fp8", "gathered", marks=SLOW),
        pytest.param("bfloat16", "paged", marks=SLOW),
        pytest.param("bfloat16", "gathered", marks=SLOW),
    ],
)
def test_everything_resident_is_full_attention_to_the_bit(kv, path):
    tokens, logits = everything(kv)
    run = alone(session(path, kv=kv, **EVERYTHING), PROMPT, STEPS)
    np.testing.assert_array_equal(run.drawn(0)[1:], tokens)
    # Prefill of the paths differs in fusions, and so may do their states: decoding is compared
    # from equal ones, which they are here.
    np.testing.assert_array_equal(run.scores(0), logits)
    events = run.session.batch.events
    assert [len(e.pages) for e in events] == [e.complete for e in events]
    assert events[-1].complete == (len(PROMPT) + 64) // PAGE_TOKENS > events[0].complete
    assert not any(e.missed_entries or e.missed_mass for e in events)


@pytest.mark.parametrize(
    "kv, other",
    [
        ("float32", "paged"),
        pytest.param("float32", "gathered", marks=SLOW),
        pytest.param("fp8", "paged", marks=SLOW),
        pytest.param("fp8", "gathered", marks=SLOW),
        pytest.param("bfloat16", "paged", marks=SLOW),
    ],
)
def test_paths_have_the_same_sets_and_logits_under_a_tight_budget(kv, other):
    runs = [
        alone(session(path, kv=kv, policy=TIGHT, budget="0.6"), PROMPT, STEPS)
        for path in ("mask", other)
    ]
    want, got = (run.session.batch.events for run in runs)
    same = ("pages", "complete", "wanted", "over_budget", "allowed", "missed_entries")
    for name in same:
        assert [getattr(e, name) for e in got] == [getattr(e, name) for e in want], name
    np.testing.assert_array_equal(runs[1].scores(0), runs[0].scores(0))
    np.testing.assert_array_equal(runs[1].drawn(0), runs[0].drawn(0))
    # The budget binds, sets change, pages are evicted and recalled, and it shows in the logits.
    assert any(e.over_budget for e in want) and any(e.missed_entries for e in want)
    assert any(set(a.pages) - set(b.pages) for a, b in itertools.pairwise(want))
    full = everything(kv)[1]
    assert np.abs(runs[0].scores(0)[: len(full)] - full).max() > 1e-3


@pytest.mark.parametrize("per_page", [1, 2, 3, 16, 64])
def test_fresh_pages_hold_what_a_cycle_of_any_lookahead_forms(per_page):
    cache = dataclasses.replace(lsa_models.cache(), page_entries=per_page)
    for lookahead in range(1, 257):
        plan = Level2(CONFIG, cache, targets=(1,), lookahead=lookahead, path="paged")
        starts = np.arange(4 * per_page * CONFIG.csa_ratio)  # tokens at the boundary before
        base = starts // CONFIG.csa_ratio // per_page * per_page
        formed = (starts + lookahead) // CONFIG.csa_ratio - base
        room = plan.fresh_pages * per_page
        assert formed.max() <= room < formed.max() + per_page + 1, (lookahead, formed.max(), room)


SHORT = prompt(13)


def _compare_lookahead(of: LsaSession, full: np.ndarray) -> None:
    lookahead, before = of.lsa.lookahead, len(of.batch.events)
    steps = max(40, lookahead + 9)
    run = alone(of, SHORT, steps)
    np.testing.assert_array_equal(run.scores(0)[1:], full[:steps], err_msg=f"{lookahead=}")
    assert len(of.batch.events) - before == 1 + steps // lookahead


def _with_lookahead(of: LsaSession, lookahead: int) -> LsaSession:
    """The same session, whose buffer is for the longest; its store compares pages of all."""
    of.lsa = of.batch.lsa = dataclasses.replace(of.lsa, lookahead=lookahead)
    return of


@pytest.fixture(scope="module")
def paged() -> LsaSession:
    return session(**EVERYTHING)


@pytest.fixture(scope="module")
def long_full() -> np.ndarray:
    """Full attention's logits of the tokens after the prompt."""
    run = Run(session("mask"))
    run.admit(SHORT, 300)
    return full_logits(run.session, run.token[0], 256 + 9)


@pytest.mark.parametrize("lookahead", [1, 2, 64, 256])
def test_no_lookahead_opens_a_gap(lookahead, paged, long_full):
    """An entry is attended in the step that forms it: else logits would differ from those of full
    attention from there on. These share a fresh buffer for the longest lookahead."""
    _compare_lookahead(_with_lookahead(paged, lookahead), long_full)


@pytest.mark.slow
def test_no_lookahead_from_1_to_256_opens_a_gap(paged, long_full):
    for lookahead in range(1, 257):
        _compare_lookahead(_with_lookahead(paged, lookahead), long_full)


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [1, 5, 65])
def test_a_fresh_buffer_of_its_own_size_suffices_a_lookahead(lookahead, long_full):
    _compare_lookahead(session(lookahead=lookahead, own_buffer=True, **EVERYTHING), long_full)


@pytest.mark.slow
def test_a_step_that_could_not_read_fresh_entries_would_be_noticed(monkeypatch, long_full):
    """The gap test itself: without what formed since the boundary, logits are others."""

    def without_fresh(self, ordinal, state, records, table) -> Resident:
        whole = resident(self, ordinal, state, records, table)
        entry = jnp.where(whole.entry < state.base[:, None], whole.entry, -1)
        return dataclasses.replace(whole, entry=entry)

    resident = Level2.resident
    monkeypatch.setattr(Level2, "resident", without_fresh)
    # A buffer of its own size, so that no other session's programs are taken for this one's.
    run = alone(session(lookahead=62, own_buffer=True, **EVERYTHING), SHORT, STEPS)
    differs = np.abs(run.scores(0)[1:] - long_full[:STEPS]).max(axis=1) > 1e-4
    # The window is 8 tokens: an entry that formed since is missed at the latest when its tokens
    # have left it.
    assert differs[2 * CONFIG.sliding_window :].any()
