"""Training samples against the rules of LSA spec 5.1, worked by hand and by brute force."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.resident_set import forced_pages
from train.data import labels, sampling
from train.data.labels import Document, ResidentRule, SamplingConfig
from train.data.sampling import Sample
from train.traces.votes import SparseRows

TOKENS, ENTRIES, PROMPT = 40, 100, 60


def rows(*pairs: dict[int, float], dtype: Any = np.int32) -> SparseRows:
    """One row a dict of index -> value."""
    indices = [i for row in pairs for i in row]
    values = [v for row in pairs for v in row.values()]
    ends = np.cumsum([0, *(len(row) for row in pairs)])
    return SparseRows(np.array(indices, np.int32), np.array(values, dtype), ends)


def random_rows(seed: int, *, low: int = 3, high: int = 22, dtype: Any = np.uint8) -> SparseRows:
    rng = np.random.default_rng(seed)
    return rows(
        *(
            {int(i): rng.integers(low, high) for i in rng.permutation(ENTRIES)[: rng.integers(6)]}
            for _ in range(TOKENS)
        ),
        dtype=dtype,
    )


def document(**options: Any) -> Document:
    """Every token forms an entry; entry 0 is golden throughout."""
    votes = random_rows(0)
    always = rows(*(dict(zip(*votes.row(t), strict=True)) | {0: 21} for t in range(TOKENS)))
    formed = np.maximum(np.arange(ENTRIES) - PROMPT, 0).astype(np.int32)
    mass = random_rows(1, low=1, high=9, dtype=np.float16)
    return Document(7, always, formed, **{"mass": mass, **options})


def golden(doc: Document, token: int, window: int) -> dict[int, int]:
    """Most votes of each entry in the window, entry by entry."""
    most: dict[int, int] = {}
    for t in range(token, min(token + window, TOKENS)):
        for index, value in zip(*doc.votes.row(t), strict=True):
            most[int(index)] = max(most.get(int(index), 0), int(value))
    return most


def same(a: Sample, b: Sample) -> bool:
    pairs = zip(dataclasses.astuple(a), dataclasses.astuple(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def test_a_window_is_the_union_of_its_tokens_with_their_most_votes() -> None:
    votes = rows({4: 3, 1: 5}, {}, {1: 7, 9: 3}, {2: 4})
    for token, window, want in [
        (0, 1, {1: 5, 4: 3}),
        (0, 3, {1: 7, 4: 3, 9: 3}),
        (1, 1, {}),
        (2, 64, {1: 7, 2: 4, 9: 3}),  # cut at the end
    ]:
        entries = labels.window_union(votes, labels.previous_rows(votes), token, window)
        assert len(entries) == len(want) and set(entries.tolist()) == set(want)
        most = labels.window_votes(votes, token, window, np.append(entries, 12))
        assert most.tolist() == [*(want[n] for n in entries.tolist()), 0]


def test_mass_adds_up_over_the_window_without_float16_rounding() -> None:
    mass = rows({3: 2048, 1: 0.5}, {3: 1}, {3: 1, 5: 4}, dtype=np.float16)
    sums = labels.window_mass(mass, 0, 3, 5)  # entry 5 is beyond the document's
    assert sums.tolist() == [0, 0.5, 0, 2050, 0] and sums.dtype == np.float32
    assert labels.window_mass(mass, 1, 64, 6).tolist() == [0, 0, 0, 2, 0, 4]
    assert labels.window_mass(rows({}, dtype=np.float16), 0, 2, 2).tolist() == [0, 0]


def test_vote_weights_run_from_a_half_to_two() -> None:
    assert labels.vote_weights(np.array([3, 12, 21], np.uint8)).tolist() == [0.5, 1.25, 2]
    assert labels.vote_weights(np.array([1, 2]), least=1, most=2).tolist() == [0.5, 2]
    with pytest.raises(ConfigError, match="ascending"):
        labels.vote_weights(np.array([3]), least=3, most=3)


def test_an_entry_is_trivial_above_the_share_of_tokens_not_at_it() -> None:
    votes = rows({0: 3, 1: 3, 8: 3}, {0: 3, 1: 3}, {0: 3, 1: 3}, {0: 3, 1: 3}, {0: 3})
    assert labels.trivial_entries(votes, 3).tolist() == [True, False, False]  # 5 and 4 of 5


def test_tokens_are_sampled_where_their_window_has_a_label() -> None:
    votes = rows({}, {}, {}, {5: 3}, {}, {}, {})
    assert labels.sampled_tokens(votes, window=2).tolist() == [2, 3]
    assert labels.sampled_tokens(votes, window=4, interval=2).tolist() == [0, 2]
    assert labels.sampled_tokens(votes, window=64).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize(("recency", "sink"), [(0, 0), (5, 0), (4, 3), (0, 9), (1000, 1)])
def test_evictable_entries_are_those_of_complete_pages_that_nothing_forces(
    size: int, recency: int, sink: int
) -> None:
    rule = ResidentRule(recency=recency, sink=sink, page_entries=size)
    counts, columns = np.arange(20), 24
    policy = PolicyConfig(recency=recency, sink=sink)
    forced = forced_pages(jnp.asarray(counts), -(-columns // size), policy, page_entries=size)
    complete = np.arange(forced.shape[1]) < (counts // size)[:, None]
    want = np.repeat(np.asarray(complete & ~forced), size, axis=1)[:, :columns]
    index = np.arange(columns)
    np.testing.assert_array_equal(labels.evictable(index, counts[:, None], rule), want)
    inside = labels.evictable(jnp.asarray(index), jnp.asarray(counts)[:, None], rule)
    np.testing.assert_array_equal(inside, want)
    for count in counts:
        first, last = rule.evictable_range(int(count))
        np.testing.assert_array_equal((index >= first) & (index < last), want[count])


@pytest.mark.parametrize("token", [0, 11, TOKENS - 1])
def test_a_sample_has_the_window_as_positives_and_as_many_others(token: int) -> None:
    doc, cfg = document(), SamplingConfig(window=8, neg_ratio=2.0)
    sample, most = sampling.draw_sample(doc, token, cfg), golden(doc, token, 8)
    assert sorted(sample.index[sample.labels == 1]) == sorted(most)
    negatives = sample.index[sample.labels == 0]
    assert len(set(negatives)) == len(negatives) == min(2 * len(most), ENTRIES - len(most))
    assert not set(negatives.tolist()) & set(most)
    weights = np.where(sample.index == 0, 0.5, 1)  # entry 0 is trivial and always positive
    np.testing.assert_array_equal(sample.weights, weights)
    mass = np.zeros(ENTRIES)
    for t in range(token, min(token + 8, TOKENS)):
        mass[doc.mass.row(t)[0]] += doc.mass.row(t)[1]
    np.testing.assert_array_equal(sample.mass, mass[sample.index])


def test_a_sample_stands_for_the_whole_pool() -> None:
    doc = document(hard=np.array([5, 50, 51, 52]))
    cfg = SamplingConfig(window=20, max_pos=10, neg_ratio=2.0, hard_share=0.2)
    sample, most = sampling.draw_sample(doc, 3, cfg), golden(doc, 3, 20)
    assert np.sum(sample.labels) == 10 < len(most)
    assert np.sum(sample.stands_for[sample.labels == 1]) == pytest.approx(len(most))
    assert np.sum(sample.stands_for) == pytest.approx(ENTRIES)
    assert not set(sample.index[sample.labels == 0].tolist()) & set(most)  # dropped ones neither


def test_weights_follow_the_most_votes_and_triviality_overrides_them() -> None:
    doc, cfg = document(), SamplingConfig(window=8, vote_weighting=True)
    sample, most = sampling.draw_sample(doc, 5, cfg), golden(doc, 5, 8)
    for index, label, weight in zip(sample.index, sample.labels, sample.weights, strict=True):
        by_votes = 0.5 + 1.5 * (most.get(int(index), 0) - 3) / 18
        want = 0.5 if index == 0 else by_votes if label else 1.0
        assert weight == pytest.approx(want)


def test_negatives_are_uniform_over_the_non_positives() -> None:
    doc, cfg = document(), SamplingConfig(window=8, neg_ratio=1.0)
    most = golden(doc, 2, 8)
    drawn = np.zeros(ENTRIES)
    draws, per_draw = 1000, len(most)
    for epoch in range(draws):
        sample = sampling.draw_sample(doc, 2, cfg, epoch=epoch)
        drawn[sample.index[sample.labels == 0]] += 1
    others = np.setdiff1d(np.arange(ENTRIES), list(most))
    share = per_draw / len(others)
    assert drawn[list(most)].sum() == 0 and drawn.sum() == draws * per_draw
    # 4.5 standard deviations: some hundred fair entries stay below with odds of 1000 to 1.
    spread = 4.5 * np.sqrt(draws * share * (1 - share))
    assert np.abs(drawn[others] - draws * share).max() < spread


def test_future_entries_are_candidates_of_the_authors_and_not_of_causal_samples() -> None:
    doc, token = document(), 4
    exist = PROMPT + token + 1  # the token's own entry can be read by it
    assert doc.entries_at(token) == exist
    everything = SamplingConfig(neg_ratio=1000.0, fake_positive=False)
    assert sorted(sampling.draw_sample(doc, token, everything).index) == list(range(ENTRIES))
    causal = dataclasses.replace(everything, causal=True)
    assert sorted(sampling.draw_sample(doc, token, causal).index) == list(range(exist))
    rule = ResidentRule(recency=10, sink=2, page_entries=8)
    ours = dataclasses.replace(everything, evictable_only=True, resident=rule)
    sample = sampling.draw_sample(doc, token, ours)
    assert sorted(sample.index) == list(range(8, 48))  # 55 are not recent, 6 pages are whole
    assert set(sample.index[sample.labels == 1].tolist()) == set(golden(doc, token, 64)) & set(
        range(8, 48)
    )


def test_labels_beyond_the_documents_entries_are_ignored_and_a_fake_one_takes_their_place() -> None:
    doc = Document(0, rows({30: 5, 11: 4}, {}), np.zeros(10, np.int32))
    sample = sampling.draw_sample(doc, 0, SamplingConfig(neg_ratio=3.0, vote_weighting=True))
    assert np.sum(sample.labels) == 1 and len(sample.index) == 4
    assert sample.index.max() < 10
    np.testing.assert_array_equal(sample.weights, 1)
    without = sampling.draw_sample(doc, 0, SamplingConfig(fake_positive=False))
    assert without.labels.tolist() == [0] and without.stands_for.tolist() == [10]
    assert not np.any(sampling.full_sample(doc, 0, SamplingConfig()).labels)
    fakes = {
        int(s.index[s.labels == 1][0])
        for s in (sampling.draw_sample(doc, 0, SamplingConfig(), epoch=e) for e in range(200))
    }
    assert fakes == set(range(10))


def test_a_sample_without_candidates_is_empty() -> None:
    cfg = SamplingConfig(evictable_only=True, resident=ResidentRule(recency=1000))
    sample = sampling.draw_sample(document(), 0, cfg)
    assert len(sample.index) == len(sample.codes) == len(sample.labels) == len(sample.mass) == 0


def test_hard_negatives_are_used_and_are_never_positives() -> None:
    doc = document(hard=np.array([0, 3, 14, 15, 92, 65, 35, 1000]))
    most = golden(doc, 0, 4)
    pool = {3, 14, 15, 92, 65, 35} - set(most)
    cfg = SamplingConfig(window=4, neg_ratio=1.0, hard_share=1.0)
    sample = sampling.draw_sample(doc, 0, cfg)
    negatives = set(sample.index[sample.labels == 0].tolist())
    assert len(negatives) == len(most) > len(pool) > 2
    assert negatives > pool and not negatives & set(most)
    few = dataclasses.replace(cfg, hard_share=2 / len(most))
    seen: set[int] = set()
    for epoch in range(60):
        sample = sampling.draw_sample(doc, 0, few, epoch=epoch)
        chosen = sample.index[(sample.labels == 0) & (sample.stands_for == 1)]
        assert len(chosen) == 2
        assert len(set(sample.index.tolist())) == len(sample.index)  # none is drawn twice
        seen |= set(chosen.tolist())
    assert seen == pool


def test_a_sample_depends_on_seed_epoch_document_and_token_only() -> None:
    cfg, tokens = SamplingConfig(window=4), range(10)
    forward = [sampling.draw_sample(document(), t, cfg) for t in tokens]
    doc = document()
    backward = [sampling.draw_sample(doc, t, cfg) for t in reversed(tokens)][::-1]
    assert all(map(same, forward, backward))
    other = dataclasses.replace(cfg, seed=1)
    assert not all(same(sampling.draw_sample(doc, t, other), forward[t]) for t in tokens)
    assert not all(same(sampling.draw_sample(doc, t, cfg, epoch=1), forward[t]) for t in tokens)
    doc.number = 8
    assert not all(same(sampling.draw_sample(doc, t, cfg), forward[t]) for t in tokens)


def test_no_two_keys_share_a_stream() -> None:
    keys = [(s, d, t, e) for s in (0, 1) for d in (0, 1) for t in (0, 1) for e in (0, 1)]
    keys += [(2**32, 0, 0, 0), (2**64, 1, 0, 0)]
    first = {labels.sample_rng(s, d, t, epoch=e).integers(2**62) for s, d, t, e in keys}
    assert len(first) == len(keys)
    with pytest.raises(ConfigError, match="token must be in"):
        labels.sample_rng(0, 0, 2**32)


def test_a_full_sample_is_every_candidate_with_its_true_label() -> None:
    doc = document()
    rule = ResidentRule(recency=10, sink=2, page_entries=8)
    cfg = SamplingConfig(window=8, evictable_only=True, resident=rule, vote_weighting=True)
    sample, most = sampling.full_sample(doc, 4, cfg), golden(doc, 4, 8)
    assert sample.index.tolist() == list(range(8, 48))
    assert sample.labels.tolist() == [float(i in most) for i in range(8, 48)]
    drawn = sampling.draw_sample(doc, 4, dataclasses.replace(cfg, neg_ratio=1000.0))
    for name in ("index", "labels", "weights", "mass", "stands_for"):
        found = getattr(drawn, name)[np.argsort(drawn.index)]
        np.testing.assert_array_equal(getattr(sample, name), found)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, 0) for name in ("window", "max_pos", "least_votes")),
        ("seed", -1),
        ("unit", "pages"),
        ("most_votes", 3),
        ("neg_ratio", -0.1),
        ("hard_share", 1.1),
        ("causal", 1),
        ("window", 1.5),
    ],
)
def test_a_bad_setting_of_sampling_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"sampling\.{field}"):
        SamplingConfig(**{field: value})


def test_documents_whose_arrays_do_not_fit_are_refused() -> None:
    votes, formed = rows({0: 3}, {}), np.array([0, 0, 1])
    with pytest.raises(ConfigError, match="document 3: formed_at must be ascending"):
        Document(3, votes, formed[::-1])
    with pytest.raises(ConfigError, match="document 3: rows of mass must be the votes' 2"):
        Document(3, votes, formed, mass=rows({}))
    with pytest.raises(ConfigError, match=r"resident\.page_entries"):
        ResidentRule(page_entries=0)


def page_sample(
    token: int = 4, window: int = 8, **options: Any
) -> tuple[Document, Sample, np.ndarray]:
    doc = document(hard=np.array([17, 18, 90]))
    rule = ResidentRule(recency=10, sink=2, page_entries=8)
    cfg = SamplingConfig(unit="page", window=window, resident=rule, **options)
    sample = sampling.draw_sample(doc, token, cfg)
    return doc, sample, sample.index.reshape(-1, 8)


@pytest.mark.parametrize("evictable_only", [False, True])
def test_whole_pages_are_drawn_with_every_entrys_own_label(evictable_only: bool) -> None:
    options = {"causal": True, "evictable_only": evictable_only}
    doc, sample, pages = page_sample(neg_ratio=1.0, **options)
    most = golden(doc, 4, 8)
    bounds = (8, 48) if evictable_only else (0, 65)
    inside = {n for n in most if bounds[0] <= n < bounds[1]}
    pages = pages[np.argsort(pages.max(axis=1))]  # they are in no order, their entries are
    first = pages.max(axis=1) // 8
    for page, row in zip(first, pages, strict=True):
        want = [n if bounds[0] <= n < bounds[1] else -1 for n in range(page * 8, page * 8 + 8)]
        assert row.tolist() == want
    positive = {n // 8 for n in inside}
    assert positive <= set(first.tolist())
    count = -(-bounds[1] // 8) - bounds[0] // 8
    assert len(first) == len(set(first.tolist())) == min(2 * len(positive), count)
    assert sorted(sample.index[sample.labels == 1]) == sorted(inside)
    mass = np.zeros(ENTRIES)
    for t in range(4, 12):
        mass[doc.mass.row(t)[0]] += doc.mass.row(t)[1]
    absent = sample.index < 0
    np.testing.assert_array_equal(sample.mass, np.where(absent, 0, mass[sample.index]))
    by_page = np.repeat(sample.stands_for[::8], 8)  # the first of a page is there
    np.testing.assert_array_equal(sample.stands_for, np.where(absent, 0, by_page))
    assert by_page[::8].sum() == pytest.approx(count)


def test_positive_pages_are_capped_by_their_entries_and_hard_pages_come_first() -> None:
    doc, sample, pages = page_sample(window=2, neg_ratio=2.0, max_pos=17, hard_share=1.0)
    positive = sample.labels.reshape(-1, 8).any(axis=1)
    golden_pages = {n // 8 for n in golden(doc, 4, 2)}
    assert positive.sum() == 2 < len(golden_pages) and len(pages) == 6
    negatives = pages[~positive, 0] // 8
    hard = {2, 11} - golden_pages
    assert hard and hard <= set(negatives.tolist()) and not golden_pages & set(negatives.tolist())
    _, sample, pages = page_sample(neg_ratio=1.0, max_pos=1)
    assert len(pages) == 2  # one of each, however small the cap


def test_the_last_page_may_be_short() -> None:
    doc, sample, pages = page_sample(token=39, neg_ratio=1000.0)
    (short,) = np.flatnonzero(pages[:, 0] == 96)
    assert doc.entries_at(39) == ENTRIES and pages[short].tolist() == [96, 97, 98, 99, *[-1] * 4]
    assert not np.any([x.reshape(-1, 8)[short, 4:] for x in (sample.mass, sample.codes)])
