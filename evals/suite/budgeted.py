"""Arms that choose pages, for rows of which each has a budget of its own.

Boundaries and cycles are the serving session's own programs. What a session does for rows that
share a budget, this does for rows that do not know of each other: a test holds each row's tokens
and pages to those of a session that has the row alone.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from evals.suite.prefix import Asked
from evals.suite.replies import Cycle, Replies, no_records
from evals.suite.variants import Variant
from lsa_jax.config import ConfigError
from lsa_jax.lsa.boundary import Where
from lsa_jax.lsa.pool_map import Table, empty_pool
from lsa_jax.lsa.programs import Programs
from lsa_jax.lsa.room import Room


class Budgeted:
    """One run of a variant, from the first boundary to the last token.

    `stepping` has the programs of steps, `choosing` those of choices, both for the plan of
    `asked`, whose state is taken.
    """

    def __init__(
        self,
        variant: Variant,
        room: Room,
        stepping: Programs,
        choosing: Programs,
        asked: Asked,
        replies: Replies,
    ):
        assert variant.lookahead is not None
        self.variant, self.room, self.replies = variant, room, replies
        self.stepping, self.choosing, self.plan = stepping, choosing, stepping.plan
        self.lookahead, self.count = variant.lookahead, len(asked.lengths)
        self.state, self.width = asked.state, self.plan.pages_of(asked.state)
        self.due = np.ones(self.count, bool)  # rows whose next pages are chosen
        self.since = np.zeros(self.count, int)  # steps since each row's last boundary
        self.open: list[Cycle | None] = [None] * self.count  # each row's cycle, not over yet
        self.seen = asked.seen if variant.arm == "snapkv" else None
        nothing = jnp.full((self.count, self.width), -1, jnp.int32)
        self.table, self.pages = Table(nothing, nothing), jnp.zeros((self.count, self.width), bool)

    def run(self) -> None:
        """Boundaries of the rows whose cycle is over, steps of all, until all rows are done; the
        first boundary is of all rows, as an admission's."""
        self._begin_cycles(ended=False)
        while self.replies.live.any():
            self._advance()
            self.due = self.replies.live & self._over()
            if self.due.any():
                self._end_cycles(self.due)
                self._begin_cycles(ended=True)
        self._end_cycles(np.ones(self.count, bool))

    def _advance(self) -> None:
        """Steps until a live row's cycle is over, or as the burst ends."""
        fed, live = np.array(self.replies.fed), self.replies.live
        steps = self.replies.steps(self.lookahead - int(self.since[live].max()))
        burst, self.state = self.replies.cycle(self.stepping, self.state, self.table, steps)
        self.replies.take(burst)
        self.since += np.array(self.replies.fed) - fed

    def _over(self) -> np.ndarray:
        """Rows whose cycle is over: it had all of its steps, or a patient fallback ends it."""
        over = self.since >= self.lookahead
        return over if self.variant.patience is None else over | self._impatient()

    def _impatient(self) -> np.ndarray:
        """Rows whose misses the fallback hears."""
        if self.variant.patience is None:
            return np.ones(self.count, bool)
        return np.asarray(self.state.streak) >= self.variant.patience

    def _begin_cycles(self, *, ended: bool) -> None:
        if self.variant.arm == "oracle" and self.replies.live.any():
            self._foresee()
        noted = self._boundary(ended=ended)
        for b in np.flatnonzero(self.due):
            self.open[b], self.since[b] = noted[b], 0

    def _end_cycles(self, which: np.ndarray) -> None:
        for b in np.flatnonzero(which).tolist():
            cycle, self.open[b] = self.open[b], None
            if cycle is not None:
                self.replies.cycles[b].append(cycle._replace(end=self.replies.fed[b]))

    def _foresee(self) -> None:
        """Votes of the next cycle, had it everything."""
        every = jnp.broadcast_to(jnp.arange(self.width, dtype=jnp.int32), self.pages.shape)
        state = jax.tree.map(jnp.copy, self.state)
        assert state.votes is not None
        state = dataclasses.replace(state, votes=jnp.zeros_like(state.votes))
        table = Table(every, every)
        _, ahead = self.replies.cycle(self.stepping, state, table, self.lookahead)
        self.state = dataclasses.replace(self.state, votes=ahead.votes)

    def _boundary(self, *, ended: bool) -> list[Cycle]:
        """Chooses the next cycle's pages, with more of them where the fallback says so: for what
        the cycle that `ended` missed, and for what the new set would."""
        if ended:
            self._fall_back()
        self._count_complete()
        noted = self._choose()
        while self._fall_back():
            noted = self._choose()
        keep, votes = ~jnp.asarray(self.due)[:, None], self.state.votes
        heard = jnp.asarray(self.due & self._impatient())
        self.state = dataclasses.replace(
            self.state,
            reads=jnp.where(keep, self.state.reads, 0),
            streak=jnp.where(heard, 0, self.state.streak),
            votes=None if votes is None else jnp.where(keep, votes, 0),
        )
        return noted

    def _count_complete(self) -> None:
        """Pages that are complete by now may leave the device: only later entries are fresh."""
        per_page = self.plan.cache.page_entries
        base = self.state.lengths // self.plan.cfg.csa_ratio // per_page * per_page
        due = jnp.asarray(self.due)
        self.state = dataclasses.replace(self.state, base=jnp.where(due, base, self.state.base))

    def _choose(self) -> list[Cycle]:
        choice = self.choosing.choose(
            self.state,
            empty_pool(1),
            self.pages,
            self.seen,
            self._where(),
            recall_pages=None,
            width=self.width,
        )
        selection = jax.tree.map(np.asarray, choice.selection)
        if selection.nan[self.due].any():
            raise ConfigError(f"scores of {self.variant.name} must be numbers, got NaN")
        self.table, self.pages = choice.table, choice.pages
        held = np.asarray(choice.pages)
        return [
            Cycle(
                complete=self.room.complete_pages(self.replies.fed[b]),
                pages=tuple(np.flatnonzero(held[b]).tolist()),
                above=int(selection.above[b]),
                wanted=int(selection.wanted[b]),
                over_budget=int(selection.over_budget[b]),
                due=self._ahead(b),
            )
            for b in range(self.count)
        ]

    def _where(self) -> Where:
        """What each row may have; on the path "mask" no page has a place on the host."""
        rows, extra = range(self.count), None
        if self.variant.fallback is not None:
            extra = jnp.asarray([self._extra(b) for b in rows], jnp.int32)
        return Where(
            host_rows=jnp.full((self.count, self.width), -1, jnp.int32),
            generations=jnp.zeros(1, jnp.int32),
            due=jnp.asarray(self.due),
            allowed=jnp.asarray([self._allowed(b) for b in rows], jnp.int32),
            extra=extra,
            limit=jnp.int32(self.width),
            cycle=jnp.int32(0),
        )

    def _allowed(self, b: int) -> int:
        """By the row's length at the end of the cycle, when the most bytes are taken."""
        ahead, limit = self._ahead(b), self.replies.limit[b]
        complete = self.room.complete_pages
        forming = complete(ahead) - complete(self.replies.fed[b])
        return min(self.room.allowed((ahead,), limit, forming=forming), self._budgeted(b))

    def _ahead(self, b: int) -> int:
        """Tokens at the end of the cycle that begins."""
        now = self.replies.fed[b]
        return min(now + self.lookahead, max(self.replies.limit[b], now))

    def _budgeted(self, b: int) -> int:
        return self.room.allowed((self.replies.limit[b],), self.replies.limit[b])

    def _extra(self, b: int) -> int:
        """Pages on top of the budget: with each growth, what the row may have doubles."""
        growth = self.replies.growth[b]
        share = max(1, self._budgeted(b))
        return min(self.room.complete_pages(self.replies.fed[b]), (share << growth) - share)

    def _fall_back(self) -> bool:
        """Grows the rows that miss more than they may; False where none can grow."""
        if self.variant.fallback is None:
            return False
        misses = self.stepping.missed(self.state, no_records(self.plan), self.table)
        over = self.due & self._impatient() & (np.asarray(misses.mass) > self.variant.fallback)
        whole = [self.room.complete_pages(fed) for fed in self.replies.fed]
        grown = [b for b in np.flatnonzero(over).tolist() if self._extra(b) < whole[b]]
        for b in grown:
            self.replies.growth[b] += 1
        return bool(grown)
