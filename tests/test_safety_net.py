"""The safety net: misses are counted, missed attention mass is estimated, and rows grow for it.

Planted states (`planted_states`) say what is true, so that estimates can be held against it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.lsa import resident_set
from lsa_jax.lsa.config import LsaConfig, ResidentPath
from lsa_jax.lsa.missed import Misses, missed, native_share
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.pool_map import Table
from lsa_jax.lsa.resident_set import Rescue, Selection
from lsa_jax.lsa.rows import Event, Row
from lsa_jax.lsa.session import LsaSession
from tests import lsa_models, planted_states
from tests.lsa_models import Run
from tests.planted_states import CACHE, CONFIG, PAGES, TARGETS, Requests, model, plan

pytestmark = pytest.mark.usefixtures("compiled_quickly")

BUDGET = 12  # pages a row, of PAGES
BOUND = 0.4  # of missed mass
ORDINARY, DENSE = 300, 60
ROOM = (PAGES + 2) * CACHE.page_entries  # entries that a row's arrays have room for


def budgeted(want: Requests) -> np.ndarray:
    """The pages [B, BUDGET] that level 1's scores put first, ascending."""
    pages = want.likely[:, : PAGES * CACHE.page_entries].reshape(len(want.likely), PAGES, -1)
    return np.sort(np.argsort(-pages.sum(2), axis=1)[:, :BUDGET], axis=1)


def readable(pages: np.ndarray) -> np.ndarray:
    """Entries [B, N] of these pages and of the page in formation."""
    whole = np.zeros((len(pages), PAGES + 1), bool)
    np.put_along_axis(whole, pages, True, axis=1)
    whole[:, PAGES] = True
    entries = PAGES * CACHE.page_entries + planted_states.FRESH
    return np.repeat(whole, CACHE.page_entries, axis=1)[:, :entries]


@jax.jit
def _missed(model, state, table) -> Misses:
    return missed(plan(), model, state, jnp.zeros((1, *plan().layout.shape), jnp.uint8), table)


def estimate(want: Requests, pages: np.ndarray, rng: np.random.Generator) -> Misses:
    table = jnp.asarray(pages, jnp.int32)
    return _missed(model(), planted_states.planted(want, rng), Table(table, table))


def native_picks(scores: np.ndarray) -> np.ndarray:
    picks = np.zeros(scores.shape, bool)
    order = np.argsort(-scores, axis=-1, kind="stable")[..., : CONFIG.index_topk]
    np.put_along_axis(picks, order, True, axis=-1)
    return picks


def expected(want: Requests, may: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, estimates, and shares of the native top-k alone, in float64 from what was planted."""
    counts, masses, shares = [], [], []
    for i in TARGETS:
        scores = want.relevance[i]
        picks = native_picks(scores)
        taken = native_picks(np.where(may, scores, -np.inf))
        weight = np.exp(scores)
        lost, kept = (np.where(p, weight, 0).sum(1) for p in (picks & ~may, picks & may))
        sink = np.exp(np.asarray(model().layers[i].attn.sink_logit[...], np.float64))
        inside = np.where(taken[:, None], np.exp(want.logits[i]), 0).sum(2)
        odds = inside / (np.exp(want.window[i]).sum(2) + sink)
        rest = np.where(taken, weight, 0).sum(1)[:, None] / odds
        counts.append((picks & ~may).sum(1))
        masses.append((lost[:, None] / ((lost + kept)[:, None] + rest)).mean(1))
        shares.append(lost / (lost + kept))
    return np.sum(counts, axis=0), np.mean(masses, axis=0), np.mean(shares, axis=0)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    ranks = [np.argsort(np.argsort(x)) for x in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@functools.cache
def sweep(local: float, sharpness: float = 1) -> dict[str, np.ndarray]:
    """256 requests from one page that matters to most of them, weakly and strongly."""
    rng = np.random.default_rng(0)
    count, strength = rng.integers(1, PAGES - 3, 256), rng.uniform(2, 7, 256)
    want = planted_states.requests(rng, count, strength=strength, local=local, sharpness=sharpness)
    pages = budgeted(want)
    got = estimate(want, pages, rng)
    counts, masses, shares = expected(want, readable(pages))
    return {
        "true": planted_states.true_mass(want, readable(pages)),
        "mass": np.asarray(got.mass),
        "entries": np.asarray(got.entries),
        "expected_mass": masses,
        "expected_entries": counts,
        "share": shares,
    }


def test_misses_are_those_of_an_independent_count() -> None:
    got = sweep(1.0)
    np.testing.assert_array_equal(got["entries"], got["expected_entries"])
    assert got["entries"].min() < 10 < 24 < got["entries"].max(), "the sweep has little and much"
    # float32 against float64, through keys whose planted scores are right within 3e-6.
    np.testing.assert_allclose(got["mass"], got["expected_mass"], atol=2e-5)


@pytest.mark.parametrize("local", [1.0, 4.0])
def test_the_estimate_tracks_the_true_missed_mass(local: float) -> None:
    """At 4, the window has most of the attention in half of the requests."""
    got = sweep(local)
    error = got["mass"] - got["true"]
    assert got["true"].min() < 0.1 and got["true"].max() > 0.6
    # What remains is sampling: two layers stand for four, which differ in a fifth of their pages.
    # Seen: rank correlation 0.962 and 0.982, mean error 0.040 and 0.028, bias -0.007 and -0.004.
    assert spearman(got["mass"], got["true"]) > 0.94
    assert np.abs(error).mean() < 0.05
    assert abs(error.mean()) < 0.015


def test_the_share_of_the_top_k_alone_would_not_track_it_where_the_window_matters() -> None:
    got = sweep(4.0)
    assert spearman(got["share"], got["true"]) < 0.85 < spearman(got["mass"], got["true"])
    assert (got["share"] - got["true"]).mean() > 0.1


@pytest.mark.parametrize("sharpness", [0.5, 1.5])
def test_an_indexer_of_another_sharpness_than_attention_still_ranks_requests(sharpness) -> None:
    got = sweep(4.0, sharpness)
    assert spearman(got["mass"], got["true"]) > 0.9


def test_nothing_readable_counts_as_all_missed_and_no_entries_as_nothing_missed() -> None:
    rng = np.random.default_rng(2)
    want = planted_states.requests(rng, np.full(4, 3), strength=np.full(4, 5.0))
    state = planted_states.planted(want, rng)
    nothing = jnp.full((4, BUDGET), -1, jnp.int32)
    empty = state.lengths.at[0].set(3)  # not yet one entry
    full = state.base.at[1].set(PAGES * CACHE.page_entries + planted_states.FRESH)
    state = planted_states.with_lengths(state, empty, full)
    got = _missed(model(), state, Table(nothing, nothing))
    assert got.mass[0] == 0 and got.entries[0] == 0
    assert got.mass[1] == 1 and got.entries[1] == len(TARGETS) * CONFIG.index_topk
    assert (np.asarray(got.mass)[2:] < 1).all() and (np.asarray(got.entries)[2:] > 0).all()


def test_native_shares_of_pages_are_those_of_an_independent_count() -> None:
    rng = np.random.default_rng(3)
    want = planted_states.requests(rng, np.array([1, 20]), strength=np.array([5.0, 5.0]))
    state = planted_states.planted(want, rng)
    share = jax.jit(lambda model, state: native_share(plan(), model, state))
    got = np.asarray(share(model(), state))
    shares = []
    for i in TARGETS:
        weight = np.where(native_picks(want.relevance[i]), np.exp(want.relevance[i]), 0)
        weight = np.pad(weight, ((0, 0), (0, ROOM - weight.shape[1])))
        shares.append(weight.reshape(2, -1, CACHE.page_entries).sum(2) / weight.sum(1)[:, None])
    np.testing.assert_allclose(got, np.mean(shares, axis=0), atol=2e-5)


# Growing


def boundary(want: Requests, fallback: float | None, rng: np.random.Generator) -> list[Event]:
    """What a boundary of all requests at once makes of them, with level 1's scores as planted."""
    lsa = LsaConfig(
        targets=TARGETS,
        arm="snapkv",  # takes its scores from outside the state
        lookahead=8,
        policy=PolicyConfig(recency=0, recall_pages=BUDGET),
        resident_path="mask",
        fallback=fallback,
    )
    rows, capacity = len(want.likely), ROOM * CONFIG.csa_ratio
    batch = LsaSession(model(), CACHE, lsa, rows=rows, capacity=capacity).batch
    batch.state = planted_states.planted(want, rng)
    length = int(batch.state.lengths[0])
    batch.rows = [Row(owner=b, limit=length, tokens=[0] * length) for b in range(rows)]
    seen = np.pad(want.likely, ((0, 0), (0, ROOM - want.likely.shape[1])))
    batch.seen = jnp.asarray(seen, jnp.float32)
    batch.boundary(np.ones(rows, bool))
    return batch.events


def mixed(rng: np.random.Generator) -> Requests:
    """Ordinary requests, to which a few pages matter that level 1 mostly finds, then dense ones,
    to which two to three times as many matter as the budget holds, all about equally."""
    few, many = rng.integers(1, 7, ORDINARY), rng.integers(2 * BUDGET, 3 * BUDGET, DENSE)
    strength = rng.uniform(4, 7, ORDINARY + DENSE)
    ordinary = planted_states.requests(
        rng, few, strength=strength[:ORDINARY], agreement=0.95, misjudged=0.02
    )
    dense = planted_states.requests(rng, many, strength=strength[ORDINARY:])
    return ordinary.joined(dense)


@functools.cache
def grown() -> tuple[Requests, list[Event], list[Event]]:
    """The mixed requests, and their events without a fallback and with one."""
    rng = np.random.default_rng(1)
    want = mixed(rng)
    return want, boundary(want, None, rng), boundary(want, BOUND, rng)


def _true(want: Requests, events: list[Event]) -> np.ndarray:
    pages = [np.array(event.pages) for event in events]
    width = max(map(len, pages))
    held = np.array([np.pad(p, (0, width - len(p)), mode="edge") for p in pages])
    return planted_states.true_mass(want, readable(held))


@pytest.mark.slow
def test_the_fallback_fires_on_dense_requests_and_on_at_most_a_twentieth_of_ordinary_ones() -> None:
    _, _, events = grown()
    fired = np.array([event.growth > 0 for event in events])
    assert fired[ORDINARY:].all()
    assert fired[:ORDINARY].mean() <= 0.05  # seen: 0.02
    assert all(event.lacking_mass <= BOUND for event in events)


def test_what_grew_misses_less_in_truth_and_what_did_not_is_as_it_was() -> None:
    want, without, events = grown()
    before, after = _true(want, without), _true(want, events)
    assert before[ORDINARY:].mean() > 0.6
    # The estimate's bound, and what the two layers that are not asked still miss.
    assert after[ORDINARY:].mean() < BOUND
    for old, new in zip(without, events, strict=True):
        assert set(old.pages) <= set(new.pages)
        assert new.growth or old.pages == new.pages


def test_bytes_during_a_fallback_are_reported() -> None:
    _, without, events = grown()
    size = plan().layout.nbytes
    for old, new in zip(without, events, strict=True):
        assert len(old.pages) == BUDGET and old.above == old.growth == 0
        assert old.lacking_mass == pytest.approx(new.lacking_mass, abs=1e-6) or new.growth
        assert new.above == len(new.pages) - BUDGET <= (BUDGET << new.growth) - BUDGET
        assert new.resident_bytes == size * len(new.pages)
        assert new.allowed == BUDGET * len(events)


def select(rng: np.random.Generator, rescue: Rescue | None, **policy) -> tuple[Selection, dict]:
    """Three rows that compete for ten pages."""
    scores = jnp.asarray(rng.uniform(0, 1, (3, 40)), jnp.float32)
    cfg = PolicyConfig(**{"recency": 4, "threshold": 0.8} | policy)
    asked = {"page_entries": 2, "allowed": 10, "live": jnp.ones(3, bool), "rescue": rescue}
    entries, complete = jnp.array([40, 33, 12]), jnp.array([20, 16, 6])
    return resident_set.select(scores, entries, complete, cfg, **asked), asked


@pytest.mark.parametrize("policy", ["budget", "top", "published"])
def test_a_row_that_is_rescued_takes_nothing_from_the_others(policy: str) -> None:
    extra = {"policy": policy} | ({"recall_pages": 4} if policy == "published" else {})
    for seed in range(20):
        rng = np.random.default_rng(seed)
        share = jnp.asarray(rng.uniform(0, 1, (3, 20)) * (rng.random((3, 20)) < 0.2), jnp.float32)
        pages = jnp.asarray(rng.integers(0, 9, 3).clip(3), jnp.int32).at[1].set(0)
        plain, _ = select(np.random.default_rng(seed), None, **extra)
        got, _ = select(np.random.default_rng(seed), Rescue(pages, share), **extra)
        assert not (plain.pages & ~got.pages).any()
        np.testing.assert_array_equal(got.pages[1], plain.pages[1])
        more = np.asarray(got.pages & ~plain.pages)
        np.testing.assert_array_equal(more.sum(1), got.above)
        room = np.array([20, 16, 6]) - np.asarray(plain.pages & (plain.page_rank < 1e9)).sum(1)
        np.testing.assert_array_equal(got.above, np.minimum(pages, room))
        for b in (0, 2):  # by native share first, whatever the policy wants
            left = np.asarray(~plain.pages)[b, : (20, 16, 6)[b]]
            native = np.where(left, np.asarray(share)[b, : (20, 16, 6)[b]], 0)
            best = [p for p in np.argsort(-native)[: int(pages[b])] if native[p] > 0]
            assert more[b, best].all()


# With pages on the host


def _pair(path: ResidentPath, fallback: float | None, **sizes) -> Run:
    """A row of 20 pages, and one beside it whose 2 pages always fit in what rows may have (4)."""
    policy = PolicyConfig(threshold=1e-6, recency=4, recall_pages=4)
    of = lsa_models.session(path, rows=2, policy=policy, budget=None, fallback=fallback, **sizes)
    run = Run(of)
    run.admit(lsa_models.prompt(22, seed=1), 30)
    run.admit(lsa_models.prompt(165, seed=2), 30)
    run.decode(20)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("path", ["paged", "gathered"])
def test_a_row_that_misses_too_much_grows_before_its_first_token_and_alone(
    path: ResidentPath,
) -> None:
    bound = 1e-9
    run, plain = _pair(path, bound), _pair(path, None)
    batch, size = run.session.batch, run.session.batch.plan.layout.nbytes
    small, *_ = [event for event in batch.events if event.row == 0]
    large = [event for event in batch.events if event.row == 1]
    assert small.growth == small.above == 0 and small.lacking_entries == 0
    assert large[0].growth >= 1 and large[0].tokens == 165, "at admission"
    for event in large:
        assert event.lacking_mass <= bound or len(event.pages) == event.complete
        assert event.above == len(event.pages) - 4 > 0
        assert event.resident_bytes == len(event.pages) * size <= event.pool_bytes
        assert event.pool_bytes > small.pool_bytes
    missing = [e for e in plain.session.batch.events if e.row == 1 and e.lacking_entries]
    assert missing, "without a fallback the row lacks entries"
    # Rows beside each other share programs, whose sums depend on the table's width.
    np.testing.assert_allclose(run.scores(0), plain.scores(0), atol=1e-5)
    run.session.finish(1)
    assert batch.tiers.records.nbytes == small.pool_bytes, "what grew goes back"
    run.decode(4, only=[0])
    plain.session.finish(1)
    plain.decode(4, only=[0])
    np.testing.assert_allclose(run.scores(0), plain.scores(0), atol=1e-5)


@pytest.mark.slow
def test_misses_are_the_same_wherever_pages_are() -> None:
    noted = []
    for path in ("mask", "paged", "gathered"):
        events = _pair(path, None).session.batch.events
        noted.append([(e.missed_entries, e.lacking_entries, e.above) for e in events])
        masses = [(e.missed_mass, e.lacking_mass) for e in events]
        first = masses if path == "mask" else first
        np.testing.assert_allclose(masses, first, atol=1e-5)
    assert noted[0] == noted[1] == noted[2]
    assert any(missed for missed, _, _ in noted[0]) and any(lack for _, lack, _ in noted[0])
