"""What a check returns."""

from typing import NamedTuple


class Finding(NamedTuple):
    """One thing that was looked at, in words with its figures, and whether it is as it must be."""

    said: str
    holds: bool
