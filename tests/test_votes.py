"""Votes, golden sets and window unions are those of the written-out rules (LSA spec 4.2)."""

import math

import numpy as np
import pytest

from lsa_jax.config import ConfigError
from train.traces.votes import (
    SparseRows,
    VoteConfig,
    golden_from_logits,
    golden_sets,
    kept_ranks,
    top_entries,
    window_unions,
)

EXAMPLE = [[2, 1, 0, 0, 0], [5, 0, 0, 0, 0], [0, 0, 3, 3, 0], [1, 1, 1, 1, 1]]


def kept_by_hand(logits, cfg):
    """The entries that one layer keeps, by the rule's words: plain Python, float64."""
    order = sorted(range(len(logits)), key=lambda j: (-logits[j], j))[: cfg.top_k]
    weights = [math.exp(logits[j] - logits[order[0]]) for j in order] if order else []
    kept, running = [], 0.0
    for rank, entry in enumerate(order):
        running += weights[rank] / sum(weights)
        if running <= cfg.top_p + cfg.eps:
            kept.append(entry)
        else:
            kept += [entry] if rank else order[:2]  # rank 0 by force, and then the first over
            break
    return kept


def golden_by_hand(logits, entries, cfg):
    rows = []
    for token, count in zip(logits, entries, strict=True):
        votes = {}
        for layer in token:
            for entry in kept_by_hand([float(z) for z in layer[:count]], cfg):
                votes[entry] = votes.get(entry, 0) + 1
        chosen = [(j, v) for j, v in votes.items() if v >= cfg.min_layers]
        rows.append(sorted(chosen, key=lambda pair: (-pair[1], pair[0])))
    return rows


def as_lists(rows):
    return [
        list(zip(*(part.tolist() for part in rows.row(r)), strict=True)) for r in range(len(rows))
    ]


def kept_entries(logits, **options):
    """Entries kept by each layer of one token, in order of rank."""
    z = np.asarray(logits, np.float32)[None]
    cfg = VoteConfig(**options)
    values, indices = top_entries(z, np.full(1, z.shape[2]), cfg.top_k)
    kept = kept_ranks(values, cfg)
    return [i[k].tolist() for i, k in zip(indices[0], kept[0], strict=True)]


def test_the_worked_example_keeps_and_votes_as_worked():
    assert kept_entries(EXAMPLE) == [[0, 1], [0, 1], [2, 3], [0, 1, 2, 3]]
    logits = np.array([EXAMPLE], np.float32)
    three, four = logits[:, :3], logits
    cfg = VoteConfig(min_layers=2)
    assert as_lists(golden_from_logits(three, np.full(1, 5), cfg)) == [[(0, 2), (1, 2)]]
    assert as_lists(golden_from_logits(three, np.full(1, 5), VoteConfig(min_layers=1))) == [
        [(0, 2), (1, 2), (2, 1), (3, 1)]
    ]
    want = [[(0, 3), (1, 3), (2, 2), (3, 2)]]
    assert as_lists(golden_from_logits(four, np.full(1, 5), cfg)) == want


def test_a_peaked_layer_votes_for_two_entries_and_for_one_where_there_is_one():
    assert kept_entries([[0, 9, 0]]) == [[1, 0]]
    assert kept_entries([[9]]) == [[0]]
    assert kept_entries([[88, -88, 3]]) == [[0, 2]]  # the others' probabilities are zero


def test_a_sum_that_reaches_p_up_to_rounding_does_not_exceed_it():
    """Three fifths in float64 are 0.6000000000000001."""
    assert kept_entries([[1] * 5]) == [[0, 1, 2, 3]]
    assert kept_entries([[1] * 5], eps=0) == [[0, 1, 2]]
    assert kept_entries([[1] * 5], top_p=0.599) == [[0, 1, 2]]
    assert kept_entries([[1] * 5], top_p=0.601) == [[0, 1, 2, 3]]


def test_probabilities_are_over_the_top_k_only():
    """Over all six, 0.9 would keep every entry but the last; over two, it keeps both."""
    assert kept_entries([[1, 1, 1, 1, 1, 1]], top_p=0.4, top_k=2) == [[0, 1]]
    assert kept_entries([[1, 1, 1, 1, 1, 1]], top_p=0.4) == [[0, 1, 2]]


def test_equal_logits_are_taken_in_the_order_of_their_entries():
    values, indices = top_entries(np.array([[[1, 2, 1, 2, 1, 2.0]]]), np.array([6]), 5)
    assert indices[0, 0].tolist() == [1, 3, 5, 0, 2]
    assert values[0, 0].tolist() == [2, 2, 2, 1, 1]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("columns", "top_k"), [(1, 4), (7, 4), (40, 8), (40, 64), (3, 3)])
def test_golden_sets_equal_the_rule_written_out(columns, top_k, ties):
    rng = np.random.default_rng(columns)
    logits = rng.normal(size=(30, 6, columns)).astype(np.float32) * rng.choice(
        [1, 4, 30], (30, 6, 1)
    )
    logits = np.round(logits) if ties else logits
    logits[:, 3:] = np.where(rng.random((30, 3, 1)) < 0.5, logits[:, :3], logits[:, 3:])
    entries = rng.integers(1, columns + 1, 30)
    cfg = VoteConfig(top_k=top_k, min_layers=2)
    got = golden_from_logits(logits, entries, cfg)
    assert as_lists(got) == golden_by_hand(logits, entries, cfg)
    assert (got.indices.dtype, got.values.dtype) == (np.int32, np.uint8)
    assert got.pointers.dtype == np.int64


def test_the_published_sizes_equal_the_rule_written_out():
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(2, 1, 900))
    logits = (2 * shared + rng.normal(size=(2, 21, 900))).astype(np.float32)
    got = golden_from_logits(logits, np.array([900, 700]), VoteConfig())
    want = golden_by_hand(logits, [900, 700], VoteConfig())
    assert as_lists(got) == want
    assert all(len(row) > 5 for row in want)


def test_columns_without_an_entry_have_no_influence():
    logits = np.random.default_rng(1).normal(size=(2, 4, 6)).astype(np.float32)
    entries, cfg = np.array([0, 4]), VoteConfig(min_layers=1)
    want = as_lists(golden_from_logits(logits, entries, cfg))
    logits[0], logits[1, :, 4:] = np.nan, np.inf
    assert as_lists(golden_from_logits(logits, entries, cfg)) == want
    assert want[0] == [] and want[1]
    nothing = golden_from_logits(np.zeros((3, 4, 0), np.float32), np.zeros(3, int), cfg)
    assert as_lists(nothing) == [[], [], []]


def test_a_logit_that_is_not_finite_is_refused_and_named():
    logits = np.zeros((2, 3, 4), np.float32)
    logits[1, 2, 0] = np.nan
    with pytest.raises(ConfigError, match="got nan at token 1, layer 2, entry 0"):
        golden_from_logits(logits, np.array([4, 4]), VoteConfig())
    with pytest.raises(ConfigError, match="got -inf at token 0, layer 0, entry 3"):
        top_entries(np.array([[[0, 0, 0, -np.inf]]]), np.array([4]), 2)


@pytest.mark.parametrize("window", [1, 3, 64])
def test_window_unions_equal_sets_joined_token_by_token(window):
    rng = np.random.default_rng(window)
    kept = rng.random((90, 5, 3)) < np.where(np.arange(90) % 7, 0.5, 0)[:, None, None]
    indices = rng.permuted(np.tile(np.arange(12), (90, 5, 1)), axis=2)[..., :3].astype(np.int32)
    golden = golden_sets(indices, kept, 2)
    chosen = np.array([0, 89, 5, 88, 5])
    for tokens in (None, chosen, np.zeros(0, int)):
        got = as_lists(window_unions(golden, tokens, window=window))
        want = []
        for t in range(90) if tokens is None else tokens:
            best = {}
            for u in range(t, min(t + window - 1, 89) + 1):
                for entry, votes in zip(*golden.row(u), strict=True):
                    best[int(entry)] = max(best.get(int(entry), 0), int(votes))
            want.append(sorted(best.items()))
        assert got == want
    assert as_lists(golden)[0] == []


def test_windows_at_the_end_shrink_to_the_tokens_that_are_left():
    golden = SparseRows(
        np.array([4, 2, 9, 2]), np.array([3, 5, 4, 6], np.uint8), np.array([0, 2, 3, 4])
    )
    assert as_lists(window_unions(golden, window=2)) == [
        [(2, 5), (4, 3), (9, 4)],
        [(2, 6), (9, 4)],
        [(2, 6)],
    ]
    empty = SparseRows(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(3, np.int64))
    assert as_lists(window_unions(empty)) == [[], []]
    with pytest.raises(ConfigError, match=r"tokens must be in 0\.\.2, got 0\.\.3"):
        window_unions(golden, np.array([0, 3]))
    with pytest.raises(ConfigError, match="window must be >= 1, got 0"):
        window_unions(golden, window=0)


@pytest.mark.parametrize(
    ("pointers", "count", "message"),
    [
        ([0, 2], 3, "pointers must run from 0 to 3"),
        ([1, 3], 3, "pointers must run from 0 to 3"),
        ([0, 2, 1, 3], 3, "pointers must never descend, but do after row 1"),
        ([], 0, "pointers must run from 0 to 0"),
    ],
)
def test_sparse_rows_that_do_not_fit_are_refused(pointers, count, message):
    with pytest.raises(ConfigError, match=message):
        SparseRows(np.zeros(count, np.int32), np.zeros(count), np.array(pointers, np.int64))


@pytest.mark.parametrize(
    ("field", "value"),
    [("top_k", 0), ("top_p", 0.0), ("top_p", 1.0), ("min_layers", 256), ("eps", -1e-9)],
)
def test_a_vote_setting_out_of_range_is_refused_and_named(field, value):
    with pytest.raises(ConfigError, match=f"votes.{field} must be"):
        VoteConfig(**{field: value})
    with pytest.raises(ConfigError, match="at most 255 layers, got 256"):
        golden_sets(np.zeros((1, 256, 1), np.int32), np.ones((1, 256, 1), bool), 3)
