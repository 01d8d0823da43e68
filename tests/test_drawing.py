"""Drawing few of many entries: each as likely as any other, none twice."""

import numpy as np
import pytest

from train.data import sampling
from train.data.labels import Document, SamplingConfig
from train.traces.votes import SparseRows


def test_few_negatives_of_many_entries_are_uniform_too() -> None:
    """Few of many are drawn by another method than the larger part of few."""
    golden = np.arange(0, 300, 3, dtype=np.int32)
    votes = SparseRows(golden, np.full(100, 3, np.uint8), np.array([0, 100]))
    doc = Document(0, votes, np.zeros(2000, np.int32))
    cfg = SamplingConfig(max_pos=40, neg_ratio=3.0)
    drawn, draws, pool = np.zeros(2000), 400, 1900
    for epoch in range(draws):
        sample = sampling.draw_sample(doc, 0, cfg, epoch=epoch)
        negatives = sample.index[sample.labels == 0]
        assert len(negatives) == 120 == len(set(negatives.tolist())) and np.sum(sample.labels) == 40
        assert np.sum(sample.stands_for) == pytest.approx(2000)
        drawn[negatives] += 1
    assert not drawn[:300:3].any()
    others = np.delete(drawn, np.arange(0, 300, 3))
    want, spread = draws * 120 / pool, np.sqrt(draws * 120 / pool * (1 - 120 / pool))
    assert np.abs(others - want).max() < 5.5 * spread  # of 1,900 fair counts: odds of 10^4 to 1
    # Chi-squared with 1,899 degrees of freedom, less as counts add up: 5 standard deviations.
    assert abs(np.sum((others - want) ** 2) / spread**2 - pool) < 5 * np.sqrt(2 * pool)


def test_what_is_drawn_of_some_is_uniform_and_all_where_all_are_wanted() -> None:
    rng, counts = np.random.default_rng(0), np.zeros(30)
    values = np.arange(30) * 7
    for _ in range(600):
        found = sampling._subset(rng, values, 12)
        assert len(set(found.tolist())) == 12
        counts[found // 7] += 1
    # 5 standard deviations of a binomial count.
    assert np.abs(counts - 240).max() < 5 * np.sqrt(600 * 0.4 * 0.6)
    assert sampling._subset(rng, values, 40).tolist() == values.tolist()
