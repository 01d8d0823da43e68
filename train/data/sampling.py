"""Training samples: which candidates of a token, with which labels and weights (LSA spec 5.1)."""

import dataclasses
from typing import NamedTuple

import numpy as np

from train.data.labels import (
    Document,
    SamplingConfig,
    sample_rng,
    vote_weights,
    window_mass,
    window_union,
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Candidates of one token, ascending, and what `losses.Targets` holds of them; all [C].

    A page is `unit_entries` candidates in a row; where one is not in the pool, its index is -1.
    """

    index: np.ndarray  # int64
    labels: np.ndarray  # float32, 0 or 1
    weights: np.ndarray  # float32
    mass: np.ndarray  # float32
    stands_for: np.ndarray  # float32

    def within(self, bounds: tuple[int, int]) -> "Sample":
        """The same candidates, those out of bounds marked as none."""
        inside = (self.index >= bounds[0]) & (self.index < bounds[1])
        index = np.where(inside, self.index, -1)
        return dataclasses.replace(self, index=index, mass=self.mass * inside)


class _Drawn(NamedTuple):
    """Units drawn, ascending; `units[place]` are `positive[kept]`."""

    units: np.ndarray
    stands_for: np.ndarray
    kept: np.ndarray
    place: np.ndarray


def _choose(rng: np.random.Generator, pool: int, count: int) -> np.ndarray:
    """`count` of 0 .. pool - 1, ascending."""
    chosen = rng.choice(pool, count, replace=False, shuffle=False)
    chosen.sort()
    return chosen


def _draw_outside(
    rng: np.random.Generator, bounds: tuple[int, int], taken: np.ndarray, count: int
) -> np.ndarray:
    """Uniform without replacement from first .. last - 1 less `taken` (both ascending)."""
    ranks = _choose(rng, bounds[1] - bounds[0] - len(taken), count)
    before = taken - np.arange(bounds[0], bounds[0] + len(taken))
    return ranks + before.searchsorted(ranks, side="right") + bounds[0]


def _merge(
    ours: tuple[np.ndarray, float], others: tuple[np.ndarray, np.ndarray | float]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two disjoint ascending arrays as one, the values beside them, and the places of `ours`."""
    place = others[0].searchsorted(ours[0]) + np.arange(len(ours[0]))
    rest = np.ones(len(ours[0]) + len(others[0]), bool)
    rest[place] = False
    units, values = np.empty(len(rest), np.int64), np.empty(len(rest), np.float32)
    units[place], values[place] = ours
    units[rest], values[rest] = others
    return units, values, place


def _draw_units(
    rng: np.random.Generator,
    bounds: tuple[int, int],
    positive: np.ndarray,
    hard: np.ndarray,
    cfg: SamplingConfig,
) -> _Drawn:
    """Units of first .. last - 1: at most as many positive ones as `cfg` says, and negatives."""
    kept, most = np.arange(len(positive)), max(1, cfg.max_pos // cfg.unit_entries)
    if len(positive) > most:
        kept = _choose(rng, len(positive), most)
    pool = bounds[1] - bounds[0] - len(positive)
    wanted = min(int(cfg.neg_ratio * max(len(kept), 1)), pool)
    chosen = np.zeros(0, np.int64)
    if cfg.hard_share and len(hard):
        hard = np.setdiff1d(hard, positive, assume_unique=True)
        count = min(round(cfg.hard_share * wanted), len(hard))
        chosen = hard[_choose(rng, len(hard), count)]
    rest = wanted - len(chosen)
    taken = _merge((positive, 0), (chosen, 0))[0] if len(chosen) else positive
    uniform = _draw_outside(rng, bounds, taken, rest)
    # A uniform negative stands for the others that could have been drawn, a hard one for itself.
    negatives = uniform, (pool - len(chosen)) / max(rest, 1)
    if len(chosen):
        negatives = _merge((chosen, 1), negatives)[:2]
    share = len(positive) / max(len(kept), 1)
    units, stands, place = _merge((positive[kept], share), negatives)
    return _Drawn(units, stands, kept, place)


def _known(
    rng: np.random.Generator | None,
    doc: Document,
    token: int,
    bounds: tuple[int, int],
    cfg: SamplingConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """The window's golden entries among the candidates and their votes; or a fake one, without.

    Without a generator nothing is fake.
    """
    golden, votes = window_union(doc.votes, token, cfg.window)
    inside = slice(golden.searchsorted(bounds[0]), golden.searchsorted(bounds[1]))
    known, votes = golden[inside], votes[inside]
    if rng and cfg.fake_positive and not len(known) and bounds[1] > bounds[0]:
        return rng.integers(*bounds, size=1), np.zeros(1, np.int64)
    return known, votes


def _sample(
    doc: Document,
    token: int,
    index: np.ndarray,
    stands_for: np.ndarray,
    positives: tuple[np.ndarray, np.ndarray],
    cfg: SamplingConfig,
) -> Sample:
    """A sample of ascending candidates, of which `positives` are places and their votes."""
    place, votes = positives
    labels, weights = np.zeros(len(index), np.float32), np.ones(len(index), np.float32)
    labels[place] = 1
    weights[place] = _positive_weights(doc, index[place], votes, cfg)
    mass = np.zeros(len(index), np.float32)
    if len(doc.mass.indices) and len(index):
        columns = max(doc.n_entries, index[-1] + 1)  # a last page may be short
        mass = window_mass(doc.mass, token, cfg.window, columns)[index]
    return Sample(index, labels, weights, mass, stands_for)


def _positive_weights(
    doc: Document, index: np.ndarray, votes: np.ndarray, cfg: SamplingConfig
) -> np.ndarray:
    """1, or by votes (a fake positive has none and weighs 1); trivial entries 0.5 either way."""
    weights = np.ones(len(index), np.float32)
    if cfg.vote_weighting:
        by_votes = vote_weights(votes, least=cfg.least_votes, most=cfg.most_votes)
        weights = np.where(votes > 0, by_votes, weights)
    weights[doc.trivial[index]] = 0.5
    return weights


def draw_sample(doc: Document, token: int, cfg: SamplingConfig, *, epoch: int = 0) -> Sample:
    """Positives and drawn negatives of one token, by LSA spec 5.1.

    Positives are the window's golden entries within the candidates; negatives are drawn uniformly
    without replacement from candidates that are not golden in the window. With pages, the pages
    with and without positives are. Empty where there are no candidates. A function of its arguments
    only.
    """
    rng = sample_rng(cfg.seed, doc.number, token, epoch=epoch)
    first, last = doc.candidate_range(token, cfg)
    bounds = first, int(last)
    known, votes = _known(rng, doc, token, bounds, cfg)
    hard = doc.hard[slice(*doc.hard.searchsorted(bounds))] if cfg.hard_share else doc.hard[:0]
    if cfg.unit == "entry":
        drawn = _draw_units(rng, bounds, known, hard, cfg)
        positives = drawn.place, votes[drawn.kept]
        return _sample(doc, token, drawn.units, drawn.stands_for, positives, cfg)
    size = cfg.unit_entries
    pages = bounds[0] // size, -(-bounds[1] // size)
    drawn = _draw_units(rng, pages, np.unique(known // size), np.unique(hard // size), cfg)
    index = (drawn.units[:, None] * size + np.arange(size)).reshape(-1)
    inside = np.isin(known // size, drawn.units)
    positives = index.searchsorted(known[inside]), votes[inside]
    stands_for = np.repeat(drawn.stands_for, size)
    return _sample(doc, token, index, stands_for, positives, cfg).within(bounds)


def full_sample(doc: Document, token: int, cfg: SamplingConfig) -> Sample:
    """All candidates of one token, as validation scores them: nothing drawn, nothing fake."""
    bounds = doc.candidate_range(token, cfg)
    index = np.arange(*bounds)
    known, votes = _known(None, doc, token, bounds, cfg)
    positives = known - bounds[0], votes
    return _sample(doc, token, index, np.ones(len(index), np.float32), positives, cfg)
