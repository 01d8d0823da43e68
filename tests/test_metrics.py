"""Metrics against counts taken one by one, hand-worked cases, and what chance and an oracle get."""

import math
from typing import Any

import numpy as np
import pytest

from lsa_jax.config import ConfigError
from train.data.labels import ResidentRule
from train.quality import intervals, metrics
from train.quality.metrics import MetricsConfig, Tally

RULE = ResidentRule(recency=6, sink=1, page_entries=4)


def value(pair: np.ndarray) -> float:
    return float(pair[0] / pair[1])


def close(got: Tally, want: dict[str, float]) -> None:
    assert {name: value(got[name]) for name in want} == pytest.approx(want)


def random_token(seed: int, n: int = 50) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores with many ties, labels and mass of one token."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, n) / 8, rng.random(n) < 0.3, rng.exponential(1, n)


def best_first(scores: np.ndarray) -> list[int]:
    """By the definition: higher scores first, of equal ones the later entry."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], -i))


def test_a_threshold_worked_by_hand() -> None:
    scores, labels = np.array([0.9, 0.5, 0.6, 0.1]), np.array([True, True, False, False])
    sums = metrics.threshold_sums(scores, labels, 0.5)  # strict: 0.5 is not kept
    close(sums, {"precision": 1 / 2, "recall": 1 / 2, "f1": 1 / 2, "kept": 1 / 2})
    sums = metrics.threshold_sums(scores, labels, 0.4)
    close(sums, {"precision": 2 / 3, "recall": 1, "f1": 4 / 5, "kept": 3 / 4})


@pytest.mark.parametrize("seed", range(5))
def test_threshold_metrics_equal_counts_taken_one_by_one(seed: int) -> None:
    scores, labels, _ = random_token(seed)
    pairs = list(zip(scores > 0.5, labels, strict=True))
    tp, fp, fn = (pairs.count(p) for p in ((True, True), (True, False), (False, True)))
    precision, recall = tp / (tp + fp), tp / (tp + fn)
    f1 = 2 * precision * recall / (precision + recall)
    sums = metrics.threshold_sums(scores, labels, 0.5)
    close(sums, {"precision": precision, "recall": recall, "f1": f1})


@pytest.mark.parametrize("seed", range(5))
def test_recall_at_k_equals_a_sorted_list_ties_included(seed: int) -> None:
    scores, labels, _ = random_token(seed)
    ks = (1, 2, 7, 30, 50, 80)
    sums = metrics.topk_sums(scores, labels, ks)
    order = best_first(scores)
    for k in ks:
        hits = sum(labels[i] for i in order[:k])
        assert sums[f"recall@{k}"].tolist() == [hits, labels.sum()]
        assert sums[f"macro_recall@{k}"].tolist() == [hits / labels.sum(), 1]
        np.testing.assert_array_equal(metrics.ranked(scores, k), order[:k])


def test_macro_recall_weighs_tokens_alike_and_micro_recall_labels() -> None:
    many = metrics.topk_sums(np.arange(10.0), np.arange(10) >= 2, (4,))  # 4 of 8
    single = metrics.topk_sums(np.arange(10.0), np.arange(10) == 9, (4,))  # 1 of 1
    empty = metrics.topk_sums(np.arange(10.0), np.zeros(10, bool), (4,))
    total = metrics.add_tallies([many, single, empty])
    assert value(total["recall@4"]) == pytest.approx(5 / 9)
    assert value(total["macro_recall@4"]) == pytest.approx((0.5 + 1) / 2)


def test_an_oracle_gets_everything() -> None:
    _, labels, mass = random_token(1, 60)
    mass[~labels] = 0
    mass[labels] = 1
    cfg = MetricsConfig(ks=(int(labels.sum()),), pages=(15,), resident=RULE)
    tally = metrics.token_tally({"oracle": labels.astype(float)}, labels, cfg, mass=mass)
    for variant in ("all", "evictable"):
        for name in ("precision", "recall", "f1", f"recall@{cfg.ks[0]}", "recall@15p", "mass@15p"):
            assert value(tally[f"oracle/{variant}/{name}"]) == 1, name


def test_chance_gets_k_of_n() -> None:
    rng = np.random.default_rng(0)
    n, k, tokens = 200, 50, 600
    total: Tally = {}
    for _ in range(tokens):
        labels = np.arange(n) < 20
        total = metrics.add_tallies([total, metrics.topk_sums(rng.random(n), labels, (k,))])
    # Hypergeometric: the standard deviation of the mean share over 600 tokens is 0.0037.
    assert value(total[f"recall@{k}"]) == pytest.approx(k / n, abs=4 * 0.0037)
    assert value(total[f"macro_recall@{k}"]) == pytest.approx(k / n, abs=4 * 0.0037)


def test_ensembles_are_those_of_the_sigmoids() -> None:
    rng = np.random.default_rng(2)
    logits, weight = rng.normal(0, 3, (3, 9)), np.array([0.5, -1, 0.2])
    p = 1 / (1 + np.exp(-logits))
    named = metrics.named_scores(logits, (10, 12, 20), weight)
    for i, ordinal in enumerate((10, 12, 20)):
        np.testing.assert_allclose(named[f"layer.{ordinal}"], p[i], rtol=1e-12)
    for kind, reduce in (("max", np.max), ("mean", np.mean), ("min", np.min)):
        np.testing.assert_allclose(named[f"ensemble.{kind}"], reduce(p, axis=0), rtol=1e-12)
    share = np.exp(weight) / np.exp(weight).sum()
    learned = 1 / (1 + np.exp(-(share @ logits)))
    np.testing.assert_allclose(named["ensemble.learned"], learned, rtol=1e-12)
    with pytest.raises(ConfigError, match="weight must be given for a learned"):
        metrics.ensemble(logits, "learned")


def test_scores_of_extreme_logits_are_exact() -> None:
    got = metrics.sigmoid(np.array([-800.0, -50, 0, 50, 800]))
    np.testing.assert_allclose(got, [0, math.exp(-50), 0.5, 1, 1], rtol=1e-12)


def test_captured_mass_worked_by_hand() -> None:
    # 18 entries: pages 0..3 complete, two entries in formation. Recency 6 forces page 3, sink 1
    # page 0; pages 1 and 2 can be chosen.
    rule, mass = RULE, np.zeros(18)
    mass[[0, 5, 6, 9, 13, 17]] = [1, 2, 3, 10, 4, 5]
    labels = mass > 0
    sums = metrics.page_sums(np.array([0.9, 0.1, 0.4, 0.2, 0.9]), labels, mass, range(6), rule)
    captured = [sums["all"][f"mass@{k}p"].tolist() for k in range(6)]
    # The newest forced page first, then the other, then page 2, then page 1.
    assert captured == [[5, 25], [9, 25], [10, 25], [20, 25], [25, 25], [25, 25]]
    recalled = [sums["all"][f"recall@{k}p"].tolist() for k in range(5)]
    assert recalled == [[1, 6], [2, 6], [3, 6], [4, 6], [6, 6]]
    free = [sums["evictable"][f"mass@{k}p"].tolist() for k in range(5)]
    assert free == [[0, 15], [0, 15], [0, 15], [10, 15], [15, 15]]


@pytest.mark.parametrize("n", [0, 3, 4, 8, 9, 31, 32])
def test_captured_mass_equals_a_list_of_resident_pages(n: int) -> None:
    scores, labels, mass = random_token(3, n)
    size, complete = RULE.page_entries, n // RULE.page_entries
    tops = metrics.per_page(scores, size, np.maximum)
    first, last = RULE.evictable_range(n)
    free = [p for p in range(complete) if first <= p * size < last]
    forced = sorted(set(range(complete)) - set(free), reverse=True)
    order = forced + sorted(free, key=lambda p: (-tops[p], -p))
    sums = metrics.page_sums(tops, labels, mass, range(10), RULE)
    for count in range(10):
        there = [i for i in range(n) if i // size in [*order[:count], complete]]
        among = [i for i in there if i // size in free]
        everything = [i for i in range(n) if i // size in free]
        got = sums["all"][f"mass@{count}p"]
        np.testing.assert_allclose(got, [mass[there].sum(), mass.sum()], rtol=1e-12)
        got = sums["evictable"][f"mass@{count}p"]
        want = [mass[among].sum(), mass[everything].sum()]
        np.testing.assert_allclose(got, want, rtol=1e-12)
        assert sums["all"][f"recall@{count}p"].tolist() == [labels[there].sum(), labels.sum()]


def test_budgets_in_bytes_are_whole_pages_beside_what_is_always_there() -> None:
    at = {"page_bytes": 100, "fixed_bytes": 250, "n_pages": 7}
    assert metrics.pages_at([0, 250, 349, 350, 1000, 10**6], **at) == (0, 0, 0, 1, 7, 7)


def test_evictable_metrics_see_evictable_candidates_only() -> None:
    n = 50
    scores, labels, mass = random_token(4, n)
    first, last = RULE.evictable_range(n)
    part = slice(first, last)
    cfg = MetricsConfig(ks=(5,), pages=(4,), resident=RULE)
    tally = metrics.token_tally({"x": scores}, labels, cfg, mass=mass)
    small = MetricsConfig(ks=(5,), resident=ResidentRule(recency=0, page_entries=1))
    alone = metrics.token_tally({"x": scores[part]}, labels[part], small)
    for name in ("precision", "recall", "f1", "recall@5", "macro_recall@5"):
        np.testing.assert_array_equal(tally[f"x/evictable/{name}"], alone[f"x/all/{name}"])
    # Other scores where nothing can be evicted change nothing about what can.
    other = scores.copy()
    other[:first], other[last:] = 1, 0.7
    again = metrics.token_tally({"x": other}, labels, cfg, mass=mass)
    for name in again:
        if "/evictable/" in name:
            np.testing.assert_array_equal(again[name], tally[name])
    assert any(np.any(again[name] != tally[name]) for name in again if "/all/" in name)


def test_a_token_without_entries_counts_nothing() -> None:
    cfg = MetricsConfig(pages=(0, 3), resident=RULE)
    none = np.zeros(0)
    tally = metrics.token_tally({"x": none}, none, cfg, mass=none)
    assert not any(np.any(pair) for pair in tally.values())
    undefined = metrics.summarise([tally], resamples=3)["x/all/recall"]
    assert all(math.isnan(x) for x in undefined)


def test_scores_of_other_entries_or_not_numbers_are_refused() -> None:
    labels = np.zeros(4, bool)
    for scores in (np.zeros(5), np.array([0, np.nan, 0, 0])):
        with pytest.raises(ConfigError, match=r"scores of x must be \[4\] without NaN"):
            metrics.token_tally({"x": scores}, labels, MetricsConfig())


def documents(seed: int, count: int = 12) -> list[Tally]:
    return [metrics.topk_sums(*random_token(seed + i)[:2], (5,)) for i in range(count)]


def test_a_summary_is_the_ratio_of_sums_within_its_interval() -> None:
    docs = documents(0)
    found = metrics.summarise(docs, seed=1)["recall@5"]
    sums = np.sum([doc["recall@5"] for doc in docs], axis=0)
    assert found.value == pytest.approx(sums[0] / sums[1])
    assert found.low < found.value < found.high
    assert metrics.summarise(docs, seed=1)["recall@5"] == found
    assert metrics.summarise(docs, seed=2)["recall@5"] != found


def test_an_interval_is_that_of_documents_drawn_one_by_one() -> None:
    rng = np.random.default_rng(3)
    sums = np.stack([rng.integers(0, 9, 15), rng.integers(9, 20, 15)], axis=1).astype(float)
    found = intervals.bootstrap(sums[:, None], resamples=4000)[0]
    drawn = sums[rng.integers(0, 15, (4000, 15))].sum(axis=1)
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], (0.025, 0.975))
    # Quantiles of 4000 draws vary by some 2 % of the interval's width.
    assert found.low == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high == pytest.approx(high, abs=0.1 * (high - low))


def test_a_single_document_has_a_figure_but_no_bounds() -> None:
    one = np.array([[[3.0, 4.0], [0.0, 0.0]]])
    figure, undefined = intervals.bootstrap(one)
    assert figure.value == 0.75 and np.isnan(figure[1:]).all()
    assert (figure.percent(), undefined.percent()) == ("75.0", "-")
    same = intervals.paired_difference(one, one)[0]
    assert same.value == 0 and np.isnan(same[1:]).all()  # and no claim that it is 0 for others
    assert intervals.Interval(0.5, 0.25, 0.75).percent(2) == "50.00 [25.00, 75.00]"


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        hits = rng.binomial(20, rng.beta(6, 4, 40))  # the mean share is 0.6
        sums = np.stack([hits, np.full(40, 20)], axis=1).astype(float)[:, None]
        found = intervals.bootstrap(sums, resamples=300, seed=trial)[0]
        covered += found.low <= 0.6 <= found.high
    assert 175 <= covered <= 199  # of 190 expected, standard deviation 3; percentile ones run short


def test_paired_differences_are_sharper_than_the_figures_they_compare() -> None:
    rng = np.random.default_rng(5)
    hits = rng.integers(2, 18, 30).astype(float)
    first = [{"recall": np.array([h + 1, 20])} for h in hits]
    second = [{"recall": np.array([h, 20])} for h in hits]
    found = metrics.compare(first, second)["recall"]
    assert found.value == pytest.approx(0.05)
    assert found.low == pytest.approx(0.05) and found.high == pytest.approx(0.05)
    alone = metrics.summarise(first)["recall"]
    assert alone.high - alone.low > 0.05
    same = metrics.compare(first, first)["recall"]
    assert same == (0, 0, 0)
    with pytest.raises(ConfigError, match="documents of the second must be the first's 30"):
        metrics.compare(first, second[1:])


def test_a_document_that_lacks_a_metric_counts_nothing_for_it() -> None:
    docs = [{"a": np.array([1.0, 2])}, {"a": np.array([1.0, 2]), "b": np.array([3.0, 4])}]
    found = metrics.summarise(docs, resamples=200)
    assert found["a"] == (0.5, 0.5, 0.5) and found["b"] == (0.75, 0.75, 0.75)


def test_buckets_of_length_are_half_open() -> None:
    edges = (16, 64)
    names = [metrics.length_bucket(n, edges) for n in (0, 15, 16, 63, 64, 999)]
    assert names == ["0-16", "0-16", "16-64", "16-64", "64-", "64-"]
    docs: list[Tally] = [{str(i): np.ones(2)} for i in range(3)]
    groups = metrics.by_bucket(docs, [70, 3, 80], edges)
    assert list(groups) == ["0-16", "64-"]
    assert groups["64-"] == [docs[0], docs[2]] and groups["0-16"] == [docs[1]]


def test_a_calibration_curve_worked_by_hand() -> None:
    scores, labels = np.array([0.1, 0.2, 0.8, 1.0]), np.array([False, True, True, True])
    sums = metrics.calibration_sums(scores, labels, bins=4)
    sums = sums + metrics.calibration_sums(np.array([0.9]), np.array([False]), bins=4)
    mean, share, error = metrics.calibration_curve(sums)
    np.testing.assert_allclose(mean, [0.15, np.nan, np.nan, 0.9])
    np.testing.assert_allclose(share, [0.5, np.nan, np.nan, 2 / 3])
    assert error == pytest.approx((2 * 0.35 + 3 * (0.9 - 2 / 3)) / 5)


def test_probabilities_that_are_drawn_from_are_calibrated() -> None:
    rng = np.random.default_rng(6)
    scores = rng.random(20_000)
    labels = rng.random(20_000) < scores
    mean, share, error = metrics.calibration_curve(metrics.calibration_sums(scores, labels))
    # A bin of 1000 has a standard deviation of at most 0.016.
    assert np.abs(mean - share).max() < 4 * 0.016 and error < 0.02
    assert math.isnan(metrics.calibration_curve(np.zeros((3, 3)))[2])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 1.0),
        ("ks", (0, 1)),
        ("ks", (4, 4)),
        ("pages", (-1,)),
        ("pages", (3, 2)),
        ("ks", (1.5,)),
    ],
)
def test_a_bad_setting_of_metrics_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"metrics\.{field}"):
        MetricsConfig(**{field: value})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: intervals.bootstrap(np.zeros((0, 2, 2))), "at least one document"),
        (lambda: intervals.bootstrap(np.ones((2, 1, 2)), level=1.0), "level must be in"),
        (lambda: intervals.bootstrap(np.ones((2, 1, 2)), resamples=0), "resamples must be"),
        (
            lambda: intervals.paired_difference(np.ones((2, 1, 2)), np.ones((3, 1, 2))),
            "sums of the second model",
        ),
    ],
)
def test_bad_calls_of_the_bootstrap_are_refused(call: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        call()
