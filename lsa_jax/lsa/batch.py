"""A batch of requests between two cycles: pages out, level 1, pages in.

Holds what the requests of a session share: decode state, tiers, programs, and the boundary that
moves pages. `session` is what callers use.
"""

import dataclasses
import hashlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lsa_jax.compile_clock import CompileClock
from lsa_jax.config import CacheConfig, ConfigError
from lsa_jax.config_io import to_json
from lsa_jax.lsa.boundary import Choice, Where
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.devices import check_mesh, replicate
from lsa_jax.lsa.host_memory import HostLimitError
from lsa_jax.lsa.host_store import chain_root
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.missed import Misses
from lsa_jax.lsa.prefill import ReadPages
from lsa_jax.lsa.programs import Programs
from lsa_jax.lsa.room import Room
from lsa_jax.lsa.rows import Event, Row, Turn, event
from lsa_jax.lsa.targets import check_targets
from lsa_jax.lsa.tiers import Tiers
from lsa_jax.nn.transformer import DeepSeekV4


def _check_indexer(lsa: LsaConfig, indexer: MemoryIndexer | None) -> None:
    if (indexer is None) == (lsa.arm == "lsa"):
        got = "none" if indexer is None else "one"
        raise ConfigError(f"indexer must be given with attention lsa only, got {got}")
    if indexer is not None and indexer.cfg.target_layers != lsa.targets:
        got = list(indexer.cfg.target_layers)
        raise ConfigError(f"targets must be the indexer's layers {got}, got {list(lsa.targets)}")
    if indexer is not None and indexer.cfg.lookback != lsa.lookback:
        raise ConfigError(
            f"lookback must be the indexer's {indexer.cfg.lookback}, got {lsa.lookback}"
        )


class Batch:
    """`rows` requests of up to `capacity` tokens; `rows[b]` is None where there is none."""

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheConfig,
        lsa: LsaConfig,
        indexer: MemoryIndexer | None = None,
        *,
        rows: int = 1,
        capacity: int,
        calibration: Calibration | None = None,
        fingerprint: str = "",
        mesh: Mesh | None = None,
    ):
        cfg = model.cfg
        check_mesh(mesh)
        _check_indexer(lsa, indexer)
        check_targets(cfg, lsa.targets)
        votes = lsa.arm in ("lagged", "oracle")
        self.plan = Level2(
            cfg,
            cache,
            targets=lsa.targets,
            lookahead=lsa.lookahead,
            path=lsa.resident_path,
            count_votes=votes,
            lookback=lsa.lookback,
        )
        self.model, self.cache, self.lsa, self.mesh = model, cache, lsa, mesh
        self.programs = Programs(self.plan, lsa, model, indexer, calibration, mesh)
        fresh = self.plan.fresh_pages * cache.page_entries
        width = model.dtype.itemsize
        self.room = Room(cfg=cfg, cache=cache, lsa=lsa, fresh_entries=fresh, window_bytes=width)
        limit = lsa.host_limit
        if limit is None:  # room for every row at any length the model has, taken as it is needed
            pages = self.room.complete_pages(cfg.max_position_embeddings)
            limit = rows * max(1, pages) * self.plan.layout.nbytes
        described = f"{to_json(cfg)} {cache} {lsa.targets} {model.compute} {fingerprint}"
        self._root = chain_root(hashlib.sha256(described.encode()).digest())
        self.rows: list[Row | None] = [None] * rows
        self.events: list[Event] = []
        self.stall_seconds = 0.0
        self._cycle = 0
        self.seen: Float[Array, "B N"] | None = None
        self.capacity = self._checked_capacity(capacity)
        self.state = self.empty(capacity)
        pages = self.plan.pages_of(self.state)
        self.tiers = Tiers(self.plan, rows=rows, pages=pages, host_limit=limit, mesh=mesh)
        self.tiers.set_pool(self._slots())

    def _checked_capacity(self, capacity: int) -> int:
        most = self.model.cfg.max_position_embeddings
        if not 1 <= capacity <= most:
            raise ConfigError(
                f"capacity must be in 1..max_position_embeddings={most}, got {capacity}"
            )
        return capacity

    def empty(self, capacity: int, rows: int | None = None) -> LsaState:
        """An empty decode state of all rows, or of so many."""
        batch = len(self.rows) if rows is None else rows
        state = self.plan.start(batch=batch, capacity=capacity, dtype=self.model.dtype)
        return replicate(state, self.mesh)

    def _slots(self, held: int = 0) -> int:
        """Pages to reserve room for: those that full rows may have, and no fewer than are held."""
        most = self.room.complete_pages(self.capacity) * len(self.rows)
        extra = sum(self._extra(row, self.capacity) for row in self.rows)
        return max(1, held, min(most, self._budgeted() + extra))

    def _held(self) -> int:
        """Pages that stay where a pool is made anew."""
        return int(np.asarray(self.tiers.pages).sum())

    def _budgeted(self) -> int:
        """Pages that full rows may have without a fallback."""
        return self.room.allowed((self.capacity,) * len(self.rows), self.capacity)

    def _extra(self, row: Row | None, tokens: int) -> int:
        """Pages that a row of so many tokens may have on top of the budget: with each growth, its
        even share of the budget doubles."""
        if row is None or not row.growth:
            return 0
        share = max(1, self._budgeted() // len(self.rows))
        return min(self.room.complete_pages(tokens), (share << row.growth) - share)

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens a row; what is there stays."""
        if capacity <= self.capacity:
            return
        state = self.empty(self._checked_capacity(capacity))
        self.capacity = capacity

        def widen(x: Array, like: Array) -> Array:
            return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, like.shape, strict=True)])

        self.state = jax.tree.map(widen, self.state, state)
        if self.seen is not None:
            pages = self.plan.pages_of(state) * self.cache.page_entries
            self.seen = jnp.pad(self.seen, ((0, 0), (0, pages - self.seen.shape[1])))
        self._resize()

    def _resize(self) -> None:
        """A pool for the present capacity and rows, which keep their pages, copied anew."""
        self.tiers.set_rows(self.plan.pages_of(self.state), self._slots(self._held()))
        self.boundary(np.zeros(len(self.rows), bool))

    def reserve(self, row: Row, tokens: int) -> None:
        """Promises host memory for a live row to reach so many tokens; else HostLimitError."""
        if self.lsa.simulated or tokens <= row.limit:
            return
        store, complete = self.tiers.store, self.room.complete_pages
        store.finish(row.owner)  # its pages stay, cached, until it is admitted again
        try:
            store.admit(row.owner, complete(tokens), row.digests)
        except HostLimitError:
            store.admit(row.owner, complete(row.limit), row.digests)
            raise

    def reader(self, row: Row) -> ReadPages:
        """Reads the row's complete pages from the host."""
        rows, memory = self.tiers.store.rows(row.owner), self.tiers.store.memory
        return lambda parts: memory.read_parts(rows, parts)

    def store_pages(self, row: Row, records: np.ndarray) -> None:
        """Writes a row's next complete pages through to the host."""
        size = self.cache.page_entries * self.plan.cfg.csa_ratio
        digests = row.digest(self._root, size, len(records))
        if len(records):
            self.tiers.store.append_pages(row.owner, digests, records)

    def pairs(self, which: np.ndarray) -> list[tuple[Row, bool]]:
        """Rows with a request, and whether each is among `which`."""
        return [(row, bool(on)) for row, on in zip(self.rows, which, strict=True) if row]

    def flush(self, due: np.ndarray) -> None:
        """Complete pages of the fresh buffer go to the host; rows that are not due keep theirs."""
        if self.lsa.simulated:
            per_page, at = self.cache.page_entries, jnp.asarray(due)
            entries = self.state.lengths // self.plan.cfg.csa_ratio
            base = jnp.where(at, entries // per_page * per_page, self.state.base)
            self.state = dataclasses.replace(self.state, base=base)
            return
        ready = [
            row is not None and self.room.complete_pages(len(row.tokens)) > len(row.digests)
            for row in self.rows
        ]
        if not (due & ready).any():
            return
        self.state, records, done = self.programs.flush(self.state, jnp.asarray(due))
        counts = np.asarray(done)
        pages = np.asarray(records[:, : counts.max()])
        for b, row in enumerate(self.rows):
            if row is not None and counts[b]:
                self.store_pages(row, pages[b, : counts[b]])

    def boundary(self, due: np.ndarray, *, ended: bool = False) -> None:
        """Fires level 1 for the rows that are due, and recalls what they are granted.

        With a fallback, a row that missed too much in the cycle that `ended` grows; and so does one
        whose new set lacks too much, before any step reads it, until it lacks less or is whole. Of
        a patient one, only rows that have missed too much for so many tokens do either.
        """
        begin, compiling = time.perf_counter(), CompileClock()
        with compiling.listen():
            turn = self._turn(due, ended=ended)
            jax.block_until_ready(self.tiers.records)
        seconds = time.perf_counter() - begin - compiling.seconds
        self.stall_seconds += seconds
        self._note(turn, seconds)

    def _turn(self, due: np.ndarray, *, ended: bool) -> Turn:
        """What a boundary does; `boundary` times it."""
        read, moved = np.asarray(self.state.reads), 0
        suspect = self.impatient()
        none = np.zeros(len(self.rows), np.int32)
        before = after = Misses(none, none.astype(np.float32))
        counted = self._firing(due) if ended else self._firing(due) & ~due
        due = self._firing(due)
        if counted.any():
            before = Misses(*(np.where(counted, x, 0) for x in self._misses()))
            self._fall_back(before, due & suspect)
        self.flush(due)
        while True:
            at = self._where(due)
            choice = self._choose(at)
            moved += self.tiers.take(choice)
            self._judge(choice, np.asarray(at.due))
            self._cycle += 1
            if due.any():
                after = self._misses()
            if not self._fall_back(after, due & suspect):
                break
        self._count_anew(due)
        for row, on in self.pairs(due):
            row.since = 0 if on else row.since
        return Turn(due, choice, read, (before, after), int(at.allowed), moved)

    def _count_anew(self, due: np.ndarray) -> None:
        """Reads and votes of the next cycle, and the streaks of rows that were heard."""
        keep = ~jnp.asarray(due)[:, None]
        votes = self.state.votes
        self.state = dataclasses.replace(
            self.state,
            reads=jnp.where(keep, self.state.reads, 0),
            streak=jnp.where(jnp.asarray(due & self.impatient()), 0, self.state.streak),
            votes=None if votes is None else jnp.where(keep, votes, 0),
        )

    def impatient(self) -> np.ndarray:
        """Rows whose misses the fallback hears: all, or those that a patient one has seen enough
        of."""
        if self.lsa.patience is None:
            return np.ones(len(self.rows), bool)
        return np.asarray(self.state.streak) >= self.lsa.patience

    def _firing(self, due: np.ndarray) -> np.ndarray:
        """The rows that fire together: under a budget all live ones, for they share it by worth,
        and a row that fired alone could take only what others leave."""
        live = np.array([row is not None for row in self.rows])
        return due if self.lsa.budget is None or not due.any() else live

    def _choose(self, at: Where) -> Choice:
        return self.programs.choose(
            self.state,
            self.tiers.pool,
            self.tiers.pages,
            self.seen,
            at,
            recall_pages=self.room.row_pages(self.capacity),
            width=self.tiers.width,
        )

    def _judge(self, choice: Choice, due: np.ndarray) -> None:
        """What the host must know of a choice; read once its recall is under way."""
        nan = np.asarray(choice.selection.nan)
        above = np.asarray(choice.selection.above)
        for b, row in enumerate(self.rows):
            if row is not None and due[b]:
                row.above, row.broken = int(above[b]), bool(nan[b])

    def _where(self, due: np.ndarray) -> Where:
        ahead = tuple(
            min(len(row.tokens) + self.lsa.lookahead, max(row.limit, len(row.tokens))) if row else 0
            for row in self.rows
        )
        stored = np.asarray(self.state.base) // self.cache.page_entries
        complete = np.array([self.room.complete_pages(n) for n in ahead])
        forming = int((complete - stored)[np.array(ahead) > 0].sum())
        # At the end of the cycle, when the most bytes are taken: no step before exceeds them.
        total = self.room.allowed(ahead, self.capacity, forming=forming)
        total = min(total, self._budgeted())
        above = np.array([row.above if row else 0 for row in self.rows])
        spent = int((np.asarray(self.tiers.pages).sum(axis=1) - above)[~due].sum())
        extra = np.array([self._extra(row, len(row.tokens)) if row else 0 for row in self.rows])
        extra = np.where(due, extra, 0).astype(np.int32)
        return Where(
            host_rows=jnp.asarray(self.tiers.host_rows([row and row.owner for row in self.rows])),
            generations=jnp.asarray(self.tiers.generations()),
            due=jnp.asarray(due),
            allowed=jnp.int32(max(0, total - spent)),
            extra=None if self.lsa.fallback is None else jnp.asarray(extra),
            limit=jnp.int32(max(total, spent) + int(extra.sum()) + int(above[~due].sum())),
            cycle=jnp.int32(self._cycle),
        )

    def _misses(self) -> Misses:
        misses = self.programs.missed(self.state, self.tiers.records, self.tiers.table)
        return Misses(*map(np.asarray, misses))

    def _fall_back(self, misses: Misses, due: np.ndarray) -> bool:
        """Grows the rows that miss more than they may; False where there is none that can grow.

        Only these rows grow: the budget grants the others what it granted them before.
        """
        if self.lsa.fallback is None:
            return False
        over = self.pairs(due & (np.asarray(misses.mass) > self.lsa.fallback))
        grown = [row for row, on in over if on and not self._whole(row)]
        for row in grown:
            row.growth += 1
        if grown and not self.lsa.simulated:
            self.tiers.set_rows(self.tiers.row_pages, self._slots(self._held()))
        return bool(grown)

    def _whole(self, row: Row) -> bool:
        """Whether a row may have all of its pages on top of the budget."""
        return self._extra(row, len(row.tokens)) >= self.room.complete_pages(len(row.tokens))

    def end(self, b: int, *, keep: bool) -> None:
        """Ends a live row; what the fallback reserved for it goes back. `keep` keeps its pages on
        the host."""
        row = self.rows[b]
        assert row is not None
        self.tiers.forget(b, row.owner, keep=keep)
        self.rows[b] = None
        if row.growth:
            self._resize()

    def _note(self, turn: Turn, seconds: float) -> None:
        for b, row in enumerate(self.rows):
            if row is not None and turn.due[b]:
                noted = event(
                    b,
                    row,
                    turn,
                    page_bytes=self.plan.layout.nbytes,
                    complete=self.room.complete_pages(len(row.tokens)),
                    pool_bytes=self.tiers.records.nbytes,
                    seconds=seconds,
                )
                self.events.append(noted)
