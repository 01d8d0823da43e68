"""A picture of a run's losses and recall. Needs matplotlib (the extra `plot`)."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from train.run.progress import TRAIN, VALIDATION


def formats() -> tuple[str, ...]:
    """Suffixes of the files that a picture can be written to."""
    return tuple(f".{name}" for name in sorted(FigureCanvasBase.get_supported_filetypes()))


def run_curves(lines: Sequence[Mapping[str, Any]], *, title: str, dpi: int = 150) -> Figure:
    """Loss by step above, validation recall and learning rate below, of `metrics.jsonl`'s lines."""
    figure = Figure(figsize=(8, 6), dpi=dpi, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    training = [line for line in lines if line["kind"] == TRAIN and line["loss"] is not None]
    steps = [line["step"] for line in training]
    above.plot(steps, [line["loss"] for line in training], color="#3b76af", label="loss")
    names = sorted({name for line in training for name in line["terms"]})
    for name in names if len(names) > 1 else ():
        values = [np.mean(line["terms"][name]) for line in training]
        above.plot(steps, values, linewidth=0.8, label=name)
    above.set(ylabel="loss", title=title)
    above.legend()
    found = [line for line in lines if line["kind"] == VALIDATION]
    recall = [line["recall"] for line in found]
    below.plot([line["step"] for line in found], recall, "o-", color="#e07b39", label="recall")
    below.set(xlabel="step", ylabel=found[-1]["metric"] if found else "recall")
    rate = below.twinx()
    rate.plot(steps, [line["learning_rate"] for line in training], color="#9aa5b1", linewidth=0.8)
    rate.set(ylabel="learning rate")
    return figure
