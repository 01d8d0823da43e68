"""What a task is made of: questions on a haystack, and how an answer to one is scored."""

import dataclasses
from typing import Literal

import numpy as np

from lsa_jax.text.special import END_THINK, EOS, SPECIAL_IDS

Split = Literal["train", "test"]
Rule = Literal["exact", "all", "any"]
Span = tuple[int, int]

# Kinds of targets, as `train.pretraining.lm_step` weighs them; a negative one does not count.
SKIPPED, REST, ANSWER, FIRST = -1, 0, 1, 2

_EOS = list(SPECIAL_IDS).index(EOS)
_END_THINK = list(SPECIAL_IDS).index(END_THINK)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Question:
    """One question with its answer.

    `prompt` [P] int32 is everything between the haystack and the answer, turn marks included;
    `answer` [A] int32 ends with EOS, and `kinds` [A] int8 says which of its tokens is the first of
    something that must be found (FIRST). `template` names the phrasing; `held_out` says whether
    training never uses it. `rule` and `accepted` are what `score` needs: token strings without EOS.
    `evidence` holds [start, end) of the sentences in the haystack that the answer follows from, in
    the order of reading; empty where it follows from all of the haystack, or from none of it.
    """

    family: str
    template: str
    held_out: bool
    prompt: np.ndarray
    answer: np.ndarray
    kinds: np.ndarray
    rule: Rule
    accepted: tuple[tuple[int, ...], ...]
    evidence: tuple[Span, ...]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Example:
    """A haystack [H] int32, which begins with BOS, and questions that do not see each other."""

    haystack: np.ndarray
    questions: tuple[Question, ...]


def score(question: Question, produced: list[int] | np.ndarray) -> float:
    """How right a continuation of the prompt is, in [0, 1]; what follows its first EOS is ignored.

    "exact": the whole is an accepted string. "all": the share of accepted strings it contains.
    "any": whether it contains one. Where the answer thinks first, only what follows counts.
    """
    text = [int(id_) for id_ in produced]
    text = text[: text.index(_EOS)] if _EOS in text else text
    if _END_THINK in question.answer:
        if _END_THINK not in text:
            return 0.0
        text = text[len(text) - text[::-1].index(_END_THINK) :]
    if question.rule == "exact":
        return float(tuple(text) in question.accepted)
    found = [_contains(text, wanted) for wanted in question.accepted]
    return float(any(found)) if question.rule == "any" else sum(found) / len(found)


def _contains(text: list[int], wanted: tuple[int, ...]) -> bool:
    size = len(wanted)
    return any(tuple(text[i : i + size]) == wanted for i in range(len(text) - size + 1))
