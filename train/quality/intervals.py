"""Bootstrap intervals of ratios, over documents: tokens of one document are not independent.

Every metric of `train.quality.metrics` is a ratio of two sums over documents, so that a resample is
a weighting of the documents: of [D] numerators and [D] denominators.
"""

import math
from typing import NamedTuple

import numpy as np

from lsa_jax.config_checks import refusal

RESAMPLES = 2000
_BLOCK = 256  # resamples drawn at once: [256, D] weights


class Interval(NamedTuple):
    """A figure and the bounds of its interval; NaN where it is undefined (0 / 0), and bounds of a
    single document's."""

    value: float
    low: float
    high: float

    def percent(self, digits: int = 1) -> str:
        """For people: "61.1 [58.0, 63.9]", without bounds "61.1", undefined "-"."""
        if math.isnan(self.value):
            return "-"
        value, *bounds = (f"{100 * x:.{digits}f}" for x in self)
        return value if math.isnan(self.low) else f"{value} [{', '.join(bounds)}]"


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """NaN where nothing was counted: undefined, which is not 0."""
    defined = denominator != 0
    return np.where(defined, numerator / np.where(defined, denominator, 1), np.nan)


def resampled(
    sums: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Ratios [M] of M metrics, and those of each resample [R, M]; `sums` is [D, M, 2].

    The documents drawn depend on (seed, resamples, D) only: figures of two models on the same
    documents are resampled alike, and can be compared as pairs. A single document says nothing of
    how documents differ: its resamples are undefined, and so are the bounds of its intervals.
    """
    if sums.ndim != 3 or sums.shape[2] != 2 or not len(sums):
        raise refusal("sums", sums.shape, "[D, M, 2] with at least one document")
    if resamples < 1:
        raise refusal("resamples", resamples, ">= 1")
    rng, count = np.random.default_rng(seed), len(sums)
    total = sums.sum(axis=0)
    parts = []
    for start in range(0, resamples, _BLOCK):
        size = min(_BLOCK, resamples - start)
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=size)
        parts.append(np.tensordot(drawn.astype(np.float64), sums, axes=1))
    again = np.concatenate(parts) * (1 if count > 1 else np.nan)
    return _ratio(total[:, 0], total[:, 1]), _ratio(again[..., 0], again[..., 1])


def _bounds(values: np.ndarray, samples: np.ndarray, level: float) -> list[Interval]:
    """Percentile intervals [M]; resamples in which a ratio is undefined are left out."""
    if not 0 < level < 1:
        raise refusal("level", level, "in (0, 1)")
    tails = ((1 - level) / 2, (1 + level) / 2)
    intervals = []
    for value, column in zip(values, samples.T, strict=True):
        column = column[~np.isnan(column)]
        low, high = np.quantile(column, tails) if len(column) else (np.nan, np.nan)
        intervals.append(Interval(float(value), float(low), float(high)))
    return intervals


def bootstrap(
    sums: np.ndarray, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Each metric's ratio of sums over the documents and its interval; `sums` is [D, M, 2]."""
    return _bounds(*resampled(sums, resamples=resamples, seed=seed), level)


def paired_difference(
    first: np.ndarray,
    second: np.ndarray,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """`first` less `second`, both on the same documents in the same order, resampled together."""
    if first.shape != second.shape:
        raise refusal("sums of the second model", second.shape, f"those of the first {first.shape}")
    values, samples = resampled(first, resamples=resamples, seed=seed)
    others, other_samples = resampled(second, resamples=resamples, seed=seed)
    return _bounds(values - others, samples - other_samples, level)
