"""The arms: scores that are what their names say, and the same budget and accounting for all."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache.state import init_state
from lsa_jax.config import ConfigError
from lsa_jax.lsa import arms
from lsa_jax.lsa.config import SIMULATED, Arm, LsaConfig, ResidentPath
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.prefill import OBSERVED
from lsa_jax.lsa.rows import Event, as_one
from lsa_jax.lsa.session import LsaSession
from tests import lsa_models
from tests.lsa_models import CAPACITY, CONFIG, PAGE_ENTRIES, PAGE_TOKENS, TARGETS, Run

pytestmark = pytest.mark.usefixtures("compiled_quickly")

OBSERVERS: tuple[Arm, ...] = ("lagged", "snapkv", "oracle")  # they look at what is attended
UNTRAINED: tuple[Arm, ...] = ("recency", "random", "lagged", "quest", "snapkv", "oracle")
LOOKAHEAD, LENGTH, STEPS = 4, 150, 14
RECENT = 4  # entries: two pages
QUOTA = 9  # pages of 18
CSA = tuple(i for i, kind in enumerate(CONFIG.layer_types) if kind == "csa")
_DONORS: dict[ResidentPath, LsaSession] = {}


class Compiled(dict[Any, Any]):
    """Programs by arm and name: all but the choice is the same for all arms."""

    _all: ClassVar[dict[Any, Any]] = {}

    def __init__(self, *of: Any):
        self.of = of

    def _at(self, at: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.of[0], self.of if at[0] == "choose" else None, at)

    def __contains__(self, at: Any) -> bool:
        return self._at(at) in self._all

    def __getitem__(self, at: Any) -> Any:
        return self._all[self._at(at)]

    def __setitem__(self, at: Any, program: Any) -> None:
        self._all[self._at(at)] = program


def session(arm: Arm, path: ResidentPath = "mask", quota: int = QUOTA, **sizes) -> LsaSession:
    """A session of an arm. Arms share a plan and, but for the choice, what was compiled for it."""
    if path == "mask" and path not in _DONORS and arm != "lagged":
        session("lagged")  # its plan counts votes
    lsa = LsaConfig(
        targets=TARGETS,
        arm=arm,
        lookahead=LOOKAHEAD,
        policy=PolicyConfig(recency=RECENT, recall_pages=quota),
        resident_path=path,
        seed=sizes.pop("seed", 0),
    )
    made = LsaSession(
        lsa_models.model(),
        lsa_models.cache(),
        lsa,
        capacity=sizes.pop("capacity", CAPACITY),
        prefill_chunk=16,
        **sizes,
    )
    donor = _DONORS.setdefault(path, made).batch
    made.batch.plan = made.batch.tiers.plan = made.batch.programs.plan = donor.plan
    made.batch.programs._compiled = Compiled(path, arm, lsa.seed)
    made.batch.state = made.batch.empty(made.capacity)
    return made


def inputs(tokens: list[int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Per CSA layer the attention input [T, D] of each token under full attention, and the index
    keys [N, K], out of one chunk."""
    model = lsa_models.model()
    state = init_state(CONFIG, lsa_models.cache(), batch=1, capacity=CAPACITY, dtype=jnp.float32)
    ids = np.zeros((1, LENGTH + STEPS), np.int32)  # one shape for all
    ids[0, : len(tokens)] = tokens
    ids, count = jnp.asarray(ids), jnp.full((1,), len(tokens), jnp.int32)
    streams, start, xs, keys = model.streams(ids), jnp.zeros((1,), jnp.int32), [], []
    for i, (block, layer) in enumerate(zip(model.layers, state.layers, strict=True)):
        streams, layer, x = _attend(block, streams, layer, start, count)
        streams = _mix(block, streams, ids)
        if i in CSA:
            xs.append(np.asarray(x)[0])
            values = np.asarray(layer.index_keys.values)
            keys.append(values.reshape(-1, values.shape[-1]).astype(np.float64))
    return xs, keys


_attend = jax.jit(lambda block, *args: block.attend(*args))
_mix = jax.jit(lambda block, *args: block.mix(*args))


def votes(tokens: list[int], last: int) -> np.ndarray:
    """How often the native top-k of all CSA layers takes each entry, for the last tokens [N]."""
    xs, keys = inputs(tokens)
    out = np.zeros(len(keys[0]))
    at = np.arange(len(tokens) - last, len(tokens))
    for i, x, k in zip(CSA, xs, keys, strict=True):
        attn = lsa_models.model().layers[i].attn
        x = jnp.asarray(x)[None, at]
        q, w = attn.indexer.queries(attn.latent_query(x), x, jnp.asarray(at)[None])
        dots = np.maximum(np.einsum("thk,nk->thn", np.asarray(q, np.float64)[0], k), 0)
        scores = np.einsum("th,thn->tn", np.asarray(w, np.float64)[0], dots)
        for position, row in zip(at, scores, strict=True):
            row[(position + 1) // CONFIG.csa_ratio :] = -np.inf
            best = np.argsort(-row, kind="stable")[: CONFIG.index_topk]
            out[best[row[best] > -np.inf]] += 1
    return out


def chosen(count: np.ndarray, complete: int, quota: int = QUOTA) -> tuple[int, ...]:
    """The pages with the most votes, newer ones first among equals; recent ones always."""
    pages = count.reshape(-1, PAGE_ENTRIES).sum(1)[:complete]
    entries = LENGTH // CONFIG.csa_ratio
    forced = np.arange(complete) >= (entries - RECENT) // PAGE_ENTRIES
    order = np.lexsort((-np.arange(complete), -pages, ~forced))
    return tuple(sorted(order[:quota].tolist()))


@functools.cache
def ran(arm: Arm) -> tuple[Run, list[Event]]:
    run = Run(session(arm))
    run.admit(lsa_models.prompt(LENGTH), STEPS + 1)
    run.decode(STEPS)
    return run, run.session.batch.events


@pytest.mark.parametrize(
    "arm", [pytest.param(a, marks=[pytest.mark.slow] * (a in OBSERVERS)) for a in UNTRAINED]
)
def test_every_arm_runs_and_has_the_same_pages_to_spend(arm: Arm) -> None:
    run, events = ran(arm)
    assert len(run.drawn(0)) == STEPS + 1
    boundaries = range(LENGTH, LENGTH + STEPS, LOOKAHEAD)  # the first is the admission
    assert [event.tokens for event in events] == [*boundaries]
    assert not events[0].read and all(event.read for event in events[1:])
    size = run.session.batch.plan.layout.nbytes
    for event in events:
        assert event.allowed == QUOTA < event.complete
        assert len(event.pages) == QUOTA and event.resident_bytes == QUOTA * size
        assert {event.complete - 1, event.complete - 2} <= set(event.pages), "recent pages"


def test_a_boundary_fired_again_is_noted_once_with_what_the_cycle_before_it_read() -> None:
    nothing = {field.name: 0 for field in dataclasses.fields(Event)} | {"read": (), "pages": ()}

    def event(owner: int, tokens: int, **more: Any) -> Event:
        return Event(**nothing | {"owner": owner, "tokens": tokens} | more)

    ended = {"read": (2,), "missed_entries": 3, "missed_mass": 0.5}
    noted = [event(0, 8), event(0, 12, **ended, pages=(1,), recalled=4, seconds=1.0), event(1, 12)]
    again = [event(0, 12, pages=(5,), recalled=2, seconds=0.5, lacking_mass=0.1), event(1, 14)]
    merged = event(0, 12, **ended, pages=(5,), recalled=6, seconds=1.5, lacking_mass=0.1)
    assert as_one(noted, again) == [noted[0], merged, noted[2], again[1]]
    assert as_one([], again) == again and as_one(noted, []) == noted


@pytest.mark.slow
def test_arms_differ_in_what_they_choose() -> None:
    sets = {arm: [event.pages for event in ran(arm)[1]][-1] for arm in UNTRAINED}
    assert len(set(sets.values())) >= len(UNTRAINED) - 1, sets


@pytest.mark.slow
@pytest.mark.parametrize("path", ["paged", "gathered"])
@pytest.mark.parametrize("arm", [arm for arm in UNTRAINED if arm not in SIMULATED])
def test_arms_that_are_not_simulated_are_the_same_with_pages_on_the_host(arm, path) -> None:
    run, events = ran(arm)
    other = Run(session(arm, path))
    other.admit(lsa_models.prompt(LENGTH), STEPS + 1)
    other.decode(STEPS)
    np.testing.assert_array_equal(run.drawn(0), other.drawn(0))
    got = other.session.batch.events
    assert [event.pages for event in got] == [event.pages for event in events]
    assert [event.missed_entries for event in got] == [event.missed_entries for event in events]
    pool = other.session.batch.tiers.records.nbytes
    assert pool == QUOTA * other.session.batch.plan.layout.nbytes


@pytest.mark.parametrize("arm", SIMULATED)
@pytest.mark.parametrize("path", ["paged", "gathered"])
def test_arms_that_score_all_history_are_simulated_only(arm: Arm, path: ResidentPath) -> None:
    with pytest.raises(ConfigError, match=f"resident_path must be mask with attention {arm}"):
        LsaConfig(targets=TARGETS, arm=arm, resident_path=path)
    assert LsaConfig(targets=TARGETS, arm=arm, resident_path="mask").simulated


def test_recency_takes_the_newest_complete_pages() -> None:
    for event in ran("recency")[1]:
        assert event.pages == tuple(range(event.complete - QUOTA, event.complete))
        assert event.complete == event.tokens // PAGE_TOKENS


def test_random_draws_depend_on_the_seed_and_the_page_alone() -> None:
    draws = np.asarray(arms._draws(7, 40))
    np.testing.assert_array_equal(draws[:10], np.asarray(arms._draws(7, 10)))
    assert not np.isclose(draws, np.asarray(arms._draws(8, 40))).any()
    assert len(np.unique(draws)) == 40 and draws.min() >= 0 and draws.max() < 1


@pytest.mark.slow
def test_a_random_set_is_the_same_whoever_is_beside_it() -> None:
    alone = ran("random")[1]
    many = session("random", rows=2)
    many.admit(lsa_models.prompt(LENGTH // 2, seed=5), max_new_tokens=1)
    many.admit(lsa_models.prompt(LENGTH, seed=6), max_new_tokens=1)
    assert [event.pages for event in many.batch.events if event.row] == [alone[0].pages]
    other = session("random", seed=1)
    other.admit(lsa_models.prompt(LENGTH), max_new_tokens=1)
    assert other.batch.events[0].pages != alone[0].pages


@pytest.mark.parametrize("sign", ["mixed", "positive", "negative"])
def test_quests_bound_holds_for_every_entry_of_every_page(sign: str) -> None:
    rng = np.random.default_rng(4)
    batch, heads, dim, pages, per_page = 3, 8, 16, 12, 5
    q = rng.normal(size=(batch, heads, dim))
    w = rng.normal(size=(batch, heads))
    w = {"mixed": w, "positive": np.abs(w), "negative": -np.abs(w)}[sign]
    keys = rng.normal(size=(batch, pages * per_page, dim)) + rng.normal(size=dim)
    count = np.array([60, 33, 1])  # entries that exist: the last page is partial, or none is there
    exists = np.arange(pages * per_page) < count[:, None]
    low, high, some = arms._extrema(jnp.asarray(keys), jnp.asarray(exists), per_page)
    bound = np.asarray(arms._bound(jnp.asarray(q), jnp.asarray(w), low, high))
    scores = np.einsum("bh,bhn->bn", w, np.maximum(np.einsum("bhk,bnk->bhn", q, keys), 0))
    best = np.where(exists, scores, -np.inf).reshape(batch, pages, per_page).max(2)
    there = best > -np.inf
    np.testing.assert_array_equal(there, some)
    # Equal where a page has one entry; float32 rounds either way.
    assert (bound[there] >= best[there] - 1e-4).all()
    np.testing.assert_allclose(bound[2, 0], best[2, 0], atol=1e-4)
    assert (bound[there] > best[there] + 1e-2).mean() > 0.5, "a bound of many is above them"


@pytest.mark.slow
def test_quest_reads_the_target_layers_own_keys_and_queries() -> None:
    run = Run(session("quest"))
    run.admit(lsa_models.prompt(LENGTH), 1)
    batch, state = run.session.batch, run.session.batch.state
    got = np.asarray(arms.scores(run.session.lsa, batch.plan, batch.model, None, state, None))[0]
    i = CSA[TARGETS[0]]
    attn, x = batch.model.layers[i].attn, state.last_hidden(0)[:, None]
    q, w = attn.indexer.queries(attn.latent_query(x), x, state.lengths[:, None] - 1)
    keys = np.asarray(state.layers[i].index_keys.values)[0].astype(np.float64)
    entries = LENGTH // CONFIG.csa_ratio
    pages = -(-entries // PAGE_ENTRIES)
    want = []
    for page in range(pages):
        there = keys[page, : entries - page * PAGE_ENTRIES]
        low, high = there.min(0), there.max(0)
        corner = np.asarray(q, np.float64)[0, 0], np.asarray(w, np.float64)[0, 0]
        most = [max(0, np.where(a > 0, a * high, a * low).sum()) for a in corner[0]]
        least = [max(0, np.where(a > 0, a * low, a * high).sum()) for a in corner[0]]
        want.append(
            sum(b * (m if b > 0 else n) for b, m, n in zip(corner[1], most, least, strict=True))
        )
    want = (np.array(want) - np.mean(want)) / np.std(want)
    np.testing.assert_allclose(got[:pages], want, atol=1e-4)
    assert not got[pages:].any()


@pytest.mark.slow
@pytest.mark.parametrize("length", [LENGTH, 7])  # chunks of 16: the last one has 6, or all 7
def test_snapkvs_votes_are_the_native_picks_of_the_prompts_last_tokens(length: int) -> None:
    ids = lsa_models.prompt(length)
    of = session("snapkv")
    of.admit(ids, max_new_tokens=1)
    want = votes(ids, min(OBSERVED, length))
    assert of.batch.seen is not None
    np.testing.assert_array_equal(np.asarray(of.batch.seen)[0], want)
    assert want.max() > 1 or length == 7
    if length == LENGTH:
        assert of.batch.events[0].pages == chosen(want, LENGTH // PAGE_TOKENS)


def test_snapkvs_set_keeps_what_the_prompt_chose() -> None:
    first, *later = ran("snapkv")[1]
    old = range(first.complete - RECENT)  # pages that are never forced by recency
    for event in later:
        assert set(event.pages) & set(old) <= set(first.pages)


@pytest.mark.slow
def test_laggeds_first_set_is_what_the_prompts_last_tokens_chose() -> None:
    want = votes(lsa_models.prompt(LENGTH), OBSERVED)
    assert ran("lagged")[1][0].pages == chosen(want, LENGTH // PAGE_TOKENS)


@pytest.mark.slow
def test_laggeds_votes_are_the_native_picks_of_the_cycle_so_far() -> None:
    """With everything resident, where full attention says what the layers see."""
    ids, other = lsa_models.prompt(LENGTH), lsa_models.prompt(90, seed=2)
    run = Run(session("lagged", quota=99, rows=2))
    run.admit(ids, 20)
    run.admit(other, 20)
    run.decode(2, only=[1])
    still = np.asarray(run.session.batch.state.votes)[1]
    run.decode(LOOKAHEAD - 1, only=[0])
    got = np.asarray(run.session.batch.state.votes)
    fed = [*ids, *run.drawn(0)[: LOOKAHEAD - 1].tolist()]
    np.testing.assert_array_equal(got[0], votes(fed, LOOKAHEAD - 1))
    np.testing.assert_array_equal(got[1], still)  # row 1 took no step
    np.testing.assert_array_equal(still, votes([*other, *run.drawn(1)[:2].tolist()], 2))
    run.decode(1, only=[0])
    assert not np.asarray(run.session.batch.state.votes)[0].any(), "counted anew after a boundary"


@pytest.mark.slow
def test_the_oracle_with_room_for_what_is_picked_is_full_attention() -> None:
    quota, equal = 14, 0
    for seed in range(3):
        ids, logits = lsa_models.prompt(LENGTH, seed), {}
        for arm in ("oracle", "recency"):
            run = Run(session(arm, quota=quota))
            row = run.admit(ids, LOOKAHEAD + 1)
            if arm == "oracle":
                full = lsa_models.full_logits(run.session, int(run.token[row]), LOOKAHEAD)
            run.decode(LOOKAHEAD)
            assert all(len(e.pages) == quota < e.complete for e in run.session.batch.events)
            logits[arm] = run.scores(row)[1:]
        fed = [*ids, *np.argmax(full, axis=-1)[: LOOKAHEAD - 1].tolist()]
        fed.insert(LENGTH, int(run.drawn(row)[0]))
        picked = np.flatnonzero(votes(fed, LOOKAHEAD).reshape(-1, PAGE_ENTRIES).sum(1))
        if len({*picked, 16, 17}) <= quota:  # recent pages have their place whatever is picked
            # The mask path runs full attention's own operations on the same state.
            np.testing.assert_allclose(logits["oracle"], full, atol=1e-5)
            assert np.abs(logits["recency"] - full).max() > 1e-3, "it is not what recency reads"
            equal += 1
    assert equal >= 1
