"""The pool holds the keys of the documents that batches are of, whatever it has to give up."""

import dataclasses
import functools
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from lsa_jax import shardings
from lsa_jax.config import ConfigError
from tests.batch_cases import DATA, SAMPLING, two_sets
from tests.train_traces import planted_traces
from train.data.dataset import Corpus, batches
from train.run import key_pool
from train.run.key_pool import KeyPool, most_pages
from train.traces.columns import TraceError
from train.traces.trace import open_trace
from train.traces.trace_info import Keys

gather = jax.jit(key_pool.gather)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Corpus:
    """Documents of 73 and of 213 entries."""
    return Corpus.open(two_sets(tmp_path_factory.mktemp("sets")))


@pytest.fixture
def small_pages(monkeypatch) -> int:
    """Pages that documents have some of, the last one not full."""
    monkeypatch.setattr(key_pool, "PAGE_ENTRIES", 32)
    return 32


def pool_bytes(corpus: Corpus, pages: int, size: int) -> int:
    return pages * size * len(corpus.target_layers) * (8 + 4)


@functools.cache
def keys_of(path: Path) -> Keys:
    return open_trace(path).keys()


def check_batch(pool: KeyPool, corpus: Corpus, batch) -> None:
    """Each candidate's keys and scales are its trace's, at every layer."""
    found = gather(pool.planes, batch.sample[:, 0], batch.drawn.index)
    keys, scale = jax.tree.map(np.asarray, found)
    for b in np.flatnonzero(batch.sample[:, 0] >= 0):
        trace = corpus.traces[batch.sample[b, 0]]
        valid = batch.targets.valid[b]
        want, index = keys_of(trace.path), batch.drawn.index[b][valid]
        for layer, ordinal in enumerate(corpus.target_layers):
            at = trace.info.target_layers.index(ordinal)
            assert keys[layer][b][valid].tobytes() == want.values[index, at].tobytes()
            assert not keys[layer][b][~valid].astype(np.float32).any()
            if want.scale is not None:
                np.testing.assert_array_equal(scale[layer][b][valid], want.scale[index, at])


@pytest.mark.parametrize("key_format", ["fp8", "bfloat16"])
def test_keys_of_every_batch_are_its_traces(key_format, small_pages, tmp_path):
    options = {"target_layers": (0, 1, 3), "key_format": key_format, "tokens": 24}
    root = planted_traces(tmp_path, documents=3, prompt_entries=90, **options)
    corpus = Corpus.open([root], (0, 3))
    stream = batches(corpus, DATA, SAMPLING)
    pool = KeyPool(corpus, DATA, stream.table, shardings.make_mesh())
    for batch in stream:
        pool.supply(stream.demand)
        check_batch(pool, corpus, batch)
    assert pool.pages == 9 and pool.uploads == 3
    stream.close()
    pool.close()


def test_a_small_pool_gives_up_what_is_not_mixed_any_more(corpus, small_pages):
    """Documents of 3, 3, 3, 7 and 7 pages; two are mixed at a time, and begin a third."""
    data = dataclasses.replace(DATA, pool_bytes=pool_bytes(corpus, 17, small_pages))
    stream = batches(corpus, data, SAMPLING, epochs=3)
    pool = KeyPool(corpus, data, stream.table, shardings.make_mesh())
    assert pool.pages == 17 < 23
    for batch in stream:
        pool.supply(stream.demand)
        check_batch(pool, corpus, batch)
    assert 5 < pool.uploads <= 3 * 7
    stream.close()
    pool.close()


def test_what_a_step_reads_is_not_overwritten_under_it(corpus, small_pages):
    """Batches are gathered before any result is looked at, uploads between them."""
    data = dataclasses.replace(DATA, pool_bytes=pool_bytes(corpus, 17, small_pages))
    stream = batches(corpus, data, SAMPLING, epochs=2)
    pool, found, want = KeyPool(corpus, data, stream.table, shardings.make_mesh()), [], []
    for batch in stream:
        pool.supply(stream.demand)
        found.append(gather(pool.planes, batch.sample[:, 0], batch.drawn.index)[0])
        want.append((batch.sample[0, 0], batch.drawn.index[0]))
    for keys, (document, index) in zip(found, want, strict=True):
        values = corpus.traces[document].keys().values[:, 0]
        got = np.asarray(keys[0][0])[index >= 0]
        assert got.tobytes() == values[index[index >= 0]].tobytes()
    stream.close()
    pool.close()


def test_a_pool_that_cannot_hold_what_is_mixed_is_refused_in_one_line(corpus, small_pages):
    needed, page = 17, pool_bytes(corpus, 1, small_pages)
    table = batches(corpus, DATA, SAMPLING).table
    data = dataclasses.replace(DATA, pool_bytes=needed * page - 1)
    with pytest.raises(ConfigError) as caught:
        KeyPool(corpus, data, table, shardings.make_mesh())
    message = str(caught.value)
    assert message.startswith(f"data.pool_bytes must be >= {needed * page:,} bytes, the keys of")
    assert f"got {needed * page - 1}" in message and "\n" not in message
    with pytest.raises(ConfigError, match=r"data\.pool_bytes must be >= 1"):
        dataclasses.replace(DATA, pool_bytes=0)


def test_documents_with_few_samples_count_as_often_as_a_batch_can_begin_with_them():
    pages, samples = np.array([5, 4, 3, 2, 1, 9]), np.array([30, 20, 10, 40, 50, 0])
    for mixed, batch, want in ((1, 1, 5), (1, 2, 9), (2, 11, 12), (1, 12, 12), (2, 64, 15)):
        data = dataclasses.replace(DATA, mixed_documents=mixed, batch_size=batch)
        assert most_pages(pages, samples, data) == want


def test_a_group_of_mixed_documents_never_has_more_pages_than_are_asked_for(corpus):
    sizes = np.array([3, 3, 3, 7, 7])
    for mixed in (1, 2, 3):
        for batch in (5, 20, 60):
            data = dataclasses.replace(DATA, mixed_documents=mixed, batch_size=batch)
            stream = batches(corpus, data, SAMPLING)
            samples = np.bincount(stream.table.documents)
            for epoch in range(5):
                groups = [sizes[group.documents].sum() for group in stream.orders[epoch].groups]
                assert max(groups) <= most_pages(sizes, samples, data)


def test_the_page_table_says_where_documents_are(corpus, small_pages):
    stream = batches(corpus, DATA, SAMPLING)
    pool = KeyPool(corpus, DATA, stream.table, shardings.make_mesh())
    next(stream)
    demand = stream.demand
    pool.supply(demand._replace(batch=np.array([0, 3])))
    table = np.asarray(pool.planes.table)
    assert table.shape == (5, 7) and table.dtype == np.int32
    assert len({*table[3].tolist(), *table[0, :3].tolist()}) == 10  # no page is of two
    assert not table[0, 3:].any()
    stream.close()
    pool.close()


def test_a_damaged_document_is_named_when_it_is_due(corpus, small_pages, tmp_path):
    root = planted_traces(tmp_path, documents=1, tokens=8, prompt_entries=40)
    broken = Corpus.open([root])
    stream = batches(broken, DATA, SAMPLING)
    pool = KeyPool(broken, DATA, stream.table, shardings.make_mesh())
    next(stream)
    shutil.rmtree(root / "doc-0-0" / "keys")
    with pytest.raises(TraceError, match=r"doc-0-0/keys is missing or damaged"):
        pool.supply(stream.demand)
    stream.close()
    pool.close()
