"""Between two cycles: complete pages leave the fresh buffer, level 1 fires, a new set is chosen.

Two programs without the host in their loop. `flush` cuts complete pages off and hands their
records to the host store. `choose` fires level 1, selects pages, and assigns them slots of the
pool; what it returns tells a recall which host rows to copy where.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from lsa_jax.cache import codec
from lsa_jax.cache.state import flat_entries
from lsa_jax.lsa import resident_set
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.pool_map import Copies, PoolMap, Table, assign
from lsa_jax.lsa.resident_set import Rescue, Selection


class Where(NamedTuple):
    """What a boundary needs to know of the host store and of the rows.

    `host_rows` has the host row of each row's complete pages (-1: none), `generations` those of the
    host rows; `due` are the rows whose cycle ends, `allowed` the pages that all of these may have
    together, `extra` those that each may have on top of that (`Rescue`; None without a fallback),
    `limit` the slots of the pool that may be used, `cycle` a number that grows.
    """

    host_rows: Int[Array, "B P"]
    generations: Int[Array, " H"]
    due: Bool[Array, " B"]
    allowed: Int[Array, ""]
    extra: Int[Array, " B"] | None
    limit: Int[Array, ""]
    cycle: Int[Array, ""]


class Choice(NamedTuple):
    """The next cycle's set. `pages` are those of all rows, also of rows that are not due."""

    pool: PoolMap
    copies: Copies
    table: Table
    pages: Bool[Array, "B P"]
    selection: Selection
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


def choose(
    plan: Level2,
    policy: PolicyConfig,
    scores: Float[Array, "B n"],
    state: LsaState,
    pool: PoolMap,
    before: Bool[Array, "B P"],
    at: Where,
    *,
    by_page: bool,
    width: int,
    threshold: Float[Array, " B"] | None = None,
    native: Float[Array, "B P"] | None = None,
) -> Choice:
    """The pages of the next cycle, from scores of entries [B, N] or of pages [B, P].

    `native` are the pages' shares of the native top-k, by which `at.extra` is spent.
    """
    entries = jnp.where(at.due, state.lengths // plan.cfg.csa_ratio, 0)
    per_page = plan.cache.page_entries
    complete = state.base // per_page
    common = {"page_entries": per_page, "allowed": at.allowed, "live": at.due, "previous": before}
    if at.extra is not None:
        assert native is not None
        common |= {"rescue": Rescue(at.extra, native)}
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
        return Choice(pool, copies, table, pages, selection, cut)
    if plan.path == "gathered":
        return _gather_anew(pool, pages, selection, at, width)
    pool, copies, table, unplaced = assign(
        pool, at.host_rows, at.generations, pages, at.limit, at.cycle, width=width
    )
    return Choice(pool, copies, table, pages, selection, unplaced)


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
    return Choice(pool, copies, table, pages, selection, cut)


def target_keys(plan: Level2, state: LsaState) -> list[codec.Planes]:
    """Index keys [B, N, ...] of the target layers."""
    layers = (state.layers[plan.csa[o]].index_keys for o in plan.targets)
    return [flat_entries(keys) for keys in layers if keys is not None]
