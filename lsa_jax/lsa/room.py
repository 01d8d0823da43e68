"""How many pages may be on the device: budgets, in the terms of `accounting`."""

import dataclasses
from fractions import Fraction

from lsa_jax.config import CacheConfig, ModelConfig
from lsa_jax.lsa import accounting, budget
from lsa_jax.lsa.accounting import Layout, Offload, Placement
from lsa_jax.lsa.budget import Budget
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.policy import PolicyConfig

PUBLISHED_SHARE = Fraction(3, 32)  # of a row's pages: 384 of 4,096 at 1M (spec 1.4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
    """Pages that rows of given lengths may have. Plain arithmetic, in occupied bytes."""

    cfg: ModelConfig
    cache: CacheConfig
    lsa: LsaConfig
    fresh_entries: int  # per row, as allocated
    window_bytes: int = 2  # of a window's number

    def complete_pages(self, tokens: int) -> int:
        """Complete pages of a row."""
        return tokens // self.cfg.csa_ratio // self.cache.page_entries

    def row_pages(self, capacity: int) -> int | None:
        """Pages that each row may have, where that is what bounds them; None under a budget."""
        if self.lsa.policy.recall_pages is not None:
            return self.lsa.policy.recall_pages
        if self.lsa.budget is not None or self.lsa.policy.policy == "threshold":
            return None
        pages = self.complete_pages(capacity)
        return default_pages(self.lsa.policy, pages, self.cache.page_entries)

    def allowed(
        self,
        lengths: tuple[int, ...],
        capacity: int,
        *,
        forming: int = 0,
        strict: bool = False,
    ) -> int:
        """Pages of all rows together once they have these lengths in tokens (0: no request).

        `forming` complete pages are in the fresh buffers then, and not among those allowed.
        `strict` refuses a budget below its floor with ConfigError, as an admission must; later on,
        what the floor takes too much is taken from the pages.
        """
        live = [n for n in lengths if n]
        total = sum(self.complete_pages(n) for n in live)
        if self.lsa.budget is not None:
            total = min(total, max(0, self._affordable(tuple(live), strict) - forming))
        each = self.row_pages(capacity)
        return total if each is None else min(total, each * len(live))

    def _affordable(self, lengths: tuple[int, ...], strict: bool) -> int:
        assert self.lsa.budget is not None
        at = self.placement(lengths, resident_pages=0, pool_pages=0)
        layout = accounting.layout_of(self.cache.kv_format)
        policy, per_page = self.lsa.policy, self.cache.page_entries
        forced = (forced_pages(policy, self.complete_pages(n), per_page) for n in lengths)
        floor = sum(forced) if strict else None
        return affordable_pages(self.cfg, layout, at, self.lsa.budget, forced=floor)

    def placement(
        self,
        lengths: tuple[int, ...],
        *,
        resident_pages: int,
        pool_pages: int,
        capacity: int | None = None,
        table_pages: int = 0,
        staging_bytes: int = 0,
    ) -> Placement:
        """These rows in the terms of the calculator."""
        return Placement(
            lengths=lengths,
            targets=self.lsa.targets,
            capacity=capacity,
            page_entries=self.cache.page_entries,
            window_bytes=self.window_bytes,
            offload=Offload(
                pool_pages=pool_pages,
                resident_entries=resident_pages * self.cache.page_entries,
                fresh_entries=self.fresh_entries,
                table_pages=table_pages,
                staging_bytes=staging_bytes,
            ),
        )


def affordable_pages(
    cfg: ModelConfig, layout: Layout, at: Placement, limit: Budget, *, forced: int | None
) -> int:
    """Pages that a budget has room for, of all rows together, beside what these rows have on the
    device whatever is recalled: HCA entries, index keys that stay, and entries in formation, in
    occupied bytes. `at` has an empty pool.

    A budget without room for the `forced` pages is refused with ConfigError, which states the
    floor; with None, one that is too small for everything else has room for none.
    """
    figures = accounting.footprint(cfg, layout, at)
    full, fixed = figures.full_occupied, figures.occupied.kv
    page = accounting.record_of(cfg, layout, at)
    if forced is None:
        return max(0, limit.limit(full) - fixed) // page
    return budget.allowed_pages(limit, full, fixed, page, forced_pages=forced)


def default_pages(policy: PolicyConfig, pages: int, page_entries: int) -> int:
    """Pages of a row on the device where no setting bounds them: of its complete pages as many as
    released settings recall, and no fewer than are forced."""
    return max(1, forced_pages(policy, pages, page_entries), int(pages * PUBLISHED_SHARE))


def forced_pages(policy: PolicyConfig, pages: int, page_entries: int) -> int:
    """Complete pages, of so many, that recency and sink can force at most."""
    recent, sink = -(-policy.recency // page_entries), -(-policy.sink // page_entries)
    return min(pages, recent + sink)
