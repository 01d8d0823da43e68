"""What a program launches on an NVIDIA GPU, by what XLA wrote down of it: the file
`*.thunk_sequence_after_thunk_passes.txt`, where --xla_dump_to asks for it."""

import re
from typing import NamedTuple

_LAUNCH = re.compile(r"( *)\d+: (k\w+)")
_GRAPH, _LOOP = "kCommandBuffer", "kWhile"
_HOLDERS = (_GRAPH, _LOOP, "kConditional", "kSequential")


class Launches(NamedTuple):
    """Kernels, copies and library calls."""

    inside: int  # of CUDA graphs
    outside: int


def launches_of_a_step(text: str) -> Launches:
    """Launches in the body of the program's largest loop: of a decode program, those of a step.

    What loops in the step launch counts once: how often they turn is not written down. Raises
    ValueError where the program has no loop.
    """
    found = _bodies(text)
    if not found:
        raise ValueError("the program must have a loop, got none")
    return max(found, key=sum)


def _bodies(text: str) -> list[Launches]:
    """Launches in the body of every loop that is in no other."""
    found: list[list[int]] = []
    holders: list[tuple[int, str]] = []  # indentation and kind, outermost first
    in_body = False  # its condition comes before
    for line in text.splitlines():
        in_body |= line.strip() == "body:"
        launch = _LAUNCH.match(line)
        if launch is None:
            continue
        indent, kind = len(launch[1]), launch[2]
        holders = [holder for holder in holders if holder[0] < indent]
        kinds = [holder for _, holder in holders]
        if kind in _HOLDERS:
            if kind == _LOOP and _LOOP not in kinds:
                found.append([0, 0])
                in_body = False
            holders.append((indent, kind))
        elif _LOOP in kinds and in_body:
            found[-1][_GRAPH not in kinds] += 1
    return [Launches(*counts) for counts in found]
