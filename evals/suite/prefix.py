"""Prefilled text as a value: read once, then forked for every question, arm and page size."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from lsa_jax.config import CacheConfig
from lsa_jax.lsa import prefill
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.nn.transformer import DeepSeekV4

QUESTION_TOKENS = 64  # questions are read in chunks of so many: one program for nearly all of them
Progress = Callable[[int], None]  # called with the number of tokens done


class Asked(NamedTuple):
    """Rows that have read their questions and answer next.

    `first` is each row's first answer token, drawn by the prefill, so the same for every arm;
    `seen` are the votes of the question's last tokens; `lengths` count tokens.
    """

    state: LsaState  # of B rows, on the path "mask"
    first: np.ndarray  # int32 [B]
    seen: Array  # float32 [B, N]
    lengths: tuple[int, ...]


def fork(state: LsaState) -> LsaState:
    """A copy, for programs that take the original's memory."""
    return jax.tree.map(jnp.copy, state)


@jax.jit
def _stack(states: Sequence[LsaState]) -> LsaState:
    """Rows one after the other: axis 1 of `hidden`, axis 0 of all else."""
    hidden = jnp.concatenate([state.hidden for state in states], axis=1)
    rest = [dataclasses.replace(state, hidden=None) for state in states]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *rest)
    return dataclasses.replace(joined, hidden=hidden)


class Prefixes:
    """Reads haystacks and questions with one model; `haystacks` counts the haystacks so far.

    Prefill attends to everything in every arm, as in serving, so nothing in it is an arm's own.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheConfig,
        targets: tuple[int, ...],
        *,
        chunk: int = 1024,
        lookback: int = 1,
    ):
        self.model, self.chunk, self.haystacks = model, chunk, 0
        self.plan = Level2(
            model.cfg, cache, targets=targets, lookahead=1, path="mask", lookback=lookback
        )

    def read(
        self, tokens: Sequence[int], capacity: int, progress: Progress | None = None
    ) -> LsaState:
        """The state of one row after a haystack, with room for `capacity` tokens."""
        self.haystacks += 1
        return self._extend(self.empty(capacity), tokens, self.chunk, progress, observed=0)[0]

    def empty(self, capacity: int) -> LsaState:
        """The state of one row before anything is read."""
        state = self.plan.start(batch=1, capacity=capacity, dtype=self.model.dtype)
        # Bound to its device as later states are, or each program is compiled for both.
        return jax.device_put(state, jax.tree.leaves(self.model)[0].sharding)

    def ask(self, haystack: LsaState, questions: Sequence[Sequence[int]]) -> Asked:
        """One row per question, each of which sees the haystack and itself alone."""
        states, first, seen = [], [], []
        for ids in questions:
            state, logits, votes = self._extend(
                fork(haystack), ids, QUESTION_TOKENS, None, observed=prefill.OBSERVED
            )
            assert votes is not None
            states.append(state)
            first.append(jnp.argmax(logits[0]))
            seen.append(votes)
        start = int(haystack.lengths[0])
        lengths = tuple(start + len(ids) for ids in questions)
        tokens = np.array(jnp.stack(first), np.int32)
        return Asked(_stack(states), tokens, jnp.concatenate(seen), lengths)

    def _extend(
        self,
        state: LsaState,
        tokens: Sequence[int],
        size: int,
        progress: Progress | None,
        *,
        observed: int,
    ) -> tuple[LsaState, Array, Array | None]:
        """Appends tokens to one row; the state is donated. Logits [1, V] after them, and votes of
        the last `observed` of them; None where that is 0."""
        logits = votes = None
        for at in range(0, len(tokens), size):
            part = np.asarray(tokens[at : at + size], np.int32)
            ids = np.zeros((1, size), np.int32)
            ids[0, : len(part)] = part
            left = len(tokens) - at - len(part)
            logits, state, chunk = prefill.run_chunk(
                self.plan,
                self.model,
                state,
                jnp.asarray(ids),
                len(part),
                None,
                observe=max(0, observed - left),
            )
            if chunk.votes is not None:
                votes = chunk.votes if votes is None else votes + chunk.votes
            if progress is not None:
                jax.block_until_ready(logits)
                progress(at + len(part))
        assert logits is not None
        return state, logits, votes


def join(parts: Sequence[Asked]) -> Asked:
    """The rows of all, which have the same capacity, one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Asked(
        _stack([part.state for part in parts]),
        np.concatenate([part.first for part in parts]),
        jnp.concatenate([part.seen for part in parts]),
        tuple(length for part in parts for length in part.lengths),
    )


def widen(asked: Asked, rows: int) -> Asked:
    """The same with copies of the first row behind, up to `rows` rows: one shape, one program."""
    more = rows - len(asked.lengths)
    if more <= 0:
        return asked
    order = jnp.concatenate([jnp.arange(len(asked.lengths)), jnp.zeros(more, jnp.int32)])
    state = jax.tree.map(lambda x: x[order], dataclasses.replace(asked.state, hidden=None))
    state = dataclasses.replace(state, hidden=asked.state.hidden[:, order])
    lengths = asked.lengths + (asked.lengths[0],) * more
    return Asked(state, asked.first[np.asarray(order)], asked.seen[order], lengths)


def in_pages_of(plan: Level2, asked: Asked, capacity: int) -> Asked:
    """A copy of the rows in the pages of another plan on the path "mask", which may differ in the
    size of pages and in whether it counts votes. What room they differ by is empty."""
    rows, dtype = len(asked.lengths), asked.state.hidden.dtype
    like = jax.eval_shape(lambda: plan.start(batch=rows, capacity=capacity, dtype=dtype))

    def fit(x: Array, shape: jax.ShapeDtypeStruct) -> Array:
        if x.shape == shape.shape:
            return jnp.copy(x)
        flat = x.reshape(rows, -1, *x.shape[3:])
        count = shape.shape[1] * shape.shape[2]
        flat = jnp.pad(
            flat[:, :count],
            [(0, 0), (0, max(0, count - flat.shape[1])), *[(0, 0)] * (flat.ndim - 2)],
        )
        return flat.reshape(shape.shape)

    own = dataclasses.replace(asked.state, reads=None, votes=None)
    state = jax.tree.map(fit, own, dataclasses.replace(like, reads=None, votes=None))
    entries = like.layers[plan.target_layers[0]].index_keys
    assert entries is not None
    pages, size = jax.tree.leaves(entries)[0].shape[1:3]
    wide = max(0, pages * size - asked.seen.shape[1])
    seen = jnp.pad(asked.seen, ((0, 0), (0, wide)))[:, : pages * size]
    state = dataclasses.replace(
        state,
        reads=jnp.zeros((rows, pages), jnp.int32),
        votes=jnp.copy(seen) if plan.count_votes else None,
    )
    return asked._replace(state=state, seen=seen)
