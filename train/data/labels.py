"""What samples are drawn from: a document's votes, their windows, and the settings (LSA spec 5.1).

Plain NumPy on plain arrays. Decode tokens count from 0. Entry n of N *exists* at token t, which can
read it, if `formed_at[n] <= t`, as `trace_info.formation_steps` says. A sample's *window* is the
tokens t .. t + window - 1, cut at the end of the document. Rows of `SparseRows` are decode tokens.

Randomness: a sample's generator is seeded by (seed, epoch, document, t) alone, so that neither the
order of samples nor the number of processes that draw them changes a sample.
"""

import dataclasses
import hashlib
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from lsa_jax.config_checks import number, refusal
from train.traces.votes import SparseRows

TRIVIAL_SHARE = 0.8  # of a document's tokens
Unit = Literal["entry", "page"]
"""What is drawn: single entries, or whole pages of `ResidentRule.page_entries`."""
_WORD = 2**32  # of a key's items but the seed


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

    def evictable_range(self, entries: Any) -> tuple[int, Any]:
        """First and behind the last of the entries that can be evicted, of `entries` that exist.

        `entries` is an int or an array of them; so is the second result.
        """
        first = -(-self.sink // self.page_entries) * self.page_entries
        last = np.maximum(0, entries - self.recency) // self.page_entries * self.page_entries
        return first, np.maximum(first, last)


def evictable(index: Any, entries: Any, rule: ResidentRule) -> Any:
    """Which of the entries `index` can be evicted where `entries` exist: not future, not resident.

    Broadcasts; integers, NumPy or JAX arrays alike, so that a step can derive a `valid` mask too.
    """
    size = rule.page_entries
    recent = (entries - rule.recency) // size * size  # below 0: all are recent
    return (index >= -(-rule.sink // size) * size) & (index < recent)


def _window(rows: SparseRows, token: int, window: int) -> slice:
    return slice(rows.pointers[token], rows.pointers[min(token + window, len(rows))])


def previous_rows(rows: SparseRows) -> np.ndarray:
    """The row of the element before each one of the same column, int32 [M]; -1 for its first."""
    order = np.argsort(rows.indices, kind="stable")
    columns, numbers = rows.indices[order], rows.row_numbers().astype(np.int32)[order]
    before = np.full(len(order), -1, np.int32)
    before[1:] = np.where(columns[1:] == columns[:-1], numbers[:-1], -1)
    out = np.empty_like(before)
    out[order] = before
    return out


def window_union(votes: SparseRows, previous: np.ndarray, token: int, window: int) -> np.ndarray:
    """Entries that are golden at any token of the window, in the order in which they first are.

    `previous` is `previous_rows(votes)`: an element is an entry's first of the window where the one
    before it lies before the window. So nothing is sorted. Entries of a row are in its order.
    """
    part = _window(votes, token, window)
    first = (previous[part] < token).nonzero()[0]  # faster than by the mask
    return votes.indices[part][first].astype(np.int64)


def window_votes(votes: SparseRows, token: int, window: int, entries: np.ndarray) -> np.ndarray:
    """The most votes that each of some entries has at a token of the window, int64; 0 for none."""
    part = _window(votes, token, window)
    found = votes.indices[part]
    highest = max(found.max(initial=-1), entries.max(initial=-1))
    most = np.zeros(highest + 1, votes.values.dtype)  # of another dtype it would be slow
    np.maximum.at(most, found, votes.values[part])
    return most[entries].astype(np.int64)


def window_sums(rows: SparseRows, token: int, window: int, columns: int) -> np.ndarray:
    """Every column's values summed over the window, float64 [columns or more]."""
    part = _window(rows, token, window)
    return np.bincount(rows.indices[part], rows.values[part], minlength=columns)


def window_mass(mass: SparseRows, token: int, window: int, n_entries: int) -> np.ndarray:
    """Attention mass of every entry summed over the window, float32 [N]."""
    return window_sums(mass, token, window, n_entries)[:n_entries].astype(np.float32)


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


class _Key(ISeedSequence):
    """Words that seed a generator: a hash of its key, five times as fast as a SeedSequence."""

    def __init__(self, key: str) -> None:
        self._words = hashlib.blake2b(key.encode(), digest_size=32).digest()

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        """The first words of the hash."""
        return np.frombuffer(self._words, dtype)[:n_words]


def sample_rng(seed: int, document: int, token: int, *, epoch: int = 0) -> np.random.Generator:
    """PCG64 seeded by the BLAKE2b hash of "seed,epoch,document,token"."""
    for name, value in (("epoch", epoch), ("document", document), ("token", token)):
        if not 0 <= value < _WORD:
            raise refusal(name, value, "in [0, 2^32)")
    key = _Key(f"{seed:d},{epoch:d},{document:d},{token:d}")
    return np.random.Generator(np.random.PCG64(cast(Any, key)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How a sample's candidates are drawn and weighted. The defaults are the authors'.

    `unit` says what is drawn, entries or whole pages; a positive page has a positive entry.
    `max_pos` caps the positives (in pages: their entries, at least a page); negatives are
    `neg_ratio` times as many (as one, if none).
    `vote_weighting` weights positives by votes, between `least_votes` and `most_votes`. `causal`
    leaves out candidates that do not exist yet, `evictable_only` also the always resident ones.
    `fake_positive` labels a random candidate where a sample has no positive, as published;
    `hard_share` is the share of negatives to take from the document's pool of hard ones.
    """

    unit: Unit = "entry"
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
        if self.unit not in get_args(Unit):
            raise refusal("sampling.unit", self.unit, f"one of {', '.join(get_args(Unit))}")
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

    @property
    def unit_entries(self) -> int:
        """Entries of one unit that is drawn."""
        return self.resident.page_entries if self.unit == "page" else 1


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
        self._previous = previous_rows(votes)
        # Sums are taken often, and of float16 slowly.
        mass = _no_rows(len(votes)) if mass is None else mass
        self.mass = dataclasses.replace(mass, values=mass.values.astype(np.float32))
        self.hard = np.unique(np.zeros(0, np.int64) if hard is None else hard)
        self.n_entries, self.highest = len(formed_at), int(votes.indices.max(initial=-1))
        self.trivial = trivial_entries(votes, self.n_entries, trivial_share)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        parts = [self.formed_at, self._previous, self.hard, self.trivial]
        parts += [p for r in (self.votes, self.mass) for p in (r.indices, r.values, r.pointers)]
        return sum(part.nbytes for part in parts)

    def golden(self, token: int, window: int) -> np.ndarray:
        """Entries that are golden at any token of the window, by the token that they first are."""
        return window_union(self.votes, self._previous, token, window)

    def entries_at(self, token: Any) -> Any:
        """Entries that exist at a token, or at each of an array of them."""
        token = np.asarray(token, self.formed_at.dtype)  # else all of formed_at is converted
        return self.formed_at.searchsorted(token, side="right")

    def candidate_range(self, token: Any, cfg: SamplingConfig) -> tuple[int, Any]:
        """First and behind the last of the entries that a sample may contain.

        `token` may be an array; where the last depends on it, it is one then.
        """
        if cfg.evictable_only:
            return cfg.resident.evictable_range(self.entries_at(token))
        return 0, self.entries_at(token) if cfg.causal else self.n_entries
