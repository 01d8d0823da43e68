"""How good a memory indexer's scores are, as it is deployed (LSA spec 5.4, 8 row 16). NumPy only.

Every metric is a ratio of two sums, so that tokens add up to documents, documents to a set, and a
bootstrap over documents (`train.quality.intervals`) is a weighting. A *tally* holds these sums by
name: "<scores>/<candidates>/<metric>", such as "ensemble.max/evictable/recall@512".

Micro metrics pool the candidates of all tokens; macro ones are means over the tokens that have a
positive. A ratio of nothing to nothing is NaN. At equal scores the newer entry (the later page) is
taken first, as resident sets do, except that the order of a page's entries never matters.
"""

import bisect
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from lsa_jax.config_checks import number, refusal
from lsa_jax.lsa.indexer_config import Score
from lsa_jax.lsa.policy import EVEN_ODDS, check_threshold
from train.data.labels import ResidentRule
from train.quality import intervals
from train.quality.intervals import Interval

EnsembleMetric = Literal["max", "mean", "min", "learned"]
Tally = dict[str, np.ndarray]
"""Metric name -> float64 [2]: numerator and denominator."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MetricsConfig:
    """What is measured. `threshold` is compared strictly, as deployed (None: what `at` says); `ks`
    and `pages` ascend.

    `ks` are sizes of candidate sets for recall@K, `pages` numbers of pages on the device (see
    `pages_at`), for captured mass and recall; `resident` says what of it cannot be chosen.
    """

    threshold: float | None = None
    ks: tuple[int, ...] = (128, 256, 512, 1024)
    pages: tuple[int, ...] = ()
    resident: ResidentRule = dataclasses.field(default_factory=ResidentRule)

    def __post_init__(self) -> None:
        if self.threshold is not None:
            check_threshold("metrics.threshold", self.threshold)
        for name, least in (("ks", 1), ("pages", 0)):
            sizes = getattr(self, name)
            for i, size in enumerate(sizes):
                if number(f"metrics.{name}[{i}]", size, int) < least:
                    raise refusal(f"metrics.{name}[{i}]", size, f">= {least}")
            if list(sizes) != sorted(set(sizes)):
                raise refusal(f"metrics.{name}", sizes, "strictly ascending")

    def at(self, entries: int, score: Score) -> "MetricsConfig":
        """With a threshold for scores of a history of so many entries: as deployed where none is
        given, 0.5 of probabilities and an even share of shares."""
        if self.threshold is not None:
            return self
        even = EVEN_ODDS if score == "sigmoid" else 1 / max(entries, 2)
        return dataclasses.replace(self, threshold=even)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) in float64, without overflow."""
    small = np.exp(-np.abs(logits.astype(np.float64)))
    return np.where(logits >= 0, 1, small) / (1 + small)


def probabilities(logits: np.ndarray, score: Score) -> np.ndarray:
    """What logits, or logarithms of shares, say of entries; float64."""
    return sigmoid(logits) if score == "sigmoid" else np.exp(logits.astype(np.float64))


def ensemble(
    logits: np.ndarray,
    kind: EnsembleMetric,
    weight: np.ndarray | None = None,
    score: Score = "sigmoid",
) -> np.ndarray:
    """Scores [N] of the layers' logits [L, N]; `weight` [L] is a learned ensemble's leaf.

    "min" is not deployed: it asks what all layers agree on.
    """
    if (weight is None) == (kind == "learned"):
        raise refusal("weight", weight, "given for a learned ensemble only")
    if weight is not None:
        share = np.exp(weight.astype(np.float64) - weight.max())
        share /= share.sum()
        if score == "softmax":
            return share @ probabilities(logits, score)
        return sigmoid(share @ logits.astype(np.float64))
    reduce = {"max": np.max, "mean": np.mean, "min": np.min}[kind]
    return reduce(probabilities(logits, score), axis=0)


def named_scores(
    logits: np.ndarray,
    layers: Sequence[int],
    weight: np.ndarray | None = None,
    score: Score = "sigmoid",
) -> dict[str, np.ndarray]:
    """Scores by name: "layer.<ordinal>" of each layer and "ensemble.<kind>" of each ensemble."""
    named = {f"layer.{o}": probabilities(x, score) for o, x in zip(layers, logits, strict=True)}
    kinds: tuple[EnsembleMetric, ...] = ("max", "mean", "min")
    named |= {f"ensemble.{kind}": ensemble(logits, kind, score=score) for kind in kinds}
    if weight is not None:
        named["ensemble.learned"] = ensemble(logits, "learned", weight, score)
    return named


def ranked(scores: np.ndarray, most: int) -> np.ndarray:
    """Indices of the `most` highest scores, in order, at equal scores from the last one down."""
    index = np.arange(len(scores))
    if 0 < most < len(scores):  # sort only what can be among them, ties included
        least = np.partition(scores, -most)[-most]
        index = np.flatnonzero(scores >= least)
    index = index[::-1]
    return index[np.argsort(-scores[index], kind="stable")][:most]


def threshold_sums(scores: np.ndarray, labels: np.ndarray, threshold: float) -> Tally:
    """Precision, recall and F1 of {score > threshold}; `labels` is bool."""
    kept = scores > threshold
    hits, positives = np.sum(kept & labels), np.sum(labels)
    return {
        "precision": np.array([hits, np.sum(kept)], np.float64),
        "recall": np.array([hits, positives], np.float64),
        "f1": np.array([2 * hits, np.sum(kept) + positives], np.float64),
        "kept": np.array([np.sum(kept), len(scores)], np.float64),
    }


def topk_sums(scores: np.ndarray, labels: np.ndarray, ks: Sequence[int]) -> Tally:
    """Micro and macro recall of the K highest scores, for every K."""
    found = np.append(0, np.cumsum(labels[ranked(scores, max(ks, default=0))]))
    positives = float(np.sum(labels))
    sums: Tally = {}
    for k in ks:
        hits = float(found[min(k, len(labels))])
        sums[f"recall@{k}"] = np.array([hits, positives])
        share = (hits / positives, 1.0) if positives else (0.0, 0.0)
        sums[f"macro_recall@{k}"] = np.array(share)
    return sums


def per_page(x: np.ndarray, page_entries: int, combine: np.ufunc) -> np.ndarray:
    """[N] -> [ceil(N / page_entries)], the entries of a page combined; the last may be ragged."""
    return combine.reduceat(x, np.arange(0, len(x), page_entries)) if len(x) else x


def pages_at(
    budgets: Sequence[int], *, page_bytes: int, fixed_bytes: int, n_pages: int
) -> tuple[int, ...]:
    """Pages on the device at budgets in bytes, beside what is there always: 0 to all of them."""
    fits = ((budget - fixed_bytes) // page_bytes for budget in budgets)
    return tuple(min(max(pages, 0), n_pages) for pages in fits)


def page_sums(
    page_scores: np.ndarray,
    labels: np.ndarray,
    mass: np.ndarray,
    pages: Sequence[int],
    rule: ResidentRule,
) -> dict[str, Tally]:
    """Recall and captured mass with so many pages on the device, of all entries and evictable ones.

    Pages that the rule forces come first, the newest first, then the others by score; the page in
    formation is there on top. Where fewer than the forced pages fit, none other is. Micro sums.
    """
    size = rule.page_entries
    first, last = (bound // size for bound in rule.evictable_range(len(labels)))
    complete = len(labels) // size
    page = np.arange(complete)
    free = (page >= first) & (page < last)
    order = ranked(np.where(free, page_scores[:complete], np.inf), complete)
    sums: dict[str, Tally] = {"all": {}, "evictable": {}}
    for name, values in (("recall", labels), ("mass", mass)):
        paged = per_page(values.astype(np.float64), size, np.add)
        total, forming = float(paged.sum()), float(paged[complete:].sum())
        gained = np.append(0, np.cumsum(paged[:complete][order]))
        free_gained = np.append(0, np.cumsum(np.where(free, paged[:complete], 0)[order]))
        for count in pages:
            at = min(count, complete)
            sums["all"][f"{name}@{count}p"] = np.array([forming + gained[at], total])
            sums["evictable"][f"{name}@{count}p"] = np.array([free_gained[at], free_gained[-1]])
    return sums


def token_tally(
    scores: Mapping[str, np.ndarray],
    labels: np.ndarray,
    cfg: MetricsConfig,
    *,
    mass: np.ndarray | None = None,
) -> Tally:
    """All metrics of one token: `labels` [N] over the N entries that exist, `scores` [N] by name.

    Variants "all" and "evictable" differ in which candidates compete and count. Captured mass is
    measured where `mass` is given; a page scores as its best entry does.
    """
    n, size = len(labels), cfg.resident.page_entries
    first, last = cfg.resident.evictable_range(n)
    chosen = labels.astype(bool)
    threshold = EVEN_ODDS if cfg.threshold is None else cfg.threshold
    tally: Tally = {}
    for name, score in scores.items():
        if score.shape != (n,) or np.isnan(score).any():
            raise refusal(f"scores of {name}", score.shape, f"[{n}] without NaN")
        variants = {"all": slice(0, n), "evictable": slice(first, min(last, n))}
        sums = {
            variant: threshold_sums(score[part], chosen[part], threshold)
            | topk_sums(score[part], chosen[part], cfg.ks)
            for variant, part in variants.items()
        }
        if mass is not None:
            tops = per_page(score, size, np.maximum)
            paged = page_sums(tops, chosen, mass, cfg.pages, cfg.resident)
            sums = {variant: sums[variant] | paged[variant] for variant in sums}
        for variant, values in sums.items():
            tally |= {f"{name}/{variant}/{metric}": pair for metric, pair in values.items()}
    return tally


def add_tallies(tallies: Iterable[Tally]) -> Tally:
    """Sums by name; names need not be in all of them."""
    total: Tally = {}
    for tally in tallies:
        for name, pair in tally.items():
            total[name] = total[name] + pair if name in total else pair
    return total


def stacked(documents: Sequence[Tally], names: Sequence[str]) -> np.ndarray:
    """[D, M, 2] for `train.quality.intervals`; a name that a document lacks counts nothing."""
    none = np.zeros(2)
    return np.array([[doc.get(name, none) for name in names] for doc in documents])


def summarise(
    documents: Sequence[Tally], *, resamples: int = intervals.RESAMPLES, seed: int = 0
) -> dict[str, Interval]:
    """Every metric over the documents with its 95 % interval; one tally a document."""
    names = sorted({name for doc in documents for name in doc})
    found = intervals.bootstrap(stacked(documents, names), resamples=resamples, seed=seed)
    return dict(zip(names, found, strict=True))


def compare(
    first: Sequence[Tally],
    second: Sequence[Tally],
    *,
    resamples: int = intervals.RESAMPLES,
    seed: int = 0,
) -> dict[str, Interval]:
    """First less second, for the metrics both have, with paired 95 % intervals.

    Both are of the same documents in the same order.
    """
    if len(first) != len(second):
        raise refusal("documents of the second", len(second), f"the first's {len(first)}")
    names = sorted({n for doc in first for n in doc} & {n for doc in second for n in doc})
    sums = (stacked(first, names), stacked(second, names))
    found = intervals.paired_difference(*sums, resamples=resamples, seed=seed)
    return dict(zip(names, found, strict=True))


def length_bucket(entries: int, edges: Sequence[int]) -> str:
    """Name of the bucket of a length in entries: edges[i - 1] <= entries < edges[i]."""
    i = bisect.bisect_right(edges, entries)
    low = edges[i - 1] if i else 0
    return f"{low}-{edges[i]}" if i < len(edges) else f"{low}-"


def by_bucket(
    documents: Sequence[Tally], entries: Sequence[int], edges: Sequence[int]
) -> dict[str, list[Tally]]:
    """Documents by length bucket, the shortest first; buckets without one are left out."""
    groups: dict[str, list[Tally]] = {}
    for count, doc in sorted(zip(entries, documents, strict=True), key=lambda pair: pair[0]):
        groups.setdefault(length_bucket(count, edges), []).append(doc)
    return groups


def calibration_sums(scores: np.ndarray, labels: np.ndarray, bins: int = 20) -> np.ndarray:
    """[bins, 3] of equal width in probability: candidates, sum of scores, positives. Additive."""
    place = np.minimum((scores * bins).astype(np.int64), bins - 1)
    columns = (None, scores, labels.astype(np.float64))
    return np.stack([np.bincount(place, x, minlength=bins) for x in columns], axis=1)


def calibration_curve(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean score and share of positives per bin (NaN where empty), and the expected error.

    The error is the mean over candidates of |mean score - share of positives| of their bin.
    """
    count = sums[:, 0]
    filled = np.where(count > 0, count, np.nan)
    mean, share = sums[:, 1] / filled, sums[:, 2] / filled
    gaps = np.where(count > 0, np.abs(sums[:, 1] - sums[:, 2]), 0)
    return mean, share, float(gaps.sum() / count.sum()) if count.sum() else float("nan")
