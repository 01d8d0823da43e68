"""What is counted before training is what training then draws; leaks between splits are named."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.train_traces import planted_traces
from train.data.dataset import Corpus, DataConfig, batches
from train.data.documents import load_labels
from train.data.labels import ResidentRule, SamplingConfig
from train.data.sample_counts import count_samples, padded_sizes, window_distinct
from train.data.sampling import draw_sample
from train.data.statistics import describe, find_leaks
from train.traces.trace import TraceWriter, open_trace

RULE = ResidentRule(recency=30, sink=3, page_entries=8)
SAMPLING = SamplingConfig(window=16, neg_ratio=2.0, resident=RULE)
DATA = DataConfig(batch_size=16, mixed_documents=2, sizes=3)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("set")
    planted_traces(path, documents=2, tokens=40, prompt_entries=50)
    return planted_traces(path, documents=2, tokens=70, prompt_entries=130, seed=1)


@pytest.fixture(scope="module")
def corpus(root):
    return Corpus.open([root])


def copied(trace, dst, *, entries=None, **changes):
    """The same recording under another description; or with the keys of some entries only."""
    info = dataclasses.replace(trace.info, **changes)
    hidden = trace.read("hidden")
    size, dtype = hidden.shape[2], hidden.dtype
    votes, keys = trace.votes(), trace.keys()
    if entries is not None:
        votes = votes.where(votes.indices < entries)
        keys = type(keys)(keys.values[:entries], keys.scale[:entries])
    with TraceWriter(dst, info, hidden_size=size, hidden_dtype=dtype, mass=False) as writer:
        writer.append(hidden, trace.read("positions"), votes)
        return writer.finish(keys)


# Counting without drawing


def test_distinct_units_of_sliding_windows_are_counted_as_by_sets():
    rng = np.random.default_rng(0)
    for tokens, window in itertools.product((1, 5, 30), (1, 4, 64)):
        rows = np.sort(rng.integers(0, tokens, 60))
        units = rng.integers(0, 12, 60)
        last = np.sort(rng.integers(0, 14, tokens))
        want = []
        for t in range(tokens):
            inside = (rows >= t) & (rows < t + window) & (units < last[t])
            want.append(len(set(units[inside].tolist())))
        assert window_distinct(rows, units, last, window).tolist() == want


MODES = [{}, {"causal": True}, {"evictable_only": True}, {"fake_positive": False}, {"max_pos": 6}]


@pytest.mark.parametrize("unit", ["entry", "page"])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_counts_are_those_of_drawn_samples(corpus, unit, mode):
    cfg = dataclasses.replace(SAMPLING, unit=unit, **mode)
    size = 8 if unit == "page" else 1
    for number, trace in enumerate(corpus.traces[::2]):
        doc = load_labels(trace, number).labels
        counts = count_samples(doc, cfg, interval=3)
        assert set(counts.tokens.tolist()) <= set(range(0, trace.tokens, 3))
        for token, positives, pool, slots in zip(*counts, strict=True):
            first, last = doc.candidate_range(int(token), cfg)
            assert pool == -(-last // size) - first // size
            golden = set()
            for t in range(token, min(token + cfg.window, trace.tokens)):
                golden |= {n // size for n in doc.votes.row(t)[0].tolist() if first <= n < last}
            drawn = len(draw_sample(doc, int(token), cfg).index)
            exact = unit == "entry" or "causal" not in mode
            assert positives == len(golden) if exact else positives >= len(golden)
            assert slots >= drawn and slots % size == 0
            assert slots == drawn or not exact or "max_pos" in mode
        if mode == {"evictable_only": True} and not len(counts.tokens):
            assert trace.entries - 30 < 16


def test_few_sizes_waste_as_little_as_any():
    rng = np.random.default_rng(1)
    for slots in (rng.integers(1, 60, 40), np.array([7]), np.array([8, 8, 16, 50])):
        rounded = np.unique(-(-slots // 8) * 8)
        for most in (1, 2, 3, 10):
            sizes = padded_sizes(slots, most=most, multiple=8)
            assert len(sizes) <= most and np.all(sizes % 8 == 0) and np.all(np.diff(sizes) > 0)

            def total(chosen, slots=slots):
                return np.array(chosen)[np.searchsorted(chosen, slots)].sum()

            ways = itertools.combinations(rounded[:-1], min(most, len(rounded)) - 1)
            assert total(sizes) == min(total([*way, rounded[-1]]) for way in ways)


# Statistics


def test_figures_are_those_of_the_batches(corpus):
    found = describe({"train": corpus}, SAMPLING, DATA).splits["train"]
    iterator = batches(corpus, DATA, SAMPLING)
    made = list(iterator)
    iterator.close()
    candidates = sum(batch.targets.valid.size for batch in made)
    used = sum(batch.targets.valid.sum() for batch in made)
    positives = np.concatenate([batch.targets.labels.sum(axis=1) for batch in made])
    positives = positives[np.concatenate([batch.sample[:, 0] >= 0 for batch in made])]
    assert (
        (found.documents, found.tokens, found.samples) == (4, 220, len(positives)) == (4, 220, 220)
    )
    assert found.batches == len(made) == 14
    assert found.entries == (60, 60 / 2 + 147 / 2, 147)
    assert found.positives == (positives.min(), np.median(positives), positives.max())
    assert found.positives_mean == pytest.approx(positives.mean())
    density = positives.sum() / (2 * 40 * 60 + 2 * 70 * 147)
    assert found.label_density == pytest.approx(density)
    assert found.padding == pytest.approx(1 - used / candidates)
    assert set(found.sizes) == {batch.targets.valid.shape[1] for batch in made}
    assert found.dropped_labels == 0


def test_more_sizes_pad_less_and_lines_say_what_was_found(corpus):
    many = dataclasses.replace(SAMPLING, neg_ratio=20.0)
    one, three = (
        describe({"train": corpus}, many, dataclasses.replace(DATA, sizes=n)).splits["train"]
        for n in (1, 3)
    )
    assert len(three.sizes) == 3 and three.padding < 0.8 * one.padding
    lines = describe({"train": corpus, "validation": corpus}, SAMPLING, DATA).lines()
    assert lines[0] == "train: 4 documents, 220 tokens, 220 samples in 14 batches"
    assert lines[1] == "  entries per document: 60 / 104 / 147 (min / median / max)"
    assert any(line.startswith("  positive entries per sample: ") for line in lines)
    assert lines[-5] == "leakage: 4 pairs of documents between train, validation"
    assert lines[-4].startswith(
        "  train/doc-0-0 and validation/doc-0-0: same source, keys, first 50"
    )
    pages = dataclasses.replace(SAMPLING, unit="page")
    assert "positive pages per sample" in describe({"x": corpus}, pages, DATA).lines()[2]


def test_leaks_between_splits_are_named_by_what_is_shared(corpus, root, tmp_path):
    traces = {path.name: open_trace(path) for path in sorted(root.iterdir())}
    first, second, third = (traces[name] for name in ("doc-0-0", "doc-0-1", "doc-1-0"))
    copied(first, tmp_path, name="a", source="told otherwise")
    copied(second, tmp_path, name="b", source="shorter", entries=55)
    copied(third, tmp_path, name="c", source="cut", entries=120, prompt_tokens=4 * 120)
    other = planted_traces(tmp_path / "other", documents=1, tokens=40, prompt_entries=50, seed=5)
    validation, test = Corpus.open([tmp_path]), Corpus.open([other])
    leaks = find_leaks({"train": corpus, "validation": validation, "test": test})
    assert [(leak.first, leak.second, leak.shared) for leak in leaks] == [
        ("train/doc-0-0", "validation/a", ("keys", "first 50 entries of the prompt")),
        ("train/doc-0-1", "validation/b", ("first 50 entries of the prompt",)),
    ]
    assert find_leaks({"train": corpus, "test": test}) == ()
    clean = describe({"train": corpus, "test": test}, SAMPLING, DATA).lines()[-1]
    assert clean == "leakage: none found between train, test"
