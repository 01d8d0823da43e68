"""Resident sets by brute force: one row, one page, one entry at a time, from the published rules
(LSA spec 2.4 and 2.6) and from the stated rules of our budget policy.

Scores and thresholds must be dyadic fractions: float32 sums are then exact in any order, and pages
tie where they do here, in exact arithmetic.
"""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

from lsa_jax.lsa.policy import PolicyConfig

Page = tuple[int, int]  # (row, page)


@dataclasses.dataclass(frozen=True)
class Row:
    """One row's entries; a row that is not live is one without entries."""

    scores: Sequence[float]
    threshold: float
    complete: int  # pages that can be resident
    previous: frozenset[int] = frozenset()


@dataclasses.dataclass(frozen=True)
class Chosen:
    """What `resident_set.Selection` says of one row, as sets and numbers."""

    pages: set[int]
    forced: set[int]
    wanted: int
    over_budget: int
    kept_entries: int
    captured: float


def mode_a_entries(scores: Sequence[float], threshold: float, cfg: PolicyConfig) -> set[int]:
    """Published entries (2.4): thresholded, recent, sink; then the cap. Newer wins a tie."""
    n = len(scores)
    passed = {j for j in range(n) if scores[j] > threshold}
    forced = {j for j in range(n) if j >= n - cfg.recency or j < cfg.sink}
    if not cfg.cap or len(passed | forced) <= cfg.cap:
        return passed | forced
    ranked = sorted(passed - forced, key=lambda j: (-scores[j], -j))
    return forced | set(ranked[: max(cfg.cap - len(forced), 0)])


def gated(scores: Sequence[float], cfg: PolicyConfig) -> bool:
    """Whether nothing but forced pages is worth recalling."""
    if cfg.recall_gate is None:
        return False
    n = len(scores)
    forced = [j for j in range(n) if j >= n - cfg.recency or j < cfg.sink]
    others = sorted((Fraction(scores[j]) for j in range(n) if j not in forced), reverse=True)
    best = sum(others[: cfg.recency + cfg.sink])
    return best <= Fraction(cfg.recall_gate) * sum(Fraction(scores[j]) for j in forced)


def published_order(
    scores: Sequence[float], threshold: float, cfg: PolicyConfig, size: int
) -> list[tuple[float, int]]:
    """(s_P, page) of all pages (2.6), s_P infinite for forced ones; ties in no order of note."""
    tail = math.floor((len(scores) - cfg.recency) / size)
    out = []
    for page in range(math.ceil(len(scores) / size)):
        entries = scores[page * size : (page + 1) * size]
        forced = page >= tail or page * size < cfg.sink
        out.append((math.inf if forced else sum(s > threshold for s in entries), page))
    return sorted(out, reverse=True)


def _page_score(
    entries: list[float], kept: list[float], row: Row, cfg: PolicyConfig
) -> float | Fraction:
    if cfg.policy == "published":
        return sum(s > row.threshold for s in entries)
    if cfg.policy == "top":
        return max(entries)
    threshold = Fraction(row.threshold)
    return sum((Fraction(s) - threshold) / (1 - threshold) for s in kept)


@dataclasses.dataclass(frozen=True)
class _Pages:
    """Of one row: places in the order of pages, and sets of pages."""

    place: dict[int, tuple[int, float | Fraction, int]]
    forced: set[int]
    needed: set[int]
    candidates: set[int]


def _row_pages(row: Row, cfg: PolicyConfig, size: int) -> _Pages:
    n = len(row.scores)
    existing = range(math.ceil(n / size))
    complete = {p for p in existing if p < row.complete}
    kept = mode_a_entries(row.scores, row.threshold, cfg)
    kept = {j for j in kept if row.scores[j] > row.threshold}
    old = row.previous & complete if cfg.sticky else frozenset()
    forced, needed, place = set(), set(), {}
    nothing = gated(row.scores, cfg)
    for p in existing:
        inside = range(p * size, min(n, (p + 1) * size))
        recent = p >= math.floor((n - cfg.recency) / size)
        if recent or p * size < cfg.sink:
            forced.add(p)
        if p in forced or p in old or cfg.policy == "top" or (kept & set(inside) and not nothing):
            needed.add(p)
        tier = 0 if p in forced else 1 if p in old else 2
        mine = [row.scores[j] for j in inside if j in kept]
        score = _page_score([row.scores[j] for j in inside], mine, row, cfg)
        place[p] = (tier, -score, -p)
    candidates = set(existing) if cfg.policy == "published" else needed & complete
    if cfg.recall_pages is not None:
        candidates = set(sorted(candidates, key=place.__getitem__)[: cfg.recall_pages])
    if cfg.policy != "published":
        forced &= complete
    return _Pages(place, forced, needed & complete, candidates)


def order(rows: Sequence[Row], cfg: PolicyConfig, size: int) -> list[Page]:
    """All pages that compete for the budget, most wanted first."""
    pages = [_row_pages(row, cfg, size) for row in rows]
    keys = {}
    for b, (row, mine) in enumerate(zip(rows, pages, strict=True)):
        complete = min(row.complete, len(row.scores) // size)
        for p in mine.candidates & set(range(row.complete)):
            tier, score, newest = mine.place[p]
            keys[b, p] = (tier, score, newest + complete, b)
    return sorted(keys, key=keys.__getitem__)


def select(
    rows: Sequence[Row], cfg: PolicyConfig, size: int, allowed: int | Sequence[int]
) -> list[Chosen]:
    """The resident set of each row; `allowed` is for all rows together or one per row."""
    ranked = order(rows, cfg, size)
    if isinstance(allowed, int):
        granted = set(ranked[:allowed])
    else:
        of_row = [[page for page in ranked if page[0] == b] for b in range(len(rows))]
        granted = {page for mine, n in zip(of_row, allowed, strict=True) for page in mine[:n]}
    return [_chosen(b, row, granted, cfg, size) for b, row in enumerate(rows)]


def _chosen(b: int, row: Row, granted: set[Page], cfg: PolicyConfig, size: int) -> Chosen:
    pages = _row_pages(row, cfg, size)
    mine = {p for owner, p in granted if owner == b}
    passed = [j for j, s in enumerate(row.scores) if s > row.threshold]
    readable = [j for j in passed if j // size in mine or j // size >= row.complete]
    return Chosen(
        pages=mine | {p for p in pages.candidates if p >= row.complete},
        forced=pages.forced,
        wanted=len(pages.needed),
        over_budget=len(pages.needed - mine),
        kept_entries=len(passed),
        captured=len(readable) / len(passed) if passed else 1.0,
    )
