"""What an answer was worth and what it took: the content of a record."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.suite.cases import Asks, Case
from evals.suite.replies import Cycle, Reply
from evals.suite.variants import UNBOUNDED, Base, Variant
from lsa_jax.config import CacheConfig
from lsa_jax.lsa import accounting, report
from lsa_jax.lsa.accounting import Footprint, Placement
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.pool_map import Table, empty_pool


def evidence_entries(question: Asks, ratio: int) -> np.ndarray:
    """CSA entries whose own tokens are of the question's evidence, ascending.

    An entry also has a say on the tokens before its own; what holds a token first is its own entry.
    """
    spans = [np.arange(start // ratio, -(-end // ratio)) for start, end in question.evidence]
    return np.unique(np.concatenate(spans)) if spans else np.zeros(0, int)


def recalled(entries: np.ndarray, cycles: Sequence[Cycle], page_entries: int) -> list[int]:
    """Of these entries: how many, how many the first cycle could read, and how many any could."""
    reached = np.zeros((len(cycles), len(entries)), bool)
    for at, cycle in enumerate(cycles):
        page = entries // page_entries
        reached[at] = np.isin(page, cycle.pages) | (page >= cycle.complete)
    first = int(reached[0].sum()) if cycles else 0
    return [len(entries), first, int(reached.any(axis=0).sum())]


@dataclasses.dataclass(frozen=True)
class Measure:
    """Scores and bytes of the answers to one model's questions."""

    base: Base

    def records(
        self, case: Case[Any], variant: Variant, replies: Sequence[Reply]
    ) -> list[dict[str, Any]]:
        """One record per question, in order."""
        asked = zip(case.questions, case.new_tokens, replies, strict=True)
        return [
            {
                **dataclasses.asdict(case.cell),
                "question": i,
                "template": question.template,
                "held_out": question.held_out,
                "variant": variant.as_dict(),
                "score": case.scores[i](reply.tokens),
                "said": reply.tokens,
                "tokens": len(case.haystack) + len(question.prompt),
                **self._sizes(case, question, new, variant, reply),
            }
            for i, (question, new, reply) in enumerate(asked)
        ]

    def _sizes(
        self, case: Case[Any], question: Asks, new: int, variant: Variant, reply: Reply
    ) -> dict[str, Any]:
        start = len(case.haystack) + len(question.prompt)
        entries = evidence_entries(question, self.base.cfg.csa_ratio)
        if variant.arm in UNBOUNDED:
            found = self._everything(start + len(reply.tokens) - 1, start + new)
            read = 0 if variant.arm == "no_csa" else len(entries)
            return {**_bytes(found), "evidence": [len(entries), read, read]}
        per_page = self.base.cache_of(variant).page_entries
        return {
            **self._of_cycles(variant, reply, start + new),
            "evidence": recalled(entries, reply.cycles, per_page),
            "growth": reply.growth,
        }

    def _everything(self, tokens: int, capacity: int) -> Footprint:
        at = Placement(
            lengths=(tokens,),
            targets=self.base.targets,
            capacity=capacity,
            page_entries=self.base.cache.page_entries,
            window_bytes=self.base.window_bytes,
        )
        layout = accounting.layout_of(self.base.cache.kv_format)
        return accounting.footprint(self.base.cfg, layout, at)

    def _of_cycles(self, variant: Variant, reply: Reply, limit: int) -> dict[str, Any]:
        """Bytes at the end of the cycle that took the most, and how the budget was kept: `slack` is
        the most whole pages that it had room for, and that were wanted and not granted."""
        room = self.base.room(variant)
        pool = room.allowed((limit,), limit) + max(cycle.above for cycle in reply.cycles)
        found = [self._at(variant, cycle, cycle.end, limit, pool) for cycle in reply.cycles]
        most = max(found, key=lambda each: each.occupied.kv)
        out: dict[str, Any] = {
            **_bytes(most),
            "resident_pages": [len(cycle.pages) for cycle in reply.cycles],
            "complete_pages": [cycle.complete for cycle in reply.cycles],
            "above": max(cycle.above for cycle in reply.cycles),
        }
        budget = room.lsa.budget
        if budget is None:
            return out
        out["exceeded"] = any(each.occupied.kv > budget.limit(each.full_occupied) for each in found)
        out["slack"] = 0
        page = self._live(variant).plan.layout.nbytes
        for cycle in reply.cycles:
            due = self._at(variant, cycle, cycle.due, limit, pool)
            free = (budget.limit(due.full_occupied) - due.occupied.kv) // page
            out["slack"] = max(out["slack"], min(free, cycle.over_budget))
        return out

    def _live(self, variant: Variant) -> report.Live:
        assert variant.lookahead is not None
        return _idle(self.base, self.base.cache_of(variant), variant.lookahead)

    def _at(self, variant: Variant, cycle: Cycle, tokens: int, limit: int, pool: int) -> Footprint:
        """A cycle's bytes once its row has so many tokens, as a session on this path reports."""
        live = self._live(variant)
        per_page = live.plan.cache.page_entries
        now = dataclasses.replace(
            live,
            capacity=limit,
            lengths=(tokens,),
            bases=(cycle.complete * per_page,),
            pool_pages=pool,
            resident_pages=len(cycle.pages),
        )
        return report.calculated(now)


@functools.lru_cache(maxsize=64)
def _idle(base: Base, cache: CacheConfig, lookahead: int) -> report.Live:
    """A session without a request; arrays are abstract."""
    targets, path = base.targets, "mask"
    plan = Level2(base.cfg, cache, targets=targets, lookahead=lookahead, path=path)
    dtype = jnp.dtype({2: jnp.bfloat16, 4: jnp.float32}[base.window_bytes])
    state = jax.eval_shape(lambda: plan.start(batch=1, capacity=1, dtype=dtype))
    nothing = jnp.zeros((1, 1), jnp.int32)
    return report.Live(
        plan=plan,
        state=state,
        records=None,
        table=Table(nothing, nothing),
        pool=empty_pool(1),
        lengths=(0,),
        bases=(0,),
        capacity=1,
        pool_pages=0,
        resident_pages=0,
        hosted_pages=0,
    )


def _bytes(found: Footprint) -> dict[str, Any]:
    """The columns of a record: bytes, and the logical share."""
    return {
        "device": found.occupied.kv,
        "host": found.occupied.host,
        "full": found.full_occupied,
        "device_reserved": found.reserved.kv,
        "full_reserved": found.full_reserved,
        "kept": found.kept,
    }
