"""From a document's votes to training samples: which entries, with which labels (LSA spec 5.1).

Plain NumPy on plain arrays. Decode tokens count from 0. Entry n of N *exists* at token t, which can
read it, if `formed_at[n] <= t + 1`: steps count from 1, and an entry is formed at a step's end
(0: before the first one). A sample's *window* is the tokens
t .. t + window - 1, cut at the end of the document. Rows of `SparseRows` are decode tokens.

Randomness: a sample's generator is seeded by (seed, epoch, document, t) alone, so that neither the
order of samples nor the number of processes that draw them changes a sample.
"""

import dataclasses
from typing import Any

import numpy as np

from lsa_jax.config_checks import number, refusal
from train.votes import SparseRows, window_unions

TRIVIAL_SHARE = 0.8  # of a document's tokens
_WORD = 2**32  # a spawn key's items are words of a seed sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResidentRule:
    """Which entries are on the device whatever is recalled, as `lsa.resident_set` forces them.

    The pages with one of the last `recency` or of the first `sink` entries, and the page in
    formation. Only whole pages can be evicted.
    """

    recency: int = 2048
    sink: int = 0
    page_entries: int = 64

    def __post_init__(self) -> None:
        for name, least in (("recency", 0), ("sink", 0), ("page_entries", 1)):
            if number(f"resident.{name}", getattr(self, name), int) < least:
                raise refusal(f"resident.{name}", getattr(self, name), f">= {least}")

    def evictable_range(self, entries: int) -> tuple[int, int]:
        """First and behind the last of the entries that can be evicted, of `entries` that exist."""
        first = -(-self.sink // self.page_entries) * self.page_entries
        last = max(0, entries - self.recency) // self.page_entries * self.page_entries
        return first, max(first, last)


def evictable(index: Any, entries: Any, rule: ResidentRule) -> Any:
    """Which of the entries `index` can be evicted where `entries` exist: not future, not resident.

    Broadcasts; integers, NumPy or JAX arrays alike, so that a step can derive a `valid` mask too.
    """
    size = rule.page_entries
    recent = (entries - rule.recency) // size * size  # below 0: all are recent
    return (index >= -(-rule.sink // size) * size) & (index < recent)


def window_union(votes: SparseRows, token: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Entries that are golden at any token of the window, ascending, and their most votes."""
    indices, most = window_unions(votes, np.array([token]), window=window).row(0)
    return indices.astype(np.int64), most


def window_mass(mass: SparseRows, token: int, window: int, n_entries: int) -> np.ndarray:
    """Attention mass of every entry summed over the window, float32 [N]."""
    part = slice(mass.pointers[token], mass.pointers[min(token + window, len(mass))])
    weights = mass.values[part].astype(np.float64)
    sums = np.bincount(mass.indices[part], weights, minlength=n_entries)
    return sums[:n_entries].astype(np.float32)


def lookup(table: tuple[np.ndarray, np.ndarray], index: np.ndarray) -> np.ndarray:
    """Values of `index` in ascending (indices, values), 0 where absent; float32."""
    indices, values = table
    if not len(indices):
        return np.zeros(len(index), np.float32)
    place = np.minimum(np.searchsorted(indices, index), len(indices) - 1)
    return np.where(indices[place] == index, values[place], 0).astype(np.float32)


def vote_weights(votes: np.ndarray, *, least: int = 3, most: int = 21) -> np.ndarray:
    """0.5 + 1.5 (v - least) / (most - least): 0.5 for just golden entries, 2 for all layers'."""
    if not 0 < least < most:
        raise refusal("least and most votes", (least, most), "ascending from at least 1")
    return (0.5 + 1.5 * (votes.astype(np.float32) - least) / (most - least)).astype(np.float32)


def trivial_entries(votes: SparseRows, n_entries: int, share: float = TRIVIAL_SHARE) -> np.ndarray:
    """Entries that are golden at more than `share` of the document's tokens, bool [N]."""
    golden = votes.indices[votes.indices < n_entries]
    return np.bincount(golden, minlength=n_entries) > share * len(votes)


def sampled_tokens(votes: SparseRows, *, window: int, interval: int = 1) -> np.ndarray:
    """Tokens 0, interval, .. whose window has a label, as published: wherever that label lies."""
    tokens = np.arange(0, len(votes), interval)
    ends = votes.pointers[np.minimum(tokens + window, len(votes))]
    return tokens[ends > votes.pointers[tokens]]


def sample_rng(seed: int, document: int, token: int, *, epoch: int = 0) -> np.random.Generator:
    """PCG64 seeded by SeedSequence(seed, spawn_key=(epoch, document, token))."""
    for name, value in (("epoch", epoch), ("document", document), ("token", token)):
        if not 0 <= value < _WORD:
            raise refusal(name, value, "in [0, 2^32)")
    key = (epoch, document, token)
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a sample's candidates are drawn and weighted. The defaults are the authors'.

    `max_pos` caps the positives; negatives are `neg_ratio` times as many (as one, if none).
    `vote_weighting` weights positives by votes, between `least_votes` and `most_votes`. `causal`
    leaves out candidates that do not exist yet, `evictable_only` also the always resident ones.
    `fake_positive` labels a random candidate where a sample has no positive, as published;
    `hard_share` is the share of negatives to take from the document's pool of hard ones.
    """

    window: int = 64
    max_pos: int = 512
    neg_ratio: float = 1.0
    vote_weighting: bool = False
    least_votes: int = 3
    most_votes: int = 21
    causal: bool = False
    evictable_only: bool = False
    fake_positive: bool = True
    hard_share: float = 0.0
    seed: int = 0
    resident: ResidentRule = dataclasses.field(default_factory=ResidentRule)

    def __post_init__(self) -> None:
        for name, least in (("window", 1), ("max_pos", 1), ("least_votes", 1), ("seed", 0)):
            if number(f"sampling.{name}", getattr(self, name), int) < least:
                raise refusal(f"sampling.{name}", getattr(self, name), f">= {least}")
        if number("sampling.most_votes", self.most_votes, int) <= self.least_votes:
            wanted = f"above least_votes={self.least_votes}"
            raise refusal("sampling.most_votes", self.most_votes, wanted)
        if number("sampling.neg_ratio", self.neg_ratio, float) < 0:
            raise refusal("sampling.neg_ratio", self.neg_ratio, ">= 0")
        if not 0 <= number("sampling.hard_share", self.hard_share, float) <= 1:
            raise refusal("sampling.hard_share", self.hard_share, "in [0, 1]")
        for name in ("vote_weighting", "causal", "evictable_only", "fake_positive"):
            if not isinstance(getattr(self, name), bool):
                raise refusal(f"sampling.{name}", getattr(self, name), "true or false")


def _no_rows(count: int) -> SparseRows:
    none = np.zeros(0, np.int32)
    return SparseRows(none, none.astype(np.float32), np.zeros(count + 1, np.int64))


class Document:
    """What labels need of one document; derived arrays are made once.

    `number` tells documents apart in seeds. `formed_at` [N] ascends. `hard` are entries that other
    indexers wrongly scored high. Entries golden at more than `trivial_share` of the tokens weigh
    0.5 as positives. Labels at or beyond N are ignored, as published.
    """

    def __init__(
        self,
        number: int,
        votes: SparseRows,
        formed_at: np.ndarray,
        *,
        mass: SparseRows | None = None,
        hard: np.ndarray | None = None,
        trivial_share: float = TRIVIAL_SHARE,
    ) -> None:
        if formed_at.ndim != 1 or (np.diff(formed_at) < 0).any():
            raise refusal(f"document {number}: formed_at", formed_at, "ascending, [N]")
        if mass is not None and len(mass) != len(votes):
            wanted = f"the votes' {len(votes)}"
            raise refusal(f"document {number}: rows of mass", len(mass), wanted)
        self.number, self.votes, self.formed_at = number, votes, formed_at
        self.mass = _no_rows(len(votes)) if mass is None else mass
        self.hard = np.unique(np.zeros(0, np.int64) if hard is None else hard)
        self.n_entries = len(formed_at)
        self.trivial = trivial_entries(votes, self.n_entries, trivial_share)

    def entries_at(self, token: int) -> int:
        """Entries that exist at a token."""
        return int(np.searchsorted(self.formed_at, token + 1, side="right"))

    def candidate_range(self, token: int, cfg: SamplingConfig) -> tuple[int, int]:
        """First and behind the last of the entries that a sample may contain."""
        exist = self.entries_at(token)
        if cfg.evictable_only:
            return cfg.resident.evictable_range(exist)
        return 0, exist if cfg.causal else self.n_entries


@dataclasses.dataclass(frozen=True)
class Sample:
    """Candidates of one token, ascending, and what `losses.Targets` holds of them; all [C]."""

    index: np.ndarray  # int64
    labels: np.ndarray  # float32, 0 or 1
    weights: np.ndarray  # float32
    mass: np.ndarray  # float32
    stands_for: np.ndarray  # float32


def _draw(rng: np.random.Generator, pool: np.ndarray | int, count: int) -> np.ndarray:
    return rng.choice(pool, count, replace=False, shuffle=False)


def _draw_outside(
    rng: np.random.Generator, bounds: tuple[int, int], taken: np.ndarray, count: int
) -> np.ndarray:
    """Uniform without replacement from first .. last - 1 less `taken` (ascending, within)."""
    ranks = _draw(rng, bounds[1] - bounds[0] - len(taken), count)
    skipped = np.searchsorted(taken - bounds[0] - np.arange(len(taken)), ranks, side="right")
    return bounds[0] + ranks + skipped


def _within(index: np.ndarray, bounds: tuple[int, int]) -> np.ndarray:
    """The part of an ascending array that lies in a range."""
    return index[slice(*np.searchsorted(index, bounds))]


def _negatives(
    rng: np.random.Generator,
    bounds: tuple[int, int],
    positives: np.ndarray,
    hard: np.ndarray,
    wanted: int,
    hard_share: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Hard and uniform negatives, and how many of the non-positives each stands for."""
    pool = bounds[1] - bounds[0] - len(positives)
    wanted = min(wanted, pool)
    hard = np.setdiff1d(_within(hard, bounds), positives, assume_unique=True)
    chosen = _draw(rng, hard, min(round(hard_share * wanted), len(hard)))
    taken = np.union1d(positives, chosen)
    rest = wanted - len(chosen)
    uniform = _draw_outside(rng, bounds, taken, rest)
    share = np.full(rest, (pool - len(chosen)) / max(rest, 1), np.float32)
    return np.concatenate([chosen, uniform]), np.append(np.ones(len(chosen), np.float32), share)


def _positives(
    rng: np.random.Generator,
    golden: tuple[np.ndarray, np.ndarray],
    bounds: tuple[int, int],
    cfg: SamplingConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """The positives to train on, ascending, and all that are known: what negatives must avoid."""
    known = _within(golden[0], bounds)
    if not len(known) and cfg.fake_positive and bounds[1] > bounds[0]:
        known = rng.integers(*bounds, size=1)
    kept = np.sort(_draw(rng, known, cfg.max_pos)) if len(known) > cfg.max_pos else known
    return kept, known


def _positive_weights(
    doc: Document, index: np.ndarray, votes: np.ndarray, cfg: SamplingConfig
) -> np.ndarray:
    """1, or by votes (a fake positive has none and weighs 1); trivial entries 0.5 either way."""
    weights = np.ones(len(index), np.float32)
    if cfg.vote_weighting:
        by_votes = vote_weights(votes, least=cfg.least_votes, most=cfg.most_votes)
        weights = np.where(votes > 0, by_votes, weights)
    return np.where(doc.trivial[index], np.float32(0.5), weights)


def draw_sample(doc: Document, token: int, cfg: SamplingConfig, *, epoch: int = 0) -> Sample:
    """Positives and drawn negatives of one token, by LSA spec 5.1.

    Positives are the window's golden entries within the candidates; negatives are drawn uniformly
    without replacement from candidates that are not golden in the window. Empty where there are no
    candidates. A function of its arguments only.
    """
    rng = sample_rng(cfg.seed, doc.number, token, epoch=epoch)
    bounds = doc.candidate_range(token, cfg)
    golden = window_union(doc.votes, token, cfg.window)
    kept, known = _positives(rng, golden, bounds, cfg)
    wanted = int(cfg.neg_ratio * max(len(kept), 1))
    negatives, shares = _negatives(rng, bounds, known, doc.hard, wanted, cfg.hard_share)
    weights = _positive_weights(doc, kept, lookup(golden, kept), cfg)
    index = np.concatenate([kept, negatives])
    order = np.argsort(index)
    labels = (np.arange(len(index)) < len(kept)).astype(np.float32)
    stands = np.full(len(kept), len(known) / max(len(kept), 1), np.float32)
    index = index[order]
    return Sample(
        index=index,
        labels=labels[order],
        weights=np.append(weights, np.ones(len(negatives), np.float32))[order],
        mass=window_mass(doc.mass, token, cfg.window, doc.n_entries)[index],
        stands_for=np.append(stands, shares)[order],
    )


def full_sample(doc: Document, token: int, cfg: SamplingConfig) -> Sample:
    """All candidates of one token, as validation scores them: nothing drawn, nothing fake."""
    bounds = doc.candidate_range(token, cfg)
    index = np.arange(*bounds)
    golden = window_union(doc.votes, token, cfg.window)
    votes = lookup(golden, index)
    labels = np.isin(index, golden[0], assume_unique=True)
    positive = _positive_weights(doc, index, votes, cfg)
    return Sample(
        index=index,
        labels=labels.astype(np.float32),
        weights=np.where(labels, positive, np.float32(1)),
        mass=window_mass(doc.mass, token, cfg.window, doc.n_entries)[index],
        stands_for=np.ones(len(index), np.float32),
    )
