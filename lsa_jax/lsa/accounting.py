"""Bytes of KV by component: the calculator's figures, and the running system's from the same code.

Everything counts whole bytes and comes in two readings. *Reserved*: arrays as allocated, in whole
pages up to a capacity. *Occupied*: entries that exist, at the bytes that a page gives each (so the
fill of a page counts). Pages, not formulas per token, are the unit, and LSA spec 1.3 follows.

Layouts: `pages584` is the published server's (584-byte entries; pages filled up to whole 576-byte
records, as `cache.exchange` writes them; HCA entries in pages of the same tokens); `planes640`,
`bf16` and `f32` are what `cache.codec` keeps as kv_format fp8, bfloat16 and float32. A *page
record* of ours holds every plane filled up to 128 bytes. No JAX here; a test holds the sizes to the
arrays.
"""

import dataclasses
from typing import Literal, get_args

from lsa_jax.config import KVFormat, ModelConfig
from lsa_jax.lsa.targets import csa_layers, hca_layers

Layout = Literal["pages584", "planes640", "bf16", "f32"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)
GIB = 2**30

_RECORD_ROW = 128  # bytes that every plane of our page records is filled up to
_SCALE_FILL = 8  # pages584: an entry's scale bytes are filled up to a multiple
_KEY_SCALE = 4
_TAIL_STATISTICS = 3  # float32 values per channel, as in cache.state.Tail


def layout_of(kv_format: KVFormat) -> Layout:
    """The layout that a running system's kv_format is."""
    formats: dict[KVFormat, Layout] = {"fp8": "planes640", "bfloat16": "bf16", "float32": "f32"}
    return formats[kv_format]


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageBytes:
    """Bytes of one layer's share of a page. A *record* is a page as host and pool hold it."""

    page_entries: int
    csa: int
    keys: int
    hca_entries: int  # HCA entries in a page of HCA
    hca: int
    record_csa: int
    record_keys: int


def page_bytes(cfg: ModelConfig, layout: Layout, page_entries: int) -> PageBytes:
    """Sizes of pages of `page_entries` CSA entries in one layout."""
    groups = cfg.nope_head_dim // cfg.kv_quant_group
    if layout == "pages584":
        data = cfg.nope_head_dim + 2 * cfg.qk_rope_head_dim
        entry, key = data + _up(groups, _SCALE_FILL), cfg.index_head_dim + _KEY_SCALE
        hca_entries = max(1, page_entries * cfg.csa_ratio // cfg.hca_ratio)
        csa, keys = _up(page_entries * entry, data), page_entries * key
        hca = _up(hca_entries * entry, data)
        return PageBytes(
            page_entries=page_entries,
            csa=csa,
            keys=keys,
            hca_entries=hca_entries,
            hca=hca,
            record_csa=csa,
            record_keys=keys,
        )
    if layout == "planes640":
        entry_planes = (_up(cfg.nope_head_dim + groups, _RECORD_ROW), 2 * cfg.qk_rope_head_dim)
        key_planes = (cfg.index_head_dim, _KEY_SCALE)
    else:
        size = 4 if layout == "f32" else 2
        entry_planes, key_planes = (size * cfg.head_dim,), (size * cfg.index_head_dim,)
    csa, keys = page_entries * sum(entry_planes), page_entries * sum(key_planes)
    return PageBytes(
        page_entries=page_entries,
        csa=csa,
        keys=keys,
        hca_entries=page_entries,
        hca=csa,
        record_csa=sum(_up(page_entries * plane, _RECORD_ROW) for plane in entry_planes),
        record_keys=sum(_up(page_entries * plane, _RECORD_ROW) for plane in key_planes),
    )


def fresh_pages(csa_ratio: int, page_entries: int, lookahead: int) -> int:
    """Pages of a row's fresh buffer: the entries of an incomplete page at a boundary, and those
    that form before the next one."""
    most = page_entries - 1 + -(-lookahead // csa_ratio)
    return -(-most // page_entries)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Offload:
    """What LSA keeps on the device of the pages that the host holds.

    `pool_pages` (reserved) and `resident_entries` (occupied) count the pool that all rows share.
    `fresh_entries` per row take what forms between boundaries, 0 for a server that has no such
    buffer. With `path_i` the host also holds the index keys of all but the target layers.
    `table_pages` is the width of a row's page table; `staging_bytes` what recalls land in.
    """

    pool_pages: int
    resident_entries: int
    path_i: bool = True
    fresh_entries: int = 0
    table_pages: int = 0
    staging_bytes: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placement:
    """Rows of one decode state, and where their pages are: all on the device without `offload`.

    `lengths` are tokens, one per row (0: a row without a request); arrays have room for `capacity`
    tokens, by default the longest row's. `targets` are CSA ordinals.
    """

    lengths: tuple[int, ...]
    targets: tuple[int, ...]
    capacity: int | None = None
    page_entries: int = 64
    offload: Offload | None = None
    window_bytes: int = 2  # of a window's number: 2 in bfloat16, 4 in float32

    @property
    def room(self) -> int:
        """Tokens that each row's arrays are allocated for."""
        return max(self.lengths) if self.capacity is None else self.capacity

    def entries(self, cfg: ModelConfig) -> int:
        """CSA entries that exist, of all rows."""
        return sum(tokens // cfg.csa_ratio for tokens in self.lengths)

    def in_formation(self, cfg: ModelConfig) -> int:
        """CSA entries in no complete page, of all rows: in the fresh buffer at a boundary."""
        if self.offload is None or self.offload.fresh_entries == 0:
            return 0
        return sum(tokens // cfg.csa_ratio % self.page_entries for tokens in self.lengths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Components:
    """Bytes by component. `target_keys` and `other_keys` are index keys of target layers and not.

    `fresh` are entries and keys formed since the last boundary. Host memory holds `host_*`.
    """

    hca_entries: int
    csa_entries: int
    target_keys: int
    other_keys: int
    fresh: int
    window: int
    tails: int
    page_tables: int
    staging: int
    host_entries: int
    host_keys: int

    @property
    def kv(self) -> int:
        """Compressed entries and index keys on the device: what the KV share counts."""
        keys = self.target_keys + self.other_keys
        return self.hca_entries + self.csa_entries + keys + self.fresh

    @property
    def host(self) -> int:
        """Bytes in host memory."""
        return self.host_entries + self.host_keys


def record_bytes(cfg: ModelConfig, pages: PageBytes, targets: int, *, path_i: bool) -> int:
    """Bytes of one page record: entries of all CSA layers, keys of those that are no targets."""
    layers = len(csa_layers(cfg))
    keys = (layers - targets) * pages.record_keys if path_i else 0
    return layers * pages.record_csa + keys


def _side_columns(cfg: ModelConfig, at: Placement) -> dict[str, int]:
    """Columns outside the KV share; they are allocated once, whatever the lengths."""
    rows, csa, hca = len(at.lengths), len(csa_layers(cfg)), len(hca_layers(cfg))
    overlap = 3 * (cfg.head_dim + cfg.index_head_dim)  # two halves of a window, and the last one
    channels = csa * overlap + hca * cfg.head_dim
    window = cfg.num_layers * cfg.sliding_window * cfg.head_dim * at.window_bytes
    off = at.offload
    return {
        "window": rows * window,
        "tails": rows * channels * _TAIL_STATISTICS * 4,
        # int32: page and slot of each column of a row; host row, generation, stamp of each slot.
        "page_tables": 4 * (2 * rows * off.table_pages + 3 * off.pool_pages) if off else 0,
        "staging": off.staging_bytes if off else 0,
    }


def occupied(cfg: ModelConfig, layout: Layout, at: Placement) -> Components:
    """Bytes of the entries that exist, each at its share of a page."""
    page = page_bytes(cfg, layout, at.page_entries)
    layers, targets = len(csa_layers(cfg)), len(at.targets)
    hca = sum(tokens // cfg.hca_ratio for tokens in at.lengths)
    resident = formed = at.entries(cfg)
    fresh, off = at.in_formation(cfg), at.offload
    if off:
        resident = off.resident_entries
    per, hosted = page.page_entries, formed - fresh
    path_i = off is not None and off.path_i
    csa, keys = (page.record_csa, page.record_keys) if off else (page.csa, page.keys)
    keys = keys if path_i else page.keys
    others = layers - targets
    return Components(
        hca_entries=len(hca_layers(cfg)) * hca * page.hca // page.hca_entries,
        csa_entries=layers * resident * csa // per,
        target_keys=targets * formed * page.keys // per,
        other_keys=others * (resident if path_i else formed) * keys // per,
        fresh=fresh * (layers * page.csa + (others * page.keys if path_i else 0)) // per,
        host_entries=layers * hosted * page.record_csa // per if off else 0,
        host_keys=others * hosted * page.record_keys // per if path_i else 0,
        **_side_columns(cfg, at),
    )


def reserved(cfg: ModelConfig, layout: Layout, at: Placement) -> Components:
    """Bytes as allocated: whole pages for `capacity` tokens in every row, and the whole pool."""
    page = page_bytes(cfg, layout, at.page_entries)
    layers, targets, rows = len(csa_layers(cfg)), len(at.targets), len(at.lengths)

    def pages(ratio: int, per_page: int) -> int:
        return rows * max(1, -(-(at.room // ratio) // per_page))

    full, off = pages(cfg.csa_ratio, at.page_entries), at.offload
    path_i = off is not None and off.path_i
    pool, csa = (off.pool_pages, page.record_csa) if off else (full, page.csa)
    others, new = layers - targets, rows * off.fresh_entries if off else 0
    new_bytes = layers * page.csa + (others * page.keys if path_i else 0)
    at_rest = occupied(cfg, layout, at)  # the host takes pages as they come: none are reserved
    return Components(
        hca_entries=len(hca_layers(cfg)) * pages(cfg.hca_ratio, page.hca_entries) * page.hca,
        csa_entries=layers * pool * csa,
        target_keys=targets * full * page.keys,
        other_keys=others * (pool * page.record_keys if path_i else full * page.keys),
        fresh=new * new_bytes // at.page_entries,
        host_entries=at_rest.host_entries,
        host_keys=at_rest.host_keys,
        **_side_columns(cfg, at),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Both readings of a placement beside the same rows with everything on the device, `full`.

    Figures in GiB are occupied ones. `kept` is the fraction of CSA entries on the device.
    """

    occupied: Components
    reserved: Components
    full_occupied: int
    full_reserved: int
    kept: float

    @property
    def logical(self) -> float:
        """GiB as the published tables count: the kept fraction of all bytes, HCA and keys too."""
        return self.kept * self.full_occupied / GIB

    @property
    def device(self) -> float:
        """GiB of entries and index keys on the device."""
        return self.occupied.kv / GIB

    @property
    def device_plus_host(self) -> float:
        """GiB of entries and index keys on the device and in host memory."""
        return (self.occupied.kv + self.occupied.host) / GIB

    @property
    def share(self) -> float:
        """The KV share of what exists."""
        return self.occupied.kv / max(1, self.full_occupied)

    @property
    def share_reserved(self) -> float:
        """The KV share of what is allocated."""
        return self.reserved.kv / max(1, self.full_reserved)


def footprint(cfg: ModelConfig, layout: Layout, at: Placement) -> Footprint:
    """All columns of a placement."""
    full = dataclasses.replace(at, offload=None)
    entries = at.entries(cfg)
    kept = entries if at.offload is None else at.offload.resident_entries + at.in_formation(cfg)
    return Footprint(
        occupied=occupied(cfg, layout, at),
        reserved=reserved(cfg, layout, at),
        full_occupied=occupied(cfg, layout, full).kv,
        full_reserved=reserved(cfg, layout, full).kv,
        kept=kept / max(1, entries),
    )


def record_of(cfg: ModelConfig, layout: Layout, at: Placement) -> int:
    """Bytes of one page record of a placement."""
    assert at.offload is not None
    page = page_bytes(cfg, layout, at.page_entries)
    return record_bytes(cfg, page, len(at.targets), path_i=at.offload.path_i)
