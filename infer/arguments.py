"""Types for argparse: they refuse a bad value in one line that says what is wanted."""

import argparse
import math
from collections.abc import Callable
from fractions import Fraction

from lsa_jax.config import ConfigError
from lsa_jax.lsa.budget import Budget, parse_budget
from lsa_jax.lsa.policy import MAX_COUNT


def flag(name: str) -> str:
    """The option whose value is in a field of that name."""
    return "--" + name.replace("_", "-")


def checked[T: (int, float)](
    kind: type[T], accepts: Callable[[T], bool], wanted: str
) -> Callable[[str], T]:
    """Numbers of one kind within bounds."""

    def convert(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not accepts(value):
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return value

    return convert


positive = checked(int, lambda n: n >= 1, "an integer >= 1")
natural = checked(int, lambda n: n >= 0, "an integer >= 0")
count = checked(int, lambda n: 0 <= n <= MAX_COUNT, "an integer in [0, 2^31)")
positive_count = checked(int, lambda n: 1 <= n <= MAX_COUNT, "an integer in [1, 2^31)")
temperature = checked(float, lambda x: 0 <= x < math.inf, "a finite number >= 0")
probability = checked(float, lambda x: 0 < x <= 1, "a number in (0, 1]")
positive_number = checked(float, lambda x: 0 < x < math.inf, "a finite number above 0")
inner = checked(float, lambda x: 0 < x < 1, "a number in (0, 1)")
seed = checked(int, lambda n: 0 <= n < 2**32, "an integer in [0, 2^32)")


def mesh(text: str) -> tuple[int, int, int]:
    """Sizes of a mesh's axes, for one sequence."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) for part in parts):
        wanted = "three positive integers DATA,EXPERT,TENSOR"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    data, expert, tensor = map(int, parts)
    if data != 1:  # the data axis splits rows, and there is one
        raise argparse.ArgumentTypeError(f"must have DATA = 1 for one sequence, got {text!r}")
    return data, expert, tensor


def ordinals(text: str) -> tuple[int, ...]:
    """CSA ordinals, separated by commas."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"must be CSA ordinals such as 10,12,20, got {text!r}")
    return tuple(map(int, parts))


def budget(text: str) -> Budget:
    """A share of all KV bytes, or bytes."""
    try:
        return parse_budget(text)
    except ConfigError as why:
        raise argparse.ArgumentTypeError(str(why)) from None


def size(text: str) -> int:
    """Bytes, with or without a unit."""
    try:
        found = parse_budget(text)
    except ConfigError:
        found = Budget(share=Fraction(1))
    if found.nbytes is None:
        raise argparse.ArgumentTypeError(f"must be bytes such as 64GiB or 123456, got {text!r}")
    return found.nbytes


def bound(text: str) -> float | None:
    """A number between 0 and 1, or "off"."""
    return None if text == "off" else inner(text)
