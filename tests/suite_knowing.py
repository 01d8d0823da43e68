"""The suite without a model: a machine that knows the answers, and planted records."""

import functools
import itertools

from evals.suite import tables
from evals.suite.cases import MiniGrid
from evals.suite.cells import Block, all_variants, averaged
from evals.suite.measure import Measure
from evals.suite.records import WHOLE, Log
from evals.suite.replies import Cycle, Reply
from evals.suite.running import run
from evals.suite.summary import FULL, summarise
from evals.suite.variants import Base, Variant
from lsa_jax.config import CacheConfig
from lsa_jax.config_io import load_config

MINI = load_config("mini_model")
BASE = Base(
    cfg=MINI,
    cache=CacheConfig(kv_format="fp8", page_entries=4),
    targets=(3,),
    recency=16,
    sink=0,
    window_bytes=2,
)
LSA = Variant(arm="lsa", budget="0.5", lookahead=16, page_entries=4, policy="budget")
RECENCY = Variant(arm="recency", budget="0.5", lookahead=16, page_entries=4)
VARIANTS = (FULL, LSA, RECENCY)


@functools.cache
def listed(grid):
    """Drawing takes longer than all else here."""
    return list(MiniGrid.cases(grid))


class Drawn(MiniGrid):
    def cases(self):
        yield from listed(self)


GRID = Drawn(tasks=("niah_single_2", "vt"), lengths=(640,), seeds=2, questions=5, each=3)
BLOCK = Block(GRID, VARIANTS)


class Knowing:
    """Answers rightly in every arm but recency, which is right about even haystacks only."""

    def __init__(self):
        self.prefills, self.asked = [], []

    def answer(self, cases, variants, log, together=1):
        assert len(cases) <= together
        self.prefills += [case.cell for case in cases]
        for variant, case in itertools.product(variants, cases):
            self.asked.append((case.cell, variant))
            wrong = variant.arm == "recency" and case.cell.haystack % 2
            said = [[1] if wrong else q.answer.tolist() for q in case.questions]
            replies = [Reply(ids, _cycles(case, variant), 0) for ids in said]
            log.append(Measure(BASE).records(case, variant, replies))


def _cycles(case, variant):
    if variant == FULL:
        return []
    end = case.most_tokens
    complete = len(case.haystack) // 16
    return [Cycle(complete, (0, 1), above=0, wanted=2, over_budget=0, due=end, end=end)]


class Interrupted(Knowing):
    def __init__(self, after):
        super().__init__()
        self.after = after

    def answer(self, cases, variants, log, together=1):
        if len(self.prefills) == self.after:
            super().answer(cases, variants[:2], log, together)
            raise KeyboardInterrupt
        super().answer(cases, variants, log, together)


def results(directory, machine, *blocks, part=WHOLE, together=1):
    """The log after a run of these blocks (BLOCK, where there are none), and both tables."""
    log, blocks = Log(directory, {"checkpoint": "one"}, part), blocks or (BLOCK,)
    keys = run(blocks, log, lambda: machine, lambda line: None, part, together)
    lines = summarise(log.of(keys), all_variants(blocks), averaged(blocks))
    text = tables.markdown(lines, heading="# Results", source="Planted.")
    return log, text, tables.to_text(tables.as_json(lines))


def planted(rng, variant, task="vt", haystacks=12):
    """Records with scores at random, with different numbers of questions a haystack."""
    sizes = {"device": 10, "full": 100, "host": 90, "device_reserved": 12, "full_reserved": 110}
    return [
        {
            "task": task,
            "length": 640,
            "seed": haystack % 3,
            "haystack": haystack // 3,
            "question": question,
            "variant": variant.as_dict(),
            "score": float(rng.random() < 0.7),
            "kept": 0.1,
            "evidence": [4, 1, 2],
            **sizes,
        }
        for haystack in range(haystacks)
        for question in range(1 + haystack % 4)
    ]
