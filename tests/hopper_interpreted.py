"""Interprets Hopper kernels in a process of its own, with a thread for every warpgroup.

A warpgroup that waits at a barrier holds one of XLA's threads, of which there are as many as
processors: four warpgroups on two processors may wait for one another for ever.
"""

import concurrent.futures
import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

THREADS = 8


def _have_threads() -> None:
    os.environ["NPROC"] = str(THREADS)  # read when XLA's client is made


def _call(op: str, args: Any, options: dict[str, Any], tuning: dict[str, Any]) -> np.ndarray:
    module = importlib.import_module(f"pallas_kernels.{op}.mosaic_gpu")
    made = module.Tuning(**tuning)
    return np.asarray(getattr(module, op)(*args, **options, tuning=made, interpret=True))


class Interpreter:
    """`call` gives the result of an operation's kernel in a tuning, given as its fields."""

    def __init__(self, pool: concurrent.futures.Executor):
        self.pool = pool

    def call(self, op: str, args: Any, options: dict[str, Any], **tuning: Any) -> np.ndarray:
        return self.pool.submit(_call, op, jax.device_get(args), options, tuning).result()


@contextlib.contextmanager
def interpreting() -> Iterator[Interpreter]:
    """An interpreter, whose process ends with it."""
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(1, context, initializer=_have_threads)
    with pool:
        yield Interpreter(pool)
