"""Two-level decoding of several requests inside one budget: admit, decode, finish.

    session = LsaSession(model, cache, lsa, indexer, rows=1, capacity=4096)
    row, logits = session.admit(prompt_ids, max_new_tokens=64)
    token = sample(logits)
    burst = session.decode(token, steps=64, sampler=Greedy(), key=key)
    session.finish(row)

Each row's cycle is its own: a row fires after `lookahead` of its own steps, whoever is beside it.
Under a budget, which rows share by worth, all of them fire when one does.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int

from lsa_jax.config import CacheConfig, ConfigError
from lsa_jax.engine import Burst
from lsa_jax.lsa import devices, prefill
from lsa_jax.lsa.arms import OBSERVING
from lsa_jax.lsa.batch import Batch
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.level2 import LsaState
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.pool_map import Table
from lsa_jax.lsa.programs import put_row, take_row
from lsa_jax.lsa.rows import Row, as_one
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Sampler

MIN_CHUNK = 16


class LsaSession:
    """Up to `rows` live requests of up to `capacity` tokens each, on one device or on a mesh.

    `prefill_chunk` bounds activation memory (rounded up to a power of two). `fingerprint` names the
    weights, so that pages of different ones are never taken for each other. With a `mesh`, whose
    data axis is 1, the model's leaves must lie on it (`shardings.leaf_sharding`).

    Raises ConfigError where a request, a budget or a setting cannot be; nothing changes then, and
    no other request is touched.
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
        mesh: Mesh | None = None,
    ):
        self.batch = Batch(
            model,
            cache,
            lsa,
            indexer,
            rows=rows,
            capacity=capacity,
            calibration=calibration,
            fingerprint=fingerprint,
            mesh=mesh,
        )
        self.lsa = lsa
        self.prefill_chunk = max(MIN_CHUNK, 1 << (prefill_chunk - 1).bit_length())
        self._owners = 0

    @property
    def capacity(self) -> int:
        """Tokens that a request may reach."""
        return self.batch.capacity

    def grow(self, capacity: int) -> None:
        """Room for `capacity` tokens a row; what is there stays."""
        self.batch.grow(capacity)

    def admit(
        self,
        prompt: Sequence[int],
        *,
        max_new_tokens: int,
        all_logits: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[int, Array | np.ndarray]:
        """Prefills a request into a free row and recalls its pages.

        Returns its row and the float32 logits [V] after the prompt, or with `all_logits` a host
        array [tokens, V]. `progress` is called with the number of tokens done so far.
        """
        if None not in self.batch.rows:
            raise ConfigError(f"rows must have a free one, all {len(self.batch.rows)} are live")
        limit = len(prompt) + max_new_tokens
        if not prompt or limit > self.capacity:
            raise ConfigError(
                f"prompt and new tokens must be 1..capacity={self.capacity}, got {limit}"
            )
        b = self.batch.rows.index(None)
        self._check_budget(b, limit)
        row = Row(owner=self._owners, limit=limit)
        if not self.lsa.simulated:
            self.batch.tiers.store.admit(row.owner, self.batch.room.complete_pages(limit))
        self._owners += 1
        self.batch.rows[b] = row
        try:
            empty = self.batch.empty(self.capacity, rows=1)
            return b, self._extend(b, prompt, empty, all_logits, progress)
        except BaseException:
            self.cancel(b)
            raise

    def extend(
        self,
        b: int,
        tokens: Sequence[int],
        *,
        max_new_tokens: int,
        all_logits: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> Array | np.ndarray:
        """Appends tokens to a live request, as its next turn does; logits as `admit` returns.

        A request that is refused for want of room stays as it was.
        """
        row = self._live(b)
        limit = len(row.tokens) + len(tokens) + max_new_tokens
        if not tokens or limit > self.capacity:
            raise ConfigError(
                f"tokens so far and new ones must be 1..capacity={self.capacity}, got {limit}"
            )
        limit = max(row.limit, limit)
        self._check_budget(b, limit)
        self.batch.reserve(row, limit)
        row.limit = limit
        self.batch.flush(self._only(b))
        state = take_row(self.batch.state, jnp.int32(b))
        return self._extend(b, tokens, state, all_logits, progress)

    def _check_budget(self, b: int, limit: int) -> None:
        """Refuses a budget below the floor of all requests, row b's of `limit` tokens."""
        others = (row.limit for other, row in enumerate(self.batch.rows) if row and other != b)
        self.batch.room.allowed((*others, limit), self.capacity, strict=True)

    def finish(self, b: int) -> None:
        """Ends a request; its pages stay on the host, for others, while there is room."""
        self._live(b)
        self.batch.end(b, keep=True)

    def cancel(self, b: int) -> None:
        """Ends a request and forgets the pages that only it brought."""
        self._live(b)
        self.batch.end(b, keep=False)

    def _live(self, b: int) -> Row:
        row = self.batch.rows[b]
        if row is None:
            raise ConfigError(f"row must be that of a live request, got {b}")
        return row

    def _only(self, b: int) -> np.ndarray:
        return np.arange(len(self.batch.rows)) == b

    def _extend(
        self,
        b: int,
        tokens: Sequence[int],
        state: LsaState,
        all_logits: bool,
        progress: Callable[[int], None] | None,
    ) -> Array | np.ndarray:
        """Prefill in chunks, then a boundary of this row alone."""
        row, logits = self._live(b), None
        rows: list[np.ndarray] = []
        seen = None
        for at in range(0, len(tokens), self.prefill_chunk):
            part = np.asarray(tokens[at : at + self.prefill_chunk], np.int32)
            size = max(MIN_CHUNK, 1 << (len(part) - 1).bit_length())
            ids = np.zeros((1, size), np.int32)
            ids[0, : len(part)] = part
            with devices.using(self.batch.mesh):
                logits, state, chunk = prefill.run_chunk(
                    self.batch.plan,
                    self.batch.model,
                    state,
                    jnp.asarray(ids),
                    len(part),
                    self.batch.reader(row) if row.digests and not self.lsa.simulated else None,
                    mesh=self.batch.mesh,
                    observe=self._observed(len(tokens) - at - len(part)),
                    all_logits=all_logits,
                )
            row.tokens += part.tolist()
            self.batch.store_pages(row, chunk.records)
            if chunk.votes is not None:
                seen = chunk.votes if seen is None else seen + chunk.votes
            if all_logits:
                rows.append(np.asarray(logits)[0, : len(part)])
            if progress is not None:
                jax.block_until_ready(logits)
                progress(at + len(part))
        assert logits is not None
        if self.lsa.arm == "lagged":  # the prompt's end stands for the cycle before the first one
            state = dataclasses.replace(state, votes=seen)
        self.batch.state = put_row(self.batch.state, state, jnp.int32(b))
        if self.lsa.arm == "snapkv":
            assert seen is not None
            before = (
                jnp.zeros((len(self.batch.rows), seen.shape[1]))
                if self.batch.seen is None
                else self.batch.seen
            )
            self.batch.seen = before.at[b].set(seen[0])
        row.since = 0
        self.batch.boundary(self._only(b))
        self._check_scores(self._only(b))
        return np.concatenate(rows) if all_logits else logits[0]

    def _observed(self, left: int) -> int:
        """Tokens of a chunk whose picks count, when so many tokens follow it."""
        return max(0, prefill.OBSERVED - left) if self.lsa.arm in OBSERVING else 0

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
        cycle ends before, for pages move between two calls and never within one. A patient fallback
        may end it after any step.

        Rows without a request, and `done` ones, are left alone. A row whose last set had NaN scores
        is refused by name; the others go on once it is cancelled or `done`.
        """
        live = np.array([row is not None for row in self.batch.rows])
        live &= ~np.asarray(done, bool) if done is not None else True
        if not live.any():
            raise ConfigError("rows must have a live one that is not done, got none")
        self._check_scores(live)
        steps = self._check_steps(live, steps)
        self._fire_late(live)
        if self.lsa.arm == "oracle":
            self._foresee(token, live, sampler, key, tuple(stop))
        burst, self.batch.state = self.batch.programs.cycle(
            self.batch.state,
            self.batch.tiers.records,
            self.batch.tiers.table,
            jnp.asarray(token, jnp.int32),
            jnp.asarray(~live),
            key,
            steps,
            sampler=sampler,
            stop=tuple(stop),
            keep_logits=keep_logits,
        )
        self._count(np.asarray(token), burst)
        over = np.asarray(burst.done)
        due = self._ended()
        if (due & ~over).any():
            self.batch.boundary(due & ~over, ended=True)
        return burst

    def _ended(self) -> np.ndarray:
        """Rows whose cycle is over: it had all of its steps, or a patient fallback ends it."""
        due = [row is not None and row.since >= self.lsa.lookahead for row in self.batch.rows]
        if self.lsa.patience is None:
            return np.array(due)
        live = np.array([row is not None for row in self.batch.rows])
        return np.array(due) | (live & self.batch.impatient())

    def _check_steps(self, live: np.ndarray, steps: int) -> int:
        """The steps until a cycle ends or a request is whole; ConfigError where one is already."""
        if steps < 1:
            raise ConfigError(f"steps must be >= 1, got {steps}")
        for b, row in enumerate(self.batch.rows):
            if row is None or not live[b]:
                continue
            if len(row.tokens) >= row.limit:  # host memory and capacity are promised up to there
                raise ConfigError(
                    f"max_new_tokens must leave row {b} a step to decode, "
                    f"it has all of its {row.limit} tokens"
                )
            left = self.lsa.lookahead - row.since % self.lsa.lookahead
            steps = min(steps, left, row.limit - len(row.tokens))
        return steps

    def _check_scores(self, live: np.ndarray) -> None:
        for b, row in enumerate(self.batch.rows):
            if row is not None and live[b] and row.broken:
                raise ConfigError(f"row {b}: scores of the memory indexer must be numbers, got NaN")

    def _fire_late(self, live: np.ndarray) -> None:
        """The boundary of rows that had stopped at the end of their cycle, and go on after all."""
        due = live & self._ended()
        if due.any():
            self.batch.boundary(due, ended=True)

    def _count(self, token: np.ndarray, burst: Burst) -> None:
        """Notes the tokens that were fed: the given one, then all drawn but the last."""
        tokens, count = np.asarray(burst.tokens), np.asarray(burst.count)
        for b, row in enumerate(self.batch.rows):
            if row is not None and count[b]:
                row.tokens += [int(token[b]), *tokens[b, : count[b] - 1].tolist()]
                row.since += int(count[b])

    def _foresee(
        self, token: Array, live: np.ndarray, sampler: Sampler, key: Array, stop: tuple[int, ...]
    ) -> None:
        """The oracle: runs the next cycle with everything readable and keeps its votes only.

        The boundary before it had no votes to choose by yet: both are noted as one.
        """
        due = np.array([row is not None and row.since == 0 for row in self.batch.rows]) & live
        if not due.any():
            return
        everything = jnp.broadcast_to(
            jnp.arange(self.batch.tiers.width), self.batch.tiers.table.pages.shape
        )
        _, ahead = self.batch.programs.cycle(
            jax.tree.map(jnp.copy, self.batch.state),
            self.batch.tiers.records,
            Table(everything.astype(jnp.int32), self.batch.tiers.table.slots),
            jnp.asarray(token, jnp.int32),
            jnp.asarray(~live),
            key,
            self.lsa.lookahead,
            sampler=sampler,
            stop=stop,
            keep_logits=False,
        )
        self.batch.state = dataclasses.replace(self.batch.state, votes=ahead.votes)
        noted = len(self.batch.events)
        self.batch.boundary(due)
        self.batch.events = as_one(self.batch.events[:noted], self.batch.events[noted:])
