"""Ctrl-C and SIGTERM: noted while there is something to save, else one line and an exit code.

The standard library only: it is there before anything slow is imported. A handler that raised
could end in the middle of an import as an error of the module.
"""

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _end(number: int, frame: FrameType | None) -> None:
    name = signal.Signals(number).name
    line = f"{name}: ended at once; the same command goes on from the newest checkpoint, if any\n"
    os.write(2, line.encode())
    os._exit(128 + number)


def end_at_signals() -> None:
    """From now on, until others handle them, these signals end the process. Main thread only."""
    for number in SIGNALS:
        signal.signal(number, _end)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """`end_at_signals`, and the handlers before it again afterwards."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    end_at_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class NotedSignals:
    """Notes SIGINT and SIGTERM instead of ending the process; a second one is left to whoever
    handled them before."""

    def __init__(self) -> None:
        self.caught: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.caught = number
        self.__exit__()
