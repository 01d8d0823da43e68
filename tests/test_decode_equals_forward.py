"""However a prompt is cut, padded, batched or paged, the model computes the same thing.

The golden tests compare with HuggingFace; these compare the model with itself, on the smallest
golden model with both compressors (CSA over 4 tokens, HCA over 8, window 5, top-k 2) and on the
tiny one, whose entries cross pages, the window and the top-k many times over.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache.state import DecodeState, grow
from lsa_jax.config import CacheConfig
from tests.golden.loader import load_case
from tests.parity_models import (
    CACHE,
    LOGITS_ERROR,
    PATH_ERROR,
    close,
    empty,
    extend,
    feed,
    flat_values,
    model_of,
    rest_of,
)

SMALL = load_case("minimal")  # 3 rows of 37 tokens
LENGTH = SMALL.ids.shape[1]


def same(got: object, want: object) -> None:
    """Bitwise equality of two pytrees of arrays."""
    jax.tree.map(np.testing.assert_array_equal, got, want)


def row(tree: object, b: int) -> object:
    return jax.tree.map(lambda x: x[b], tree)


def counts(*n: int) -> np.ndarray:
    return np.array(n, np.int32)


def same_history(a: DecodeState, b: DecodeState, ratios: tuple[int, ...]) -> None:
    """Two states of the same tokens agree on everything that later tokens can read."""
    np.testing.assert_array_equal(a.lengths, b.lengths)
    tokens = int(a.lengths[0])
    for i, (x, y) in enumerate(zip(a.layers, b.layers, strict=True)):
        close(x.window, y.window, PATH_ERROR)
        if ratios[i]:
            n = tokens // ratios[i]
            close(flat_values(x.entries)[:, :n], flat_values(y.entries)[:, :n], PATH_ERROR)
        for ours, theirs in ((x.tail, y.tail), (x.index_tail, y.index_tail)):
            jax.tree.map(lambda p, q: close(p, q, PATH_ERROR), ours, theirs)


@functools.cache
def one_shot() -> tuple[np.ndarray, DecodeState]:
    model = model_of("minimal")
    state = empty(model, len(SMALL.ids), LENGTH)
    logits, _, state = extend(model, SMALL.ids, state, np.full(3, LENGTH, np.int32))
    return np.asarray(logits), state


def ragged_chunks(rows: int, length: int, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens so far, tokens of the next chunk) of each row, row b in chunks of about b tokens;
    some chunks of some rows are empty."""
    rng, at = np.random.default_rng(0), np.zeros(rows, np.int32)
    while (at < length).any():
        n = np.clip(np.arange(rows) + rng.integers(-2, 4, rows), 0, size)
        n = np.minimum(n, length - at).astype(np.int32)
        yield at, n
        at = at + n


def test_any_chunks_from_any_offset_give_the_logits_and_state_of_regular_ones():
    case, model = load_case("tiny"), model_of("tiny")
    rows, length, size = 24, 100, 24
    ids = np.resize(case.ids[:, :length], (rows, length))  # the two prompts in turns
    want = np.resize(case.outputs["logits"][:, :length], (rows, length, case.cfg.vocab_size))
    ragged, regular, starts = empty(model, rows, length), empty(model, rows, length), set()
    for at, n in ragged_chunks(rows, length, size):
        logits, _, ragged = extend(model, rest_of(ids, at)[:, :size], ragged, n)
        for b in range(rows):
            close(logits[b, : n[b]], want[b, at[b] : at[b] + n[b]], LOGITS_ERROR)
        starts |= set(at.tolist())
    for period in (case.cfg.csa_ratio, case.cfg.hca_ratio, case.cfg.sliding_window):
        assert {start % period for start in starts} == set(range(period))
    for at in range(0, length, size):
        n = np.full(rows, min(size, length - at), np.int32)
        _, _, regular = extend(model, rest_of(ids, np.full(rows, at))[:, :size], regular, n)
    same_history(ragged, regular, tuple(map(case.cfg.ratio, case.cfg.layer_types)))


@pytest.mark.slow
@pytest.mark.parametrize("page_entries", [1, 4, 64])
def test_the_page_size_changes_nothing(page_entries: int):
    model, cache = model_of("minimal"), CacheConfig(kv_format="float32", page_entries=page_entries)
    split = counts(1, 18, 36)
    state = empty(model, 3, LENGTH, cache)
    assert jax.tree.leaves(state.layers[0].entries)[0].shape[2] == page_entries
    before, _, state = extend(model, SMALL.ids, state, split)
    after, state = feed(model, rest_of(SMALL.ids, split), state, LENGTH - split)
    want, whole = one_shot()
    for b, s in enumerate(split):
        close(before[b, :s], want[b, :s], PATH_ERROR)
        close(after[b, : LENGTH - s], want[b, s:], PATH_ERROR)
    same_history(state, whole, (4, 8))


def test_decoding_a_token_at_a_time_from_nothing_equals_one_pass():
    model, (want, whole) = model_of("minimal"), one_shot()
    logits, state = feed(model, SMALL.ids, empty(model, 3, LENGTH), np.full(3, LENGTH, np.int32))
    close(logits, want, PATH_ERROR)
    same_history(state, whole, (4, 8))


def test_a_batch_of_mixed_lengths_equals_its_rows_alone():
    model, lengths, more = model_of("minimal"), counts(37, 5, 20), counts(0, 7, 9)
    before, _, state = extend(model, SMALL.ids, empty(model, 3, LENGTH), lengths)
    after, state = feed(model, rest_of(SMALL.ids, lengths), state, more)
    for b, (n, m) in enumerate(zip(lengths, more, strict=True)):
        ids = SMALL.ids[b : b + 1]
        alone, _, single = extend(model, ids, empty(model, 1, LENGTH), counts(n))
        close(before[b, :n], alone[0, :n], PATH_ERROR)
        rest, single = feed(model, rest_of(ids, counts(n)), single, counts(m))
        close(after[b, :m], rest[0, :m], PATH_ERROR)
        one_row = jax.tree.map(lambda x, b=b: x[b : b + 1], state)
        same_history(one_row, single, (4, 8))


@pytest.mark.parametrize("run", [lambda *a: extend(*a)[0::2], feed], ids=["prefill", "decode"])
def test_a_row_does_not_depend_on_its_neighbours_tokens_or_lengths(run):
    model = model_of("minimal")
    start = extend(model, SMALL.ids, empty(model, 3, 2 * LENGTH), counts(11, 11, 11))[2]
    logits, state = run(model, SMALL.ids, start, counts(9, 21, 30))
    other = SMALL.ids.copy()
    other[0], other[2] = (other[0] + 1) % SMALL.cfg.vocab_size, other[2, ::-1]
    changed, after = run(model, other, start, counts(37, 21, 2))
    assert not np.array_equal(changed[0], logits[0])
    same(changed[1, :21], logits[1, :21])
    same(row(after, 1), row(state, 1))


@pytest.mark.parametrize("run", [lambda *a: extend(*a)[0::2], feed], ids=["prefill", "decode"])
def test_padding_leaves_no_trace(run):
    model = model_of("minimal")
    start = extend(model, SMALL.ids, empty(model, 3, 2 * LENGTH), counts(3, 17, 30))[2]
    n = counts(0, 6, 19)
    logits, state = run(model, SMALL.ids, start, n)
    padding = np.arange(LENGTH) >= n[:, None]
    other = np.where(padding, SMALL.ids[::-1, ::-1], SMALL.ids)
    changed, after = run(model, other, start, n)
    for b, count in enumerate(n):
        same(changed[b, :count], logits[b, :count])
    same(after, state)
    same(row(state, 0), row(start, 0))  # no tokens at all: not a bit changes


def test_a_token_is_seen_by_itself_and_later_tokens_only():
    model = model_of("minimal")
    logits = one_shot()[0]
    for at in (0, 3, 4, 7, 8, 20):  # first and last tokens of entries
        other = SMALL.ids.copy()
        other[:, at] = (other[:, at] + 1) % SMALL.cfg.vocab_size
        changed, _, _ = extend(model, other, empty(model, 3, LENGTH), np.full(3, LENGTH, np.int32))
        # Causal to rounding: another routing moves tokens within the expert matmuls.
        close(changed[:, :at], logits[:, :at], 1e-6 if at else 0)
        assert (np.abs(changed - logits)[:, at:].max(axis=(0, 2)) > 1e-3).all()


@pytest.mark.slow
def test_a_grown_state_goes_on_as_a_large_one_would():
    model, split = model_of("minimal"), counts(5, 8, 11)
    _, _, state = extend(model, SMALL.ids[:, :11], empty(model, 3, 11), split)
    state = grow(SMALL.cfg, CACHE, state, LENGTH)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, empty(model, 3, LENGTH))
    after, state = feed(model, rest_of(SMALL.ids, split), state, LENGTH - split)
    want, whole = one_shot()
    for b, s in enumerate(split):
        close(after[b, : LENGTH - s], want[b, s:], PATH_ERROR)
    same_history(state, whole, (4, 8))
