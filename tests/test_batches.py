"""Batches hold what the traces say, each sample once an epoch, in an order of its own."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from tests.batch_cases import (
    DATA,
    SAMPLING,
    check_row,
    entries_of,
    equal,
    facts_of,
    taken,
    two_sets,
)
from tests.train_traces import PAGE, planted_traces
from train.data.dataset import Corpus, batches, sample_table
from train.data.labels import ResidentRule
from train.data.order import epoch_order


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    return two_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def corpus(sets) -> Corpus:
    return Corpus.open(sets)


@pytest.mark.parametrize("key_format", ["fp8", "bfloat16", "float32"])
def test_every_row_is_what_its_trace_says(key_format, tmp_path):
    root = planted_traces(
        tmp_path,
        documents=2,
        tokens=24,
        prompt_entries=90,
        target_layers=(0, 1, 3),
        key_format=key_format,
    )
    corpus = Corpus.open([root], (0, 3))
    for batch in taken(corpus):
        assert batch.hidden.dtype == ml_dtypes.bfloat16
        for b in np.flatnonzero(batch.sample[:, 0] >= 0):
            trace = corpus.traces[batch.sample[b, 0]]
            facts = facts_of(trace.path, (0, 2))
            positives, negatives, golden = check_row(batch, b, facts, SAMPLING)
            assert positives == golden
            assert len(negatives) == min(3 * len(golden), trace.entries - len(golden))
            valid = batch.targets.valid[b]
            stands = batch.targets.stands_for[b][valid]
            assert stands.sum() == pytest.approx(trace.entries)  # the whole pool


def test_what_is_not_valid_is_zero_and_rows_beyond_the_last_sample_are_empty(corpus):
    found = taken(corpus)
    empty = 0
    for batch in found:
        absent = ~batch.targets.valid
        assert all(not np.any(part[absent]) for part in batch.targets)
        assert np.all(batch.drawn.index[absent] == -1) and not batch.drawn.codes[absent].any()
        rows = batch.sample[:, 0] < 0
        assert not batch.targets.valid[rows].any() and not batch.hidden[:, rows].astype(float).any()
        assert np.all(batch.sample[rows] == -1) and not np.any(np.diff(rows.astype(int)) < 0)
        empty += rows.sum()
    assert empty == -5 * 53 % DATA.batch_size > 0


def test_offsets_move_positions_within_their_range_and_nothing_else(corpus):
    data = dataclasses.replace(DATA, max_offset=5)
    seen = {}
    for plain, moved in zip(taken(corpus, epochs=2), taken(corpus, data, epochs=2), strict=True):
        offsets = moved.drawn.positions - plain.drawn.positions
        rows = plain.sample[:, 0] >= 0
        for sample, offset in zip(plain.sample[rows].tolist(), offsets[rows].tolist(), strict=True):
            seen.setdefault(tuple(sample), []).append(offset)
        moved.drawn.rows[:, 2] = plain.drawn.rows[:, 2]
        assert equal(plain, moved)
    both = np.array(list(seen.values()))
    assert both.shape == (265, 2) and set(both.ravel().tolist()) == set(range(6))
    assert not np.array_equal(both[:, 0], both[:, 1])  # other offsets in another epoch
    chance = np.bincount(both.ravel(), minlength=6) / both.size
    assert np.abs(chance - 1 / 6).max() < 5 * np.sqrt(5 / 36 / both.size)  # 5 standard deviations


def test_without_mass_targets_have_none_and_all_else_is_the_same(corpus):
    data = dataclasses.replace(DATA, mass=False)
    for with_mass, without in zip(taken(corpus), taken(corpus, data), strict=True):
        assert with_mass.targets.mass.any() and not without.targets.mass.any()
        none = with_mass.drawn.mass[:, :0]
        assert equal(without, with_mass._replace(drawn=with_mass.drawn._replace(mass=none)))


def test_pages_are_drawn_whole_and_lie_together(corpus):
    rule = ResidentRule(recency=20, sink=3, page_entries=PAGE)
    sampling = dataclasses.replace(
        SAMPLING, unit="page", evictable_only=True, resident=rule, max_pos=40
    )
    for batch in taken(corpus, sampling=sampling):
        assert batch.drawn.index.shape[1] % 64 == 0
        for b in np.flatnonzero(batch.sample[:, 0] >= 0):
            found = entries_of(batch, b)
            valid = batch.targets.valid[b].reshape(-1, PAGE)
            assert np.all(valid.all(1) == valid.any(1))  # evictable pages are whole
            pages = []
            for n, page in enumerate(np.flatnonzero(valid.all(1))):
                entries = found[n * PAGE : (n + 1) * PAGE]
                assert entries == list(range(entries[0], entries[0] + PAGE))
                assert entries[0] % PAGE == 0 and entries[0] >= 8  # not the sink's page
                assert entries[-1] < (batch.drawn.entries[b] - 20) // PAGE * PAGE
                pages.append(batch.targets.labels[b].reshape(-1, PAGE)[page].any())
            assert sum(pages) <= 5  # 40 entries
            assert len(pages) <= 4 * max(sum(pages), 1)


# Every sample once, in an order of its own


def samples_of(found):
    rows = np.concatenate([batch.sample for batch in found])
    return rows[rows[:, 0] >= 0].tolist()


@pytest.mark.parametrize("batch_size", [1, 20, 64, 300])
@pytest.mark.parametrize("mixed", [1, 2, 9])
def test_an_epoch_has_every_sample_once(corpus, batch_size, mixed):
    data = dataclasses.replace(
        DATA, batch_size=batch_size, mixed_documents=mixed, sample_interval=2
    )
    table = sample_table(corpus, data, SAMPLING)
    every = sorted(range(5 * 27))
    orders = []
    for epoch in range(3):
        order = epoch_order(table, batch=batch_size, mixed_documents=mixed, seed=1, epoch=epoch)
        assert len(order.samples) == -(-len(every) // batch_size) == len(order.candidates)
        assert sorted(order.samples[order.samples >= 0].tolist()) == every
        slots = np.where(order.samples >= 0, table.slots[order.samples], 0).max(axis=1)
        assert np.all(slots <= order.candidates) and set(order.candidates) <= set(table.sizes)
        apart = [len(set(table.documents[row[row >= 0]])) for row in order.samples]
        assert max(apart) <= mixed + 1 + batch_size // 27
        orders.append(order.samples.tolist())
    assert batch_size > 20 or orders[0] != orders[1] != orders[2]


def test_epochs_differ_in_order_and_negatives_and_repeat_with_the_seed(corpus):
    first, again = taken(corpus, epochs=2), taken(corpus, epochs=2)
    assert all(map(equal, first, again))
    half = len(first) // 2
    one, two = samples_of(first[:half]), samples_of(first[half:])
    assert one != two and sorted(one) == sorted(two) == [
        [d, t] for d in range(5) for t in range(53)
    ]
    other = taken(corpus, dataclasses.replace(DATA, seed=4))
    assert samples_of(other) != one

    def drawn_of(found, sample):
        for batch in found:
            for b in np.flatnonzero((batch.sample == sample).all(1)):
                return entries_of(batch, b)

    assert drawn_of(first[:half], [4, 7]) != drawn_of(first[half:], [4, 7])


def test_documents_of_the_next_group_are_due_in_turn_in_time(corpus):
    table = sample_table(corpus, DATA, SAMPLING)
    order = epoch_order(table, batch=20, mixed_documents=2, seed=DATA.seed, epoch=0)
    assert len(order.groups) == 3
    iterator, due = batches(corpus, DATA, SAMPLING, epochs=2), {}
    for step, batch in enumerate(iterator):
        demand = iterator.demand
        rows = batch.sample[:, 0]
        assert set(rows[rows >= 0].tolist()) == set(demand.batch.tolist())
        assert set(demand.batch.tolist()) <= set(demand.group.tolist())
        due.setdefault(tuple(demand.group), []).append((demand.following.tolist(), demand.due))
        if step < len(order.samples):
            at = max(n for n, group in enumerate(order.groups) if group.first <= step)
            np.testing.assert_array_equal(demand.group, order.groups[at].documents)
            if at < 2:
                np.testing.assert_array_equal(demand.following, order.groups[at + 1].documents)
            else:  # the next epoch's first group
                assert len(demand.following) in (2, 3)
    iterator.close()
    assert demand.due == len(demand.following) == 0  # of the last group of all
    for steps in list(due.values())[:-1]:
        counts = [count for _, count in steps]
        assert counts == sorted(counts) and counts[-1] == len(steps[-1][0])
