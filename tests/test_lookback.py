"""A fire may ask what the last tokens need, not the last one alone: LSA's look-back."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa import indexer_config, prefill
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig, ResidentPath
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.pool_map import Table
from lsa_jax.lsa.session import LsaSession
from tests.lsa_models import ALL, CAPACITY, CONFIG, TARGETS, Run, cache, indexer, model, prompt

LOOKBACK, CHUNK = 5, 16
IDS = prompt(38)
WIDE = MemoryIndexer(
    dataclasses.replace(indexer().cfg, lookback=LOOKBACK),
    indexer().leaves(),
)


def plan(lookback: int) -> Level2:
    options = {"lookahead": 8, "path": "mask", "lookback": lookback}
    return Level2(CONFIG, cache(), targets=TARGETS, **options)


def read(parts: list[int], lookback: int = LOOKBACK) -> LsaState:
    """The state after the first tokens of IDS, read in prefill chunks of so many."""
    of = plan(lookback)
    state, at = of.start(batch=1, capacity=CAPACITY, dtype=model().dtype), 0
    for size in parts:
        ids = np.zeros((1, CHUNK), np.int32)
        ids[0, :size] = IDS[at : at + size]
        _, state, _ = prefill.run_chunk(of, model(), state, jnp.asarray(ids), size, None)
        at += size
    return state


def decoded(state: LsaState, tokens: list[int], of: Level2) -> LsaState:
    """The state after more tokens, fed one by one."""
    everything = jnp.arange(of.pages_of(state), dtype=jnp.int32)[None]
    for token in tokens:
        args = (Table(everything, everything), jnp.asarray([token]), jnp.ones(1, bool))
        _, state = of.step(model(), state, jnp.zeros((1, 1, 128), jnp.uint8), *args)
    return state


def test_shapes_that_are_equal_share_compiled_prefill(monkeypatch):
    traced, tail = [], prefill._tail
    monkeypatch.setattr(prefill, "_tail", lambda *args: traced.append(None) or tail(*args))
    want = read([CHUNK, 4], lookback=3)  # of no other test
    first = len(traced)
    again = read([CHUNK, 4], lookback=3)
    assert first and len(traced) == first
    np.testing.assert_array_equal(again.hidden, want.hidden)
    read([CHUNK], lookback=2)
    assert len(traced) == 2 * first


@functools.cache
def input_of(at: int) -> np.ndarray:
    """The attention input of the target layer at a token of IDS, from a state that has no other."""
    parts = [CHUNK] * ((at + 1) // CHUNK) + [(at + 1) % CHUNK] * ((at + 1) % CHUNK > 0)
    return np.asarray(read(parts, lookback=1).last_hidden(0)[0])


def inputs(first: int, end: int) -> np.ndarray:
    """Those of the tokens first .. end - 1."""
    return np.stack([input_of(at) for at in range(first, end)])


@pytest.mark.parametrize("parts", [[16, 16, 6], [16, 1, 2, 16, 3], [1, 1, 1]])
def test_a_state_keeps_the_inputs_of_the_last_tokens_however_they_were_read(parts):
    done = sum(parts)
    state = read(parts)
    assert state.hidden.shape == (1, 1, LOOKBACK, CONFIG.hidden_size)
    there = min(LOOKBACK, done)
    got = np.asarray(state.hidden[0, 0])
    np.testing.assert_allclose(got[-there:], inputs(done - there, done), atol=2e-5)
    assert not got[: LOOKBACK - there].any()


def test_decoded_tokens_follow_those_that_were_prefilled():
    state = decoded(read([16, 16]), IDS[32:35], plan(LOOKBACK))
    np.testing.assert_allclose(state.hidden[0, 0], inputs(30, 35), atol=2e-5)


def test_a_row_that_rests_keeps_its_tokens():
    before = read([16, 16])
    args = (Table(*[jnp.zeros((1, 1), jnp.int32)] * 2), jnp.asarray([3]), jnp.zeros(1, bool))
    _, after = plan(LOOKBACK).step(model(), before, jnp.zeros((1, 1, 128), jnp.uint8), *args)
    np.testing.assert_array_equal(after.hidden, before.hidden)


@pytest.mark.parametrize("position", [0, 2, 37])
def test_a_logit_is_the_highest_of_the_tokens_that_there_are(position):
    state = read([16, 16, 6])
    keys = [state.layers[i].index_keys for i in plan(LOOKBACK).target_layers]
    flat = [jax.tree.map(lambda x: x.reshape(1, -1, *x.shape[3:]), planes) for planes in keys]
    got = WIDE.recent(state.hidden, jnp.asarray([position]), flat, jnp.asarray([7]))
    single = [
        WIDE(state.hidden[:, :, LOOKBACK - 1 - age], jnp.asarray([position - age]), flat)
        for age in range(min(LOOKBACK, position + 1))
    ]
    np.testing.assert_allclose(got, np.max(single, axis=0), atol=1e-5)
    assert (np.max(single, axis=0) > np.asarray(single[0])).any() == (position > 0)


def session(lookback: int, path: ResidentPath) -> LsaSession:
    policy = dataclasses.replace(ALL, recency=0)
    lsa = LsaConfig(
        targets=TARGETS,
        lookahead=16,
        lookback=lookback,
        policy=policy,
        budget=parse_budget("0.6"),
        resident_path=path,
    )
    of = {1: indexer(), LOOKBACK: WIDE}[lookback]
    return LsaSession(model(), cache(), lsa, of, rows=1, capacity=CAPACITY, prefill_chunk=CHUNK)


def test_paths_agree_on_what_is_chosen_and_other_tokens_are_asked():
    chosen = {}
    cases: list[tuple[int, ResidentPath]] = [(LOOKBACK, "paged"), (LOOKBACK, "mask"), (1, "paged")]
    for lookback, path in cases:
        run = Run(session(lookback, path))
        run.admit(prompt(120, seed=3), 20)
        chosen[lookback, path] = [tuple(event.pages) for event in run.session.batch.events]
    assert chosen[LOOKBACK, "paged"] == chosen[LOOKBACK, "mask"] != chosen[1, "paged"]


def test_a_session_asks_as_its_indexer_was_made_to():
    lsa = LsaConfig(targets=TARGETS, lookback=2)
    with pytest.raises(ConfigError, match="must be the indexer's 5, got 2"):
        LsaSession(model(), cache(), lsa, WIDE, rows=1, capacity=CAPACITY)


def test_files_from_before_there_was_a_lookback_have_one_of_1():
    raw = indexer_config.to_json(WIDE.cfg)
    assert indexer_config.from_json(raw) == WIDE.cfg
    del raw["lookback"]
    assert indexer_config.from_json(raw) == indexer().cfg
    with pytest.raises(ConfigError, match=r"indexer\.lookback must be >= 1, got 0"):
        dataclasses.replace(WIDE.cfg, lookback=0)
    with pytest.raises(ConfigError, match=r"indexer.lookback must be <= 512, got 513"):
        dataclasses.replace(WIDE.cfg, lookback=513)
