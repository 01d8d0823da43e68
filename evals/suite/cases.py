"""What is asked: haystacks with their questions, drawn by task, length and seed."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from evals.mini.vocabulary import SIZE
from evals.tasks.examples import example
from evals.tasks.families import FAMILIES, check_families
from evals.tasks.phrases import EOS_ID
from evals.tasks.question import Question, Span, score
from lsa_jax.config import ModelConfig
from lsa_jax.config_checks import refusal

# Families that look strings up: those whose average the claims are made on.
RETRIEVAL = (
    *("niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt"),
)
# All that are scored by default: not what only training rows are made of.
TASKS = (
    *RETRIEVAL,
    *("cwe", "fwe", "qa_1", "qa_2", "chat_fact", "chat_update", "chat_order", "chat_abstain"),
    *("multiple_choice", "mrcr", "context_free"),
)
MORE_TOKENS = 8  # that an answer may have on top of the right one's


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One haystack's place: records and random draws depend on it alone."""

    task: str
    length: int
    seed: int
    haystack: int


class Asks(Protocol):
    """What is asked of a haystack: tokens, and where in the haystack the evidence lies."""

    @property
    def template(self) -> str:
        """The phrasing, or the item's name."""
        ...

    @property
    def held_out(self) -> bool:
        """Whether training never saw the phrasing."""
        ...

    @property
    def prompt(self) -> np.ndarray:
        """Tokens [P] between the haystack and the answer."""
        ...

    @property
    def evidence(self) -> tuple[Span, ...]:
        """Spans of the haystack; none where nobody knows."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Case[Q: Asks]:
    """A haystack and its questions, how long each answer may be, and what an answer is worth.

    Haystack, question and answer have room for `cell.length` tokens and MORE_TOKENS.
    """

    cell: Cell
    haystack: tuple[int, ...]
    questions: tuple[Q, ...]
    new_tokens: tuple[int, ...]
    scores: tuple[Callable[[list[int]], float], ...]

    @property
    def most_tokens(self) -> int:
        """Tokens that the longest row may reach."""
        asked = zip(self.questions, self.new_tokens, strict=True)
        return len(self.haystack) + max(len(q.prompt) + new for q, new in asked)


def check_tasks(cfg: ModelConfig, tasks: Sequence[str], lengths: Sequence[int]) -> None:
    """Raises ConfigError for unknown tasks, and for a model that cannot be asked them."""
    check_families("tasks", tasks)
    if "plain" in tasks:  # text without questions
        raise refusal("tasks", "plain", f"among {', '.join(n for n in FAMILIES if n != 'plain')}")
    check_lengths(cfg, lengths)
    if cfg.vocab_size < SIZE:
        raise refusal("vocab_size", cfg.vocab_size, f"at least the {SIZE} ids of the tasks")


def check_lengths(cfg: ModelConfig, lengths: Sequence[int]) -> None:
    """Raises ConfigError where a model has no room for a length, or ends its text otherwise."""
    if cfg.eos_token_id != EOS_ID:
        raise refusal("eos_token_id", cfg.eos_token_id, f"{EOS_ID}, where answers end")
    most = capacity_for(max(lengths))
    if most > cfg.max_position_embeddings:
        wanted = f"at most {cfg.max_position_embeddings} with {most - max(lengths)} for answers"
        raise refusal("lengths", max(lengths), wanted)


def capacity_for(length: int) -> int:
    """Tokens to make room for, so that every case of a length runs the same programs."""
    return 16 * math.ceil((length + MORE_TOKENS) / 16)


def draw(cell: Cell, questions: int) -> Case[Question]:
    """The case of a cell with up to `questions` questions, all of the test split.

    Raises ConfigError where the length is too short for the task.
    """
    rng = np.random.default_rng(
        [zlib.crc32(cell.task.encode()), cell.length, cell.seed, cell.haystack]
    )
    made = example(cell.task, rng, cell.length, questions, "test")
    return Case(
        cell=cell,
        haystack=tuple(made.haystack.tolist()),
        questions=made.questions,
        new_tokens=tuple(len(question.answer) + MORE_TOKENS for question in made.questions),
        scores=tuple(functools.partial(score, question) for question in made.questions),
    )


def cases(task: str, length: int, seed: int, *, total: int, each: int) -> Iterator[Case[Question]]:
    """Haystacks of up to `each` questions, until there are `total` of these or some more.

    What a haystack asks does not depend on `total`: a longer run begins with the shorter one's.
    """
    asked = haystack = 0
    while asked < total:
        case = draw(Cell(task=task, length=length, seed=seed, haystack=haystack), each)
        yield case
        asked, haystack = asked + len(case.questions), haystack + 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniGrid:
    """Tasks at lengths with seeds: at least `questions` of each, up to `each` of a haystack."""

    tasks: Sequence[str]
    lengths: Sequence[int]
    seeds: int
    questions: int
    each: int

    @property
    def work(self) -> int:
        """Questions times tokens."""
        return len(self.tasks) * self.seeds * self.questions * sum(self.lengths)

    def cases(self) -> Iterator[Case[Question]]:
        """Lengths in order, for each of which programs are compiled anew."""
        for length in self.lengths:
            for seed in range(self.seeds):
                for task in self.tasks:
                    yield from cases(task, length, seed, total=self.questions, each=self.each)

    def tasks_at(self, length: int) -> Sequence[str]:
        """The tasks, which are the same at every length."""
        return self.tasks
