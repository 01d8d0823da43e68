"""A haystack before it has a length: pieces in the order of the text, and questions on them."""

import dataclasses
import random

import numpy as np

from evals.tasks import phrases
from evals.tasks.config import Range, TaskConfig
from evals.tasks.filler import Filler, Kind, word_ids
from evals.tasks.question import ANSWER, FIRST, Rule, Span
from evals.tasks.strings import Strings
from lsa_jax.config import ConfigError

Tokens = list[int]


@dataclasses.dataclass(kw_only=True)
class Ask:
    """A question; `pieces` are the indices of those it follows from (see `Question`)."""

    phrase: phrases.Phrase
    held_out: bool
    prompt: Tokens
    answer: Tokens
    kinds: list[int]
    rule: Rule
    accepted: tuple[tuple[int, ...], ...]
    pieces: tuple[int, ...]

    @property
    def size(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.prompt) + len(self.answer)


@dataclasses.dataclass(kw_only=True)
class Plan:
    """Pieces, questions, and the filler between pieces.

    A packed haystack is made of pieces; what filler it needs may stand anywhere, since its builder
    has asked for no piece near an end. In the others every piece is evidence for something.
    """

    pieces: list[Tokens]
    asks: list[Ask]
    filler: Kind = "text"
    packed: bool = False


class Answer:
    """An answer as it is written: tokens, and which of them have to be found."""

    def __init__(self) -> None:
        self.ids: Tokens = []
        self.kinds: list[int] = []

    def follow(self, ids: Tokens) -> "Answer":
        """Adds tokens that what stands in the question or before them decides."""
        self.ids += ids
        self.kinds += [ANSWER] * len(ids)
        return self

    def find(self, ids: Tokens) -> "Answer":
        """Adds a string of which the first token has to be found."""
        self.ids += ids
        self.kinds += [FIRST] + [ANSWER] * (len(ids) - 1)
        return self


@dataclasses.dataclass(frozen=True, kw_only=True)
class Draw:
    """What a builder draws with: `tokens` is the haystack's room with all of its questions."""

    rnd: random.Random
    strings: Strings
    filler: Filler
    cfg: TaskConfig
    tokens: int
    questions: int
    test: bool

    def pick(self, texts: tuple[str, ...]) -> phrases.Phrase:
        """A phrasing of this split; in training perhaps with other words (`TaskConfig.reword`)."""
        return self.reworded(self.pick_as_is(texts))

    def pick_as_is(self, texts: tuple[str, ...]) -> phrases.Phrase:
        """A phrasing of this split whose own words say what is asked."""
        return phrases.pick(self.rnd, texts, test=self.test)

    def reworded(self, phrase: phrases.Phrase) -> phrases.Phrase:
        """The phrasing, in a share of training's with other words."""
        if self.test or not self.cfg.reword or self.rnd.random() >= self.cfg.reword:
            return phrase
        return phrases.reworded(self.rnd, phrase, word_ids())

    def between(self, bounds: Range) -> int:
        """A whole number of the range, its ends included."""
        return bounds[0] + int(self.rnd.random() * (bounds[1] - bounds[0] + 1))

    def one_of[T](self, items: tuple[T, ...] | list[T]) -> T:
        """One of the items."""
        return items[int(self.rnd.random() * len(items))]

    def kind(self) -> Kind:
        """Sentences, or for some haystacks random words."""
        return "words" if self.rnd.random() < self.cfg.words else "text"

    def facts(self) -> int:
        """How many facts: of the configured number, enough for all questions if it can be."""
        return max(self.between(self.cfg.facts), min(self.questions, self.cfg.facts[1]))

    def fitting(self, wanted: int, tokens_each: int) -> int:
        """How many of these pieces fit beside filler: `wanted`, or fewer, at least one."""
        margins = self.cfg.head + self.cfg.tail if self.test else 0
        room = min(self.cfg.density * self.tokens, self.tokens - margins)
        return max(1, min(wanted, int(room) // tokens_each))

    def shuffled[T](self, items: list[T]) -> list[T]:
        """The items in random order."""
        return self.rnd.sample(items, len(items))


def ask(
    question: phrases.Phrase,
    prompt: Tokens,
    answer: Answer,
    *,
    rule: Rule,
    accepted: list[Tokens],
    pieces: tuple[int, ...] = (),
    held_out: bool = False,
) -> Ask:
    """A question whose answer ends with EOS; `held_out` where the wording of its facts is."""
    answer.follow([phrases.EOS_ID])
    return Ask(
        phrase=question,
        held_out=held_out or question.held_out,
        prompt=prompt,
        answer=answer.ids,
        kinds=answer.kinds,
        rule=rule,
        accepted=tuple(tuple(ids) for ids in accepted),
        pieces=pieces,
    )


class TooShort(ConfigError):
    """A haystack that cannot hold what its family needs; says what it holds and what is wanted."""


def place(draw: Draw, plan: Plan, length: int) -> tuple[np.ndarray, np.ndarray, list[Span]]:
    """The haystack [length] int32, which tokens are filler [length] bool, and spans of the pieces.

    Pieces stand between sentences. Raises TooShort.
    """
    sizes = [len(piece) for piece in plan.pieces]
    free = length - 1 - sum(sizes)
    low, high = 0, free
    if draw.test and not plan.packed:
        low, high = draw.cfg.head, free - draw.cfg.tail
    if free < 0 or high < low:
        need = length + (low - high if free >= 0 else -free)
        raise TooShort(f"tokens must be at least {need - length} more for these facts")
    text, starts = draw.filler.take(draw.rnd, plan.filler, free)
    first, last = np.searchsorted(starts, low), np.searchsorted(starts, high, side="right")
    places = starts[first:last].tolist() or [low]
    at = sorted(draw.one_of(places) for _ in sizes)
    ids = np.empty(length, np.int32)
    is_filler = np.ones(length, bool)
    ids[0], is_filler[0] = phrases.BOS_ID, False
    spans: list[Span] = []
    done, cursor = 0, 1
    for piece, size, until in zip(plan.pieces, sizes, at, strict=True):
        if until > done:
            ids[cursor : cursor + until - done] = text[done:until]
            cursor, done = cursor + until - done, until
        ids[cursor : cursor + size] = piece
        is_filler[cursor : cursor + size] = False
        spans.append((cursor, cursor + size))
        cursor += size
    ids[cursor:] = text[done:]
    return ids, is_filler, spans
