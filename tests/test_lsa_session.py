"""Sessions: prefill, refusals, turns, growth, fallback, length without end."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.config import ConfigError
from lsa_jax.lsa.host_memory import HostLimitError
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from lsa_jax.sampling import Sampling
from tests.lsa_models import (
    CONFIG,
    KEY,
    PAGE_TOKENS,
    Run,
    alone,
    engine,
    prompt,
    session,
    teacher_forced,
)

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Two compilations of the same sums: other fusions. Measured 8e-7 on logits of about 1.
FUSION = 2e-6


# Prefill


def prefill_difference(length: int, chunk: int) -> float:
    ids = prompt(length, seed=length)
    of = session(chunk=chunk)
    row, got = of.admit(ids, max_new_tokens=0)
    start = engine(chunk=chunk).start(batch=1, capacity=of.capacity)
    want, _ = engine(chunk=chunk).prefill(start, [ids])
    assert of.batch.rows[row].tokens == ids
    assert len(of.batch.tiers.store.rows(of.batch.rows[row].owner)) == length // PAGE_TOKENS
    return float(np.abs(np.asarray(got) - np.asarray(want)[0]).max())


@pytest.mark.parametrize("length", [1, 3, 16, 17, 77])
def test_layerwise_prefill_is_any_other_prefill(length):
    assert prefill_difference(length, 16) <= FUSION


AROUND = sorted({at + d for at in (4, 8, 16, 32, 64, 96, 128) for d in (-1, 0, 1)} | {2, 200})


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [16, 32, 64])
def test_layerwise_prefill_of_any_length_and_chunk(chunk):
    worst = {length: prefill_difference(length, chunk) for length in AROUND}
    assert max(worst.values()) <= FUSION, worst


@pytest.mark.slow
@pytest.mark.parametrize("length", [5, 31, 32, 33, 61])
def test_decoding_after_it_is_teacher_forced_full_attention(length):
    ids = prompt(length, seed=length)
    run = alone(session(lookahead=16), ids, 100)
    want = teacher_forced(ids, run.drawn(0))
    # Errors of 1e-6 pass through a hundred steps of entries and keys.
    np.testing.assert_allclose(run.scores(0), want, atol=2e-5)


# Refusals


def test_requests_that_do_not_fit_are_refused_by_name():
    of = session(rows=1)
    for ids, new in (([], 4), (prompt(500), 13), (prompt(513), 0)):
        with pytest.raises(ConfigError, match=r"must be 1\.\.capacity=512"):
            of.admit(ids, max_new_tokens=new)
    with pytest.raises(ConfigError, match="live request"):
        of.extend(0, [1], max_new_tokens=1)
    run = Run(of)
    run.admit(prompt(20), 10)
    with pytest.raises(ConfigError, match="all 1 are live"):
        of.admit(prompt(20), max_new_tokens=1)
    with pytest.raises(ConfigError, match=r"must be 1\.\.capacity=512"):
        of.extend(0, prompt(490), max_new_tokens=10)
    run.decode(5)
    assert np.isfinite(run.scores(0)).all()


def test_a_request_cannot_be_decoded_past_what_it_was_admitted_for():
    """Entries past the capacity would be dropped, and pages past the reservation have no room."""
    run = Run(session())
    run.admit(prompt(45), 10)
    run.decode(10)
    assert len(run.session.batch.rows[0].tokens) == 55
    with pytest.raises(ConfigError, match="max_new_tokens"):
        run.decode(1)
    assert len(run.session.batch.rows[0].tokens) == 55


def test_a_full_host_store_refuses_and_leaves_others_alone():
    want = alone(session(), prompt(45), 30)
    size = session().batch.plan.layout.nbytes
    of = session(rows=2, host_limit=12 * size)
    run = Run(of)
    run.admit(prompt(45), 31)  # 76 tokens: 9 pages
    run.decode(10)
    before = of.batch.tiers.store.stats()
    with pytest.raises(HostLimitError) as refused:
        of.admit(prompt(30, seed=9), max_new_tokens=10)
    assert (refused.value.needed, refused.value.available) == (5 * size, 3 * size)
    with pytest.raises(HostLimitError) as refused:
        of.extend(0, prompt(40), max_new_tokens=40)  # 55 + 40 + 40 tokens: 16 pages
    assert refused.value.needed > refused.value.available
    after = dataclasses.replace(of.batch.tiers.store.stats(), hits=before.hits)
    assert after == before and of.batch.rows[1] is None
    run.decode(20)
    np.testing.assert_allclose(run.scores(0), want.scores(0), atol=1e-5)
    other = of.admit(prompt(20, seed=9), max_new_tokens=4)[0]  # what fits is taken
    assert len(of.batch.tiers.store.rows(of.batch.rows[other].owner)) == 2


def test_nan_scores_of_one_row_are_an_error_and_leave_others_alive():
    want = alone(session(), prompt(45), 40)
    of = session(rows=2)
    run = Run(of)
    run.admit(prompt(45), 60)
    bad = run.admit(prompt(45, seed=5), 60)
    run.decode(4)
    layer = CONFIG.layer_types.index("csa", 1)
    keys = of.batch.state.layers[layer].index_keys
    poisoned = codec.DensePlanes(keys.values.at[bad, 0].set(jnp.nan))
    layers = list(of.batch.state.layers)
    layers[layer] = dataclasses.replace(layers[layer], index_keys=poisoned)
    of.batch.state = dataclasses.replace(of.batch.state, layers=tuple(layers))
    with pytest.raises(ConfigError, match=f"row {bad}: .*must be numbers, got NaN"):
        run.decode(20)
    of.cancel(bad)
    run.decode(40 - (len(run.tokens[0]) - 1))
    np.testing.assert_allclose(run.scores(0), want.scores(0), atol=1e-5)


# Turns, growth, fallback


@pytest.mark.slow
@pytest.mark.parametrize("path", ["paged", "mask"])
def test_turns_are_one_long_prompt(path):
    """Extended in the middle of a cycle, of a page and of an entry."""
    run = Run(session(path))
    row = run.admit(prompt(21), 200)
    run.decode(23)
    history = [*prompt(21), *run.tokens[row]]
    new = prompt(18, seed=8)
    run.extend(row, new, 100)
    first = run.scores(row)[0]
    whole = teacher_forced([*history, *new], np.zeros(1, int))
    np.testing.assert_allclose(first, whole[0], atol=1e-5)
    run.decode(40)
    want = teacher_forced([*history, *new], run.drawn(row))
    np.testing.assert_allclose(run.scores(row), want, atol=2e-5)
    assert run.session.batch.rows[row].tokens == [*history, *new, *run.tokens[row][:-1]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "path, budget",
    [
        *(("paged", "1.0"), ("mask", "1.0"), ("paged", "0.5"), ("mask", "0.5")),
        *(("paged", "35kB"), ("gathered", "35kB")),
    ],
)
def test_growing_keeps_contents_and_answers(path, budget):
    """Also where a budget in bytes leaves fewer slots at the larger capacity than are taken."""
    small, whole = (session(path, capacity=c, budget=budget) for c in (128, 512))
    runs = [Run(small), Run(whole)]
    for run in runs:
        run.admit(prompt(45), 80)
        run.decode(21)
    held = [np.asarray(run.session.batch.tiers.pages)[0] for run in runs]
    small.grow(whole.capacity)
    assert small.capacity == whole.capacity
    after = np.asarray(small.batch.tiers.pages)[0]
    np.testing.assert_array_equal(np.flatnonzero(after), np.flatnonzero(held[0]))
    small.grow(64)  # never shrinks
    assert small.capacity == whole.capacity
    for run in runs:
        run.decode(30)
    if budget == "1.0":
        # Programs for another capacity; errors of 1e-6 pass through fifty steps.
        np.testing.assert_allclose(runs[0].scores(0), runs[1].scores(0), atol=1e-5)
    assert np.isfinite(runs[0].scores(0)).all()


@pytest.mark.slow
def test_a_session_grown_after_extension_goes_on():
    run = Run(session(capacity=128))
    row = run.admit(prompt(45), 60)
    run.decode(20)
    run.session.grow(512)
    history = [*prompt(45), *run.tokens[row]]
    run.extend(row, prompt(150, seed=2), 100)
    run.decode(60)
    want = teacher_forced([*history, *prompt(150, seed=2)], run.drawn(row))
    np.testing.assert_allclose(run.scores(row), want, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("threshold", [1e-6, 0.9])
def test_with_a_fallback_no_cycle_starts_without_what_the_native_top_k_takes(threshold):
    """Also where the memory indexer wants few pages: it may be what is wrong."""
    policy = PolicyConfig(threshold=threshold, recency=4)
    run = Run(session(budget="0.45", fallback=1e-6, policy=policy, lookahead=8))
    run.admit(prompt(60), 400)
    run.decode(200)
    batch = run.session.batch
    assert batch.rows[0].growth >= 1
    assert max(e.lacking_mass for e in batch.events) <= 1e-6


def test_a_stop_token_at_the_end_of_a_cycle_ends_nothing_else():
    """A caller that ignores the stop must be able to go on: the boundary was skipped."""
    want = alone(session(), prompt(45), 40)
    stop = int(want.drawn(0)[16])  # drawn in the 16th step, the cycle's last
    run = Run(session())
    run.admit(prompt(45), 41)
    while len(run.tokens[0]) < 41:
        run.decode(41 - len(run.tokens[0]), stop=(stop,))
    np.testing.assert_array_equal(run.drawn(0), want.drawn(0))
    np.testing.assert_array_equal(run.scores(0), want.scores(0))


# Length without end


@functools.cache
def _long(path: str, steps: int) -> tuple[LsaSession, np.ndarray]:
    policy = PolicyConfig(threshold=0.45, recency=16, recall_pages=24)
    of = session(path, lookahead=256, capacity=6144, policy=policy, budget=None)
    _, logits = of.admit(prompt(20), max_new_tokens=steps + 1)
    token, drawn = jnp.argmax(logits)[None].astype(jnp.int32), []
    while len(drawn) < steps:
        burst = of.decode(
            token,
            steps=steps - len(drawn),
            sampler=Sampling(temperature=1.0),  # greedy decoding of a random model would repeat
            key=KEY,
        )
        drawn += np.asarray(burst.tokens)[0, : int(burst.count[0])].tolist()
        token = burst.last_token(token)
    return of, np.array(drawn)


@pytest.fixture
def compiled_in_full() -> Iterator[None]:
    """For what holds to the bit only as users compile it."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.mark.slow
@pytest.mark.usefixtures("compiled_in_full")
def test_five_thousand_decoded_tokens_keep_every_entry_reachable():
    steps = 5000
    dense, want = _long("mask", steps)
    of, drawn = _long("paged", steps)
    np.testing.assert_array_equal(drawn, want)
    assert len(set(drawn.tolist())) > 50
    assert [e.pages for e in of.batch.events] == [e.pages for e in dense.batch.events]
    # Every complete page is in the store once, with the bytes of the dense copy.
    store, layout = of.batch.tiers.store, of.batch.plan.layout
    complete = (20 + steps) // PAGE_TOKENS
    of.batch.flush(np.array([True]))
    rows = store.rows(of.batch.rows[0].owner)
    assert len(rows) == len(set(rows.tolist())) == complete
    layers = [dense.batch.state.layers[i] for i in of.batch.plan.csa]
    planes = jax.tree.map(lambda x: x[0, :complete], [(y.entries, y.index_keys) for y in layers])
    np.testing.assert_array_equal(store.memory.read(rows), np.asarray(layout.pack_pages(planes)))
    # Whatever pages are wanted, they come: two dozen at a time, from the first to the last.
    seen, batch = set(), of.batch
    for first in range(0, complete, 24):
        wanted = np.zeros_like(np.asarray(batch.tiers.pages))
        wanted[0, first : min(first + 24, complete)] = True
        batch.tiers.pages = jnp.asarray(wanted)
        batch.boundary(np.array([False]))
        pages, slots = (np.asarray(x)[0] for x in batch.tiers.table)
        here = pages >= 0
        np.testing.assert_array_equal(pages[here], np.flatnonzero(wanted[0]))
        got = np.asarray(batch.tiers.records)[slots[here]]
        np.testing.assert_array_equal(got, store.memory.read(rows[pages[here]]))
        seen |= set(pages[here].tolist())
    assert seen == set(range(complete))
