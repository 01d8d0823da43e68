"""A picture of which pages were where, cycle by cycle. Needs matplotlib (the extra `plot`)."""

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from lsa_jax.lsa.rows import Event

HOST, KEPT, NEW = 1, 2, 3
_KINDS = {
    HOST: ("#d9dee5", "complete, not resident"),
    KEPT: ("#3b76af", "resident, as in the cycle before"),
    NEW: ("#e07b39", "resident, new in this cycle"),
}


def residency_map(events: Sequence[Event]) -> np.ndarray:
    """uint8 [pages, cycles]: 0 where there is no page yet, else HOST, KEPT or NEW."""
    out = np.zeros((max((event.complete for event in events), default=0), len(events)), np.uint8)
    before: set[int] = set()
    for cycle, event in enumerate(events):
        out[: event.complete, cycle] = HOST
        for page in event.pages:
            out[page, cycle] = KEPT if page in before else NEW
        before = set(event.pages)
    return out


def residency(
    events: Sequence[Event], *, page_tokens: int, title: str, row: int = 0, dpi: int = 150
) -> Figure:
    """Position by cycle for one row, and below what each cycle missed at its last step.

    A column is the set that a boundary chose for the cycle after it. Dots are pages, resident or
    formed in that cycle, of which any CSA layer picked an entry in it (the cycle under way: none
    yet).
    """
    events = [event for event in events if event.row == row]
    grid = residency_map(events)
    figure = Figure(figsize=(8, 6), dpi=dpi, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    cycles = np.arange(len(events))
    colours = ListedColormap(["#ffffff", *(colour for colour, _ in _KINDS.values())])
    if grid.size:
        end = (len(events) - 0.5, grid.shape[0] * page_tokens)
        above.imshow(
            grid,
            cmap=colours,
            vmin=0,
            vmax=NEW,
            aspect="auto",
            interpolation="nearest",
            origin="lower",
            extent=(-0.5, end[0], 0, end[1]),
        )
    above.set(ylabel="position (tokens)", title=title)
    read = [(cycle, page) for cycle, event in enumerate(events[1:]) for page in event.read]
    x = [cycle for cycle, _ in read]
    y = [(page + 0.5) * page_tokens for _, page in read]
    dots = above.scatter(x, y, s=4, color="#1b1f24", label="read in this cycle")
    patches = [Patch(facecolor=colour, label=label) for colour, label in _KINDS.values()]
    heading = f"pages of {page_tokens} tokens"
    above.legend(handles=[*patches, dots], loc="upper left", fontsize="small", title=heading)
    mass = [100 * event.missed_mass for event in events]
    below.bar(cycles, mass, color="#a33b3b", label="estimated attention mass missed before it (%)")
    below.set(
        xlabel="boundary", ylabel="missed (%)", ylim=(0, max(1.0, 1.1 * max(mass, default=0)))
    )
    below.legend(loc="upper left", fontsize="small")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
