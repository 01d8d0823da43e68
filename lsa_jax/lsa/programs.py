"""The compiled programs of two-level decoding around one model. Holds weights, no decode state."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, UInt8

from lsa_jax.engine import Burst, empty_burst, run_burst
from lsa_jax.lsa import arms, boundary, devices, missed, resident_set
from lsa_jax.lsa.boundary import Choice, Where
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.missed import Misses
from lsa_jax.lsa.pool_map import PoolMap, Table
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Sampler


class Programs:
    """Programs by name, compiled at first use for each set of shapes and static arguments.

    `compile_seconds` and `compilations` count what was compiled so far.
    """

    def __init__(
        self,
        plan: Level2,
        lsa: LsaConfig,
        model: DeepSeekV4,
        indexer: MemoryIndexer | None,
        calibration: Calibration | None,
        mesh: Mesh | None = None,
    ):
        self.plan, self.lsa, self.calibration, self.mesh = plan, lsa, calibration, mesh
        both = (model, devices.replicate(indexer, mesh))
        self._weights, self._treedef = jax.tree.flatten(both)
        self._compiled: dict[Any, Any] = {}
        self.compile_seconds, self.compilations = 0.0, 0

    def _run(self, name: str, static: tuple[Any, ...], donate: tuple[int, ...], *args: Any) -> Any:
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), args)
        at = (name, static, jax.tree.structure(shapes), *jax.tree.leaves(shapes))
        args = devices.replicate(args, self.mesh)
        if at not in self._compiled:
            begin = time.perf_counter()
            body = functools.partial(getattr(self, f"_{name}"), *static)
            results = None if self.mesh is None else devices.everywhere(self.mesh)
            donated = tuple(i + 1 for i in donate)
            jitted = jax.jit(body, donate_argnums=donated, out_shardings=results)
            with devices.using(self.mesh):
                self._compiled[at] = jitted.lower(self._weights, *args).compile()
            self.compile_seconds += time.perf_counter() - begin
            self.compilations += 1
        return self._compiled[at](self._weights, *args)

    def _model(self, weights: list[Array]) -> tuple[DeepSeekV4, MemoryIndexer | None]:
        return jax.tree.unflatten(self._treedef, weights)

    def cycle(
        self,
        state: LsaState,
        records: UInt8[Array, "S r 128"],
        table: Table,
        token: Int[Array, " B"],
        done: Bool[Array, " B"],
        key: Array,
        steps: int,
        *,
        sampler: Sampler,
        stop: tuple[int, ...],
        keep_logits: bool,
    ) -> tuple[Burst, LsaState]:
        """Up to `steps` <= lookahead steps in which no page moves; fewer where a patient fallback
        has seen enough of a live row. The state is donated."""
        static = (sampler, stop, keep_logits)
        args = (state, records, table, token, done, key, jnp.int32(steps))
        return self._run("cycle", static, (0,), *args)

    def _cycle(
        self,
        sampler: Sampler,
        stop: tuple[int, ...],
        keep_logits: bool,
        weights: list[Array],
        state: LsaState,
        records: Array,
        table: Table,
        token: Array,
        done: Array,
        key: Array,
        steps: Array,
    ) -> tuple[Burst, LsaState]:
        model, _ = self._model(weights)
        bound, patience = self.lsa.fallback, self.lsa.patience

        def forward(state: LsaState, token: Array, live: Array) -> tuple[Array, LsaState]:
            streams, state = self.plan.step(model, state, records, table, token, live)
            if bound is not None and patience is not None:
                mass = missed.missed(self.plan, model, state, records, table).mass
                counted = jnp.where(mass > bound, state.streak + 1, 0)
                streak = jnp.where(live, counted, state.streak)
                state = dataclasses.replace(state, streak=streak)
            return model.logits(streams)[:, 0], state

        def enough(state: LsaState, live: Array) -> Array:
            return jnp.any(live & (state.streak >= jnp.int32(patience)))

        options = {"sampler": sampler, "stop": stop, "enough": None if patience is None else enough}
        vocab = self.plan.cfg.vocab_size if keep_logits else None
        burst = empty_burst(done, self.lsa.lookahead, vocab)
        return run_burst(forward, state, burst, token, key, steps, **options)

    def missed(self, state: LsaState, records: UInt8[Array, "S r 128"], table: Table) -> Misses:
        """`missed.missed`."""
        return self._run("missed", (), (), state, records, table)

    def _missed(
        self, weights: list[Array], state: LsaState, records: Array, table: Table
    ) -> Misses:
        return missed.missed(self.plan, self._model(weights)[0], state, records, table)

    def flush(self, state: LsaState, due: Bool[Array, " B"]) -> tuple[LsaState, Array, Array]:
        """`boundary.flush`. The state is donated."""
        return self._run("flush", (), (0,), state, due)

    def _flush(self, weights: list[Array], state: LsaState, due: Array) -> Any:
        del weights
        return boundary.flush(self.plan, state, due)

    def choose(
        self,
        state: LsaState,
        pool: PoolMap,
        before: Bool[Array, "B P"],
        seen: Float[Array, "B N"] | None,
        at: Where,
        *,
        recall_pages: int | None,
        width: int,
    ) -> Choice:
        """Fires level 1 and assigns the next pages: `boundary.choose`."""
        args = (state, pool, before, seen, at)
        return self._run("choose", (recall_pages, width), (), *args)

    def _choose(
        self,
        recall_pages: int | None,
        width: int,
        weights: list[Array],
        state: LsaState,
        pool: PoolMap,
        before: Array,
        seen: Array | None,
        at: Where,
    ) -> Choice:
        model, indexer = self._model(weights)
        scores = arms.scores(self.lsa, self.plan, model, indexer, state, seen)
        policy = dataclasses.replace(arms.policy_of(self.lsa), recall_pages=recall_pages)
        threshold = None
        if self.calibration is not None:
            entries = state.lengths // self.plan.cfg.csa_ratio
            threshold = resident_set.row_thresholds(self.calibration, entries)
        elif indexer is not None and indexer.cfg.score == "softmax" and policy.threshold is None:
            threshold = resident_set.even_shares(state.lengths // self.plan.cfg.csa_ratio)
        native = None
        if at.extra is not None:
            native = missed.native_share(self.plan, model, state)
        return boundary.choose(
            self.plan,
            policy,
            scores,
            state,
            pool,
            before,
            at,
            by_page=arms.by_page(self.lsa),
            width=width,
            threshold=threshold,
            native=native,
        )


@functools.partial(jax.jit, donate_argnums=(0,))
def put_row(state: LsaState, row: LsaState, b: Int[Array, ""]) -> LsaState:
    """The state with row b replaced by a state of one row."""

    def put(axis: int) -> Callable[[Array, Array], Array]:
        return lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y.astype(x.dtype), b, axis)

    return _by_row(put, state, row)


@jax.jit
def take_row(state: LsaState, b: Int[Array, ""]) -> LsaState:
    """Row b as a state of one row."""

    def take(axis: int) -> Callable[..., Array]:
        return lambda x, *_: jax.lax.dynamic_slice_in_dim(x, b, 1, axis)

    return _by_row(take, state)


def _by_row(along: Callable[[int], Callable[..., Array]], state: LsaState, *other: Any) -> LsaState:
    """A function over rows: axis 1 of `hidden`, axis 0 of all else."""
    first, hidden = along(0), along(1)
    rest = [dataclasses.replace(x, hidden=None) for x in (state, *other)]
    out = jax.tree.map(first, *rest)
    return dataclasses.replace(out, hidden=hidden(state.hidden, *(x.hidden for x in other)))
