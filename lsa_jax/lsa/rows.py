"""What the host knows of each request, and what it noted at each boundary."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lsa_jax.lsa.boundary import Choice
from lsa_jax.lsa.host_store import chain_digest
from lsa_jax.lsa.missed import Misses


@dataclasses.dataclass
class Row:
    """One request: the tokens it has seen and the digests of its complete pages."""

    owner: int
    limit: int  # tokens it may reach
    tokens: list[int] = dataclasses.field(default_factory=list)
    digests: list[bytes] = dataclasses.field(default_factory=list)
    since: int = 0  # steps since its last boundary
    growth: int = 0  # times the fallback doubled what it may have
    above: int = 0  # resident pages on top of the budget, for that
    broken: bool = False  # level 1 has no score for it

    def digest(self, root: bytes, page_tokens: int, count: int) -> Sequence[bytes]:
        """Chain digests of its next `count` complete pages, noted and returned."""
        first = len(self.digests)
        for page in range(first, first + count):
            before = self.digests[-1] if self.digests else root
            tokens = self.tokens[page * page_tokens : (page + 1) * page_tokens]
            self.digests.append(chain_digest(before, tokens))
        return self.digests[first:]


@dataclasses.dataclass(frozen=True)
class Event:
    """A boundary, as one row saw it: for reports.

    *Missed* is what the cycle that ended could not read at its last token (0 at an admission),
    *lacking* what the new set lacks for the same token; both as `missed.Misses` counts.
    """

    row: int
    owner: int
    tokens: int
    read: tuple[int, ...]  # of which level 2 picked something in the cycle that ended
    pages: tuple[int, ...]  # resident in the next cycle
    complete: int  # pages that could be
    wanted: int
    over_budget: int
    allowed: int  # for all rows together, without what the fallback adds
    growth: int  # times the fallback doubled what the row may have, so far
    above: int  # resident pages that the fallback added
    resident_bytes: int  # of the row's pages, these included
    pool_bytes: int  # reserved on the device for all rows
    recalled: int  # pages moved, for all rows together
    missed_entries: int
    missed_mass: float
    lacking_entries: int
    lacking_mass: float
    seconds: float


class Turn(NamedTuple):
    """What happened at a boundary: the rows that fired, what was chosen, and what was missed."""

    due: np.ndarray
    choice: Choice
    read: np.ndarray
    misses: tuple[Misses, Misses]  # in the cycle that ended, and by the set just chosen
    allowed: int  # pages
    recalled: int  # pages


def event(b: int, row: Row, turn: Turn, *, page_bytes: int, **shared: Any) -> Event:
    """What row b notes of a boundary; `shared` are the fields that say the same of every row."""
    pages, (before, after) = np.asarray(turn.choice.pages)[b], turn.misses
    return Event(
        row=b,
        owner=row.owner,
        tokens=len(row.tokens),
        read=tuple(np.flatnonzero(turn.read[b]).tolist()),
        pages=tuple(np.flatnonzero(pages).tolist()),
        wanted=int(turn.choice.selection.wanted[b]),
        over_budget=int(turn.choice.selection.over_budget[b]),
        allowed=turn.allowed,
        growth=row.growth,
        above=row.above,
        resident_bytes=int(pages.sum()) * page_bytes,
        recalled=turn.recalled,
        missed_entries=int(before.entries[b]),
        missed_mass=float(before.mass[b]),
        lacking_entries=int(after.entries[b]),
        lacking_mass=float(after.mass[b]),
        **shared,
    )


def as_one(noted: list[Event], again: list[Event]) -> list[Event]:
    """The events where boundaries were fired `again` after those `noted`.

    An event of a request that has taken no step since its last one is that same boundary: it takes
    its place, and keeps what it said of the cycle that ended.
    """
    out = list(noted)
    for late in again:
        last = max((i for i, event in enumerate(out) if event.owner == late.owner), default=-1)
        if last < 0 or out[last].tokens != late.tokens:
            out.append(late)
            continue
        first = out[last]
        out[last] = dataclasses.replace(
            late,
            read=first.read,
            missed_entries=first.missed_entries,
            missed_mass=first.missed_mass,
            recalled=first.recalled + late.recalled,
            seconds=first.seconds + late.seconds,
        )
    return out
