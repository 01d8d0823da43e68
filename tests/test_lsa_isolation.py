"""Requests beside each other: each decodes as if alone, whatever others leave behind."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from tests.lsa_models import PAGE_TOKENS, Run, alone, prompt, session

pytestmark = pytest.mark.usefixtures("compiled_quickly")

# Rows bounded one by one: what is beside a request has no say in what it has.
OWN = PolicyConfig(threshold=0.45, recency=4, recall_pages=5)
STEPS = 40
# A batch of 8 is compiled to other sums than one of 1.
BATCH = 1e-5


def bounded(rows: int, **settings) -> LsaSession:
    return session(rows=rows, policy=OWN, budget=None, **settings)


def poison(of: LsaSession, byte: int) -> int:
    """Overwrites every slot that no row may read now; returns how many those are."""
    tiers = of.batch.tiers
    readable = np.asarray(tiers.table.slots).reshape(-1)
    unused = np.setdiff1d(np.arange(tiers.slots), readable[readable >= 0])
    # A page that is held but not readable would be served from its slot later on: it is dropped
    # from the map too, as if something else had taken the slot.
    held = tiers.pool
    tiers.pool = type(held)(
        *(x.at[unused].set(-1) for x in (held.host_row, held.generation, held.stamp))
    )
    tiers.records = tiers.records.at[unused].set(byte)
    return len(unused)


def fresh_only(of: LsaSession) -> None:
    """The decode state has no room for a history: pages on the device are in the pool only."""
    batch = of.batch
    for ordinal, i in enumerate(batch.plan.csa):
        layer = batch.state.layers[i]
        assert layer.entries.values.shape[1] == batch.plan.fresh_pages
        if ordinal not in batch.plan.targets:
            assert layer.index_keys.values.shape[1] == batch.plan.fresh_pages


@pytest.mark.slow
@pytest.mark.parametrize("byte", [0x7E, 0xFF])
def test_what_evicted_slots_hold_is_never_read(byte):
    """0x7E bytes are large numbers in every format, 0xFF bytes are NaN."""
    of, want = bounded(2), alone(bounded(2), prompt(45), STEPS)
    run = Run(of)
    poison(of, byte)
    run.admit(prompt(45), STEPS + 1)
    count = 0
    for _ in range(STEPS):
        count += poison(of, byte)
        fresh_only(of)
        run.decode(1)
    assert count > STEPS
    np.testing.assert_array_equal(run.scores(0), want.scores(0))
    assert [e.pages for e in of.batch.events] == [e.pages for e in want.session.batch.events]


@pytest.mark.slow
def test_a_row_with_less_than_top_k_entries_reads_nothing_of_others():
    """Level 2 gathers top-k columns, there or not; the weight of those that are not is zero."""
    of = bounded(2)
    run = Run(of)
    poison(of, 0xFF)
    run.admit(prompt(3), 20)
    for _ in range(18):
        poison(of, 0xFF)
        run.decode(1)
    want = alone(bounded(2), prompt(3), 18)
    np.testing.assert_array_equal(run.scores(0), want.scores(0))


@pytest.mark.slow
def test_written_through_pages_leave_no_copy_that_is_read():
    """After a boundary, the fresh pages that went to the host are overwritten too."""
    of, want = bounded(2), alone(bounded(2), prompt(45), STEPS)
    run = Run(of)
    run.admit(prompt(45), STEPS + 1)
    batch = of.batch
    for _ in range(STEPS):
        state, per_page = batch.state, batch.cache.page_entries
        formed = np.asarray(state.lengths) // 4 - np.asarray(state.base)
        unused = np.arange(batch.plan.fresh_pages * per_page) >= formed[:, None]
        unused = jnp.asarray(unused.reshape(len(formed), -1, per_page))

        def wipe(x: jax.Array, unused=unused) -> jax.Array:
            return jnp.where(unused[..., None], 3e38, x)

        layers = list(state.layers)
        for ordinal, i in enumerate(batch.plan.csa):
            keys = layers[i].index_keys
            if ordinal not in batch.plan.targets:
                keys = jax.tree.map(wipe, keys)
            entries = jax.tree.map(wipe, layers[i].entries)
            layers[i] = dataclasses.replace(layers[i], entries=entries, index_keys=keys)
        batch.state = dataclasses.replace(state, layers=tuple(layers))
        run.decode(1)
    np.testing.assert_array_equal(run.scores(0), want.scores(0))


def pages_of(of: LsaSession, owner: int) -> list[tuple[int, ...]]:
    return [e.pages for e in of.batch.events if e.owner == owner]


@pytest.fixture(scope="module")
def each_alone() -> list[Run]:
    """Eight requests of their own lengths, one after the other in one session of one row."""
    of = bounded(1)
    return [alone(of, prompt(20 + 7 * n, seed=100 + n), STEPS) for n in range(8)]


def check_same(run: Run, row: int, owner: int, want: Run, owner_alone: int) -> None:
    steps = len(run.tokens[row])
    np.testing.assert_array_equal(run.drawn(row), want.drawn(0)[:steps])
    np.testing.assert_allclose(run.scores(row), want.scores(0)[:steps], atol=BATCH)
    pages = pages_of(want.session, owner_alone)
    assert pages_of(run.session, owner) == pages[: len(pages_of(run.session, owner))]
    assert len(pages_of(run.session, owner)) == 1 + (steps - 1) // 16


@pytest.mark.slow
def test_eight_requests_at_once_equal_each_alone(each_alone):
    of = bounded(8)
    run = Run(of)
    for n in range(8):
        assert run.admit(prompt(20 + 7 * n, seed=100 + n), STEPS + 1) == n
    run.decode(STEPS)
    for n in range(8):
        check_same(run, n, n, each_alone[n], n)


@pytest.mark.slow
def test_requests_that_come_and_go_equal_each_alone(each_alone):
    """Admitted in the middle of others' cycles; two are cancelled, and their rows used again."""
    of = bounded(8)
    run, owner, row_of = Run(of), {}, {}

    def admit(n: int) -> None:
        owner[n] = of._owners
        row_of[n] = run.admit(prompt(20 + 7 * n, seed=100 + n), STEPS + 1)

    def check(n: int) -> None:
        check_same(run, row_of[n], owner[n], each_alone[n], n)

    admit(0)
    run.decode(3)
    admit(1)
    admit(2)
    run.decode(9)
    check(1)
    of.cancel(row_of[1])
    run.decode(1)
    admit(3)
    assert row_of[3] == row_of[1]
    run.decode(20)
    admit(4)
    run.decode(STEPS - 33)
    for n in (0, 2):
        check(n)
    assert len(run.tokens[row_of[0]]) == STEPS + 1
    of.finish(row_of[0])
    check(3)
    of.cancel(row_of[3])
    admit(5)
    admit(1)  # once more, from the start
    live = [row_of[n] for n in (4, 5, 1)]
    run.decode(13, only=live)
    of.finish(row_of[2])
    run.decode(2, only=live)
    for n in (1, 4, 5):
        check(n)
    for n in (1, 4, 5):
        of.cancel(row_of[n])
    stats = of.batch.tiers.store.stats()
    assert stats.live == stats.reserved == 0
    of.batch.tiers.store.clear_cache()
    assert of.batch.tiers.store.stats().cached == 0
    poison(of, 0xFF)
    admit(7)
    run.decode(STEPS)
    check(7)


@pytest.mark.slow
def test_a_common_prefix_is_stored_and_resident_once():
    """Two requests part in the middle of a page; while both live, they share what they can."""
    common, of = prompt(100, seed=7), session(rows=2, budget="1.0")
    tails = [prompt(20, seed=8), prompt(20, seed=9)]
    ids = [[*common, *tail] for tail in tails]
    want = [alone(session(), x, 33) for x in ids]
    run = Run(of)
    for x in ids:
        run.admit(x, 34)
    whole, shared = 120 // PAGE_TOKENS, 100 // PAGE_TOKENS
    rows = [of.batch.tiers.store.rows(row.owner) for row in of.batch.rows]
    np.testing.assert_array_equal(rows[0][:shared], rows[1][:shared])
    assert not set(rows[0][shared:].tolist()) & set(rows[1][shared:].tolist())
    assert of.batch.tiers.store.stats().hits == shared
    slots = np.asarray(of.batch.tiers.table.slots)[:, :whole]
    np.testing.assert_array_equal(slots[0, :shared], slots[1, :shared])
    assert len(set(slots.reshape(-1).tolist())) == 2 * whole - shared
    run.decode(20)
    for row in (0, 1):
        steps = len(run.tokens[row])
        np.testing.assert_array_equal(run.drawn(row), want[row].drawn(0)[:steps])
    of.cancel(0)  # takes nothing that row 1 has
    run.decode(13)
    np.testing.assert_allclose(run.scores(1), want[1].scores(0), atol=BATCH)
    # The same tokens after another page are other pages.
    odd = run.admit([*prompt(PAGE_TOKENS, seed=99), *ids[1][PAGE_TOKENS:]], 2)
    apart = of.batch.tiers.store.rows(of.batch.rows[odd].owner)
    assert not set(apart.tolist()) & set(of.batch.tiers.store.rows(1).tolist())
    of.cancel(odd)
    # What row 1 left is found by a third request, and what row 0 brought alone is gone.
    of.finish(1)
    cached = of.batch.tiers.store.stats().cached // of.batch.plan.layout.nbytes
    assert cached == (120 + 33) // PAGE_TOKENS
    row = run.admit(ids[1], 34)
    np.testing.assert_array_equal(of.batch.tiers.store.rows(of.batch.rows[row].owner), rows[1])
    run.decode(33)
    np.testing.assert_allclose(run.scores(row), want[1].scores(0), atol=BATCH)
