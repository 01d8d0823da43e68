"""What devices say to each other in a compiled program: collectives in its HLO text, and bytes.

Loops count as often as the compiler knows that they turn. One whose turns it does not know, such as
the loop over decode steps, counts once: figures of a decode program are per step. In a program in
which some layers stand for others, what is in the scope of such a layer counts for all of them.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

_KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16} | {
    f"{kind}{n}": n for kind in ("s", "u", "f") for n in (2, 4, 8, 16, 32, 64)
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_SHAPE = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,]*)\]")
_OP = re.compile(rf"= (.*?) ({'|'.join(_KINDS)})(?:-start)?\(")
_LAYER = re.compile(r'op_name="[^"]*\blayer_(\d+)/')
_BODY = re.compile(r"\bwhile\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'known_trip_count"?\s*[:=]\s*\{"?n"?\s*[:=]\s*"?(\d+)')
_CALLS = re.compile(r"(?:calls=|to_apply=|called_computations=\{|branch_computations=\{)([^})\s]+)")


@dataclasses.dataclass(frozen=True)
class Collectives:
    """How often each kind runs, and the bytes of their results on one device."""

    count: Mapping[str, int]
    nbytes: int


def collectives(hlo: str, layers: Mapping[int, int]) -> Collectives:
    """Counts the collectives of a compiled program's text. `layers`: a layer -> how many layers it
    stands for, 1 where nothing is said."""
    computations, entry = _split(hlo)
    turns = _turns(computations, entry)
    count: collections.Counter[str] = collections.Counter()
    nbytes = 0
    for name, lines in computations.items():
        for line in lines:
            if found := _OP.search(line):
                scope = _LAYER.search(line)
                times = turns[name] * (layers.get(int(scope[1]), 1) if scope else 1)
                count[found[2]] += times
                nbytes += times * _result_bytes(found[1], started="-start(" in line)
    return Collectives(dict(count), nbytes)


def _split(hlo: str) -> tuple[dict[str, list[str]], str]:
    """Lines by computation, and the name of the entry computation ("" without one)."""
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    return computations, entry


def _callees(line: str) -> Iterator[tuple[str, int]]:
    """Computations that an instruction runs, and how often."""
    if body := _BODY.search(line):
        trips = _TRIPS.search(line)
        yield body[1], int(trips[1]) if trips else 1
    for names in _CALLS.findall(line):
        for name in names.split(","):
            yield name.strip().lstrip("%"), 1


def _turns(computations: dict[str, list[str]], entry: str) -> collections.Counter[str]:
    """How often each computation runs. HLO lists callees before their callers."""
    turns: collections.Counter[str] = collections.Counter({entry: 1})
    for name in reversed(computations):
        for line in computations[name] if turns[name] else ():
            for callee, times in _callees(line):
                if callee in computations:
                    turns[callee] += turns[name] * times
    return turns


def _result_bytes(shapes: str, *, started: bool) -> int:
    """Bytes of a result. That of a start is a tuple of the operands and then the results."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _BITS[kind] // 8
        for kind, dims in _SHAPE.findall(shapes)
        if kind in _BITS
    ]
    return max(sizes, default=0) if started else sum(sizes)
