"""Batches are the same however they are made, and go on from wherever they were left."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest

from lsa_jax.config import ConfigError
from tests.batch_cases import DATA, SAMPLING, equal, joined, leaves, taken, two_sets
from train.data.dataset import Corpus, batches
from train.traces.columns import TraceError


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> tuple[Path, Path]:
    return two_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def corpus(sets) -> Corpus:
    return Corpus.open(sets)


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
        with pytest.raises(ConfigError, match=r"data\.train must have the traces and") as caught:
            other.set_state(state)
        assert f"got others in {sets[0].parent}/" in str(caught.value)
    with pytest.raises(ConfigError, match=r"next_step of the data's state must be in 0\.\.14"):
        iterator.set_state({**state, "next_step": 15})
    same = batches(corpus, dataclasses.replace(DATA, cache_bytes=0, threads=1), SAMPLING)
    same.set_state(state)
    for one in (iterator, same, *others):
        one.close()


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
