"""Bytes of a running session, from the arrays that it holds, in the calculator's columns.

`measured` counts arrays: *reserved* as allocated, *occupied* at what each existing entry takes of
them. `calculated` is what `accounting` says of the same placement; the two agree, which a test
holds them to. On the path "mask" everything is on the device: `measured` says so, and what is
reported (`figures`) is what the calculator says of the sets that were chosen: simulated bytes.
"""

import collections
import dataclasses
import math
from typing import Any

import jax
import numpy as np

from lsa_jax.cache.state import LayerState
from lsa_jax.lsa import accounting
from lsa_jax.lsa.accounting import GIB, Components, Footprint, Offload, Placement
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.pool_map import PoolMap, Table
from lsa_jax.lsa.session import LsaSession


@dataclasses.dataclass(frozen=True, kw_only=True)
class Live:
    """What a session holds, as far as bytes go. Arrays may be abstract (`jax.eval_shape`).

    `lengths` are tokens and `bases` entries on the host, per row; there is room for `capacity`
    tokens in each. `pool_pages` are the pages of the pool (on the path "mask", those that it would
    have), `resident_pages` the distinct ones that the next steps read, `hosted_pages` those of
    these rows in host memory. `staging` bytes are what the largest recall landed in.
    """

    plan: Level2
    state: LsaState
    records: Any  # uint8 [S, r, 128]
    table: Table
    pool: PoolMap
    lengths: tuple[int, ...]
    bases: tuple[int, ...]
    capacity: int
    pool_pages: int
    resident_pages: int
    hosted_pages: int
    staging: int = 0

    @property
    def formed(self) -> int:
        """CSA entries that exist, of all rows."""
        return sum(tokens // self.plan.cfg.csa_ratio for tokens in self.lengths)

    @property
    def fresh(self) -> int:
        """CSA entries in fresh pages, of all rows."""
        return self.formed - sum(self.bases)


def live_of(session: LsaSession) -> Live:
    """What a session holds now."""
    batch, tiers = session.batch, session.batch.tiers
    slots = np.asarray(tiers.table.slots)
    bases = [len(row.digests) * batch.cache.page_entries if row else 0 for row in batch.rows]
    held, pool, staging = np.unique(slots[slots >= 0]).size, tiers.slots, 0
    if tiers.simulated:
        now = np.asarray(batch.state.base).tolist()
        bases = [base if row else 0 for row, base in zip(batch.rows, now, strict=True)]
        held = np.asarray(tiers.pages).sum()
        pool = max((event.allowed for event in batch.events), default=0)
    if not tiers.recall.in_place and not tiers.simulated:
        most = max((event.recalled for event in batch.events), default=0)
        pages = min(1 << (most - 1).bit_length(), tiers.slots) if most else 0
        staging = pages * batch.plan.layout.nbytes
    return Live(
        plan=batch.plan,
        state=batch.state,
        records=tiers.records,
        table=tiers.table,
        pool=tiers.pool,
        lengths=tuple(len(row.tokens) if row else 0 for row in batch.rows),
        bases=tuple(bases),
        capacity=batch.capacity,
        pool_pages=pool,
        resident_pages=int(held),
        hosted_pages=tiers.store.stats().live // batch.plan.layout.nbytes,
        staging=staging,
    )


def _nbytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _part(planes: Any, entries: int) -> int:
    """What so many entries take of planes [B, pages, page_entries, ...]."""
    room = math.prod(jax.tree.leaves(planes)[0].shape[:3])
    return _nbytes(planes) * entries // room


def measured(live: Live) -> Footprint:
    """Columns from the arrays."""
    plan, held, used = live.plan, collections.Counter(), collections.Counter()
    full_held = full_used = 0
    keys = live.state.layers[plan.target_layers[0]].index_keys
    room = math.prod(jax.tree.leaves(keys)[0].shape[:3])  # of every CSA layer, were it all here
    for i, layer in enumerate(live.state.layers):
        for column, planes, entries in _layer_parts(live, i, layer):
            held[column] += _nbytes(planes)
            used[column] += _part(planes, entries)
            in_csa = i in plan.csa
            full_held += _part(planes, room) if in_csa else _nbytes(planes)
            full_used += _part(planes, live.formed if in_csa else entries)
    for counter, pages in ((held, live.records.shape[0]), (used, live.resident_pages)):
        counter.update(_side_columns(live))
        counter.update(_record_columns(live, pages))
    resident = live.resident_pages * plan.cache.page_entries
    return Footprint(
        occupied=_components(used),
        reserved=_components(held),
        full_occupied=full_used,
        full_reserved=full_held,
        kept=(resident + live.fresh) / max(1, live.formed),
    )


def _layer_parts(live: Live, i: int, layer: LayerState) -> list[tuple[str, Any, int]]:
    """A layer's planes: their column, and how many entries exist in them."""
    plan, formed = live.plan, live.formed
    if layer.entries is None:
        return []
    if i not in plan.csa:
        hca = sum(tokens // plan.cfg.hca_ratio for tokens in live.lengths)
        return [("hca_entries", layer.entries, hca)]
    target = i in plan.target_layers
    if plan.path == "mask":
        keys = "target_keys" if target else "other_keys"
        return [("csa_entries", layer.entries, formed), (keys, layer.index_keys, formed)]
    keys = ("target_keys", formed) if target else ("fresh", live.fresh)
    return [("fresh", layer.entries, live.fresh), (keys[0], layer.index_keys, keys[1])]


def _side_columns(live: Live) -> dict[str, int]:
    layers = live.state.layers
    return {
        "window": _nbytes([layer.window for layer in layers]),
        "tails": _nbytes([(layer.tail, layer.index_tail) for layer in layers]),
        "page_tables": _nbytes((live.table, live.pool)),
        "staging": live.staging,
    }


def _record_columns(live: Live, pages: int) -> dict[str, int]:
    """Bytes of page records on the device and on the host."""
    layout = live.plan.layout
    row_bytes = layout.nbytes // layout.rows
    spans = [layout.spans(ordinal)[0] for ordinal in range(len(live.plan.csa))]
    entries = sum(span.stop - span.start for span in spans) * row_bytes
    keys = layout.nbytes - entries
    on_device = 0 if live.plan.path == "mask" else pages  # there the pool is one unused slot
    return {
        "csa_entries": on_device * entries,
        "other_keys": on_device * keys,
        "host_entries": live.hosted_pages * entries,
        "host_keys": live.hosted_pages * keys,
    }


def _components(columns: collections.Counter[str]) -> Components:
    return Components(**{f.name: columns[f.name] for f in dataclasses.fields(Components)})


def placement_of(live: Live) -> Placement:
    """The same in the terms of the calculator."""
    plan = live.plan
    return Placement(
        lengths=live.lengths,
        targets=plan.targets,
        capacity=live.capacity,
        page_entries=plan.cache.page_entries,
        offload=Offload(
            pool_pages=live.pool_pages,
            resident_entries=live.resident_pages * plan.cache.page_entries,
            fresh_entries=plan.fresh_pages * plan.cache.page_entries,
            table_pages=live.table.pages.shape[1],
            staging_bytes=live.staging,
        ),
        window_bytes=live.state.layers[0].window.dtype.itemsize,
    )


def calculated(live: Live) -> Footprint:
    """The calculator's figures.

    It takes each row alone: rows that share a prefix hold less on the host than it says. And it
    knows boundaries only: pages completed since the last one are moved back to the fresh ones here.
    """
    plan, at = live.plan, placement_of(live)
    layout = accounting.layout_of(plan.cache.kv_format)
    found = accounting.footprint(plan.cfg, layout, at)
    late = live.fresh - at.in_formation(plan.cfg)
    page = accounting.page_bytes(plan.cfg, layout, plan.cache.page_entries)
    pages, layers = late // plan.cache.page_entries, len(plan.csa)
    others = layers - len(plan.targets)
    fresh = pages * (layers * page.csa + others * page.keys)

    def at_present(parts: Components, more: int) -> Components:
        return dataclasses.replace(
            parts,
            fresh=parts.fresh + more,
            host_entries=parts.host_entries - pages * layers * page.record_csa,
            host_keys=parts.host_keys - pages * others * page.record_keys,
        )

    return dataclasses.replace(
        found,
        occupied=at_present(found.occupied, fresh),
        reserved=at_present(found.reserved, 0),
        kept=found.kept + late / max(1, live.formed),
    )


def figures(session: LsaSession) -> Footprint:
    """What is reported: measured, or calculated where the bytes are simulated."""
    live = live_of(session)
    return calculated(live) if session.lsa.simulated else measured(live)


def device_bytes(session: LsaSession) -> dict[str, int]:
    """Bytes on the device, as allocated, by component; `state` are the small arrays beside them."""
    batch = session.batch
    columns = dataclasses.asdict(measured(live_of(session)).reserved)
    small = dataclasses.replace(batch.state, layers=())
    beside = _nbytes((small, batch.tiers.pages, batch.seen))
    on_device = {name: size for name, size in columns.items() if not name.startswith("host_")}
    return {**on_device, "state": beside}


def _as_dict(found: Footprint) -> dict[str, Any]:
    """As `lsa_jax.footprint` prints them."""
    device, host = found.reserved.kv, found.reserved.host
    return {
        "kv_gib": {
            "logical": found.logical,
            "device": found.device,
            "device_plus_host": found.device_plus_host,
        },
        "kv_share": found.share,
        "logical_share": found.kept,
        "kv_gib_reserved": {"device": device / GIB, "device_plus_host": (device + host) / GIB},
        "kv_share_reserved": found.share_reserved,
        "components": dataclasses.asdict(found.occupied),
        "components_reserved": dataclasses.asdict(found.reserved),
    }


def as_json(session: LsaSession) -> dict[str, Any]:
    """Columns, host memory, recalls, misses, the fallback's growth, and every cycle; bytes unless a
    name says otherwise."""
    batch, lsa = session.batch, session.lsa
    tiers, record = batch.tiers, batch.plan.layout.nbytes
    events = batch.events
    before = batch.room.allowed((batch.capacity,) * len(batch.rows), batch.capacity)
    return {
        "attention": lsa.arm,
        "simulated_bytes": lsa.simulated,
        "lsa": _plain(dataclasses.asdict(lsa)),
        "target_transformer_layers": list(batch.plan.target_layers),
        "page_entries": batch.cache.page_entries,
        "page_record_bytes": record,
        "tokens": [len(row.tokens) if row else 0 for row in batch.rows],
        "capacity": batch.capacity,
        **_as_dict(figures(session)),
        "calculated": _as_dict(calculated(live_of(session))),
        "allocated_on_device": device_bytes(session),
        "host": dataclasses.asdict(tiers.store.stats()) | {"kind": tiers.store.memory.kind},
        "recall": {
            "pages": tiers.recall.pages,
            "bytes": tiers.recall.nbytes,
            "in_place": tiers.recall.in_place,
            "stall_seconds": batch.stall_seconds,
        },
        "misses": {
            "entries": sum(event.missed_entries for event in events),
            "highest_mass": max((event.missed_mass for event in events), default=0.0),
        },
        "fallback": {
            "bound": lsa.fallback,
            "patience": lsa.patience,
            "doublings": max((event.growth for event in events), default=0),
            "pages_above_budget": max((event.above for event in events), default=0),
            "pool_bytes": tiers.slots * record,
            "pool_bytes_without": max(1, before) * record,
        },
        "cycles": [dataclasses.asdict(event) for event in events],
    }


def _plain(value: Any) -> Any:
    """Settings as JSON has them: an exact share becomes a number."""
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    return value if isinstance(value, int | str | tuple | None) else float(value)
