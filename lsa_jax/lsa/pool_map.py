"""Which host page each slot of the device pool holds, and what a cycle must copy into it.

The pool belongs to all live rows: a slot is keyed by the host row (the host store's number of a
page) that it holds, so that rows with a common prefix share slots. Pure functions of static shapes,
usable inside a jitted boundary. Cost is linear in slots, pages and host rows, but for one sort of
the slots.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PoolMap:
    """What each of S slots holds. No two valid slots hold the same host row."""

    host_row: Int[Array, " S"]  # -1: empty
    generation: Int[Array, " S"]  # of the host row when it was copied; -1: empty
    stamp: Int[Array, " S"]  # cycle in which the page was last wanted; -1: empty


class Copies(NamedTuple):
    """Host rows to bring to slots; the first `count` elements, then -1."""

    src: Int[Array, " S"]
    dst: Int[Array, " S"]
    count: Int[Array, ""]


class Table(NamedTuple):
    """Readable pages of each row, ascending, and their slots; -1 at the end."""

    pages: Int[Array, "B K"]
    slots: Int[Array, "B K"]


def empty_pool(slots: int) -> PoolMap:
    """A pool of `slots` empty slots."""
    return PoolMap(*(jnp.full((slots,), -1, jnp.int32) for _ in range(3)))


class _Wanted(NamedTuple):
    """Wanted (row, page) pairs, flattened; `row` is H where the pair is not wanted."""

    row: Int[Array, " M"]
    first: Bool[Array, " M"]  # the first pair that wants its host row
    any: Bool[Array, " H1"]  # by host row; the last element is False


def _wanted_rows(
    host_rows: Int[Array, "B P"], wanted: Bool[Array, "B P"], hosts: int
) -> tuple[_Wanted, Int[Array, ""]]:
    """The wanted pairs, and how many name no host row."""
    known = (host_rows >= 0) & (host_rows < hosts)
    row = jnp.where(wanted & known, host_rows, hosts).reshape(-1)
    pair = jnp.arange(row.size, dtype=jnp.int32)
    first_pair = jnp.full((hosts + 1,), row.size, jnp.int32).at[row].min(pair)
    first = (first_pair[row] == pair) & (row < hosts)
    any_pair = (first_pair < row.size).at[hosts].set(False)
    return _Wanted(row, first, any_pair), jnp.sum(wanted & ~known, dtype=jnp.int32)


def _slot_of(host_row: Int[Array, " S"], hosts: int) -> Int[Array, " H1"]:
    """The slot that holds each host row, -1 where none does; element H stands for no host row."""
    slot = jnp.arange(len(host_row), dtype=jnp.int32)
    index = jnp.where(host_row < 0, hosts, host_row)
    return jnp.full((hosts + 1,), -1, jnp.int32).at[index].set(slot).at[hosts].set(-1)


def _table(slots: Int[Array, "B P"], width: int) -> tuple[Table, Int[Array, ""]]:
    """Pages that have a slot, moved to the front of each row; how many did not fit in `width`."""
    readable = slots >= 0
    batch, pages = slots.shape
    place = jnp.where(readable, jnp.cumsum(readable, axis=1, dtype=jnp.int32) - 1, width)
    at = (jnp.arange(batch)[:, None], place)
    page = jnp.broadcast_to(jnp.arange(pages, dtype=jnp.int32), slots.shape)
    empty = jnp.full((batch, width), -1, jnp.int32)
    table = Table(empty.at[at].set(page, mode="drop"), empty.at[at].set(slots, mode="drop"))
    return table, jnp.sum(readable & (place >= width), dtype=jnp.int32)


def _copies(
    want: _Wanted, slot_of: Array, valid: Array, hit: Array, usable: Array, stamp: Array
) -> tuple[Copies, Int[Array, ""]]:
    """Slots for the wanted host rows that have none, and how many of these found no slot.

    Empty slots go first, then the least recently wanted; the lowest slot at equal age.
    """
    slots = valid.shape[0]
    slot = jnp.arange(slots, dtype=jnp.int32)
    tier = jnp.where(hit | ~usable, 2, jnp.where(valid, 1, 0))
    age = jnp.where(valid, stamp, -1)
    victims = jax.lax.sort((tier, age, slot), num_keys=2, is_stable=True)[-1]
    new = want.first & (slot_of[want.row] < 0)
    needed = jnp.sum(new, dtype=jnp.int32)
    count = jnp.minimum(needed, jnp.sum(usable & ~hit, dtype=jnp.int32))
    (pair,) = jnp.nonzero(new, size=slots, fill_value=0)
    src = jnp.where(slot < count, want.row[pair], -1)
    dst = jnp.where(slot < count, victims, -1)
    return Copies(src, dst, count), needed - count


def assign(
    pool: PoolMap,
    host_rows: Int[Array, "B P"],
    generations: Int[Array, " H"],
    wanted: Bool[Array, "B P"],
    limit: Int[Array, ""] | int,
    cycle: Int[Array, ""] | int,
    *,
    width: int,
) -> tuple[PoolMap, Copies, Table, Int[Array, ""]]:
    """The pool after a cycle's boundary, the copies that make it true, and the cycle's table.

    `host_rows` has the host row of each row's logical pages (-1: none), `generations` that of each
    host row now: a slot that holds an older one counts as empty. A page of the `wanted` set stays
    in its slot; new ones take slots in the order of (row, page), never one that is wanted. Pages no
    longer wanted stay until their slot is needed. Slots from `limit` on are emptied. `cycle` grows
    from call to call; `width` is the table's K.

    The last result counts wanted pages that the table lacks: distinct host rows beyond the limit,
    pages without a host row or beyond the table's width. A caller that allows for them sees 0.
    """
    hosts, slots = generations.shape[0], pool.host_row.shape[0]
    want, unknown = _wanted_rows(host_rows, wanted, hosts)
    usable = jnp.arange(slots) < limit
    held = jnp.where((pool.host_row >= 0) & (pool.host_row < hosts), pool.host_row, hosts)
    current = jnp.append(generations, -1)  # element H stands for no host row
    valid = usable & (held < hosts) & (pool.generation == current[held])
    hit = valid & want.any[held]
    slot_of = _slot_of(jnp.where(valid, held, -1), hosts)
    copies, unplaced = _copies(want, slot_of, valid, hit, usable, pool.stamp)
    at = jnp.where(copies.dst < 0, slots, copies.dst)  # padding falls out of range
    row = jnp.where(valid, held, -1).at[at].set(copies.src, mode="drop")
    stamp = jnp.where(hit, cycle, jnp.where(valid, pool.stamp, -1)).at[at].set(cycle, mode="drop")
    generation = current[jnp.where(row < 0, hosts, row)]
    slots_of_pages = _slot_of(row, hosts)[want.row].reshape(wanted.shape)
    table, cut = _table(slots_of_pages, width)
    return PoolMap(row, generation, stamp), copies, table, unknown + cut + unplaced
