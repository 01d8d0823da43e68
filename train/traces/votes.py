"""What a backbone's native indexers vote for: the labels of a memory indexer (LSA spec 4.2).

At each token every CSA layer keeps a top-p set of its top-k entries, and an entry's votes are the
layers that keep it. Two rules are easy to miss, and kept as published: probabilities are a softmax
over the top k only; and the first entry beyond p is kept *as well as* the first rank, so a layer
whose first entry already exceeds p keeps two.

Where the published rule leaves the outcome to rounding, this says what happens: logits are compared
as float32, equal ones in the order of their entries; probabilities and their running sum are
float64, and a sum within `eps` of p does not exceed it. NumPy only.
"""

import dataclasses

import numpy as np

from lsa_jax.config import ConfigError
from lsa_jax.config_checks import number, refusal

MAX_LAYERS = 255  # votes are stored as uint8


@dataclasses.dataclass(frozen=True, kw_only=True)
class VoteConfig:
    """How logits become votes, and votes golden sets; the defaults are the published ones.

    `eps` is about what the rounding of a float32 sum of `top_k` probabilities amounts to.
    """

    top_k: int = 512
    top_p: float = 0.6
    min_layers: int = 3
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("top_k", "min_layers"):
            if number(f"votes.{name}", getattr(self, name), int) < 1:
                raise refusal(f"votes.{name}", getattr(self, name), ">= 1")
        if self.min_layers > MAX_LAYERS:
            raise refusal("votes.min_layers", self.min_layers, f"<= {MAX_LAYERS}")
        if not 0 < number("votes.top_p", self.top_p, float) < 1:
            raise refusal("votes.top_p", self.top_p, "in (0, 1)")
        if not 0 <= number("votes.eps", self.eps, float) < 1e-2:
            raise refusal("votes.eps", self.eps, "in [0, 0.01)")


@dataclasses.dataclass(frozen=True)
class SparseRows:
    """Values at some columns of each row: of row r, those at `pointers[r]:pointers[r + 1]`.

    `indices` int32 [M] are columns, `values` [M] theirs, `pointers` int64 [rows + 1].
    """

    indices: np.ndarray
    values: np.ndarray
    pointers: np.ndarray

    def __post_init__(self) -> None:
        if not self.indices.shape == self.values.shape == (self.indices.size,):
            got = f"{self.indices.shape} and {self.values.shape}"
            raise ConfigError(f"indices and values must be of one length, got shapes {got}")
        ends = self.pointers
        if ends.ndim != 1 or not len(ends) or ends[0] != 0 or ends[-1] != len(self.indices):
            got = f"shape {ends.shape} ending with {ends[-1:].tolist()}"
            raise ConfigError(f"pointers must run from 0 to {len(self.indices)}, got {got}")
        if np.any(np.diff(ends) < 0):
            row = int(np.argmax(np.diff(ends) < 0))
            raise ConfigError(f"pointers must never descend, but do after row {row}")

    def __len__(self) -> int:
        return len(self.pointers) - 1

    def row(self, r: int) -> tuple[np.ndarray, np.ndarray]:
        """Columns and values of one row."""
        span = slice(self.pointers[r], self.pointers[r + 1])
        return self.indices[span], self.values[span]

    def row_numbers(self) -> np.ndarray:
        """The row of every element, int64 [M]."""
        return np.repeat(np.arange(len(self)), np.diff(self.pointers))

    def repeats(self) -> bool:
        """Whether a row has a column twice."""
        pairs = np.sort(_paired(self.row_numbers(), self.indices))
        return bool(np.any(pairs[1:] == pairs[:-1]))

    def where(self, chosen: np.ndarray) -> "SparseRows":
        """The chosen elements (bool [M]), in the same rows and order."""
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(chosen)])
        return SparseRows(self.indices[chosen], self.values[chosen], before[self.pointers])

    def by_value(self) -> "SparseRows":
        """The same rows, each with its highest values first, the lower column among equals."""
        descending = -self.values.astype(np.float64)
        order = np.lexsort((self.indices, descending, self.row_numbers()))
        return SparseRows(self.indices[order], self.values[order], self.pointers)


def top_entries(
    logits: np.ndarray, entries: np.ndarray, top_k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The highest logits [T, L, N] of each token and layer, descending, and whose they are.

    Token t has `entries[t]` entries; later columns have no influence. Returns float32 and int32
    [T, L, min(top_k, N)]; where a token has fewer entries than that, its last logits are -inf.
    Raises ConfigError where a logit of an entry is not finite.
    """
    tokens, layers, columns = logits.shape
    exists = np.arange(columns) < np.asarray(entries)[:, None, None]
    rows = np.where(exists, logits, -np.inf).astype(np.float32)
    if not np.array_equal(np.isfinite(rows), np.broadcast_to(exists, rows.shape)):
        t, layer, entry = np.argwhere(np.isfinite(rows) != exists)[0]
        raise ConfigError(
            f"logits must be finite, got {logits[t, layer, entry]} at token {t}, layer {layer},"
            f" entry {entry}"
        )
    k = min(top_k, columns)
    if k == 0:
        return np.zeros((tokens, layers, 0), np.float32), np.zeros((tokens, layers, 0), np.int32)
    rows = rows.reshape(-1, columns)
    last = np.partition(rows, columns - k, axis=1)[:, columns - k, None]
    above, level = rows > last, rows == last
    room = k - np.sum(above, axis=1, keepdims=True)
    chosen = above | (level & (np.cumsum(level, axis=1) <= room))  # of equals, the first entries
    indices = np.nonzero(chosen)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(rows, indices, 1), axis=1, kind="stable")
    indices = np.take_along_axis(indices, order, 1)
    values = np.take_along_axis(rows, indices, 1)
    shape = (tokens, layers, k)
    return values.reshape(shape), indices.astype(np.int32).reshape(shape)


def kept_ranks(values: np.ndarray, cfg: VoteConfig) -> np.ndarray:
    """Which of the descending top logits [..., K] their layer keeps: bool [..., K].

    Those whose running probability is at most p, and the next one; at least the first two. A value
    of -inf is no entry.
    """
    exists = values > -np.inf
    first = np.where(exists[..., :1], values[..., :1], 0).astype(np.float64)
    weights = np.exp(values.astype(np.float64) - first)
    total = np.maximum(np.sum(weights, axis=-1, keepdims=True), 1)  # 1: the first's own weight
    running = np.cumsum(weights / total, axis=-1)
    within = np.sum(exists & (running <= cfg.top_p + cfg.eps), axis=-1, keepdims=True)
    return exists & (np.arange(values.shape[-1]) < np.maximum(within, 1) + 1)


def golden_sets(indices: np.ndarray, kept: np.ndarray, min_layers: int) -> SparseRows:
    """Entries with at least `min_layers` votes at each token, and their votes (uint8).

    `indices` [T, L, K] are entries, distinct within a token and layer, and `kept` says which have
    the layer's vote. Rows are tokens, most votes first, the lower entry among equals.
    """
    tokens, layers = kept.shape[:2]
    if layers > MAX_LAYERS:
        raise ConfigError(f"votes must be of at most {MAX_LAYERS} layers, got {layers}")
    token = np.broadcast_to(np.arange(tokens)[:, None, None], kept.shape)[kept]
    pairs, votes = np.unique(_paired(token, indices[kept]), return_counts=True)
    return _from_pairs(pairs, votes.astype(np.uint8), tokens).where(votes >= min_layers).by_value()


def golden_from_logits(logits: np.ndarray, entries: np.ndarray, cfg: VoteConfig) -> SparseRows:
    """The golden sets of tokens with native logits [T, L, N], of which `entries` [T] exist.

    All N entries take part that exist at the token, those of the prompt and those formed since.
    """
    values, indices = top_entries(logits, entries, cfg.top_k)
    return golden_sets(indices, kept_ranks(values, cfg), cfg.min_layers)


def window_unions(
    golden: SparseRows, tokens: np.ndarray | None = None, *, window: int = 64
) -> SparseRows:
    """For each of `tokens` (default: all), the union of the golden sets of `window` tokens from it.

    The window shrinks at the end of the recording. Rows are in the order of `tokens`, their entries
    ascending, each with its most votes in the window.
    """
    if window < 1:
        raise ConfigError(f"window must be >= 1, got {window}")
    first = np.arange(len(golden)) if tokens is None else np.asarray(tokens, np.int64)
    if first.size and not 0 <= first.min() <= first.max() < len(golden):
        got = f"{first.min()}..{first.max()}"
        raise ConfigError(f"tokens must be in 0..{len(golden) - 1}, got {got}")
    starts = golden.pointers[first]
    lengths = golden.pointers[np.minimum(first + window, len(golden))] - starts
    # A window's elements lie together: place m of the rows laid end to end is element at[m].
    at = np.arange(lengths.sum()) + np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
    pairs = _paired(np.repeat(np.arange(len(first)), lengths), golden.indices[at])
    order = np.argsort(pairs, kind="stable")
    pairs, votes = pairs[order], golden.values[at[order]]
    new = np.flatnonzero(np.diff(pairs, prepend=-1))
    best = np.maximum.reduceat(votes, new) if len(new) else votes
    return _from_pairs(pairs[new], best, len(first))


def _paired(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Row and column in one int64 that sorts by row, then by column."""
    return (rows.astype(np.int64) << 32) | columns.astype(np.int64)


def _from_pairs(pairs: np.ndarray, values: np.ndarray, rows: int) -> SparseRows:
    """Ascending pairs as rows."""
    pointers = np.searchsorted(pairs >> 32, np.arange(rows + 1)).astype(np.int64)
    return SparseRows((pairs & 0xFFFFFFFF).astype(np.int32), values, pointers)
