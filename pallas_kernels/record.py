"""What a bench has found so far: a JSON file that outlives its process, and says what it was at."""

import json
from pathlib import Path
from typing import Any

RUNNING, FINISHED = "running", "finished"
DIED = "the process died or hung"


class Refused(ValueError):
    """A record that this process cannot go on with; the message is one line."""


def read(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where there is none. Refused where it is no record."""
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise Refused(f"{file} must be JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"{file} must hold a JSON object, got {type(found).__name__}")
    return found


def reopen(file: Path) -> None:
    """Says that something is left to do, whatever an earlier command found."""
    if found := read(file):
        _replace(file, found | {FINISHED: False})


def _replace(file: Path, content: dict[str, Any]) -> None:
    """At once, so that whoever kills this process keeps what it had."""
    fresh = file.with_name(file.name + ".tmp")
    fresh.write_text(json.dumps(content, indent=1, default=str) + "\n")
    fresh.replace(file)


class Record:
    """Rows of one kind, such as "checks", made on one device.

    What a process was at when it died is a row that failed: it is not tried again.
    """

    def __init__(self, file: Path | None, kind: str, here: dict[str, str], *, resume: bool = False):
        self.file, self.result = file, read(file) if file and resume else {}
        there = {name: self.result.get(name, value) for name, value in here.items()}
        if there != here:
            raise Refused(f"{file} is of {there}, and this is {here}")
        self.result |= {**here, FINISHED: False}
        self.rows: list[dict[str, Any]] = self.result.setdefault(kind, [])
        self.died: dict[str, Any] | None = self.result.pop(RUNNING, None)
        if self.died:
            self.rows.append({**self.died, "outcome": "FAIL", "failed": DIED, "why": DIED})

    def begin(self, case: str, backend: str) -> None:
        """Says what may kill this process."""
        self.result[RUNNING] = {"op": case.split()[0], "case": case, "backend": backend}
        self.write()

    def add(self, row: dict[str, Any]) -> None:
        """Keeps a row."""
        self.result.pop(RUNNING, None)
        self.rows.append(row)
        self.write()

    def finish(self) -> None:
        """Says that nothing is left to do."""
        self.result.pop(RUNNING, None)
        self.result[FINISHED] = True
        self.write()

    def write(self) -> None:
        """Replaces the file, where there is one."""
        if self.file:
            _replace(self.file, self.result)
