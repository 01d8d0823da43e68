"""Between two cycles: complete pages leave the fresh buffer, level 1 fires, a new set is chosen.

Two programs without the host in their loop. `flush` cuts complete pages off and hands their
records to the host store. `choose` fires level 1, selects pages, and assigns them slots of the
pool; what it returns tells a recall which host rows to copy where.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from lsa_jax.cache import codec
from lsa_jax.cache.state import flat_entries
from lsa_jax.lsa import resident_set
from lsa_jax.lsa.level2 import Level2, LsaState, native_scores
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.pool_map import Copies, PoolMap, Table, assign
from lsa_jax.lsa.resident_set import Selection
from lsa_jax.nn.lightning_indexer import topk_mask
from lsa_jax.nn.transformer import DeepSeekV4

# Page scores [B, P] of rows whose last token is at position lengths - 1; see `arms`.
Scorer = Callable[[DeepSeekV4, LsaState], Float[Array, "B P"]]


class Where(NamedTuple):
    """What a boundary needs to know of the host store and of the rows.

    `host_rows` has the host row of each row's complete pages (-1: none), `generations` those of the
    host rows; `due` are the rows whose cycle ends, `allowed` the pages that all of these may have
    together, `limit` the slots of the pool that may be used, `cycle` a number that grows.
    """

    host_rows: Int[Array, "B P"]
    generations: Int[Array, " H"]
    due: Bool[Array, " B"]
    allowed: Int[Array, ""]
    limit: Int[Array, ""]
    cycle: Int[Array, ""]


class Misses(NamedTuple):
    """What the cycle that ended could not read at its last token (spec W10), per row.

    `entries` counts entries that the target layers' own top-k over all of the history takes and
    that were not readable; `mass` is their share of the softmax of the scores of that top-k, the
    mean of the target layers: an estimate of the attention mass that level 2 missed.
    """

    entries: Int[Array, " B"]
    mass: Float[Array, " B"]


class Choice(NamedTuple):
    """The next cycle's set. `pages` are those of all rows, also of rows that are not due."""

    pool: PoolMap
    copies: Copies
    table: Table
    pages: Bool[Array, "B P"]
    selection: Selection
    misses: Misses
    unplaced: Int[Array, ""]  # pages granted that found no slot: a bug where it is not 0


def flush(
    plan: Level2, state: LsaState, due: Bool[Array, " B"]
) -> tuple[LsaState, UInt8[Array, "B F r 128"], Int[Array, " B"]]:
    """The state without its complete fresh pages, the records of all fresh pages, and how many of
    them are complete, which come first. Rows that are not due keep theirs."""
    per_page = plan.cache.page_entries
    entries = state.lengths // plan.cfg.csa_ratio
    done = jnp.where(due, (entries - state.base) // per_page, 0)
    pages = []
    layers = list(state.layers)
    order = jnp.minimum(done[:, None] + jnp.arange(plan.fresh_pages), plan.fresh_pages - 1)
    rows = jnp.arange(done.shape[0])[:, None]

    def shift(planes: codec.Planes) -> codec.Planes:
        return jax.tree.map(lambda x: x[rows, order], planes)

    for ordinal, i in enumerate(plan.csa):
        layer = layers[i]
        assert layer.entries is not None and layer.index_keys is not None
        pages.append((layer.entries, layer.index_keys))
        target = ordinal in plan.targets
        keys = layer.index_keys if target else shift(layer.index_keys)
        layers[i] = dataclasses.replace(layer, entries=shift(layer.entries), index_keys=keys)
    base = state.base + done * per_page
    return (
        dataclasses.replace(state, layers=tuple(layers), base=base),
        plan.layout.pack_pages(pages),
        done,
    )


def missed(plan: Level2, model: DeepSeekV4, state: LsaState, table: Table) -> Misses:
    """Misses of the cycle that ended, whose table this was, before its pages are flushed."""
    readable = plan.readable(state, table)
    entries, mass = jnp.zeros_like(state.lengths), jnp.zeros(state.lengths.shape, jnp.float32)
    exists = jnp.arange(readable.shape[1]) < (state.lengths // plan.cfg.csa_ratio)[:, None]
    for n, ordinal in enumerate(plan.targets):
        i = plan.csa[ordinal]
        at = state.lengths - 1
        scores = native_scores(model.layers[i].attn, state.hidden[n], at, state.layers[i])
        picks = topk_mask(scores, exists, plan.cfg.index_topk)
        weight = jax.nn.softmax(jnp.where(picks, scores, -jnp.inf), axis=-1)
        absent = picks & ~readable
        entries += jnp.sum(absent, axis=-1, dtype=jnp.int32)
        mass += jnp.sum(jnp.where(absent, weight, 0), axis=-1) / len(plan.targets)
    return Misses(entries, mass)


def choose(
    plan: Level2,
    policy: PolicyConfig,
    scores: Float[Array, "B n"],
    state: LsaState,
    pool: PoolMap,
    before: Bool[Array, "B P"],
    misses: Misses,
    at: Where,
    *,
    by_page: bool,
    width: int,
    threshold: Float[Array, " B"] | None = None,
) -> Choice:
    """The pages of the next cycle, from scores of entries [B, N] or of pages [B, P]."""
    entries = jnp.where(at.due, state.lengths // plan.cfg.csa_ratio, 0)
    per_page = plan.cache.page_entries
    complete = state.base // per_page
    common = {"page_entries": per_page, "allowed": at.allowed, "live": at.due, "previous": before}
    if by_page:
        selection = resident_set.select_pages(scores, entries, complete, policy, **common)
    else:
        selection = resident_set.select(
            scores, entries, complete, policy, **common, threshold=threshold
        )
    whole = jnp.arange(selection.pages.shape[1]) < complete[:, None]
    pages = jnp.where(at.due[:, None], selection.pages & whole, before)
    if plan.path == "mask":
        table, cut = _identity(pages, width)
        nothing = jnp.full_like(pool.host_row, -1)
        copies = Copies(nothing, nothing, jnp.int32(0))
        return Choice(pool, copies, table, pages, selection, misses, cut)
    if plan.path == "gathered":
        return _gather_anew(pool, pages, selection, misses, at, width)
    pool, copies, table, unplaced = assign(
        pool, at.host_rows, at.generations, pages, at.limit, at.cycle, width=width
    )
    return Choice(pool, copies, table, pages, selection, misses, unplaced)


def _identity(pages: Bool[Array, "B P"], width: int) -> tuple[Table, Int[Array, ""]]:
    """A table of pages whose slots nobody reads."""
    order = jnp.argsort(~pages, axis=1, stable=True)[:, :width].astype(jnp.int32)
    held = jnp.take_along_axis(pages, order, axis=1)
    return (
        Table(jnp.where(held, order, -1), jnp.where(held, order, -1)),
        jnp.maximum(0, jnp.max(jnp.sum(pages, axis=1, dtype=jnp.int32)) - width),
    )


def _gather_anew(
    pool: PoolMap,
    pages: Bool[Array, "B P"],
    selection: Selection,
    misses: Misses,
    at: Where,
    width: int,
) -> Choice:
    """Slot b * width + c for the c-th page of row b: everything is copied, what is there too."""
    table, cut = _identity(pages, width)
    held = table.pages >= 0
    rows = jnp.take_along_axis(at.host_rows, jnp.maximum(table.pages, 0), axis=1)
    slot = jnp.arange(held.size, dtype=jnp.int32).reshape(held.shape)
    host_row = jnp.where(held, rows, -1).reshape(-1)
    count = jnp.sum(held, dtype=jnp.int32)
    first = jnp.argsort(host_row < 0, stable=True).astype(jnp.int32)
    n = jnp.arange(host_row.size)
    copies = Copies(
        jnp.where(n < count, host_row[first], -1), jnp.where(n < count, first, -1), count
    )
    generation = jnp.where(host_row < 0, -1, at.generations[jnp.maximum(host_row, 0)])
    pool = PoolMap(host_row, generation, jnp.where(host_row < 0, -1, at.cycle))
    table = Table(table.pages, jnp.where(held, slot, -1))
    return Choice(pool, copies, table, pages, selection, misses, cut)


def target_keys(plan: Level2, state: LsaState) -> list[codec.Planes]:
    """Index keys [B, N, ...] of the target layers."""
    layers = (state.layers[plan.csa[o]].index_keys for o in plan.targets)
    return [flat_entries(keys) for keys in layers if keys is not None]
