"""Official files of other benchmarks as cases: read, put into the message format, scored.

Scores are the benchmarks' mechanical rules. LongMemEval's judge is a language model: a containment
stands in for it, and its tasks say so in their names. Where evidence lies is not in the files.
"""

import dataclasses
import difflib
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.suite.cases import MORE_TOKENS, Case, Cell
from evals.suite.prefix import QUESTION_TOKENS
from evals.tasks.question import Span
from lsa_jax.config import ConfigError
from lsa_jax.text.messages import encode_messages
from lsa_jax.text.tokenizer import Tokenizer

_RULER_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
_CHOICE = re.compile(r"The correct answer is \(?([A-D])\)?")
_UNKNOWN = ("not know", "n't know", "not mention", "no information", "not enough information")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """One question of a file: messages, or a text that the model goes on with."""

    task: str
    name: str
    messages: Sequence[dict[str, Any]]
    new_tokens: int
    score: Callable[[str], float]
    answer_prefix: str = ""


@dataclasses.dataclass(frozen=True)
class TextQuestion:
    """What a case asks: the last tokens of a prompt."""

    template: str
    prompt: np.ndarray
    held_out: bool = False
    evidence: tuple[Span, ...] = ()


def share_contained(wanted: Sequence[str], said: str) -> float:
    """The share of the strings that were said, whatever their case (RULER)."""
    return sum(text.lower() in said.lower() for text in wanted) / len(wanted)


def any_contained(wanted: Sequence[str], said: str) -> float:
    """Whether one of the strings was said, whatever its case (RULER's QA)."""
    return float(any(text.lower() in said.lower() for text in wanted))


def choice(wanted: str, said: str) -> float:
    """Whether the letter in "The correct answer is (X)" is the right one (LongBench-v2)."""
    found = _CHOICE.search(said.replace("*", ""))
    return float(found is not None and found[1] == wanted)


def remembered(answer: str, abstains: bool, said: str) -> float:
    """In the place of LongMemEval's judge: the answer is contained, or not to know is admitted."""
    if abstains:
        return any_contained(_UNKNOWN, said)
    plain = " ".join(re.findall(r"\w+", said.lower()))
    return float(" ".join(re.findall(r"\w+", answer.lower())) in plain)


def likeness(prefix: str, answer: str, said: str) -> float:
    """The ratio of matching characters after the prefix that must be said first (MRCR)."""
    if not said.startswith(prefix):
        return 0.0
    texts = (said.removeprefix(prefix), answer.removeprefix(prefix))
    return difflib.SequenceMatcher(None, *texts).ratio()


def read_ruler(path: Path) -> Iterator[Item]:
    """RULER's .jsonl of one task, which the file's or the folder's name says."""
    name = path.parent.name if path.stem in ("validation", "test") else path.stem
    kind = name.split("_")[0]
    if kind not in _RULER_TOKENS:
        wanted = f"of a RULER task, which begins with {', '.join(_RULER_TOKENS)}"
        raise ConfigError(f"--ruler must have the name {wanted}, got {path}")
    rule = any_contained if kind == "qa" else share_contained
    for i, row in enumerate(_rows(path)):
        yield Item(
            task=f"ruler/{name}",
            name=str(row.get("index", i)),
            messages=[_user(row["input"])],
            new_tokens=_RULER_TOKENS[kind],
            score=functools.partial(rule, row["outputs"]),
            answer_prefix=row.get("answer_prefix", ""),
        )


def read_longbench(path: Path) -> Iterator[Item]:
    """LongBench-v2's data.json: multiple choice."""
    for row in _rows(path):
        options = "\n".join(f"({letter}) {row[f'choice_{letter}']}" for letter in "ABCD")
        question = f"{row['context']}\n\nQuestion: {row['question']}\n{options}\n\n"
        question += 'Choose one and say: "The correct answer is (letter)".'
        yield Item(
            task=f"longbench_v2/{row['length']}",
            name=row["_id"],
            messages=[_user(question)],
            new_tokens=128,
            score=functools.partial(choice, row["answer"]),
        )


def read_longmemeval(path: Path) -> Iterator[Item]:
    """LongMemEval's .json: sessions of a chat, then a question with its date."""
    for row in _rows(path):
        parts = []
        sessions = zip(row["haystack_dates"], row["haystack_sessions"], strict=True)
        for date, turns in sessions:
            parts.append(f"Session of {date}")
            parts += [f"{turn['role']}: {turn['content']}" for turn in turns]
        parts.append(f"Today is {row['question_date']}. {row['question']}")
        abstains = row["question_id"].endswith("_abs")
        yield Item(
            task=f"longmemeval/{row['question_type']} (stand-in)",
            name=row["question_id"],
            messages=[_user("\n".join(parts))],
            new_tokens=128,
            score=functools.partial(remembered, str(row["answer"]), abstains),
        )


def read_mrcr(path: Path) -> Iterator[Item]:
    """MRCR's rows (.jsonl; .parquet with pyarrow): a conversation, the n-th repetition of it."""
    for i, row in enumerate(_rows(path)):
        prefix, answer = row["random_string_to_prepend"], row["answer"]
        yield Item(
            task=f"mrcr/{row['n_needles']} needles",
            name=str(i),
            messages=json.loads(row["prompt"]),
            new_tokens=1024,
            score=functools.partial(likeness, prefix, answer),
        )


READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "ruler": read_ruler,
    "longbench": read_longbench,
    "longmemeval": read_longmemeval,
    "mrcr": read_mrcr,
}


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _rows(path: Path) -> list[dict[str, Any]]:
    """A file's objects, by its ending."""
    if path.suffix == ".parquet":
        try:
            from pyarrow import parquet  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(f"{path} needs pyarrow, got none: pip install pyarrow") from None
        return parquet.read_table(path).to_pylist()
    text = path.read_text("utf-8")
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    try:
        found = [json.loads(part) for part in parts if part]
    except json.JSONDecodeError as why:
        raise ConfigError(f"{path} must be JSON: {why}") from None
    return found if path.suffix == ".jsonl" else found[0]


def items(reader: str, path: Path) -> list[Item]:
    """All questions of a file; ConfigError where it lacks a field of its benchmark."""
    try:
        return list(READERS[reader](path))
    except (KeyError, TypeError, AttributeError) as why:
        raise ConfigError(f"--{reader} {path} must have the benchmark's fields: {why!r}") from None


def to_case(item: Item, index: int, tokenizer: Tokenizer) -> Case[TextQuestion]:
    """A case of one question; its last tokens are the question, all before them the haystack."""
    text = encode_messages(item.messages) + item.answer_prefix
    ids = tokenizer.encode(text)
    at = max(1, len(ids) - QUESTION_TOKENS)
    room = len(ids) + item.new_tokens
    length = max(1024, 1 << (room - MORE_TOKENS - 1).bit_length())
    score = item.score

    def worth(said: list[int]) -> float:
        return score(tokenizer.decode(said, skip_special=True))

    return Case(
        cell=Cell(task=item.task, length=length, seed=0, haystack=index),
        haystack=tuple(ids[:at]),
        questions=(TextQuestion(item.name, np.array(ids[at:], np.int32)),),
        new_tokens=(item.new_tokens,),
        scores=(worth,),
    )


@dataclasses.dataclass(frozen=True)
class OfficialGrid:
    """Cases of files, those that the model has room for, by length."""

    made: tuple[Case[TextQuestion], ...]
    left_out: int = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rooms of the cases, ascending."""
        return tuple(sorted({case.cell.length for case in self.made}))

    @property
    def work(self) -> int:
        """Tokens."""
        return sum(case.cell.length for case in self.made)

    def cases(self) -> Iterator[Case[TextQuestion]]:
        """All of them, the short ones first."""
        yield from sorted(self.made, key=lambda case: case.cell.length)

    def tasks_at(self, length: int) -> tuple[str, ...]:
        """Tasks of the cases with this room, each once."""
        own = (case.cell.task for case in self.made if case.cell.length == length)
        return tuple(dict.fromkeys(own))


def read_grid(
    files: Mapping[str, Sequence[Path]], tokenizer: Tokenizer, most: int | None
) -> OfficialGrid:
    """The cases of all files but those that take more than `most` tokens, which are counted.

    Raises ConfigError where there is none.
    """
    found = [item for name, paths in files.items() for path in paths for item in items(name, path)]
    made = [to_case(item, i, tokenizer) for i, item in enumerate(found)]
    kept = tuple(case for case in made if most is None or case.most_tokens <= most)
    if not kept:
        raise ConfigError(f"--suite official needs files with items that fit, got {len(made)}")
    return OfficialGrid(kept, len(made) - len(kept))
