"""Untrained arms, ages of a set, and orders of pages, in cases worked by hand."""

import dataclasses

import numpy as np
import pytest

from lsa_jax.lsa.budget import Calibration
from tests.evaluation_cases import (
    PAGE,
    RULE,
    protocol,
)
from train.data.labels import Document, ResidentRule
from train.quality import baselines
from train.quality.baselines import of_probabilities
from train.quality.evaluation import Recording
from train.quality.evaluation_report import curve
from train.quality.metrics import MetricsConfig
from train.quality.pareto import forced_pages
from train.quality.study import entry_sums, set_sums
from train.traces.votes import SparseRows


def recording(rows: list[dict[int, int]], formed: list[int], mass=None) -> Recording:
    """Of votes by entry for each token."""

    def sparse(rows, dtype) -> SparseRows:
        indices = np.concatenate([np.array([*row], np.int32) for row in rows])
        values = np.concatenate([np.array([*row.values()], dtype) for row in rows])
        return SparseRows(indices, values, np.cumsum([0, *map(len, rows)]))

    weights = None if mass is None else sparse(mass, np.float32)
    document = Document(0, sparse(rows, np.uint8), np.array(formed), mass=weights)
    return Recording("hand", np.arange(len(rows)), document, mass is not None)


def test_forced_pages_are_counted_as_the_rule_says() -> None:
    for entries in range(60):
        want = [p for p in range(entries // PAGE) if p == 0 or p >= (entries - 12) // PAGE]
        assert forced_pages(entries, RULE) == len(want)


def test_chance_finds_k_of_n() -> None:
    rec = recording([{}] * 400, [0] * 160)
    cfg = MetricsConfig(ks=(40,), resident=ResidentRule(recency=0, page_entries=PAGE))
    golden = np.arange(160) % 16 == 0
    total: dict[str, np.ndarray] = {}
    for token in range(400):
        arm = baselines.baseline_scores("random", rec, token, window=1, page_entries=PAGE)["random"]
        sums = entry_sums(arm, golden, cfg) | set_sums(arm, golden, None, {"b": 5}, cfg)
        for name, pair in sums.items():
            total[name] = total.get(name, 0) + pair
    # Ten of 160 at K = 40: the mean share over 400 tokens deviates by 0.0067.
    for name in ("all/recall@40", "all/recall@b"):
        assert total[name][0] / total[name][1] == pytest.approx(0.25, abs=4 * 0.0067)
    assert not {"all/precision", "all/f1"} & total.keys()  # of draws, a threshold says nothing


def test_draws_depend_on_seed_document_and_token_alone() -> None:
    rec = recording([{}] * 9, [0] * 30)

    def draw(token: int, seed: int = 0, of: Recording = rec) -> list[float]:
        options = {"window": 1, "page_entries": PAGE, "seed": seed}
        return baselines.baseline_scores("random", of, token, **options)["random"].entries.tolist()

    assert draw(3) == draw(3) != draw(4)
    assert draw(3) != draw(3, seed=1)
    assert draw(3) != draw(3, of=dataclasses.replace(rec, name="other"))


def test_the_lagged_arm_sees_the_window_up_to_the_decision_and_no_later_token() -> None:
    votes = [{0: 4}, {1: 3, 2: 5}, {1: 4}, {3: 9}, {2: 9}]
    rec = recording(votes, [0, 0, 0, 0, 4])
    for token, window, want in (
        (2, 2, [0, 7, 5, 0]),
        (2, 3, [4, 7, 5, 0]),
        (0, 64, [4, 0, 0, 0]),
        (4, 2, [0, 0, 9, 9, 0]),
    ):
        arm = baselines.baseline_scores("lagged", rec, token, window=window, page_entries=3)
        assert arm["lagged"].entries.tolist() == want
        assert arm["lagged"].pages.tolist() == [sum(want[:3]), sum(want[3:])]


def test_ages_of_a_set_worked_by_hand() -> None:
    spans = protocol(taus=(2, 4), window=3).horizons
    assert spans(5, 20) == {"window": (5, 8), "tau 1-2": (6, 8), "tau 3-4": (8, 10)}
    assert [*spans(15, 20)] == ["window", "tau 1-2", "tau 3-4"]  # tokens 18 and 19
    assert [*spans(16, 20)] == ["window", "tau 1-2"]  # 20 was not recorded
    assert [*spans(18, 20)] == ["window"]
    votes = [{0: 3}, {1: 3}, {2: 3, 5: 3}, {}, {0: 3}]
    mass = [{0: 1.0}, {1: 2.0}, {2: 0.5, 5: 9.0}, {2: 0.25}, {0: 8.0}]
    rec = recording(votes, [0, 0, 0, 0, 0, 2], mass)
    assert rec.golden(0, 3, 5).nonzero()[0].tolist() == [0, 1, 2]  # 5 does not exist at 0
    assert rec.golden(1, 3, 5).nonzero()[0].tolist() == [1, 2]
    assert rec.golden(3, 5, 5).nonzero()[0].tolist() == [0]
    assert rec.golden(4, 99, 6).nonzero()[0].tolist() == [0]
    assert rec.mass(1, 3, 5).tolist() == [0, 2, 0.5, 0, 0]
    assert rec.mass(2, 4, 6).tolist() == [0, 0, 0.75, 0, 0, 9]
    assert rec.decisions(2).tolist() == [0, 2, 4]
    assert recording(votes, [3, 3, 4, 4, 4, 4]).decisions(2).tolist() == [4]  # none exists before


def test_pages_are_ordered_as_the_policies_say() -> None:
    p = np.array([0.6, 0.6, 0.9, 0.1, 0.5, 0.3, 0.2, 0.49])
    arms = {
        policy: of_probabilities(p, policy, threshold=0.5, page_entries=2)
        for policy in ("top", "published", "budget")
    }
    assert arms["top"].pages.tolist() == [0.6, 0.9, 0.5, 0.49]
    assert arms["published"].pages.tolist() == [2, 1, 0, 0]
    np.testing.assert_allclose(arms["budget"].pages, [0.4, 0.8, -0.5, -0.51])


def test_a_calibrated_threshold_is_that_of_the_length() -> None:
    cal = Calibration((50, 100), (0.2, 0.4, 0.7), 0.5)
    cfg = protocol(calibration=cal)
    assert [cfg.metrics_at(n).threshold for n in (49, 50, 99, 100)] == [0.2, 0.4, 0.4, 0.7]
    assert protocol().metrics_at(70).threshold == 0.55


def test_calibration_of_a_document_worked_by_hand() -> None:
    sums = np.array([[[4, 1.0, 2], [0, 0, 0]], [[2, 0.8, 0], [2, 1.6, 2]]])  # two documents
    found = curve(sums)
    assert found.count.tolist() == [6, 2]
    assert [point.value for point in found.expected] == pytest.approx([0.3, 0.8])
    assert [point.value for point in found.observed] == pytest.approx([2 / 6, 1])
    # Gaps 1.8 - 2 and 1.6 - 2 of 8 candidates; alone, documents have 1 of 4 and 0.8 + 0.4 of 4.
    assert found.error.value == pytest.approx(0.6 / 8)
    assert found.error.high == pytest.approx(0.3) and found.error.low == pytest.approx(0.075)
