"""Training samples: which candidates of a token, with which labels and weights (LSA spec 5.1)."""

import dataclasses
from typing import NamedTuple

import numpy as np

from lsa_jax.config_checks import refusal
from train.data.labels import (
    Document,
    SamplingConfig,
    sample_rng,
    vote_weights,
    window_sums,
    window_votes,
)

# Codes of candidates: rows of a sample's grades. From _VOTES on positives by their votes.
_NONE, _UNIFORM, _HARD, _POSITIVE, _TRIVIAL, _BESIDE, _VOTES = range(7)
_GRADES = np.zeros((_VOTES, 3), np.float32)
_GRADES[_UNIFORM:, 1] = 1
_GRADES[_POSITIVE : _TRIVIAL + 1, 0] = 1
_GRADES[_TRIVIAL, 1] = 0.5
_GRADES[_HARD, 2] = 1  # stands for itself
_KEPT = slice(_POSITIVE, None)  # grades of what comes with positive units


@dataclasses.dataclass(frozen=True)
class Sample:
    """Candidates of one token, and what `losses.Targets` holds of them; all [C].

    Positives, then hard negatives, then uniform ones, in no order: a step gathers their keys one by
    one, so that an order would cost time here and save none there.

    What candidates have in common is said once: the row of `grades` that is a candidate's code is
    its label, its weight, and what it stands for. A page is `unit_entries` candidates in a row;
    where one is not in the pool, its index is -1, and all else of it 0.
    """

    index: np.ndarray  # int64
    codes: np.ndarray  # uint8
    grades: np.ndarray  # float32 [`grade_count`, 3]
    mass: np.ndarray  # float32

    @property
    def labels(self) -> np.ndarray:
        """0 or 1, float32."""
        return self.grades[self.codes, 0]

    @property
    def weights(self) -> np.ndarray:
        """Of the losses that weigh elements, float32."""
        return self.grades[self.codes, 1]

    @property
    def stands_for(self) -> np.ndarray:
        """Candidates of the full pool that each represents, float32."""
        return self.grades[self.codes, 2]

    def within(self, bounds: tuple[int, int]) -> "Sample":
        """The same candidates, those out of bounds marked as none."""
        inside = (self.index >= bounds[0]) & (self.index < bounds[1])
        index = np.where(inside, self.index, -1)
        return dataclasses.replace(
            self, index=index, codes=self.codes * inside, mass=self.mass * inside
        )


def grade_count(cfg: SamplingConfig) -> int:
    """Rows of a sample's grades."""
    return _VOTES + (cfg.most_votes + 1) * cfg.vote_weighting


def _graded(cfg: SamplingConfig, negative: float, positive: float) -> np.ndarray:
    """Grades where each negative and each positive unit stands for so many."""
    grades = _GRADES.copy()
    if cfg.vote_weighting:
        votes = np.arange(cfg.most_votes + 1)
        by_votes = np.ones((len(votes), 3), np.float32)
        by_votes[:, 1] = vote_weights(votes, least=cfg.least_votes, most=cfg.most_votes)
        grades = np.concatenate([grades, by_votes])
    grades[_UNIFORM, 2], grades[_KEPT, 2] = negative, positive
    return grades


class _Drawn(NamedTuple):
    """Units drawn, their codes, and how many each negative and each positive stands for."""

    units: np.ndarray
    codes: np.ndarray
    shares: tuple[float, float]


def _distinct(rng: np.random.Generator, taken: np.ndarray, count: int) -> np.ndarray:
    """`count` of the units where `taken` [n] is 0, in random order, uniform without replacement.

    Units are tried at random, more of them while too few are found, which should be rare: less than
    half of the free ones are wanted. What is left out of the distinct ones are those tried last, by
    their last turns, which has nothing to do with which units they are.
    """
    tried, found = np.zeros(0, np.int64), taken[:0]
    turn_of = np.empty(len(taken), np.int32)
    while len(found) < count:
        more = (count - len(found)) * 17 // 16 + 32
        more = (rng.random(more) * len(taken)).astype(np.int64)
        tried = np.concatenate([tried, more[taken[more] == 0]])
        turn = np.arange(len(tried), dtype=np.int32)
        turn_of[tried] = turn
        found = tried[turn_of[tried] == turn]
    return found[:count]


def _subset(rng: np.random.Generator, values: np.ndarray, count: int) -> np.ndarray:
    """`count` of some values, uniform without replacement; all if there are no more."""
    if count >= len(values):
        return values
    chosen = np.zeros(len(values), bool)
    if 2 * count <= len(values):
        return values[_distinct(rng, chosen, count)]
    chosen[_distinct(rng, chosen, len(values) - count)] = True
    return values[~chosen]


def _draw_free(rng: np.random.Generator, kind: np.ndarray, pool: int, count: int) -> np.ndarray:
    """`count` of the `pool` units whose `kind` [n] is _NONE, uniform without replacement."""
    if 4 * count > pool or 2 * pool < len(kind):
        return _subset(rng, np.flatnonzero(kind == _NONE), count)
    return _distinct(rng, kind, count)


def _draw_units(
    rng: np.random.Generator,
    bounds: tuple[int, int],
    positive: np.ndarray,
    hard: np.ndarray,
    cfg: SamplingConfig,
) -> _Drawn:
    """Units of first .. last - 1: at most as many positive ones as `cfg` says, and negatives."""
    first, last = bounds
    positive, kind = positive - first, np.zeros(last - first, np.uint8)
    kind[positive] = _POSITIVE
    kept = _subset(rng, positive, max(1, cfg.max_pos // cfg.unit_entries))
    pool = len(kind) - len(positive)
    wanted = min(int(cfg.neg_ratio * max(len(kept), 1)), pool)
    chosen = hard[:0]
    if cfg.hard_share and len(hard):
        hard = hard[kind[hard - first] == _NONE] - first
        chosen = _subset(rng, hard, min(round(cfg.hard_share * wanted), len(hard)))
        kind[chosen] = _HARD
    rest, others = wanted - len(chosen), pool - len(chosen)
    units = np.concatenate([kept, chosen, _draw_free(rng, kind, others, rest)])
    codes = np.full(len(units), _UNIFORM, np.uint8)
    codes[: len(kept) + len(chosen)] = _HARD
    codes[: len(kept)] = _POSITIVE
    shares = others / max(rest, 1), len(positive) / max(len(kept), 1)
    return _Drawn(units + first, codes, shares)


def _known(doc: Document, token: int, bounds: tuple[int, int], cfg: SamplingConfig) -> np.ndarray:
    """The window's golden entries among the candidates, in no order."""
    golden = doc.golden(token, cfg.window)
    if bounds[0] == 0 and doc.highest < bounds[1]:
        return golden
    return golden[(golden >= bounds[0]) & (golden < bounds[1])]


def _sample(
    doc: Document,
    token: int,
    index: np.ndarray,
    codes: np.ndarray,
    shares: tuple[float, float],
    cfg: SamplingConfig,
) -> Sample:
    """A sample of candidates, whose positive ones have the code _POSITIVE.

    They weigh 1, or by votes (a fake positive has none and weighs 1); trivial entries 0.5 either
    way.
    """
    trivial = (codes == _POSITIVE) & doc.trivial.take(index, mode="clip")  # a last page is short
    if cfg.vote_weighting:
        place = np.flatnonzero(codes == _POSITIVE)
        votes = window_votes(doc.votes, token, cfg.window, index[place])
        if votes.max(initial=0) > cfg.most_votes:
            raise refusal("sampling.most_votes", cfg.most_votes, f">= {votes.max()}, votes met")
        codes[place] = np.where(votes > 0, _VOTES + votes, _POSITIVE)
    codes[trivial] = _TRIVIAL
    mass = np.zeros(len(index), np.float32)
    if len(doc.mass.indices) and len(index):
        columns = max(doc.n_entries, index.max() + 1)  # a last page may be short
        mass = window_sums(doc.mass, token, cfg.window, columns)[index].astype(np.float32)
    return Sample(index, codes, _graded(cfg, *shares), mass)


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
    known = _known(doc, token, bounds, cfg)
    if cfg.fake_positive and not len(known) and bounds[1] > bounds[0]:
        known = rng.integers(*bounds, size=1)
    hard = doc.hard[slice(*doc.hard.searchsorted(bounds))] if cfg.hard_share else doc.hard[:0]
    if cfg.unit == "entry":
        drawn = _draw_units(rng, bounds, known, hard, cfg)
        return _sample(doc, token, *drawn, cfg)
    size = cfg.unit_entries
    pages = bounds[0] // size, -(-bounds[1] // size)
    drawn = _draw_units(rng, pages, np.unique(known // size), np.unique(hard // size), cfg)
    index = (drawn.units[:, None] * size + np.arange(size)).reshape(-1)
    codes = np.where(drawn.codes == _POSITIVE, _BESIDE, drawn.codes).astype(np.uint8)
    codes = np.repeat(codes, size)
    place = np.full(pages[1], -1)
    place[drawn.units] = np.arange(0, len(index), size)
    place, within = place[known // size], known % size
    codes[(place + within)[place >= 0]] = _POSITIVE
    return _sample(doc, token, index, codes, drawn.shares, cfg).within(bounds)


def full_sample(doc: Document, token: int, cfg: SamplingConfig) -> Sample:
    """All candidates of one token, as validation scores them: nothing drawn, nothing fake."""
    bounds = doc.candidate_range(token, cfg)
    index = np.arange(*bounds)
    codes = np.full(len(index), _UNIFORM, np.uint8)
    codes[_known(doc, token, bounds, cfg) - bounds[0]] = _POSITIVE
    return _sample(doc, token, index, codes, (1.0, 1.0), cfg)
