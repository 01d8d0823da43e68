"""Sequences made ahead of the step that takes them, by this process or by others.

What a step gets is a function of the run's seed and the step's number, so that a run goes on from
any step, with any number of workers.
"""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from train.pretraining.plan import PretrainConfig

_ROWS, _TAUGHT = 0, 1  # streams of random numbers of a step


class Rows(NamedTuple):
    """A batch: ids int32 and kinds int8 [B, S] (`lm_step`), and each row's group [B], by which
    accuracies are reported."""

    ids: np.ndarray
    kinds: np.ndarray
    groups: np.ndarray


Source = Callable[[Mapping[str, Any], np.random.Generator, int, int], Rows]
"""(a stage's `rows`, generator, batch, tokens) -> rows; workers import it by its name."""


def _generator(seed: int, step: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, step, stream])


def taught_positions(cfg: PretrainConfig, step: int) -> np.ndarray | None:
    """Ascending positions whose queries teach the lightning indexers in a step, if any do."""
    stage = cfg.at(step)[1]
    if not stage.taught:
        return None
    rng = _generator(cfg.run.seed, step, _TAUGHT)
    return np.sort(rng.choice(stage.tokens - 1, stage.taught, replace=False)).astype(np.int32)


def make_rows(source: Source, cfg: PretrainConfig, step: int) -> Rows:
    """The rows of a step."""
    stage = cfg.at(step)[1]
    rng = _generator(cfg.run.seed, step, _ROWS)
    return source(stage.rows, rng, stage.batch, stage.tokens)


def _end_with_parent() -> None:
    """A worker's start: it ends when the process that started it does, however that ended, and
    leaves Ctrl-C to it."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=wait, args=(parent,), daemon=True).start()


class Feed:
    """Rows of steps `first .. total - 1`, in order; a context manager."""

    def __init__(self, source: Source, cfg: PretrainConfig, first: int) -> None:
        self._source, self._cfg, self._next = source, cfg, first
        self._ahead: deque[concurrent.futures.Future[Rows]] = deque()
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None
        if cfg.run.workers:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                cfg.run.workers,
                multiprocessing.get_context("spawn"),
                initializer=_end_with_parent,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        total = self._cfg.total
        if self._pool is None:
            if self._next >= total:
                raise StopIteration
            self._next += 1
            return make_rows(self._source, self._cfg, self._next - 1)
        while self._next < total and len(self._ahead) < 2 * self._cfg.run.workers + 1:
            made = self._pool.submit(make_rows, self._source, self._cfg, self._next)
            self._ahead.append(made)
            self._next += 1
        if not self._ahead:
            raise StopIteration
        return self._ahead.popleft().result()
