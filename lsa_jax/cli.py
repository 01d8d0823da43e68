"""What the command-line modules share: progress on stderr, and errors as one line."""

import argparse
import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import NoReturn

import tqdm

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import ConfigError
from lsa_jax.text.messages import MessageError
from lsa_jax.text.tokenizer import TokenizerError

_EXPECTED = (CheckpointError, ConfigError, MessageError, OSError, TokenizerError)

_LINE_SECONDS = 5.0  # between progress lines where stderr is no terminal


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line too, and exit with 2."""

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"error: {message}\n")


def show_log() -> None:
    """Prints what the library logs, such as tensors skipped, to stderr: one line each."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("lsa_jax").setLevel(logging.INFO)


def byte_progress(total: int, title: str) -> AbstractContextManager[Callable[[int], None]]:
    """Gives a function to call with bytes done: a bar on a terminal, else a line now and then."""
    size = f"{total / 1e9:.2f} GB"
    return _progress(total, title, "B", lambda rate: f"{size}, {rate / 1e6:.0f} MB/s")


def token_progress(total: int, title: str) -> AbstractContextManager[Callable[[int], None]]:
    """Gives a function to call with tokens done: a bar on a terminal, else a line now and then."""
    size = f"{total:,} tokens"
    return _progress(total, title, " tokens", lambda rate: f"{size}, {rate:,.0f} tokens/s")


@contextlib.contextmanager
def step_progress(total: int, *, shown: bool = True) -> Iterator[Callable[[int, float], None]]:
    """Gives a function to call with (step, loss): a bar on a terminal, else a line now and then."""
    if not shown:
        yield lambda step, loss: None
        return
    if sys.stderr.isatty():
        with tqdm.tqdm(total=total, desc="train", unit=" steps") as bar:

            def update(step: int, loss: float) -> None:
                bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
                bar.update(step - bar.n)

            yield update
        return
    last = time.monotonic()

    def advance(step: int, loss: float) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(
                f"train: step {step:,} of {total:,}, loss {loss:.4f}", file=sys.stderr, flush=True
            )

    yield advance


@contextlib.contextmanager
def _progress(
    total: int, title: str, unit: str, describe: Callable[[float], str]
) -> Iterator[Callable[[int], None]]:
    """`describe` words the total and the rate per second of a line."""
    if sys.stderr.isatty():
        with tqdm.tqdm(total=total, desc=title, unit=unit, unit_scale=True) as bar:

            def update(count: int) -> None:
                bar.update(count)

            yield update
        return
    done, began = 0, time.monotonic()
    shown = began

    def advance(count: int) -> None:
        nonlocal done, shown
        done += count
        now = time.monotonic()
        if now - shown >= _LINE_SECONDS:
            shown = now
            percent = 100 * done // max(total, 1)
            line = f"{title}: {percent} % of {describe(done / (now - began))}"
            print(line, file=sys.stderr, flush=True)

    yield advance


def exit_code(body: Callable[[], None], *, interrupted: str) -> int:
    """Runs a command: 0, 2 after an expected error (one line), 130 after Ctrl-C (`interrupted`)."""
    try:
        body()
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return 130
    return 0
