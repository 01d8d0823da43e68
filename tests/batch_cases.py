"""Planted traces as batches, and what tests hold batches against."""

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.train_traces import planted_traces
from train.data.dataset import DataConfig, batches
from train.data.labels import SamplingConfig
from train.traces.trace import open_trace
from train.traces.votes import SparseRows

SAMPLING = SamplingConfig(window=16, neg_ratio=3.0, vote_weighting=True, most_votes=4)
DATA = DataConfig(batch_size=20, mixed_documents=2, threads=2, seed=3)


def two_sets(root: Path) -> tuple[Path, Path]:
    """Two trace sets of 3 and 2 documents, of 53 tokens each and of two lengths."""
    options = {"tokens": 53, "hidden": 6}
    short = planted_traces(root / "short", documents=3, prompt_entries=60, **options)
    return short, planted_traces(root / "long", documents=2, seed=1, **options)


def taken(corpus, data=DATA, sampling=SAMPLING, *, epochs=1, **options):
    iterator = batches(corpus, data, sampling, epochs=epochs, **options)
    found = list(iterator)
    assert len(found) == epochs * iterator.steps_per_epoch
    iterator.close()
    return found


def leaves(batch):
    return [batch.hidden, *batch.drawn]


def equal(one, other):
    pairs = list(zip(leaves(one), leaves(other), strict=True))
    return all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def joined(parts):
    """The global batch of all processes' rows; hidden states have a first axis more."""
    columns = zip(*map(leaves, parts), strict=True)
    return [np.concatenate(c, axis=1 if i == 0 else 0) for i, c in enumerate(columns)]


class Facts(NamedTuple):
    """A trace as plain arrays."""

    hidden: np.ndarray
    positions: np.ndarray
    formed_at: np.ndarray
    votes: SparseRows
    mass: SparseRows
    common: np.ndarray


@functools.cache
def facts_of(path, layers=(0, 1)):
    trace = open_trace(path)
    votes, mass = trace.votes(), trace.mass()
    assert mass is not None
    arrays = [trace.read(name) for name in ("hidden", "positions", "formed_at")]
    common = np.bincount(votes.indices, minlength=trace.entries) > 0.8 * trace.tokens
    return Facts(arrays[0][:, layers], *arrays[1:], votes, mass, common)


def entries_of(batch, b):
    """The entries of the valid candidates of a row."""
    return batch.drawn.index[b][batch.targets.valid[b]].tolist()


def check_row(batch, b, facts, sampling):
    """One row against the trace, by formulas of its own: positives, negatives, golden entries."""
    token, entries = int(batch.sample[b, 1]), len(facts.formed_at)
    votes, sums = {}, np.zeros(entries)
    for t in range(token, min(token + sampling.window, len(facts.positions))):
        for entry, value in zip(*facts.votes.row(t), strict=True):
            votes[int(entry)] = max(votes.get(int(entry), 0), int(value))
        np.add.at(sums, *facts.mass.row(t))
    np.testing.assert_array_equal(batch.hidden[:, b, -1], facts.hidden[token])
    assert batch.drawn.positions[b] == facts.positions[token]
    assert batch.drawn.entries[b] == np.sum(facts.formed_at <= token)
    found = entries_of(batch, b)
    assert len(found) == len(set(found))
    positive = np.array([entry in votes for entry in found])
    weights = [0.5 + 1.5 * (votes.get(n, 3) - 3) / (sampling.most_votes - 3) for n in found]
    weights = np.where(facts.common[found], 0.5, weights)
    targets = [part[b][batch.targets.valid[b]] for part in batch.targets[:3]]
    np.testing.assert_array_equal(targets[0], positive)
    np.testing.assert_allclose(targets[1], np.where(positive, weights, 1), rtol=1e-6)
    np.testing.assert_allclose(targets[2], sums[found], rtol=1e-6)  # float32
    return set(found) & set(votes), set(found) - set(votes), set(votes)
