"""What decides, beside an indexer's scores, which pages are on the device. NumPy only.

Every arm gives scores of entries, for recall@K, and of pages, for the order in which they are
resident after the forced ones; all arms fill the same number of pages.
"""

import zlib
from typing import Literal, NamedTuple, get_args

import numpy as np

from train.data.labels import sample_rng
from train.quality.evaluation import Recording
from train.quality.metrics import per_page

Baseline = Literal["recency", "random", "lagged", "oracle"]
BASELINES: tuple[Baseline, ...] = get_args(Baseline)
PagePolicy = Literal["budget", "top", "published"]

DESCRIPTIONS = {
    "recency": "the newest entries",
    "random": "a draw for each entry, by seed, document and token",
    "lagged": "entries by the sum of their recorded native votes (of all CSA layers, golden sets "
    "only) at the last `window` decode tokens up to the decision's own, which has been fed; fewer "
    "at a document's start, as the prompt's votes are not recorded; newer entries first among "
    "equals; a page by its entries' sum",
    "oracle.recall": "the window's own golden entries; a page by how many it has",
    "oracle.mass": "the window's own attention mass; a page by its entries' sum",
}


class Scores(NamedTuple):
    """Scores of an arm at one decision; where `probability`, a threshold means something."""

    entries: np.ndarray
    pages: np.ndarray
    probability: bool = False


def of_probabilities(
    probabilities: np.ndarray, policy: PagePolicy, *, threshold: float, page_entries: int
) -> Scores:
    """An indexer's scores, and its pages in the order of a policy of `lsa.resident_set`.

    "top": by the best entry. "published": by entries above the threshold. "budget": by the surplus
    of entries above the threshold; where deployment would leave the rest of a budget empty, pages
    without one follow, by their best entry.
    """
    best = per_page(probabilities, page_entries, np.maximum)
    above = probabilities > threshold
    if policy == "top":
        pages = best
    elif policy == "published":
        pages = per_page(above.astype(np.float64), page_entries, np.add)
    else:
        surplus = np.where(above, probabilities - threshold, 0) / (1 - threshold)
        worth = per_page(surplus, page_entries, np.add)
        pages = np.where(best > threshold, worth, best - 1)
    return Scores(probabilities, pages, probability=True)


def _summed(entries: np.ndarray, page_entries: int) -> Scores:
    entries = entries.astype(np.float64)
    return Scores(entries, per_page(entries, page_entries, np.add))


def lagged_votes(recording: Recording, token: int, window: int, entries: int) -> np.ndarray:
    """Votes of each entry summed over the tokens token - window + 1 .. token."""
    votes = recording.document.votes
    part = slice(votes.pointers[max(0, token + 1 - window)], votes.pointers[token + 1])
    counts = votes.values[part].astype(np.float64)
    return np.bincount(votes.indices[part], counts, minlength=entries)[:entries]


def baseline_scores(
    kind: Baseline,
    recording: Recording,
    token: int,
    *,
    window: int,
    page_entries: int,
    seed: int = 0,
) -> dict[str, Scores]:
    """The arms of a baseline at one decision, by name; `DESCRIPTIONS` says what they see.

    The oracle is two: one for labels, and one for attention mass where that is recorded.
    """
    entries = int(recording.document.entries_at(token))
    if kind == "recency":
        newest = np.arange(entries, dtype=np.float64)
        return {kind: Scores(newest, per_page(newest, page_entries, np.maximum))}
    if kind == "random":
        rng = sample_rng(seed, zlib.crc32(recording.name.encode()), token)
        draws = rng.random(entries)
        return {kind: Scores(draws, per_page(draws, page_entries, np.maximum))}
    if kind == "lagged":
        votes = lagged_votes(recording, token, window, entries)
        return {kind: _summed(votes, page_entries)}
    arms = {
        "oracle.recall": _summed(recording.golden(token, token + window, entries), page_entries)
    }
    mass = recording.mass(token, token + window, entries)
    if mass is not None:
        arms["oracle.mass"] = _summed(mass, page_entries)
    return arms
