"""Documents: which fit together, what is read of them and kept, which negatives are hard."""

import dataclasses
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from lsa_jax.config import ConfigError
from tests.batch_cases import DATA, SAMPLING, check_row, facts_of, taken, two_sets
from tests.train_traces import planted_traces
from train.data import documents
from train.data.dataset import Corpus, batches
from train.data.documents import Cache, load_hidden, load_keys, load_labels
from train.traces.columns import TraceError
from train.traces.trace import finished_traces, open_trace


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    return two_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def corpus(sets) -> Corpus:
    return Corpus.open(sets)


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
    with pytest.raises(TraceError, match=r"must be given once, got .*short/doc-0-0 twice"):
        Corpus.open([sets[0], sets[0]])
    (tmp_path / "empty").mkdir()
    for missing in ("empty", "nowhere"):
        with pytest.raises(TraceError, match=f"{missing} must have .*traces, got none"):
            Corpus.open([tmp_path / missing])


def test_documents_are_loaded_once_and_the_least_recent_are_given_up(corpus):
    size = load_labels(corpus.traces[4], 4).nbytes
    cache = Cache(lambda n: load_labels(corpus.traces[n], n), 2 * size)
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
    cache = Cache(lambda n: documents.load_hidden(corpus.traces[n], (0,)), 1 << 30)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone"):

        def gone(*_):
            raise OSError("gone")

        patch.setattr(documents, "load_hidden", gone)
        cache[2]
    assert cache[2].shape[1] == 1 and cache.loads == 1


def test_the_size_of_documents_is_known_before_they_are_loaded(sets):
    for layers in ((0, 2), (2,)):
        corpus = Corpus.open(sets, layers)
        held = []
        for number, trace in enumerate(corpus.traces):
            keys, hidden = load_keys(trace, layers), load_hidden(trace, layers)
            assert keys.values.shape == (trace.entries, len(layers), 8) and keys.scale is not None
            held.append(load_labels(trace, number).nbytes + hidden.nbytes)
            held[-1] += keys.values.nbytes + keys.scale.nbytes
        # Mass is float16 in the trace and float32 in memory, and labels have a little beside.
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
