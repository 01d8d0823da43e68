"""Answers of every variant to questions that are rows of one batch."""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from evals.suite.budgeted import Budgeted
from evals.suite.prefix import Asked, in_pages_of
from evals.suite.replies import DECODING, Replies, Reply
from evals.suite.variants import Base, Variant
from lsa_jax.cache.state import DecodeState
from lsa_jax.config import ConfigError
from lsa_jax.engine import Engine
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, Ensemble
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.pool_map import Table
from lsa_jax.lsa.programs import Programs
from lsa_jax.nn.transformer import DeepSeekV4

MAX_BURST = 64


class Answers:
    """Programs of all variants around one model, compiled once for each set of shapes.

    The programs of steps are those of all arms that take the same steps, and the size of a budget
    is part of no program.
    """

    def __init__(
        self,
        base: Base,
        model: DeepSeekV4,
        indexer: MemoryIndexer | None = None,
        calibration: Calibration | None = None,
    ):
        self.base, self.model = base, model
        self._indexer, self._calibration = indexer, calibration
        self._engine = Engine(model, base.cache, max_burst=MAX_BURST)
        self._plan = functools.cache(self._make_plan)
        self._stepping = functools.cache(self._make_stepping)
        self._choosing = functools.cache(self._make_choosing)

    def run(
        self,
        asked: Asked,
        variant: Variant,
        *,
        new_tokens: Sequence[int],
        capacity: int,
        seed: int = 0,
    ) -> list[Reply]:
        """Greedy answers of all rows, of at most `new_tokens[b]` tokens or up to EOS.

        `capacity` is what the rows of `asked` have room for; `asked` stays as it was.
        """
        replies = Replies(asked, new_tokens)
        if variant.arm == "full":
            self._run_full(asked, replies)
        elif variant.arm == "no_csa":
            self._run_without_csa(asked, replies, capacity)
        else:
            assert variant.lookahead is not None
            plan = self._plan_of(variant)
            watched = () if variant.patience is None else (variant.fallback, variant.patience)
            Budgeted(
                variant,
                self.base.room(variant),
                self._stepping(plan, variant.lookahead, *watched),
                self._chooser(plan, variant, seed),
                in_pages_of(plan, asked, capacity),
                replies,
            ).run()
        return replies.done()

    def _run_full(self, asked: Asked, replies: Replies) -> None:
        state = jax.tree.map(jnp.copy, DecodeState(asked.state.layers, asked.state.lengths))
        while replies.live.any():
            burst, state = self._engine.decode(
                state,
                jnp.asarray(replies.token),
                steps=replies.steps(MAX_BURST),
                key=jax.random.key(0),
                done=jnp.asarray(~replies.live),
                **DECODING,
            )
            replies.take(burst)

    def _run_without_csa(self, asked: Asked, replies: Replies, capacity: int) -> None:
        """No page is resident, and fresh entries are said to begin where no entry can be."""
        plan = self._plan(self.base.cache.page_entries, MAX_BURST, False)
        state = in_pages_of(plan, asked, capacity).state
        beyond = plan.pages_of(state) * plan.cache.page_entries
        state = dataclasses.replace(state, base=jnp.full_like(state.base, beyond))
        nothing = jnp.full((len(asked.lengths), 1), -1, jnp.int32)
        while replies.live.any():
            steps = replies.steps(MAX_BURST)
            burst, state = replies.cycle(
                self._stepping(plan, MAX_BURST), state, Table(nothing, nothing), steps
            )
            replies.take(burst)

    def _plan_of(self, variant: Variant) -> Level2:
        assert variant.lookahead is not None
        size = self.base.cache_of(variant).page_entries
        return self._plan(size, variant.lookahead, variant.arm in ("lagged", "oracle"))

    def _make_plan(self, page_entries: int, lookahead: int, votes: bool) -> Level2:
        return Level2(
            self.model.cfg,
            dataclasses.replace(self.base.cache, page_entries=page_entries),
            targets=self.base.targets,
            lookahead=lookahead,
            path="mask",
            count_votes=votes,
            lookback=self.base.lookback,
        )

    def _make_stepping(
        self,
        plan: Level2,
        lookahead: int,
        fallback: float | None = None,
        patience: int | None = None,
    ) -> Programs:
        """Steps and misses know nothing of arms but their lookahead, and of a patient fallback: one
        stands for all."""
        lsa = LsaConfig(
            targets=plan.targets,
            arm="recency",
            lookahead=lookahead,
            lookback=plan.lookback,
            resident_path="mask",
            fallback=fallback,
            patience=patience,
        )
        return Programs(plan, lsa, self.model, None, None)

    def _chooser(self, plan: Level2, variant: Variant, seed: int) -> Programs:
        lsa = self.base.lsa(variant, seed=seed)
        lsa = dataclasses.replace(lsa, budget=None, fallback=None, patience=None)
        calibrated = (variant.policy, variant.threshold, variant.ensemble) == ("budget", None, None)
        return self._choosing(plan, lsa, variant.ensemble, calibrated)

    def _make_choosing(
        self, plan: Level2, lsa: LsaConfig, ensemble: Ensemble | None, calibrated: bool
    ) -> Programs:
        indexer = self._indexer if lsa.arm == "lsa" else None
        if indexer is not None and ensemble is not None:
            indexer = with_ensemble(indexer, ensemble)
        return Programs(plan, lsa, self.model, indexer, self._calibration if calibrated else None)


def with_ensemble(indexer: MemoryIndexer, ensemble: Ensemble) -> MemoryIndexer:
    """The same target layers, joined in another way; ConfigError for weights that it never had."""
    leaves = indexer.leaves()
    if ensemble != "learned":
        leaves.pop(ENSEMBLE_LEAF, None)
    elif ENSEMBLE_LEAF not in leaves:
        raise ConfigError(f"ensemble learned needs the indexer's leaf {ENSEMBLE_LEAF}, got none")
    return MemoryIndexer(dataclasses.replace(indexer.cfg, ensemble=ensemble), leaves)
