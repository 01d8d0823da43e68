"""Budgets in device bytes, as pages of a document that is as long as it is at a decision."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from lsa_jax.config import ModelConfig
from lsa_jax.config_checks import refusal
from lsa_jax.lsa import accounting, budget
from lsa_jax.lsa.accounting import Layout, Offload, Placement
from lsa_jax.lsa.budget import Budget
from lsa_jax.lsa.targets import csa_layers
from train.data.labels import ResidentRule
from train.quality.metrics import pages_at
from train.traces.columns import TraceError
from train.traces.trace import Trace
from train.traces.trace_info import fingerprint


class Sizes(NamedTuple):
    """Occupied KV bytes of one request: all of it, what always stays on the device, a page."""

    full: int
    fixed: int
    page: int

    def used(self, pages: int) -> int:
        """Bytes on the device with so many pages."""
        return self.fixed + pages * self.page


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceRoom:
    """How many pages fit into a budget, as `lsa.room` counts: of HCA entries, index keys of the
    target layers, entries in formation, and pages with the other layers' keys.

    `targets` are an indexer's layers, whose keys stay on the device.
    """

    cfg: ModelConfig
    layout: Layout
    targets: tuple[int, ...]
    page_entries: int
    lookahead: int

    def check(self, trace: Trace) -> None:
        """TraceError where a trace is of another backbone, as far as both say."""
        info, model = trace.info, fingerprint(self.cfg)
        layers = len(csa_layers(self.cfg))
        wanted = {"csa_layers": layers, "csa_ratio": self.cfg.csa_ratio}
        wanted["page_entries"] = self.page_entries
        for name, value in wanted.items():
            if getattr(info, name) != value:
                got = f"got {getattr(info, name)}"
                raise TraceError(f"{trace.path}: {name} must be {value} as in --config, {got}")
        if info.model is not None and info.model != model:
            got = f"it is of {info.model[:16]}, --config of {model[:16]}"
            raise TraceError(f"{trace.path} must be of the backbone of --config: {got}")

    def sizes(self, tokens: int) -> Sizes:
        """Of a request of so many tokens at a boundary."""
        fresh = accounting.fresh_pages(self.cfg.csa_ratio, self.page_entries, self.lookahead)
        empty = Offload(pool_pages=0, resident_entries=0, fresh_entries=fresh * self.page_entries)
        at = Placement(
            lengths=(tokens,), targets=self.targets, page_entries=self.page_entries, offload=empty
        )
        found = accounting.footprint(self.cfg, self.layout, at)
        page = accounting.record_of(self.cfg, self.layout, at)
        return Sizes(found.full_occupied, found.occupied.kv, page)

    def pages(self, tokens: int, budgets: Mapping[str, Budget]) -> dict[str, int]:
        """Complete pages of such a request that each budget has room for, forced ones included."""
        sizes = self.sizes(tokens)
        complete = tokens // self.cfg.csa_ratio // self.page_entries
        limits = [budget.limit(sizes.full) for budget in budgets.values()]
        counts = pages_at(limits, page_bytes=sizes.page, fixed_bytes=sizes.fixed, n_pages=complete)
        return dict(zip(budgets, counts, strict=True))


def parse_budgets(text: str) -> dict[str, Budget]:
    """Budgets by how they were written: "0.02,0.10,400MB". Raises ConfigError."""
    words = [word.strip() for word in text.split(",")]
    if len(set(words)) < len(words):
        raise refusal("budgets", text, "distinct")
    return {word: budget.parse_budget(word) for word in words}


def forced_pages(entries: int, rule: ResidentRule) -> int:
    """Complete pages that the rule forces, of so many entries."""
    first, last = rule.evictable_range(entries)
    return entries // rule.page_entries - (int(last) - first) // rule.page_entries
