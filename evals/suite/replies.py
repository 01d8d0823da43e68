"""Answers as they grow: tokens, limits, and which rows of a batch go on."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from evals.suite.prefix import Asked
from evals.tasks.phrases import EOS_ID
from lsa_jax.engine import Burst
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.pool_map import Table
from lsa_jax.lsa.programs import Programs
from lsa_jax.sampling import Greedy

DECODING = {"sampler": Greedy(), "stop": (EOS_ID,)}


class Cycle(NamedTuple):
    """A cycle of one row: what was resident of the `complete` pages before it. It ended after `end`
    tokens, and would have after `due`."""

    complete: int
    pages: tuple[int, ...]
    above: int  # of these, on top of the budget
    wanted: int
    over_budget: int  # wanted pages that are not resident
    due: int
    end: int = 0


class Reply(NamedTuple):
    """One row's answer, and its cycles (none where nothing is chosen)."""

    tokens: list[int]
    cycles: list[Cycle]
    growth: int  # times the fallback doubled the row's pages


def no_records(plan: Level2) -> Array:
    """The pool of the path "mask": one slot that nobody reads."""
    return jnp.zeros((1, *plan.layout.shape), jnp.uint8)


class Replies:
    """What rows have said so far. `fed[b]` tokens are in the state, up to `limit[b]` will be."""

    def __init__(self, asked: Asked, new_tokens: Sequence[int]):
        self.token = asked.first.copy()
        self.fed = list(asked.lengths)
        self.limit = [n + new for n, new in zip(asked.lengths, new_tokens, strict=True)]
        self.cycles: list[list[Cycle]] = [[] for _ in self.fed]
        self.growth = [0] * len(self.fed)
        self._said = [[int(token)] for token in asked.first]
        self._left = np.array(new_tokens) - 1
        self.live = (self.token != EOS_ID) & (self._left > 0)

    def steps(self, most: int) -> int:
        """Steps until a live row has all of its tokens, at most `most`."""
        return int(min(most, self._left[self.live].min()))

    def cycle(
        self, programs: Programs, state: LsaState, table: Table, steps: int
    ) -> tuple[Burst, LsaState]:
        """Steps of the live rows in which no page moves; the state is donated."""
        return programs.cycle(
            state,
            no_records(programs.plan),
            table,
            jnp.asarray(self.token),
            jnp.asarray(~self.live),
            jax.random.key(0),
            steps,
            keep_logits=False,
            **DECODING,
        )

    def take(self, burst: Burst) -> int:
        """Notes what a burst said; returns the steps that it took."""
        tokens, count = np.asarray(burst.tokens), np.asarray(burst.count)
        taken = np.where(self.live, count, 0)
        for b in np.flatnonzero(taken):
            self._said[b] += tokens[b, : count[b]].tolist()
            self.fed[b] += int(count[b])
        self.token = np.array(burst.last_token(jnp.asarray(self.token)), np.int32)
        self._left = self._left - taken
        self.live = self.live & ~np.asarray(burst.done) & (self._left > 0)
        return int(taken.max())

    def done(self) -> list[Reply]:
        """What all rows said."""
        return [Reply(*row) for row in zip(self._said, self.cycles, self.growth, strict=True)]
