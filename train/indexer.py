"""Trains a memory indexer on traces: `python -m train.indexer --config indexer --out RUN`.

Signals are answered from the first moment on, so nothing slow is imported here; all else is in
`train.indexer_command`.
"""

import importlib
import sys

from train.run.interrupts import ended_by_signals


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    with ended_by_signals():
        return importlib.import_module("train.indexer_command").main(argv)


if __name__ == "__main__":
    sys.exit(main())
