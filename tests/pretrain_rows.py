"""Rows of a small vocabulary for pre-training tests; a module that worker processes can import."""

import os
import signal
from collections.abc import Mapping
from typing import Any

import numpy as np

from train.pretraining.feed import Rows


def source(table: Mapping[str, Any], rng: np.random.Generator, batch: int, tokens: int) -> Rows:
    """Random ids below `vocab`, answers in the second half; two groups.

    With `stop_at`, a file, the process gets SIGTERM as the rows are made, once.
    """
    ids = rng.integers(0, table["vocab"], (batch, tokens), np.int32)
    kinds = np.zeros((batch, tokens), np.int8)
    kinds[:, tokens // 2 :] = 1
    kinds[:, tokens // 2] = 2
    stop = table.get("stop_at")
    if stop and os.path.exists(stop):
        os.remove(stop)
        os.kill(os.getpid(), signal.SIGTERM)
    return Rows(ids, kinds, rng.integers(0, 2, batch))
