"""Batches made ahead: on threads of this process, or in processes of their own; and taken ahead.

Worker processes end with the one that started them, however it ends. Signals are its business: a
terminal, or whatever stops a whole group of processes, sends them to all, and a run that is to save
first needs its workers until then.
"""

import contextlib
import gc
import multiprocessing
import os
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, cast

import grain
import jax
from absl import flags

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def _begin_worker(index: int, count: int) -> None:
    """Runs first in a worker."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    jax.config.update("jax_platforms", "cpu")  # should anything ever start a backend here


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Signals wait. Threads and processes that begin meanwhile never get them, nor do theirs."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Ahead[T]:
    """An iterator over `make(first)` .. `make(end - 1)`, some of which are made ahead.

    With `workers` processes, each is `prefetch` elements ahead; `make` is sent to them. Without,
    `threads` threads are `prefetch` elements ahead together, and at least one each (0: none).
    """

    def __init__(
        self,
        make: Callable[[int], T],
        first: int,
        end: int,
        *,
        workers: int,
        threads: int,
        prefetch: int,
    ) -> None:
        made = grain.MapDataset.range(first, end).map(make)
        if workers:
            here = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            options = grain.MultiprocessingOptions(workers, max(1, prefetch))
            dataset = made.to_iter_dataset(here).mp_prefetch(options, _begin_worker)
        else:
            threads = threads if prefetch else 0
            size = max(threads, prefetch)
            dataset = made.to_iter_dataset(grain.ReadOptions(threads, size))
        self._iterator, self._workers, self._begun = iter(dataset), workers, not workers

    def __iter__(self) -> "Ahead[T]":
        return self

    def __next__(self) -> T:
        if self._begun:
            return next(self._iterator)
        if not flags.FLAGS.is_parsed():  # grain asks them, and we have none
            flags.FLAGS.mark_as_parsed()
        with _signals_held():  # workers start now
            self._begun = True
            return next(self._iterator)

    def close(self) -> None:
        """Ends threads and processes."""
        self._iterator.close()  # pyright: ignore[reportAttributeAccessIssue]
        if self._workers:
            # The exception that ends a worker's stream holds, in a cycle, the last that it made:
            # shared memory, which would outlive this process.
            gc.collect()


class Taker[T]:
    """The elements of an iterator, which a thread takes up to `ahead` before they are asked for.

    What the iterator raises is raised in its turn. `close` before what the iterator is made of.
    """

    def __init__(self, source: Iterator[T], *, ahead: int) -> None:
        self._source, self._stop = source, False
        self._taken: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(ahead)
        self._room = threading.Semaphore(ahead)
        self._thread = threading.Thread(target=self._take, name="taker", daemon=True)
        with _signals_held():  # the main thread's; and workers start on this one
            self._thread.start()

    def _take(self) -> None:
        error: BaseException | None = None
        while error is None:
            self._room.acquire()
            if self._stop:
                return
            element = None
            try:
                element = next(self._source)
            except BaseException as why:  # StopIteration among them
                error = why
            self._taken.put((element, error))

    def __iter__(self) -> "Taker[T]":
        return self

    def __next__(self) -> T:
        element, error = self._taken.get()
        if error is not None:
            self._taken.put((None, error))  # for whoever asks again
            raise error
        self._room.release()
        return cast(T, element)

    def close(self) -> None:
        """Ends the thread, once it has what it is waiting for."""
        self._stop = True
        self._room.release()
        self._thread.join()
