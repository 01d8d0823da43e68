"""Budgets as text, bytes and pages; calibrated thresholds on scores they were not fitted to."""

import json
from fractions import Fraction

import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa.budget import Budget, Calibration, allowed_pages, fit_thresholds, parse_budget


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.10", Budget(share=Fraction(1, 10))),
        (" 1.0 ", Budget(share=Fraction(1))),
        ("1B", Budget(nbytes=1)),
        ("123456", Budget(nbytes=123456)),
        ("400MB", Budget(nbytes=400_000_000)),
        ("400 MB", Budget(nbytes=400_000_000)),
        ("1.5GiB", Budget(nbytes=3 << 29)),
        ("2kB", Budget(nbytes=2000)),
        ("2KB", Budget(nbytes=2000)),
        ("3KiB", Budget(nbytes=3072)),
        ("0.001TB", Budget(nbytes=10**9)),
    ],
)
def test_a_budget_is_read_as_a_share_or_as_bytes(text, budget):
    assert parse_budget(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        *("", "0.0", "0", "1", "1.01", "-0.1", "-5", "nan", "inf", "1e9", "10%", "5mb", "GiB"),
        *(".5", "0.4B", "1,5GiB", "1.", "٣", "0x10", "3 PB", "1 000"),
    ],
)
def test_a_budget_that_is_neither_is_refused(text):
    with pytest.raises(ConfigError, match=r"^kv_budget must be .*, got"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0.1", "0.3", "1.0", "0.0777", "12345", "3KiB", "9.9MB"])
@pytest.mark.parametrize("page_bytes", [1, 7, 640, 4096])
def test_pages_fill_a_budget_to_within_one_page_and_never_exceed_it(text, page_bytes):
    budget, full, fixed = parse_budget(text), 1_000_003, 1000
    pages = allowed_pages(budget, full, fixed, page_bytes)
    used = fixed + pages * page_bytes
    assert used <= budget.limit(full) < used + page_bytes
    if budget.share is not None:
        assert Fraction(used, full) <= budget.share


def test_a_share_is_exact_where_a_float_is_not():
    assert int(Fraction(0.1) * 10**18) == 10**17 + 5  # as a float it would be exceeded
    assert parse_budget("0.1").limit(10**18) == 10**17


def test_a_budget_under_its_floor_is_refused_with_the_floor_in_bytes_and_as_a_share():
    budget = parse_budget("0.05")
    assert allowed_pages(budget, 10_000, 100, 40, forced_pages=10) == 10
    with pytest.raises(ConfigError, match=r"floor of 540 bytes \(0\.0540 of 10000;.* got 500 "):
        allowed_pages(budget, 10_000, 100, 40, forced_pages=11)
    with pytest.raises(ConfigError, match=r"floor of 501 bytes"):
        allowed_pages(budget, 10_000, 501, 40)


def test_a_length_is_looked_up_in_its_bucket():
    calibration = Calibration((100, 200), (0.5, 0.6, 0.7), 0.1)
    lengths = (0, 99, 100, 199, 200, 10**9)
    assert [calibration.threshold(n) for n in lengths] == [0.5, 0.5, 0.6, 0.6, 0.7, 0.7]
    assert Calibration((), (0.4,), 0.1).threshold(5) == 0.4


def test_a_calibration_survives_json_exactly():
    thresholds = tuple(float(np.float32(x)) for x in (0.1, 1 / 3, 0.9999999))
    calibration = Calibration((64, 4096), thresholds, 0.1)
    text = calibration.to_json()
    assert "\n" not in text and Calibration.from_json(text) == calibration


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [5, 5]}, "edges must be strictly ascending"),
        ({"edges": [0, 5]}, r"edges\[0\] must be"),
        ({"edges": [1.5, 5]}, r"edges\[0\] must be"),
        ({"edges": "ab"}, "calibration.edges must be a list"),
        ({"thresholds": [0.5]}, "thresholds must be 3 items long"),
        ({"thresholds": [0.5, 1.0, 0.5]}, r"thresholds\[1\] must be"),
        ({"kept_pages": 0}, "kept_pages must be"),
        ({"more": 1}, "calibration must be a table with the keys"),
    ],
    ids=str,
)
def test_a_bad_calibration_is_refused_by_name(change, message):
    good = json.loads(Calibration((4, 8), (0.5, 0.5, 0.5), 0.1).to_json())
    with pytest.raises(ConfigError, match=message):
        Calibration.from_json(json.dumps(good | change))


@pytest.mark.parametrize("text", ["", "[]", "{", "null"])
def test_text_that_is_no_calibration_is_refused(text):
    with pytest.raises(ConfigError, match=r"^calibration must be"):
        Calibration.from_json(text)


def histories(seed, lengths):
    """Sigmoids whose background rises with the length of the history, as retention does."""
    rng = np.random.default_rng(seed)
    return [1 / (1 + np.exp(4 - n / 4000 - rng.normal(size=n))) for n in lengths]


def kept_share(scores, threshold, page_entries, recency, sink):
    """Of the complete pages that are not forced, the share with an entry above the threshold."""
    pages = len(scores) // page_entries
    free = range(-(-sink // page_entries), max((len(scores) - recency) // page_entries, 0))
    free = [p for p in free if p < pages]
    kept = [max(scores[p * page_entries : (p + 1) * page_entries]) > threshold for p in free]
    return sum(kept) / len(kept)


@pytest.mark.parametrize("kept_pages", [0.02, 0.1, 0.5, 1.0])
def test_thresholds_keep_the_share_of_pages_they_were_fitted_to(kept_pages):
    lengths, edges = [1500, 1700, 1999, 2001, 4000, 4000, 7999] * 4, (2000, 4000)
    settings = {"page_entries": 8, "recency": 100, "sink": 5}
    samples = [scores.astype(np.float32) for scores in histories(0, lengths)]
    calibration = fit_thresholds(samples, edges=edges, kept_pages=kept_pages, **settings)
    for low, high, pages in ((0, 2000, 174), (2000, 4000, 237), (4000, 10**6, 486)):

        def mean_share(some, low=low, high=high):
            some = [scores for scores in some if low <= len(scores) < high]
            return np.mean([kept_share(s, calibration.threshold(len(s)), **settings) for s in some])

        # At most the share, and less than one page of the bucket's shortest history below it.
        assert kept_pages - 1 / pages < mean_share(samples) <= kept_pages + 1e-9
        # Five standard deviations of the difference of two binomial shares of >= 4 histories each.
        deviation = (2 * kept_pages * (1 - kept_pages) / (4 * pages)) ** 0.5
        assert abs(mean_share(histories(1, lengths)) - kept_pages) <= 5 * deviation + 1 / pages
    if kept_pages < 1:
        assert calibration.thresholds == tuple(sorted(set(calibration.thresholds)))


def test_pages_of_equal_score_are_not_kept_beyond_the_share():
    scores = np.repeat(np.array([0.9, 0.5, 0.5, 0.1], np.float32), 4)
    fit = {"edges": (), "page_entries": 4, "recency": 0}
    assert fit_thresholds([scores], kept_pages=0.5, **fit).thresholds == (0.5,)
    lower = fit_thresholds([scores], kept_pages=0.75, **fit).thresholds
    np.testing.assert_allclose(lower, [0.1], rtol=1e-7)  # float32 0.1


def test_a_bucket_without_samples_or_with_too_many_certain_pages_is_refused():
    fit = {"edges": (100,), "kept_pages": 0.1, "page_entries": 4, "recency": 0}
    with pytest.raises(ConfigError, match="bucket 1 must have sampled scores"):
        fit_thresholds([np.full(50, 0.5)], **fit)
    with pytest.raises(ConfigError, match="bucket 0 must have at most"):
        fit_thresholds([np.ones(50), np.full(500, 0.5)], **fit)
    with pytest.raises(ConfigError, match="without NaN"):
        fit_thresholds([np.full(50, np.nan)], **fit)
