"""Prompts to record, a JSON object to a line. Each has exactly one of the fields

    prompt     chat messages as JSON text, as the authors' files have them (LSA spec 4.3)
    messages   chat messages
    text       plain text to go on from; BOS is put before it unless it begins with one
    ids        token ids, used as they are

and may have `answer`, text or token ids, which a replay feeds instead of what the model would say.
Other fields, such as the authors' `golden_chunks`, are not looked at. Blank lines do not count.
A file may be larger than memory: it is checked once, and its lines are read when they are needed.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lsa_jax.config import ConfigError
from lsa_jax.text.message_types import check_text, fail, shown
from lsa_jax.text.messages import MessageError, encode_messages
from lsa_jax.text.special import BOS
from lsa_jax.text.tokenizer import Tokenizer

SOURCES = ("prompt", "messages", "text", "ids")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """How lines are read: whether messages ask for reasoning, which ids there are, and whether
    every line must have an answer (which is ignored otherwise)."""

    vocab_size: int
    thinking: bool = False
    replay: bool = False


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and the answer to replay: text that spells its special tokens, or ids."""

    content: str | tuple[int, ...]
    answer: str | tuple[int, ...] | None

    @property
    def needs_tokenizer(self) -> bool:
        """Whether any of it is text."""
        return isinstance(self.content, str) or isinstance(self.answer, str)

    @property
    def digest(self) -> str:
        """Digest of what is fed to the model, before it is tokenised."""
        return hashlib.sha256(json.dumps([self.content, self.answer]).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Line:
    """Where a prompt is: its line, from 1, and the offset of that in bytes."""

    number: int
    offset: int
    digest: str
    needs_tokenizer: bool


def token_ids(content: str | Sequence[int], tokenizer: Tokenizer | None) -> list[int]:
    """Ids of a prompt or an answer; ids need no tokenizer."""
    if not isinstance(content, str):
        return list(content)
    assert tokenizer is not None
    return tokenizer.encode(content)


def scan(path: Path, reading: Reading) -> list[Line]:
    """Every prompt of a file, checked.

    Raises ConfigError naming file, line, field, what it is and must be; OSError.
    """
    lines: list[Line] = []
    with path.open("rb") as file:
        offset = 0
        for number, raw in enumerate(file, 1):
            if raw.strip():
                prompt = _read(path, number, raw, reading)
                lines.append(Line(number, offset, prompt.digest, prompt.needs_tokenizer))
            offset += len(raw)
    if not lines:
        raise ConfigError(f"{path} must have at least one prompt, got none")
    return lines


def load(path: Path, line: Line, reading: Reading) -> Prompt:
    """A prompt that `scan` found, with the same `reading`; ConfigError where the file changed."""
    with path.open("rb") as file:
        file.seek(line.offset)
        prompt = _read(path, line.number, file.readline(), reading)
    if prompt.digest != line.digest:
        raise ConfigError(f"{path}:{line.number} must not change while it is read, but did")
    return prompt


def _read(path: Path, number: int, raw: bytes, reading: Reading) -> Prompt:
    where = f"{path}:{number}"
    try:
        line = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as why:  # bad UTF-8 too
        raise ConfigError(f"{where} must be a JSON object: {why}") from None
    if not isinstance(line, dict):
        raise ConfigError(f"{where} must be a JSON object, got {shown(line)}")
    given = [name for name in SOURCES if name in line]
    if len(given) != 1:
        wanted = "exactly one of the fields " + ", ".join(SOURCES)
        raise ConfigError(f"{where} must have {wanted}, got {', '.join(line) or 'none'}")
    try:
        content = _content(given[0], line[given[0]], reading)
        answer = _answer(line.get("answer"), reading) if reading.replay else None
    except MessageError as why:
        raise ConfigError(f"{where}: {why}") from None
    return Prompt(content, answer)


def _content(source: str, value: Any, reading: Reading) -> str | tuple[int, ...]:
    if source == "ids":
        return _ids("ids", value, reading.vocab_size)
    if source == "text":
        text = check_text("text", value)
        if not text:
            raise fail("text", text, "not empty")
        return text if text.startswith(BOS) else BOS + text
    if source == "prompt":
        value = _parsed(value)
    if not isinstance(value, list) or not value:
        raise fail(source, value, "a list of chat messages, not empty")
    last = value[-1].get("role") if isinstance(value[-1], dict) else None
    if last == "assistant":
        raise fail(f"{source}[{len(value) - 1}].role", last, "one that is to be answered")
    try:
        return encode_messages(value, thinking=reading.thinking)
    except MessageError as why:
        raise MessageError(f"{source}: {why}") from None


def _parsed(value: Any) -> Any:
    """What the JSON text of a field `prompt` says."""
    try:
        return json.loads(check_text("prompt", value))
    except (ValueError, RecursionError):
        raise fail("prompt", value, "JSON text of a list of chat messages") from None


def _answer(value: Any, reading: Reading) -> str | tuple[int, ...]:
    if isinstance(value, list):
        return _ids("answer", value, reading.vocab_size)
    if not isinstance(value, str) or not value:
        raise fail("answer", value, "text or token ids to replay, not empty")
    return check_text("answer", value)


def _ids(field: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise fail(field, value, "a list of token ids, not empty")
    for i, item in enumerate(value):
        if type(item) is not int or not 0 <= item < vocab_size:
            raise fail(f"{field}[{i}]", item, f"an id in [0, vocab_size={vocab_size})")
    return tuple(value)
