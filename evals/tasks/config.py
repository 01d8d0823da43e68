"""How hard tasks are, and what training rows are mixed from; plain fields that TOML can set."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lsa_jax.config import ConfigError
from lsa_jax.config_checks import number, refusal, table

Range = tuple[int, int]


def _check_range(where: str, value: object, least: int) -> None:
    wanted = f"two ascending ints from {least} on"
    if not isinstance(value, tuple) or len(value) != 2:
        raise refusal(where, value, wanted)
    low, high = (number(where, end, int) for end in value)
    if not least <= low <= high:
        raise refusal(where, value, wanted)


def _check_share(where: str, value: object) -> None:
    if not 0 <= number(where, value, float) <= 1:
        raise refusal(where, value, "in [0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Difficulty of a haystack and its questions. Ranges are inclusive; every example draws anew.

    Counts are cut to what fits, so one config serves all lengths.
    """

    facts: Range = (2, 16)  # what could be asked for: keys, chains, people, chat; bounds questions
    gap: Range = (0, 8)  # recall: filler tokens between key and value
    adjacent: float = 0.35  # recall: share of facts with gap 0 whatever `gap` is
    alike: float = 0.5  # names that share a syllable with another of the example
    asked: Range = (2, 4)  # keys that a question of several names
    values: Range = (2, 4)  # values of a key that has several
    hops: Range = (2, 5)  # variable tracking: copies after the first variable
    common: Range = (3, 10)  # common words
    copies: Range = (2, 8)  # n-th of so many that are alike
    passage: Range = (64, 256)  # tokens to recite
    reword: float = 0.0  # training: share of wordings some of whose words are others
    words: float = 0.2  # haystacks of random words in place of sentences
    density: float = 0.5  # facts take at most this share of a haystack with filler
    head: int = 128  # in a test, no evidence before this token
    tail: int = 192  # nor within so many before the end of the haystack

    def __post_init__(self) -> None:
        for name in ("facts", "asked", "values", "hops", "common", "copies", "passage"):
            _check_range(f"task.{name}", getattr(self, name), 1)
        _check_range("task.gap", self.gap, 0)
        for name in ("adjacent", "alike", "reword", "words", "density"):
            _check_share(f"task.{name}", getattr(self, name))
        for name in ("head", "tail"):
            if number(f"task.{name}", getattr(self, name), int) < 0:
                raise refusal(f"task.{name}", getattr(self, name), ">= 0")
        for name, most in (("copies", 8), ("common", 20), ("hops", 9)):
            if getattr(self, name)[1] > most:
                raise refusal(f"task.{name}", getattr(self, name), f"at most {most}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """Training rows: families with their weights (of any sum), questions per row, echoes.

    Questions take at most `question_share` of a row. `echoes` is how many stretches of filler are
    repeated per 512 tokens of haystack, `echo_tokens` how long each is.
    """

    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"recall": 1.0})
    questions: Range = (4, 16)
    question_share: float = 0.4
    echoes: Range = (0, 0)
    echo_tokens: Range = (8, 24)
    task: TaskConfig = dataclasses.field(default_factory=TaskConfig)

    def __post_init__(self) -> None:
        _check_range("mixture.questions", self.questions, 1)
        _check_range("mixture.echoes", self.echoes, 0)
        _check_range("mixture.echo_tokens", self.echo_tokens, 3)
        _check_share("mixture.question_share", self.question_share)
        for name, weight in self.weights.items():
            if number(f"mixture.weights.{name}", weight, float) < 0:
                raise refusal(f"mixture.weights.{name}", weight, ">= 0")
        if not sum(self.weights.values()) > 0:
            raise refusal("mixture.weights", dict(self.weights), "a table with a positive sum")


def _tuples(raw: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(v) if isinstance(v, list) else v for key, v in raw.items()}


def _check_fields(where: str, raw: Mapping[str, Any], kind: type) -> None:
    known = [field.name for field in dataclasses.fields(kind)]
    for key in raw:
        if key not in known:
            raise ConfigError(f"{where}.{key} is unknown; known are {', '.join(known)}")


def read_mixture(raw: Mapping[str, Any], where: str = "mixture") -> MixtureConfig:
    """A mixture from a TOML table; lists are ranges, `task` and `weights` tables in it.

    Raises ConfigError for unknown fields and bad values.
    """
    _check_fields(where, raw, MixtureConfig)
    fields = _tuples(raw)
    if "weights" in fields:
        fields["weights"] = table(f"{where}.weights", fields["weights"])
    if "task" in fields:
        task = table(f"{where}.task", fields["task"])
        _check_fields(f"{where}.task", task, TaskConfig)
        fields["task"] = TaskConfig(**_tuples(task))
    return MixtureConfig(**fields)
