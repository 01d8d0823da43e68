"""Answers on disk, one JSON line each, appended as they come: a run that was cut off goes on.

A group is what one variant answered about one haystack. Its lines say how many they are, so that
a group that is not whole is told apart, dropped, and answered anew. Parts of a run that go on at
the same time have files of their own, and everybody reads all.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from evals.suite.cases import Cell
from evals.suite.variants import Variant
from lsa_jax.config import ConfigError

NAME, PARTS = "answers.jsonl", "answers-*-of-*.jsonl"
SETTINGS = "settings.json"

Record = dict[str, Any]
Key = tuple[Any, ...]


def key_of(cell: Cell, variant: Variant) -> Key:
    """What tells groups apart."""
    return (*dataclasses.astuple(cell), *dataclasses.astuple(variant))


def _key(record: Record) -> Key:
    cell = Cell(**{f.name: record[f.name] for f in dataclasses.fields(Cell)})
    return key_of(cell, Variant(**record["variant"]))


def read(path: Path) -> list[Record]:
    """The records of whole groups. What follows the last line end was being written: it is left
    out. Raises ConfigError for any other line that is no record."""
    if not path.exists():
        return []
    groups: dict[Key, list[Record]] = collections.defaultdict(list)
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            groups[_key(record)].append(record)
        except (ValueError, KeyError, TypeError) as why:
            raise ConfigError(f"{path} line {number} must be a record of answers: {why}") from None
    return [r for group in groups.values() if len(group) == group[0]["group"] for r in group]


class Part(NamedTuple):
    """Number `index` of `count` parts of a run, from 1 on."""

    index: int
    count: int

    def has(self, number: int) -> bool:
        """Whether haystack `number`, from 0 on, is this part's."""
        return number % self.count == self.index - 1


WHOLE = Part(1, 1)


class Log:
    """The records of a run's directory, which is made where it is not there yet; new ones are
    added to the file of a part.

    `settings` are what all records depend on; a directory of other settings is refused with
    ConfigError, which names the first that differs. `made` says what makes new records, for people:
    hardware, version, date.
    """

    def __init__(
        self, directory: Path, settings: dict[str, Any], part: Part = WHOLE, *, made: str = ""
    ):
        self.made = made
        name = NAME if part == WHOLE else f"answers-{part.index}-of-{part.count}.jsonl"
        self.path = directory / name
        directory.mkdir(parents=True, exist_ok=True)
        _hold_to(directory / SETTINGS, settings)
        own = read(self.path)
        _replace(self.path, (json.dumps(record) for record in own))
        self.records, self._done = own, {_key(record) for record in own}
        for path in sorted({directory / NAME, *directory.glob(PARTS)} - {self.path}):
            others = [record for record in read(path) if _key(record) not in self._done]
            self.records = self.records + others
            self._done |= {_key(record) for record in others}

    def has(self, cell: Cell, variant: Variant) -> bool:
        """Whether a group is there."""
        return key_of(cell, variant) in self._done

    def of(self, keys: Collection[Key]) -> list[Record]:
        """The records of these groups; earlier runs may have left others."""
        return [record for record in self.records if _key(record) in keys]

    def append(self, records: Sequence[Record]) -> None:
        """Adds a whole group, and has it on the disk before it returns."""
        of_all = {"group": len(records), "made": self.made}
        text = "".join(json.dumps({**r, **of_all}) + "\n" for r in records)
        with self.path.open("ab") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        for line in text.splitlines():
            self.records.append(json.loads(line))
        self._done.add(_key(self.records[-1]))


def _hold_to(path: Path, settings: dict[str, Any]) -> None:
    plain = json.loads(json.dumps(settings))
    if not path.exists():
        _replace(path, [json.dumps(plain, indent=1)])
        return
    before = json.loads(path.read_text("utf-8"))
    for name in sorted(before.keys() | plain.keys()):
        if before.get(name) != plain.get(name):
            raise ConfigError(
                f"{path.parent} has answers with {name} {before.get(name)!r}, "
                f"got {plain.get(name)!r}: take another --out"
            )


def _replace(path: Path, lines: Iterable[str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(line + "\n" for line in lines), "utf-8")
    partial.replace(path)
