"""Batches hold what the traces say, each sample once an epoch, however they are made."""

import dataclasses
import functools
import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
import pytest

from lsa_jax.config import ConfigError
from tests.train_traces import PAGE, planted_traces
from train.data import documents
from train.data.dataset import Corpus, DataConfig, batches, sample_table
from train.data.documents import DocumentCache
from train.data.labels import ResidentRule, SamplingConfig
from train.data.order import epoch_order
from train.traces.columns import TraceError
from train.traces.trace import finished_traces, open_trace
from train.traces.votes import SparseRows

SAMPLING = SamplingConfig(window=16, neg_ratio=3.0, vote_weighting=True, most_votes=4)
DATA = DataConfig(batch_size=20, mixed_documents=2, threads=2, seed=3)


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    """Two trace sets of 3 and 2 documents, of 53 tokens each and of two lengths."""
    root = tmp_path_factory.mktemp("sets")
    options = {"tokens": 53, "hidden": 6}
    short = planted_traces(root / "short", documents=3, prompt_entries=60, **options)
    return short, planted_traces(root / "long", documents=2, seed=1, **options)


@pytest.fixture(scope="module")
def corpus(sets) -> Corpus:
    return Corpus.open(sets)


def taken(corpus, data=DATA, sampling=SAMPLING, *, epochs=1, **options):
    iterator = batches(corpus, data, sampling, epochs=epochs, **options)
    found = list(iterator)
    assert len(found) == epochs * iterator.steps_per_epoch
    iterator.close()
    return found


def leaves(batch):
    return [part for part in (*batch[:5], *batch.targets, batch.sample) if part is not None]


def equal(one, other):
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def joined(parts):
    """The global batch of all processes' rows; keys and hidden have layers in front."""
    columns = zip(*map(leaves, parts), strict=True)
    return [np.concatenate(c, axis=1 if i in (0, 3, 4) else 0) for i, c in enumerate(columns)]


# What is in a batch


class Facts(NamedTuple):
    """A trace as plain arrays, and its entries by the bytes of their keys at some layers."""

    hidden: np.ndarray
    positions: np.ndarray
    formed_at: np.ndarray
    votes: SparseRows
    mass: SparseRows
    common: np.ndarray
    entry: dict[bytes, int]


@functools.cache
def facts_of(path, layers=(0, 1)):
    trace = open_trace(path)
    keys, votes, mass = trace.keys(), trace.votes(), trace.mass()
    parts = [keys.values[:, layers]] + ([] if keys.scale is None else [keys.scale[:, layers]])
    rows = [b"".join(part[n].tobytes() for part in parts) for n in range(trace.entries)]
    assert len(set(rows)) == len(rows) and mass is not None
    arrays = [trace.read(name) for name in ("hidden", "positions", "formed_at")]
    common = np.bincount(votes.indices, minlength=trace.entries) > 0.8 * trace.tokens
    return Facts(
        arrays[0][:, layers],
        *arrays[1:],
        votes,
        mass,
        common,
        dict(zip(rows, range(trace.entries), strict=True)),
    )


def entries_of(batch, b, facts):
    """The entries of the valid candidates of a row, by their keys at all layers."""
    planes = [batch.keys[:, b]] + ([] if batch.key_scale is None else [batch.key_scale[:, b]])
    places = np.flatnonzero(batch.targets.valid[b])
    return [facts.entry[b"".join(p[:, c].tobytes() for p in planes)] for c in places]


def check_row(batch, b, facts, sampling):
    """One row against the trace, by formulas of its own: positives, negatives, golden entries."""
    token, entries = int(batch.sample[b, 1]), len(facts.formed_at)
    votes, sums = {}, np.zeros(entries)
    for t in range(token, min(token + sampling.window, len(facts.positions))):
        for entry, value in zip(*facts.votes.row(t), strict=True):
            votes[int(entry)] = max(votes.get(int(entry), 0), int(value))
        np.add.at(sums, *facts.mass.row(t))
    np.testing.assert_array_equal(batch.hidden[:, b], facts.hidden[token])
    assert batch.positions[b] == facts.positions[token]
    assert batch.entries[b] == np.sum(facts.formed_at <= token)
    found = entries_of(batch, b, facts)
    assert found == sorted(set(found))
    positive = np.array([entry in votes for entry in found])
    weights = [0.5 + 1.5 * (votes.get(n, 3) - 3) / (sampling.most_votes - 3) for n in found]
    weights = np.where(facts.common[found], 0.5, weights)
    targets = [part[b][batch.targets.valid[b]] for part in batch.targets[:3]]
    np.testing.assert_array_equal(targets[0], positive)
    np.testing.assert_allclose(targets[1], np.where(positive, weights, 1), rtol=1e-6)
    np.testing.assert_allclose(targets[2], sums[found], rtol=1e-6)  # float32
    return set(found) & set(votes), set(found) - set(votes), set(votes)


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
    dtype = {"fp8": ml_dtypes.float8_e4m3fn, "bfloat16": ml_dtypes.bfloat16}.get(
        key_format, np.float32
    )
    for batch in taken(corpus):
        assert batch.keys.dtype == dtype and batch.hidden.dtype == ml_dtypes.bfloat16
        assert (batch.key_scale is None) == (key_format != "fp8")
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
        for part in (*batch.targets, batch.key_scale[0], batch.keys[1].astype(np.float32).any(-1)):
            assert not np.any(part[absent])
        rows = batch.sample[:, 0] < 0
        assert not batch.targets.valid[rows].any() and not batch.hidden[:, rows].astype(float).any()
        assert np.all(batch.sample[rows] == -1) and not np.any(np.diff(rows.astype(int)) < 0)
        empty += rows.sum()
    assert empty == -5 * 53 % DATA.batch_size > 0


def test_offsets_move_positions_within_their_range_and_nothing_else(corpus):
    data = dataclasses.replace(DATA, max_offset=5)
    seen = {}
    for plain, moved in zip(taken(corpus, epochs=2), taken(corpus, data, epochs=2), strict=True):
        offsets = moved.positions - plain.positions
        rows = plain.sample[:, 0] >= 0
        for sample, offset in zip(plain.sample[rows].tolist(), offsets[rows].tolist(), strict=True):
            seen.setdefault(tuple(sample), []).append(offset)
        assert equal(plain, moved._replace(positions=plain.positions))
    both = np.array(list(seen.values()))
    assert both.shape == (265, 2) and set(both.ravel().tolist()) == set(range(6))
    assert not np.array_equal(both[:, 0], both[:, 1])  # other offsets in another epoch
    chance = np.bincount(both.ravel(), minlength=6) / both.size
    assert np.abs(chance - 1 / 6).max() < 5 * np.sqrt(5 / 36 / both.size)  # 5 standard deviations


def test_without_mass_targets_have_none_and_all_else_is_the_same(corpus):
    data = dataclasses.replace(DATA, mass=False)
    for with_mass, without in zip(taken(corpus), taken(corpus, data), strict=True):
        assert with_mass.targets.mass.any() and not without.targets.mass.any()
        targets = with_mass.targets._replace(mass=without.targets.mass)
        assert equal(without, with_mass._replace(targets=targets))


def test_pages_are_drawn_whole_and_lie_together(corpus):
    rule = ResidentRule(recency=20, sink=3, page_entries=PAGE)
    sampling = dataclasses.replace(
        SAMPLING, unit="page", evictable_only=True, resident=rule, max_pos=40
    )
    for batch in taken(corpus, sampling=sampling):
        assert batch.keys.shape[2] % 64 == 0
        for b in np.flatnonzero(batch.sample[:, 0] >= 0):
            found = entries_of(batch, b, facts_of(corpus.traces[batch.sample[b, 0]].path))
            valid = batch.targets.valid[b].reshape(-1, PAGE)
            assert np.all(valid.all(1) == valid.any(1))  # evictable pages are whole
            pages = []
            for n, page in enumerate(np.flatnonzero(valid.all(1))):
                entries = found[n * PAGE : (n + 1) * PAGE]
                assert entries == list(range(entries[0], entries[0] + PAGE))
                assert entries[0] % PAGE == 0 and entries[0] >= 8  # not the sink's page
                assert entries[-1] < (batch.entries[b] - 20) // PAGE * PAGE
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

    def keys_of(found, sample):
        for batch in found:
            for b in np.flatnonzero((batch.sample == sample).all(1)):
                return batch.keys[0, b][batch.targets.valid[b]].tobytes()

    assert keys_of(first[:half], [4, 7]) != keys_of(first[half:], [4, 7])


def test_documents_of_the_next_group_are_loaded_ahead_each_once(corpus):
    table = sample_table(corpus, DATA, SAMPLING)
    order = epoch_order(table, batch=20, mixed_documents=2, seed=0, epoch=0)
    assert len(order.groups) == 3
    for group, following in zip(order.groups[:-1], order.groups[1:], strict=True):
        due = []
        for step in range(group.first, following.first):
            current, coming, ahead = order.ahead(step)
            np.testing.assert_array_equal(coming, following.documents)
            np.testing.assert_array_equal(current, group.documents)
            used = table.documents[order.samples[step]]
            assert set(used.tolist()) <= set(current.tolist())
            due += ahead.tolist()
        assert due == following.documents.tolist()
    assert [len(part) for part in order.ahead(len(order.samples) - 1)[1:]] == [0, 0]


# However they are made


@pytest.mark.parametrize(("threads", "prefetch"), [(1, 0), (1, 1), (3, 5)])
def test_threads_prefetch_and_cache_change_nothing(corpus, threads, prefetch):
    want = taken(corpus)
    for cache_bytes in (0, 1 << 30):
        options = {"threads": threads, "prefetch": prefetch, "cache_bytes": cache_bytes}
        assert all(map(equal, taken(corpus, dataclasses.replace(DATA, **options)), want))


@pytest.mark.parametrize("count", [2, 4, 5])
def test_processes_get_their_rows_of_the_same_batches(corpus, count):
    parts = [taken(corpus, process=(i, count)) for i in range(count)]
    for whole, *rows in zip(taken(corpus), *parts, strict=True):
        for want, got in zip(leaves(whole), joined(rows), strict=True):
            assert got.tobytes() == want.tobytes()


def test_a_run_stopped_after_any_batch_goes_on_without_loss_or_repetition(corpus):
    data = dataclasses.replace(DATA, prefetch=3, threads=2)
    want = taken(corpus, data, epochs=2)
    running = batches(corpus, data, SAMPLING, epochs=2)
    for k in range(len(want) + 1):
        time.sleep(0.002)  # batches beyond the one taken are being made
        state = json.loads(json.dumps(running.get_state()))
        resumed = batches(corpus, data, SAMPLING, epochs=2)
        resumed.set_state(state)
        for expected in want[k : k + 2]:
            assert equal(next(resumed), expected)
        resumed.set_state(state)  # and back, with batches in flight
        assert resumed.get_state() == state
        rest = want[k:] if k % 7 == 0 else want[k : k + 1]
        assert all(map(equal, rest, resumed))
        resumed.close()
        if k < len(want):
            assert equal(next(running), want[k])
    with pytest.raises(StopIteration):
        next(running)
    running.close()


def test_a_run_goes_on_with_another_number_of_processes(corpus):
    whole = batches(corpus, DATA, SAMPLING)
    for _ in range(4):
        next(whole)
    parts = [batches(corpus, DATA, SAMPLING, process=(i, 2)) for i in range(2)]
    for part in parts:
        part.set_state(whole.get_state())
    for want, *rows in zip(whole, *parts, strict=True):
        assert [x.tobytes() for x in joined(rows)] == [x.tobytes() for x in leaves(want)]
    for iterator in (whole, *parts):
        iterator.close()


def relabelled(corpus: Corpus) -> Corpus:
    """The same documents, recorded once more with other votes."""
    first, *others = corpus.traces
    votes = dataclasses.replace(first.columns["vote_scores"], sha256="another")
    columns = {**first.columns, "vote_scores": votes}
    return Corpus([dataclasses.replace(first, columns=columns), *others], corpus.target_layers)


def test_a_state_of_other_data_is_refused(corpus, sets):
    iterator = batches(corpus, DATA, SAMPLING)
    state = iterator.get_state()
    others = [
        batches(corpus, dataclasses.replace(DATA, batch_size=10), SAMPLING),
        batches(corpus, dataclasses.replace(DATA, seed=9), SAMPLING),
        batches(corpus, DATA, dataclasses.replace(SAMPLING, neg_ratio=1.0)),
        batches(Corpus.open(sets[:1]), DATA, SAMPLING),
        batches(relabelled(corpus), DATA, SAMPLING),
    ]
    for other in others:
        with pytest.raises(ConfigError, match="data's state must be one of the same traces"):
            other.set_state(state)
    with pytest.raises(ConfigError, match=r"next_step of the data's state must be in 0\.\.14"):
        iterator.set_state({**state, "next_step": 15})
    same = batches(corpus, dataclasses.replace(DATA, cache_bytes=0, threads=1), SAMPLING)
    same.set_state(state)
    for one in (iterator, same, *others):
        one.close()


# Hard negatives


def hard_file(path, corpus, **changes):
    pools = {t.info.name: np.arange(5 + i, 45 + i) for i, t in enumerate(corpus.traces)}
    np.savez(path, **{k: v for k, v in {**pools, **changes}.items() if v is not None})
    return path


def test_hard_negatives_of_the_file_are_the_negatives(sets, corpus, tmp_path):
    path = hard_file(tmp_path / "hard.npz", corpus)
    hard = Corpus.open(sets, hard_negatives=path)
    sampling = dataclasses.replace(SAMPLING, hard_share=1.0, neg_ratio=1.0)
    for batch in taken(hard, sampling=sampling):
        for b in np.flatnonzero(batch.sample[:, 0] >= 0):
            number = int(batch.sample[b, 0])
            facts = facts_of(hard.traces[number].path)
            _, negatives, golden = check_row(batch, b, facts, sampling)
            pool = set(range(5 + number, 45 + number)) - golden
            assert len(pool & negatives) == min(len(pool), len(negatives)) > 0


def test_hard_negatives_that_do_not_fit_are_refused(sets, corpus, tmp_path):
    first = corpus.traces[0].info.name
    for change, message in (
        ({first: None}, "must have the hard negatives of doc-0-0, got none"),
        ({first: np.array([73])}, r"doc-0-0 must be entries in 0\.\.72"),
        ({first: np.array([0.5])}, r"doc-0-0 must be entries in 0\.\.72, got float64"),
        ({first: np.array([{}])}, "must be an npz file of integer arrays"),
    ):
        with pytest.raises(TraceError, match=message):
            Corpus.open(sets, hard_negatives=hard_file(tmp_path / "hard.npz", corpus, **change))
    (tmp_path / "hard.npz").write_bytes(b"no zip")
    with pytest.raises(TraceError, match="must be an npz file"):
        Corpus.open(sets, hard_negatives=tmp_path / "hard.npz")
    with pytest.raises(FileNotFoundError):
        Corpus.open(sets, hard_negatives=tmp_path / "none.npz")
    hard = Corpus.open(sets, hard_negatives=hard_file(tmp_path / "hard.npz", corpus))
    for used, share in ((hard, 0.0), (corpus, 0.5)):
        with pytest.raises(ConfigError, match="hard_share must be above 0 with"):
            batches(used, DATA, dataclasses.replace(SAMPLING, hard_share=share))


# What a corpus refuses


def test_traces_that_do_not_fit_together_are_refused_and_both_named(sets, tmp_path):
    for name, options in {
        "target_layers": {"target_layers": (0, 1)},
        "csa_layers": {"csa_layers": 5},
        "page_entries": {"page_entries": 4},
        "hidden": {"hidden": 7},
        "keys": {"key_format": "bfloat16", "hidden": 6},
        "rope": {"head_dim": 16},
    }.items():
        root = planted_traces(tmp_path / name, documents=1, tokens=8, seed=7, **options)
        with pytest.raises(TraceError, match=f"^{name} must be the same") as caught:
            Corpus.open([sets[0], root])
        assert str(sets[0] / "doc-0-0") in str(caught.value) and "\n" not in str(caught.value)
        assert str(root / "doc-7-0") in str(caught.value)
    with pytest.raises(TraceError, match=r"target_layers must be of every trace, got \(1,\)"):
        Corpus.open(sets, (1,))
    with pytest.raises(TraceError, match=r"different names: .*short/doc-0-0, .*short/doc-0-0"):
        Corpus.open([sets[0], sets[0]])
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(TraceError, match=f"{missing} must have .*traces, got none"):
            Corpus.open([tmp_path / missing])


def test_what_cannot_become_batches_is_refused(corpus):
    for options, message in (
        ({"process": (0, 3)}, "data.batch_size must be a multiple of 3 processes"),
        ({"process": (2, 2)}, "data.batch_size"),
        ({"epochs": 0}, "epochs must be >= 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            batches(corpus, DATA, SAMPLING, **options)
    resident = dataclasses.replace(SAMPLING, evictable_only=True)
    with pytest.raises(ConfigError, match="no sample in 5 documents"):
        batches(corpus, DATA, resident)
    for name, value in (
        ("batch_size", 0),
        ("threads", 0),
        ("train", "x"),
        ("target_layers", (2, 0)),
    ):
        with pytest.raises(ConfigError, match=f"data.{name} must be"):
            dataclasses.replace(DATA, **{name: value})


def test_a_damaged_trace_stops_the_run_with_one_line(sets, tmp_path):
    root = Path(shutil.copytree(sets[0], tmp_path / "copy"))
    corpus = Corpus.open([root])
    shutil.rmtree(root / "doc-0-1" / "hidden")
    iterator = batches(corpus, DATA, SAMPLING)
    with pytest.raises(TraceError, match="doc-0-1/hidden is missing or damaged") as caught:
        list(iterator)
    assert "\n" not in str(caught.value)
    iterator.close()


# The cache


def test_documents_are_loaded_once_and_the_least_recent_are_given_up(corpus):
    size = documents.load_document(corpus.traces[4], 4, (0, 2)).nbytes
    cache = DocumentCache(corpus.traces, 2 * size, target_layers=(0, 2))
    barrier = threading.Barrier(8)

    def ask(_):
        barrier.wait()
        return cache[4]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    assert all(document is found[0] for document in found) and cache.loads == 1
    three = cache[3]
    assert cache[4] is found[0] and cache.loads == 2 and cache.held_bytes <= 2 * size
    cache[0]
    assert cache[4] is found[0] and cache.loads == 3  # 3 was the least recent
    assert cache[3] is not three and cache.loads == 4


def test_a_document_that_could_not_be_loaded_is_tried_again(corpus, monkeypatch):
    cache = DocumentCache(corpus.traces, 1 << 30, target_layers=(0,))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):

        def gone(*_, **__):
            raise OSError("gone")

        patch.setattr(documents, "load_document", gone)
        cache[2]
    assert cache[2].hidden.shape[1] == 1 and cache.loads == 1


def test_the_size_of_documents_is_known_before_they_are_loaded(sets):
    for layers in ((0, 2), (2,)):
        corpus = Corpus.open(sets, layers)
        held = [documents.load_document(t, i, layers).nbytes for i, t in enumerate(corpus.traces)]
        # Mass is float16 in the trace and float32 in memory.
        assert np.all(np.abs(corpus.document_bytes / held - 1) < 0.25)


def test_a_trace_set_has_planted_structure(sets):
    for path in finished_traces(sets[1]):
        trace = open_trace(path)
        votes, exist = (
            trace.votes(),
            np.searchsorted(trace.read("formed_at"), np.arange(53), "right"),
        )
        assert trace.entries == 213 and exist[0] == 200 and exist[-1] == 213
        assert all(votes.row(t)[0].max() < exist[t] for t in range(trace.tokens))
