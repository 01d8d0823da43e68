"""KV budgets of a session: held at every step, used up to a page, shared by worth."""

import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa import accounting
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from tests.lsa_models import CONFIG, PAGE_ENTRIES, Run, prompt, session

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def occupied(of: LsaSession, *, pages: int | None = None) -> tuple[int, int]:
    """Bytes of KV on the device now, from the live arrays' meaning: resident pages, entries that
    are fresh, target keys, HCA entries; and the budget at these lengths."""
    batch = of.batch
    layout = accounting.layout_of(batch.cache.kv_format)
    page = accounting.page_bytes(CONFIG, layout, PAGE_ENTRIES)
    lengths = [len(row.tokens) if row else 0 for row in batch.rows]
    assert lengths == [
        n if row else 0 for n, row in zip(batch.state.lengths.tolist(), batch.rows, strict=True)
    ]
    fresh = [
        n // CONFIG.csa_ratio - base if row else 0
        for n, base, row in zip(lengths, batch.state.base.tolist(), batch.rows, strict=True)
    ]
    if pages is None:
        pages = len({s for s in np.asarray(batch.tiers.table.slots).reshape(-1).tolist() if s >= 0})
    entry, key = page.csa // PAGE_ENTRIES, page.keys // PAGE_ENTRIES
    entries = sum(n // CONFIG.csa_ratio for n in lengths)
    hca = sum(n // CONFIG.hca_ratio for n in lengths) * (page.hca // page.hca_entries)
    used = pages * batch.plan.layout.nbytes + sum(fresh) * (2 * entry + key) + entries * key + hca
    full = entries * 2 * (entry + key) + hca
    assert batch.lsa.budget is not None
    return used, batch.lsa.budget.limit(full)


def check_budget(run: Run, steps: int, *, want_more: bool) -> None:
    """Decodes step by step; KV never exceeds the budget, not even within a cycle, and at the end
    of a cycle is at most a page below it where a row could have used more."""
    batch = run.session.batch
    page, binding = batch.plan.layout.nbytes, 0
    for _ in range(steps):
        used, limit = occupied(run.session)
        # What is in formation cannot be elsewhere: a share of a short history may be less.
        assert used <= limit or not np.asarray(batch.tiers.pages).any(), (used, limit)
        last = [row is None or row.since == run.session.lsa.lookahead - 1 for row in batch.rows]
        event = batch.events[-1]
        if all(last) and event.over_budget and event.allowed < batch.tiers.slots:
            # The step that ends the cycle may complete an entry of each layer.
            binding += 1
            per_step = sum(2 * 64 + 32 for row in batch.rows if row) * 4 + 32 * 4
            assert limit - used < page + per_step, (used, limit, event)
        run.decode(1)
    assert bool(binding) == want_more


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["0.45", "0.8"])
def test_a_share_is_never_exceeded_and_at_most_a_page_is_left(budget):
    run = Run(session(budget=budget))
    run.admit(prompt(300), 200)
    check_budget(run, 70, want_more=True)


@pytest.mark.slow
@pytest.mark.parametrize("lookahead", [3, 16, 64])
def test_a_number_of_bytes_is_never_exceeded(lookahead):
    run = Run(session(budget="50kB", lookahead=lookahead))
    run.admit(prompt(380), 132)  # up to the capacity, for which slots are reserved
    check_budget(run, 131, want_more=True)
    assert run.session.batch.events[-1].over_budget > 10


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["0.5", "100kB"])
def test_two_rows_never_exceed_their_budget_and_both_get_pages(budget):
    run = Run(session(budget=budget, rows=2))
    run.admit(prompt(300, seed=1), 200)
    run.decode(5)
    run.admit(prompt(300, seed=2), 200)
    # Under bytes, the slots for full rows bind here: a pool is reserved for the capacity.
    check_budget(run, 120, want_more=budget == "0.5")
    shares = [[len(e.pages) for e in run.session.batch.events[-8:] if e.row == b] for b in (0, 1)]
    assert min(map(min, shares)) >= 1, shares


@pytest.mark.slow
def test_a_budget_that_binds_goes_to_the_row_with_more_worth():
    """Water-filling: two rows fire together, and the pages granted are the first of both."""
    policy = PolicyConfig(threshold=0.4, recency=2)
    run = Run(session(budget="80kB", rows=2, policy=policy))
    run.admit(prompt(120, seed=3), 100)
    run.admit(prompt(60, seed=4), 100)
    run.decode(48)
    a, b = run.session.batch.events[-2:]
    assert (a.row, b.row, a.tokens, b.tokens) == (0, 1, 168, 108)
    assert a.over_budget + b.over_budget > 0
    assert len(a.pages) + len(b.pages) == a.allowed == b.allowed
    assert len(a.pages) >= 1 and len(b.pages) >= 1


def test_a_budget_below_its_floor_is_refused_with_the_floor():
    of = session(budget="3kB")
    with pytest.raises(ConfigError, match=r"kv_budget must be at least the floor of [0-9]+ bytes"):
        of.admit(prompt(45), max_new_tokens=100)
    assert of.batch.rows == [None] and of.batch.tiers.store.stats().live == 0
