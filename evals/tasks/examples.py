"""An example of a family: a haystack and questions that do not see each other."""

import random

import numpy as np

from evals.tasks.config import TaskConfig
from evals.tasks.families import FAMILIES, check_families
from evals.tasks.filler import Filler
from evals.tasks.plan import Ask, Draw, Plan, place
from evals.tasks.question import Example, Question, Span, Split
from evals.tasks.strings import Strings


def draw_plan(
    family: str,
    rnd: random.Random,
    filler: Filler,
    cfg: TaskConfig,
    *,
    tokens: int,
    questions: int,
    test: bool,
) -> tuple[Draw, Plan]:
    """What a family wants in `tokens` tokens, and what it was drawn with."""
    draw = Draw(
        rnd=rnd,
        strings=Strings(rnd, test=test, alike=cfg.alike),
        filler=filler,
        cfg=cfg,
        tokens=tokens,
        questions=questions,
        test=test,
    )
    return draw, FAMILIES[family](draw)


def example(
    family: str,
    rng: np.random.Generator,
    tokens: int,
    questions: int = 8,
    split: Split = "test",
    cfg: TaskConfig | None = None,
) -> Example:
    """A haystack of which every question, with its prompt and answer, fits into `tokens` tokens.

    At most `questions` of them: fewer where the haystack holds fewer facts, and one where all of it
    is counted. Raises ConfigError for an unknown family, TooShort for too few tokens.
    """
    check_families("family", [family])
    cfg = cfg or TaskConfig()
    rnd = random.Random(int(rng.integers(1 << 62)))
    filler = Filler(rng, tokens + tokens // 2 + 1024)
    room = {"tokens": tokens, "questions": questions, "test": split == "test"}
    draw, plan = draw_plan(family, rnd, filler, cfg, **room)
    longest = max((ask.size for ask in plan.asks), default=0)
    haystack, _, spans = place(draw, plan, tokens - longest)
    asked = tuple(_question(family, ask, spans) for ask in plan.asks)
    return Example(haystack=haystack, questions=asked)


def _question(family: str, ask: Ask, spans: list[Span]) -> Question:
    return Question(
        family=family,
        template=ask.phrase.name,
        held_out=ask.held_out,
        prompt=np.array(ask.prompt, np.int32),
        answer=np.array(ask.answer, np.int32),
        kinds=np.array(ask.kinds, np.int8),
        rule=ask.rule,
        accepted=ask.accepted,
        evidence=tuple(spans[i] for i in ask.pieces),
    )
