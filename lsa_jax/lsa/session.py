"""Two-level decoding of several requests inside one budget: admit, decode, finish.

    session = LsaSession(model, cache, lsa, indexer, rows=1, capacity=4096)
    row, logits = session.admit(prompt_ids, max_new_tokens=64)
    token = sample(logits)
    burst = session.decode(token, steps=64, sampler=Greedy(), key=key)
    session.finish(row)

Each row's cycle is its own: a row fires after `lookahead` of its own steps, whoever is beside it.
"""

import dataclasses
import hashlib
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsa_jax.config import CacheConfig, ConfigError
from lsa_jax.config_io import to_json
from lsa_jax.engine import Burst
from lsa_jax.lsa import prefill
from lsa_jax.lsa.boundary import Choice, Misses, Where
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.host_store import chain_digest, chain_root
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.pool_map import Table
from lsa_jax.lsa.programs import Programs, put_row, take_row
from lsa_jax.lsa.room import Room
from lsa_jax.lsa.tiers import Tiers
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Sampler

MIN_CHUNK = 16


@dataclasses.dataclass
class Row:
    """One request: the tokens it has seen and the digests of its complete pages."""

    owner: int
    limit: int  # tokens it may reach
    tokens: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    since: int = 0  # steps since its last boundary


@dataclasses.dataclass(frozen=True)
class Event:
    """A boundary, as one row saw it: for reports."""

    row: int
    owner: int
    tokens: int
    pages: tuple[int, ...]  # resident in the next cycle
    complete: int  # pages that could be
    wanted: int
    over_budget: int
    allowed: int  # for all rows together
    recalled: int  # pages moved, for all rows together
    missed_entries: int
    missed_mass: float
    seconds: float


class LsaSession:
    """Up to `rows` live requests on one device, of up to `capacity` tokens each.

    All decode state is in `state` (arrays) and `rows` (what the host knows of each). Raises
    ConfigError where a request, a budget or a setting cannot be; nothing changes then.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheConfig,
        lsa: LsaConfig,
        indexer: MemoryIndexer | None = None,
        *,
        rows: int = 1,
        capacity: int,
        prefill_chunk: int = 1024,
        calibration: Calibration | None = None,
        fingerprint: str = "",
    ):
        if (indexer is None) == (lsa.arm == "lsa"):
            got = "none" if indexer is None else "one"
            raise ConfigError(f"indexer must be given with attention lsa only, got {got}")
        cfg = model.cfg
        votes = lsa.arm in ("lagged", "oracle")
        self.plan = Level2(
            cfg,
            cache,
            targets=lsa.targets,
            lookahead=lsa.lookahead,
            path=lsa.resident_path,
            count_votes=votes,
        )
        self.model, self.cache, self.lsa = model, cache, lsa
        self.programs = Programs(self.plan, lsa, model, indexer, calibration)
        fresh = self.plan.fresh_pages * cache.page_entries
        self.room = Room(cfg=cfg, cache=cache, lsa=lsa, fresh_entries=fresh)
        self.prefill_chunk = max(MIN_CHUNK, 1 << (prefill_chunk - 1).bit_length())
        limit = lsa.host_limit
        if limit is None:  # room for every row at any length the model has, taken as it is needed
            pages = self.room.complete_pages(cfg.max_position_embeddings)
            limit = rows * max(1, pages) * self.plan.layout.nbytes
        self._host_limit = limit
        described = f"{to_json(cfg)} {cache} {lsa.targets} {model.compute} {fingerprint}"
        self._root = chain_root(hashlib.sha256(described.encode()).digest())
        self.rows: list[Row | None] = [None] * rows
        self.events: list[Event] = []
        self.growth = 0  # times the fallback doubled what is allowed
        self.stall_seconds = 0.0
        self._owners = self._cycle = 0
        self._seen: Float[Array, "B N"] | None = None
        self.capacity = self._checked_capacity(capacity)
        self.state = self._empty(capacity)
        pages = self.plan.pages_of(self.state)
        self.tiers = Tiers(self.plan, rows=rows, pages=pages, host_limit=limit)
        self.tiers.set_pool(self._slots())

    def _checked_capacity(self, capacity: int) -> int:
        most = self.model.cfg.max_position_embeddings
        if not 1 <= capacity <= most:
            raise ConfigError(
                f"capacity must be in 1..max_position_embeddings={most}, got {capacity}"
            )
        return capacity

    def _empty(self, capacity: int, rows: int | None = None) -> LsaState:
        batch = len(self.rows) if rows is None else rows
        return self.plan.start(batch=batch, capacity=capacity, dtype=self.model.dtype)

    def _slots(self) -> int:
        """Pages to reserve room for: those that full rows may have."""
        allowed = self.room.allowed((self.capacity,) * len(self.rows), self.capacity)
        return max(1, self._grown(allowed, (self.capacity,) * len(self.rows)))

    def _grown(self, allowed: int, lengths: tuple[int, ...]) -> int:
        """What is allowed after the fallback's doublings: at most everything."""
        most = sum(self.room.complete_pages(n) for n in lengths)
        return min(most, max(allowed, 1) << self.growth) if self.growth else allowed

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens a row; what is there stays."""
        if capacity <= self.capacity:
            return
        state = self._empty(self._checked_capacity(capacity))
        self.capacity = capacity

        def widen(x: Array, like: Array) -> Array:
            return jnp.pad(x, [(0, n - m) for m, n in zip(x.shape, like.shape, strict=True)])

        self.state = jax.tree.map(widen, self.state, state)
        if self._seen is not None:
            pages = self.plan.pages_of(state) * self.cache.page_entries
            self._seen = jnp.pad(self._seen, ((0, 0), (0, pages - self._seen.shape[1])))
        self._resize()

    def _resize(self) -> None:
        """A pool for the present capacity and growth; rows keep their pages, copied anew."""
        self.tiers.set_rows(self.plan.pages_of(self.state), self._slots())
        self._boundary(np.zeros(len(self.rows), bool))

    # Requests

    def admit(self, prompt: Sequence[int], *, max_new_tokens: int) -> tuple[int, Array]:
        """Prefills a request into a free row and recalls its pages.

        Returns its row and the float32 logits [V] after the prompt.
        """
        if None not in self.rows:
            raise ConfigError(f"rows must have a free one, all {len(self.rows)} are live")
        limit = len(prompt) + max_new_tokens
        if not prompt or limit > self.capacity:
            raise ConfigError(
                f"prompt and new tokens must be 1..capacity={self.capacity}, got {limit}"
            )
        b = self.rows.index(None)
        lengths = (*(row.limit for row in self.rows if row), limit)
        self.room.allowed(lengths, self.capacity, strict=True)
        row = Row(owner=self._owners, limit=limit)
        if not self.lsa.simulated:
            self.tiers.store.admit(row.owner, self.room.complete_pages(limit))
        self._owners += 1
        self.rows[b] = row
        try:
            return b, self._extend(b, prompt, self._empty(self.capacity, rows=1))
        except BaseException:
            self.cancel(b)
            raise

    def extend(self, b: int, tokens: Sequence[int], *, max_new_tokens: int) -> Array:
        """Appends tokens to a live request, as its next turn does; logits [V] after the last."""
        row = self._live(b)
        limit = len(row.tokens) + len(tokens) + max_new_tokens
        if not tokens or limit > self.capacity:
            raise ConfigError(
                f"tokens so far and new ones must be 1..capacity={self.capacity}, got {limit}"
            )
        row.limit = max(row.limit, limit)
        self._flush(self._only(b))
        return self._extend(b, tokens, take_row(self.state, jnp.int32(b)))

    def finish(self, b: int) -> None:
        """Ends a request; its pages stay on the host, for others, while there is room."""
        self.tiers.forget(b, self._live(b).owner, keep=True)
        self.rows[b] = None

    def cancel(self, b: int) -> None:
        """Ends a request and forgets the pages that only it brought."""
        self.tiers.forget(b, self._live(b).owner, keep=False)
        self.rows[b] = None

    def _live(self, b: int) -> Row:
        row = self.rows[b]
        if row is None:
            raise ConfigError(f"row must be that of a live request, got {b}")
        return row

    def _only(self, b: int) -> np.ndarray:
        return np.arange(len(self.rows)) == b

    def _extend(self, b: int, tokens: Sequence[int], state: LsaState) -> Array:
        """Prefill in chunks, then a boundary of this row alone."""
        row, logits = self._live(b), None
        seen = None
        for at in range(0, len(tokens), self.prefill_chunk):
            part = np.asarray(tokens[at : at + self.prefill_chunk], np.int32)
            size = max(MIN_CHUNK, 1 << (len(part) - 1).bit_length())
            ids = np.zeros((1, size), np.int32)
            ids[0, : len(part)] = part
            logits, state, chunk = prefill.run_chunk(
                self.plan,
                self.model,
                state,
                jnp.asarray(ids),
                len(part),
                self._reader(row) if row.digests and not self.lsa.simulated else None,
                observe=self.lsa.arm == "snapkv" and at + self.prefill_chunk >= len(tokens),
            )
            row.tokens += part.tolist()
            self._store(row, chunk.records)
            seen = chunk.votes
        assert logits is not None
        self.state = put_row(self.state, state, jnp.int32(b))
        if seen is not None:
            before = (
                jnp.zeros((len(self.rows), seen.shape[1])) if self._seen is None else self._seen
            )
            self._seen = before.at[b].set(seen[0])
        row.since = 0
        self._boundary(self._only(b))
        return logits[0]

    def _reader(self, row: Row) -> prefill.ReadPages:
        rows, memory = self.tiers.store.rows(row.owner), self.tiers.store.memory
        return lambda parts: memory.read_parts(rows, parts)

    def _store(self, row: Row, records: np.ndarray) -> None:
        """Writes a row's next complete pages through to the host."""
        size = self.cache.page_entries * self.plan.cfg.csa_ratio
        first = len(row.digests)
        for page in range(first, first + len(records)):
            before = row.digests[-1] if row.digests else self._root
            tokens = row.tokens[page * size : (page + 1) * size]
            row.digests.append(chain_digest(before, tokens))
        if len(records):
            self.tiers.store.append_pages(row.owner, row.digests[first:], records)

    # Decoding

    def decode(
        self,
        token: Int[Array, " B"],
        *,
        steps: int,
        sampler: Sampler,
        key: Array,
        stop: Sequence[int] = (),
        done: Sequence[bool] | np.ndarray | None = None,
        keep_logits: bool = False,
    ) -> Burst:
        """Feeds `token`, draws the next, and so on for at most `steps` steps: fewer where a row's
        cycle ends before, for pages move between two calls and never within one.

        Rows without a request, and `done` ones, are left alone.
        """
        live = np.array([row is not None for row in self.rows])
        live &= ~np.asarray(done, bool) if done is not None else True
        self._check_room(live, steps)
        if not live.any():
            raise ConfigError("rows must have a live one that is not done, got none")
        if self.lsa.arm == "oracle":
            self._foresee(token, live, sampler, key, tuple(stop))
        left = min(self.lsa.lookahead - row.since for row, on in self._rows(live) if on)
        burst, self.state = self.programs.cycle(
            self.state,
            self.tiers.records,
            self.tiers.table,
            jnp.asarray(token, jnp.int32),
            jnp.asarray(~live),
            key,
            min(steps, left),
            sampler=sampler,
            stop=tuple(stop),
            keep_logits=keep_logits,
        )
        self._count(np.asarray(token), burst)
        over = np.asarray(burst.done)
        due = [row is not None and row.since >= self.lsa.lookahead for row in self.rows]
        if (due & ~over).any():
            self._boundary(due & ~over, ended=True)
        return burst

    def _rows(self, which: np.ndarray) -> list[tuple[Row, bool]]:
        return [(row, bool(on)) for row, on in zip(self.rows, which, strict=True) if row]

    def _check_room(self, live: np.ndarray, steps: int) -> None:
        if steps < 1:
            raise ConfigError(f"steps must be >= 1, got {steps}")
        longest = max((len(row.tokens) for row, on in self._rows(live) if on), default=0)
        if longest >= self.capacity:
            raise ConfigError(f"state must have capacity for {longest + 1}, has {self.capacity}")

    def _count(self, token: np.ndarray, burst: Burst) -> None:
        """Notes the tokens that were fed: the given one, then all drawn but the last."""
        tokens, count = np.asarray(burst.tokens), np.asarray(burst.count)
        for b, row in enumerate(self.rows):
            if row is not None and count[b]:
                row.tokens += [int(token[b]), *tokens[b, : count[b] - 1].tolist()]
                row.since += int(count[b])

    def _foresee(
        self, token: Array, live: np.ndarray, sampler: Sampler, key: Array, stop: tuple[int, ...]
    ) -> None:
        """The oracle: runs the next cycle with everything readable and keeps its votes only."""
        due = np.array([row is not None and row.since == 0 for row in self.rows]) & live
        if not due.any():
            return
        everything = jnp.broadcast_to(jnp.arange(self.tiers.width), self.tiers.table.pages.shape)
        _, ahead = self.programs.cycle(
            jax.tree.map(jnp.copy, self.state),
            self.tiers.records,
            Table(everything.astype(jnp.int32), self.tiers.table.slots),
            jnp.asarray(token, jnp.int32),
            jnp.asarray(~live),
            key,
            self.lsa.lookahead,
            sampler=sampler,
            stop=stop,
            keep_logits=False,
        )
        self.state = dataclasses.replace(self.state, votes=ahead.votes)
        self._boundary(due)

    # Boundaries

    def _flush(self, due: np.ndarray) -> None:
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
                self._store(row, pages[b, : counts[b]])

    def _boundary(self, due: np.ndarray, *, ended: bool = False) -> None:
        """Fires level 1 for the rows that are due, and recalls what they are granted."""
        begin = time.perf_counter()
        nothing = jnp.zeros(len(self.rows), jnp.int32)
        misses = Misses(nothing, nothing.astype(jnp.float32))
        if ended:
            misses = self.programs.missed(self.state, self.tiers.table)
            self._fall_back(np.asarray(misses.mass), due)
        self._flush(due)
        at = self._where(due)
        choice = self.programs.choose(
            self.state,
            self.tiers.pool,
            self.tiers.pages,
            misses,
            self._seen,
            at,
            recall_pages=self._recall_pages(),
            width=self.tiers.width,
        )
        if np.asarray(choice.selection.nan).any():
            raise ConfigError("scores of the memory indexer must be numbers, got NaN")
        moved = self.tiers.take(choice)
        if self.state.votes is not None:
            votes = jnp.where(jnp.asarray(due)[:, None], 0, self.state.votes)
            self.state = dataclasses.replace(self.state, votes=votes)
        self._cycle += 1
        for row, on in self._rows(due):
            row.since = 0 if on else row.since
        jax.block_until_ready(self.tiers.records)
        seconds = time.perf_counter() - begin
        self.stall_seconds += seconds
        self._note(due, choice, int(at.allowed), moved, seconds)

    def _recall_pages(self) -> int | None:
        pages = self.room.row_pages(self.capacity)
        most = self.room.complete_pages(self.capacity)
        return None if pages is None else max(1, min(most, pages << self.growth))

    def _where(self, due: np.ndarray) -> Where:
        live = [row if row else None for row in self.rows]
        ahead = tuple(
            min(len(row.tokens) + self.lsa.lookahead, max(row.limit, len(row.tokens))) if row else 0
            for row in live
        )
        total = self._grown(self.room.allowed(ahead, self.capacity), ahead)
        total = total if self.lsa.simulated else min(total, self.tiers.slots)
        held = np.asarray(self.tiers.pages).sum(axis=1)
        return Where(
            host_rows=jnp.asarray(self.tiers.host_rows([row and row.owner for row in live])),
            generations=jnp.asarray(self.tiers.generations()),
            due=jnp.asarray(due),
            allowed=jnp.int32(max(0, total - int(held[~due].sum()))),
            limit=jnp.int32(max(total, int(held[~due].sum()))),
            cycle=jnp.int32(self._cycle),
        )

    def _fall_back(self, mass: np.ndarray, due: np.ndarray) -> None:
        """Doubles what is allowed where a row misses more than it may."""
        if self.lsa.fallback is None or not (mass[due] > self.lsa.fallback).any():
            return
        most = self.room.complete_pages(self.capacity) * len(self.rows)
        held = self.tiers.row_pages if self.lsa.simulated else self.tiers.slots
        if held < most:
            self.growth += 1
            self._resize()

    def _note(
        self, due: np.ndarray, choice: Choice, allowed: int, moved: int, seconds: float
    ) -> None:
        selection, misses = choice.selection, choice.misses
        pages = np.asarray(choice.pages)
        for b, row in enumerate(self.rows):
            if row is not None and due[b]:
                self.events.append(
                    Event(
                        row=b,
                        owner=row.owner,
                        tokens=len(row.tokens),
                        pages=tuple(np.flatnonzero(pages[b]).tolist()),
                        complete=self.room.complete_pages(len(row.tokens)),
                        wanted=int(selection.wanted[b]),
                        over_budget=int(selection.over_budget[b]),
                        allowed=allowed,
                        recalled=moved,
                        missed_entries=int(misses.entries[b]),
                        missed_mass=float(misses.mass[b]),
                        seconds=seconds,
                    )
                )
