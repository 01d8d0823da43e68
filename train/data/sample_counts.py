"""How many candidates each sample will have, without drawing one; and few sizes to pad them to."""

from typing import NamedTuple

import numpy as np

from train.data.labels import Document, SamplingConfig, sampled_tokens

SIZE_MULTIPLE = 64  # of a batch's candidates: tiles of matrix units


class SampleCounts(NamedTuple):
    """The samples of a document, ascending by token; all int32 [S]."""

    tokens: np.ndarray
    positives: np.ndarray  # entries or pages with a label in the window, before any cap
    pool: np.ndarray  # entries or pages that may be candidates
    slots: np.ndarray  # candidates of the drawn sample, at most


def window_distinct(
    rows: np.ndarray, units: np.ndarray, last: np.ndarray, window: int
) -> np.ndarray:
    """Distinct units below last[t] in rows t .. t + window - 1, for every t: int64 [T].

    `units` are those of elements in ascending `rows`; `last` ascends. An element is the first of
    its unit in the windows that begin after the element before it, and at most `window` - 1 tokens
    earlier: so each adds one to a stretch of tokens.
    """
    order = np.argsort(units, kind="stable")
    rows, units = rows[order], units[order]
    before = np.full(len(rows), -1)
    again = units[1:] == units[:-1]
    before[1:][again] = rows[:-1][again]
    begin = np.maximum(before + 1, rows - window + 1)
    begin = np.maximum(begin, np.searchsorted(last, units, side="right"))
    seen = begin <= rows
    count = len(last) + 1
    steps = np.bincount(begin[seen], minlength=count) - np.bincount(rows[seen] + 1, minlength=count)
    return np.cumsum(steps)[:-1]


def count_samples(doc: Document, cfg: SamplingConfig, *, interval: int = 1) -> SampleCounts:
    """What `draw_sample` will find at each sampled token that has candidates.

    Exact, except that `slots` may be too high where positives are capped and negatives run out, and
    with pages where a page is golden by an entry that does not exist yet.
    """
    tokens = sampled_tokens(doc.votes, window=cfg.window, interval=interval)
    first, last = doc.candidate_range(np.arange(len(doc.votes)), cfg)
    last = np.broadcast_to(last, len(doc.votes))
    size = cfg.unit_entries
    inside = (doc.votes.indices >= first) & (doc.votes.indices < doc.n_entries)
    units = doc.votes.indices[inside] // size
    ends = -(-last // size)
    rows = doc.votes.row_numbers()[inside]
    positives = window_distinct(rows, units, ends, cfg.window)[tokens]
    pool = ends[tokens] - first // size
    kept = np.minimum(positives, max(1, cfg.max_pos // size))
    if cfg.fake_positive:
        kept = np.maximum(kept, 1)
    wanted = (cfg.neg_ratio * np.maximum(kept, 1)).astype(np.int64)
    slots = np.minimum(kept + wanted, pool) * size
    parts = (part[pool > 0].astype(np.int32) for part in (tokens, positives, pool, slots))
    return SampleCounts(*parts)


def padded_sizes(slots: np.ndarray, *, most: int, multiple: int) -> np.ndarray:
    """At most `most` sizes, multiples of `multiple`, ascending, that waste the fewest candidates.

    Every sample is padded to the next size: `padded_sizes(slots, ...)[np.searchsorted(sizes,
    slots)]`. Exact, by dynamic programming over the sizes that occur.
    """
    values, counts = np.unique(-(-slots // multiple), return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    # cost[j]: of the samples of the first j values with k sizes, the last of which is values[j-1].
    cost = np.where(np.arange(len(values) + 1) > 0, np.inf, 0.0)
    choices = []
    for _ in range(min(most, len(values))):
        total = cost[:, None] + (below[None, 1:] - below[:, None]) * values
        total[np.arange(len(values) + 1)[:, None] > np.arange(len(values))] = np.inf
        best = np.argmin(total, axis=0)
        choices.append(best)
        cost = np.append(0.0, total[best, np.arange(len(values))])
    sizes, end = [], len(values)
    for best in reversed(choices):
        if end == 0:
            break
        sizes.append(values[end - 1])
        end = best[end - 1]
    return np.array(sizes[::-1], np.int64) * multiple
