"""From scores to a resident set: which pages of each row are on the device until the next cycle.

Pure functions of static shapes: N entries make P = ceil(N / page_entries) pages. Only complete
pages can be resident, because a page in formation lives in a buffer of its own, always readable.

Order of pages, one for all policies: forced pages, then sticky ones, then the others; among these
the higher page score; at equal scores the page nearer to its row's end; at last the lower row.
The budget goes to the first pages in this order, over all rows where they share it.

Page scores:
  - "published": the number of entries above the threshold.
  - "top": the highest score of an entry.
  - "budget" and "threshold": the page's surplus, sum over kept entries of
    (score - threshold) / (1 - threshold). The threshold is the price of an entry, the surplus what
    is gained over it: zero where nothing is worth keeping, one for each entry that is certain,
    whatever the row's threshold, so that rows can be compared. Counting entries instead, as
    published, ranks eight entries at 0.55 above two at 0.99, and so loses a needle to background
    that happens to be dense; the surplus ranks the needle first (0.98 units above 0.4 of them).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.policy import EVEN_ODDS, PolicyConfig


class Selection(NamedTuple):
    """A resident set and what it cost. Rows that are not live have nothing in any field."""

    pages: Bool[Array, "B P"]  # resident; "published" counts pages in formation: see `select`
    page_rank: Float[Array, "B P"]  # place in the order of what shares a budget; inf: not in it
    forced: Bool[Array, "B P"]  # recent or first pages that could be resident
    wanted: Int[Array, " B"]  # complete pages with an entry to keep, forced or sticky
    over_budget: Int[Array, " B"]  # wanted pages that are not resident
    kept_entries: Int[Array, " B"]  # entries above the threshold, before any cap
    captured: Float[Array, " B"]  # of those, the share in resident pages or in formation (W1)
    nan: Bool[Array, " B"]  # an entry that exists has a NaN score: the caller must raise
    above: Int[Array, " B"]  # resident pages on top of what the budget grants, see `Rescue`


class Rescue(NamedTuple):
    """What the safety net adds to a row, whatever its policy: up to `pages` complete pages that the
    budget did not grant. Those with a `share` come first, most first, then those that the policy
    wants, then the others. What the budget grants, to this row and to others, stays the same."""

    pages: Int[Array, " B"]
    share: Float[Array, "B P"]  # of the target layers' native top-k


def row_thresholds(calibration: Calibration, entries: Int[Array, " B"]) -> Float[Array, " B"]:
    """Each row's calibrated threshold by its length in entries, as `Calibration.threshold`."""
    edges = jnp.asarray(calibration.edges, jnp.int32)
    bucket = jnp.searchsorted(edges, entries, side="right")
    return jnp.asarray(calibration.thresholds, jnp.float32)[bucket]


def even_shares(entries: Int[Array, " B"]) -> Float[Array, " B"]:
    """What each of a row's entries would get if all got the same: the threshold of shares."""
    return 1 / jnp.maximum(entries, 2).astype(jnp.float32)


def forced_pages(
    entries: Int[Array, " B"], pages: int, cfg: PolicyConfig, *, page_entries: int
) -> Bool[Array, "B {pages}"]:
    """Pages that hold one of the last `recency` or of the first `sink` of a row's entries.

    As published (spec 2.6), the tail starts at page floor((N - recency) / page_entries).
    """
    page = jnp.arange(pages, dtype=jnp.int32)
    recent = page >= ((entries - cfg.recency) // page_entries)[:, None]
    sink = page < -(-cfg.sink // page_entries)
    return (recent | sink) & (page < -(-entries // page_entries)[:, None])


def _rank(
    tier: Int[Array, "R M"], score: Float[Array, "R M"], age: Int[Array, "R M"]
) -> Int[Array, "R M"]:
    """Each element's place in its row's order: low tier, high score, low age, low column."""
    place = jax.lax.broadcasted_iota(jnp.int32, tier.shape, 1)
    keys = (tier, -score, age)
    order = jax.lax.sort((*keys, place), dimension=1, num_keys=3, is_stable=True)[-1]
    row = jnp.arange(tier.shape[0])[:, None]
    return jnp.zeros_like(place).at[row, order].set(place, unique_indices=True)


def _first(
    candidates: Bool[Array, "B P"],
    keys: tuple[Array, Array, Array],
    allowed: Int[Array, ""] | Int[Array, " B"],
) -> tuple[Bool[Array, "B P"], Int[Array, "B P"]]:
    """The first `allowed` candidates, over all rows or per row, and the rank of every page."""
    tier, score, age = keys
    tier = jnp.where(candidates, tier, 3)
    shape = tier.shape if allowed.ndim else (1, tier.size)
    rank = _rank(*(key.reshape(shape) for key in (tier, score, age))).reshape(tier.shape)
    return candidates & (rank < (allowed[:, None] if allowed.ndim else allowed)), rank


def _per_page(x: Array, page_entries: int, fill: float | bool) -> Array:
    """[B, N] -> [B, P, page_entries], the last page filled up."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % page_entries)), constant_values=fill)
    return x.reshape(x.shape[0], -1, page_entries)


def _capped(
    scores: Float[Array, "B N"],
    passed: Bool[Array, "B N"],
    entries: Int[Array, " B"],
    cfg: PolicyConfig,
) -> Bool[Array, "B N"]:
    """The passed entries that `cap` leaves: recent and first ones, then the highest, then newer."""
    index = jnp.arange(scores.shape[1], dtype=jnp.int32)
    forced = _always_kept(entries, scores.shape[1], cfg)
    optional = passed & ~forced
    room = jnp.maximum(cfg.cap - jnp.sum(forced, axis=1, dtype=jnp.int32), 0)
    tier = jnp.zeros_like(scores, jnp.int32)
    age = jnp.broadcast_to(-index, scores.shape)
    return (passed & forced) | _first(optional, (tier, scores, age), room)[0]


def _always_kept(
    entries: Int[Array, " B"], columns: int, cfg: PolicyConfig
) -> Bool[Array, "B {columns}"]:
    """The last `recency` entries of each row and its first `sink`."""
    index = jnp.arange(columns, dtype=jnp.int32)
    forced = (index >= (entries - cfg.recency)[:, None]) | (index < cfg.sink)
    return forced & (index < entries[:, None])


def _worthwhile(
    scores: Float[Array, "B N"], entries: Int[Array, " B"], cfg: PolicyConfig
) -> Bool[Array, " B"]:
    """Rows that pass `cfg.recall_gate`; sanitised scores."""
    assert cfg.recall_gate is not None
    always = _always_kept(entries, scores.shape[1], cfg)
    scores = jnp.maximum(scores, 0)  # what does not exist has no share
    count = min(cfg.recency + cfg.sink, scores.shape[1])
    best = jnp.sum(jax.lax.top_k(jnp.where(always, 0, scores), count)[0], axis=1)
    return best > cfg.recall_gate * jnp.sum(jnp.where(always, scores, 0), axis=1)


def _page_scores(
    scores: Array, kept: Array, counts: Array, threshold: Array, cfg: PolicyConfig, size: int
) -> Float[Array, "B P"]:
    """The page score of the policy, from sanitised entry scores; the module says which."""
    if cfg.policy == "published":
        return counts.astype(jnp.float32)
    if cfg.policy == "top":
        return jnp.max(_per_page(scores, size, -jnp.inf), axis=-1)
    surplus = jnp.where(kept, scores - threshold[:, None], 0)
    return jnp.sum(_per_page(surplus, size, 0), axis=-1) / (1 - threshold)[:, None]


def _captured(
    counts: Int[Array, "B P"] | None, readable: Bool[Array, "B P"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Entries above the threshold, and the share of them in readable pages (1 where none is)."""
    if counts is None:
        counts = jnp.zeros_like(readable, jnp.int32)
    total = jnp.sum(counts, axis=1, dtype=jnp.int32)
    inside = jnp.sum(jnp.where(readable, counts, 0), axis=1, dtype=jnp.int32)
    return total, jnp.where(total == 0, 1, inside / jnp.maximum(total, 1))


def select(
    scores: Float[Array, "B N"],
    entries: Int[Array, " B"],
    pages_complete: Int[Array, " B"],
    cfg: PolicyConfig,
    *,
    page_entries: int,
    allowed: Int[Array, ""] | Int[Array, " B"] | int,
    live: Bool[Array, " B"],
    previous: Bool[Array, "B P"] | None = None,
    threshold: Float[Array, " B"] | None = None,
    rescue: Rescue | None = None,
) -> Selection:
    """The resident set of each row, by the policy of `cfg`.

    Row b has `entries[b]` entries, whose scores are in [0, 1]; later columns have no influence,
    whatever they hold. `pages_complete` of its pages can be resident. `allowed` bounds the pages
    of all rows together (a scalar) or of each row ([B]); it is never exceeded, and reached where as
    many complete pages are wanted. `previous` is the last set, used by `sticky` only. `threshold`
    replaces `cfg.threshold` row by row, as calibrated or as shares want it.

    With the policy "published", a row's quota counts pages in formation as the published rule does
    and `pages` says where they are; the caller drops these, which no `allowed` counts.
    """
    if threshold is None:
        given = EVEN_ODDS if cfg.threshold is None else cfg.threshold
        threshold = jnp.full(entries.shape, given, jnp.float32)
    exists = jnp.arange(scores.shape[1]) < jnp.where(live, entries, 0)[:, None]
    nan = exists & jnp.isnan(scores)
    scores = jnp.where(exists & ~nan, scores.astype(jnp.float32), -jnp.inf)
    passed = scores > threshold[:, None]
    kept = _capped(scores, passed, entries, cfg) if cfg.cap else passed
    counts = jnp.sum(_per_page(passed, page_entries, False), axis=-1, dtype=jnp.int32)
    page_scores = _page_scores(scores, kept, counts, threshold, cfg, page_entries)
    wanted = jnp.any(_per_page(kept, page_entries, False), axis=-1)
    if cfg.recall_gate is not None:
        wanted &= _worthwhile(scores, entries, cfg)[:, None]
    shared = {"page_entries": page_entries, "allowed": allowed, "live": live, "previous": previous}
    shared |= {"rescue": rescue}
    own = {"wanted": None if cfg.policy == "top" else wanted, "counts": counts}
    selection = select_pages(page_scores, entries, pages_complete, cfg, **shared, **own)
    return selection._replace(nan=jnp.any(nan, axis=1))


class _Masks(NamedTuple):
    """What pages are before any score is looked at; all [B, P]."""

    exists: Array
    complete: Array  # and on the host
    forced: Array  # of the pages that the policy may take
    sticky: Array
    age: Array  # pages from the end of its row's complete ones


def _masks(
    entries: Array,
    pages_complete: Array,
    pages: int,
    cfg: PolicyConfig,
    size: int,
    old: Array | None,
) -> _Masks:
    page = jnp.arange(pages, dtype=jnp.int32)
    exists = page < -(-entries // size)[:, None]
    complete = page < jnp.minimum(pages_complete, entries // size)[:, None]
    forced = forced_pages(entries, pages, cfg, page_entries=size)
    forced &= exists if cfg.policy == "published" else complete
    sticky = complete & (old if cfg.sticky and old is not None else False)
    age = jnp.sum(complete, axis=1, dtype=jnp.int32)[:, None] - page
    return _Masks(exists, complete, forced, sticky, age)


def select_pages(
    page_scores: Float[Array, "B P"],
    entries: Int[Array, " B"],
    pages_complete: Int[Array, " B"],
    cfg: PolicyConfig,
    *,
    page_entries: int,
    allowed: Int[Array, ""] | Int[Array, " B"] | int,
    live: Bool[Array, " B"],
    previous: Bool[Array, "B P"] | None = None,
    wanted: Bool[Array, "B P"] | None = None,
    counts: Int[Array, "B P"] | None = None,
    rescue: Rescue | None = None,
) -> Selection:
    """`select` from page scores of any finite kind; all other arguments as there.

    `wanted` marks the pages worth a place in the budget (None: all of them); `counts` has each
    page's entries above the threshold (None: zeros), for the figures of the selection only.
    """
    entries = jnp.where(live, entries, 0)
    masks = _masks(entries, pages_complete, page_scores.shape[1], cfg, page_entries, previous)
    needed = masks.complete & (True if wanted is None else wanted | masks.forced | masks.sticky)
    candidates = masks.exists if cfg.policy == "published" else needed
    nan = masks.exists & jnp.isnan(page_scores)
    score = jnp.where(masks.exists & ~nan, page_scores.astype(jnp.float32), -jnp.inf)
    keys = (jnp.where(masks.forced, 0, jnp.where(masks.sticky, 1, 2)), score, masks.age)
    if cfg.recall_pages is not None:
        candidates = _first(candidates, keys, jnp.full_like(entries, cfg.recall_pages))[0]
    rivals = candidates & masks.complete
    granted, rank = _first(rivals, keys, jnp.asarray(allowed, jnp.int32))
    more = jnp.zeros_like(granted)
    if rescue is not None:
        more = _rescued(masks.complete & ~granted, needed, score, masks.age, rescue)
        granted |= more
    kept, captured = _captured(counts, granted | (masks.exists & ~masks.complete))
    return Selection(
        pages=granted | (candidates & ~masks.complete),
        page_rank=jnp.where(rivals, rank, jnp.inf),
        forced=masks.forced,
        wanted=jnp.sum(needed, axis=1, dtype=jnp.int32),
        over_budget=jnp.sum(needed & ~granted, axis=1, dtype=jnp.int32),
        kept_entries=kept,
        captured=captured,
        nan=jnp.any(nan, axis=1),
        above=jnp.sum(more, axis=1, dtype=jnp.int32),
    )


def _rescued(
    candidates: Bool[Array, "B P"],
    needed: Bool[Array, "B P"],
    score: Float[Array, "B P"],
    age: Int[Array, "B P"],
    rescue: Rescue,
) -> Bool[Array, "B P"]:
    tier = jnp.where(rescue.share > 0, 0, jnp.where(needed, 1, 2))
    score = jnp.where(rescue.share > 0, rescue.share, score)
    return _first(candidates, (tier, score, age), rescue.pages)[0]
