"""KV budgets in bytes and pages, and thresholds calibrated to a share of pages. No JAX here.

*Full bytes* is what entries and index keys take with everything on the device, *fixed bytes* the
part that is on the device whatever is recalled: HCA entries and the target layers' index keys.
"""

import bisect
import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from lsa_jax.config import ConfigError
from lsa_jax.config_checks import number, refusal, table
from lsa_jax.lsa.policy import MAX_COUNT, MAX_THRESHOLD, check_threshold

_UNITS = {"": 1, "B": 1, "kB": 1000} | {
    prefix + suffix: base**power
    for power, prefix in enumerate("KMGT", start=1)
    for suffix, base in (("B", 1000), ("iB", 1024))
}
_BUDGET = re.compile(r"(?P<number>\d+(?P<point>\.\d+)?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)
_WANTED = "a share such as 0.10 (up to 1.0) or bytes such as 400MB, 1.5GiB or 123456"


@dataclasses.dataclass(frozen=True)
class Budget:
    """A bound on KV bytes on the device: a share of the full bytes, or a number of bytes."""

    share: Fraction | None = None
    nbytes: int | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.nbytes is None):
            raise refusal("kv_budget", (self.share, self.nbytes), "either a share or bytes")
        if self.share is not None and not 0 < self.share <= 1:
            raise refusal("kv_budget", float(self.share), f"in (0, 1] or {_WANTED}")
        if self.nbytes is not None and number("kv_budget", self.nbytes, int) < 1:
            raise refusal("kv_budget", self.nbytes, "at least 1 byte")

    def limit(self, full_bytes: int) -> int:
        """The bytes that must not be exceeded, rounded down."""
        if self.share is not None:
            return int(self.share * full_bytes)
        assert self.nbytes is not None
        return self.nbytes


def parse_budget(text: str) -> Budget:
    """A number with a decimal point is a share; with a unit, or an integer above 1, it is bytes.

    A plain "1" could be meant as either and is refused.
    """
    match = _BUDGET.fullmatch(text.strip())
    if match is None or match["unit"] not in _UNITS:
        raise refusal("kv_budget", text, _WANTED)
    value = Fraction(match["number"])
    if not match["unit"] and match["point"]:
        return Budget(share=value)
    if not match["unit"] and value == 1:
        raise refusal("kv_budget", text, "1.0 for everything or 1B for one byte")
    return Budget(nbytes=int(value * _UNITS[match["unit"]]))


def allowed_pages(
    budget: Budget, full_bytes: int, fixed_bytes: int, page_bytes: int, *, forced_pages: int = 0
) -> int:
    """Pages that fit beside the fixed bytes: one more would exceed the budget.

    The forced pages are among them; a budget without room for these is refused with its floor.
    """
    limit, floor = budget.limit(full_bytes), fixed_bytes + forced_pages * page_bytes
    if limit < floor:
        share = floor / full_bytes
        raise ConfigError(
            f"kv_budget must be at least the floor of {floor} bytes ({share:.4f} of {full_bytes}; "
            f"{fixed_bytes} stay on the device always, {forced_pages} pages of {page_bytes} are "
            f"forced), got {limit} bytes ({limit / full_bytes:.4f})"
        )
    return (limit - fixed_bytes) // page_bytes


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A threshold per length bucket: bucket i has edges[i - 1] <= entries < edges[i].

    `thresholds` has one item more than `edges`: the last bucket has no end. `kept_pages` is the
    share of unforced pages that they were fitted to keep.
    """

    edges: tuple[int, ...]
    thresholds: tuple[float, ...]
    kept_pages: float

    def __post_init__(self) -> None:
        for i, edge in enumerate(self.edges):
            if not 1 <= number(f"edges[{i}]", edge, int) <= MAX_COUNT:
                raise refusal(f"edges[{i}]", edge, "an int in [1, 2^31)")
        if any(a >= b for a, b in itertools.pairwise(self.edges)):
            raise refusal("edges", self.edges, "strictly ascending")
        if len(self.thresholds) != len(self.edges) + 1:
            raise refusal("thresholds", self.thresholds, f"{len(self.edges) + 1} items long")
        for i, threshold in enumerate(self.thresholds):
            check_threshold(f"thresholds[{i}]", threshold)
        _check_share(self.kept_pages)

    def threshold(self, entries: int) -> float:
        """The threshold of a row of `entries` entries."""
        return self.thresholds[bisect.bisect_right(self.edges, entries)]

    def to_json(self) -> str:
        """One line of JSON, for the metadata of an indexer file; floats survive exactly."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Calibration":
        """Reads what `to_json` wrote; ConfigError on anything else."""
        names = [field.name for field in dataclasses.fields(cls)]
        try:
            raw = table("calibration", json.loads(text))
        except json.JSONDecodeError as error:
            raise refusal("calibration", text, "JSON") from error
        if set(raw) != set(names):
            raise refusal("calibration", sorted(raw), f"a table with the keys {names}")
        for name in ("edges", "thresholds"):
            if not isinstance(raw[name], list):
                raise refusal(f"calibration.{name}", raw[name], "a list")
        return cls(tuple(raw["edges"]), tuple(raw["thresholds"]), raw["kept_pages"])


def _check_share(kept_pages: object) -> None:
    if not 0 < number("kept_pages", kept_pages, float) <= 1:
        raise refusal("kept_pages", kept_pages, "in (0, 1]")


def _free_page_maxima(scores: np.ndarray, page_entries: int, recency: int, sink: int) -> np.ndarray:
    """Highest score of each complete page that no rule forces, float32."""
    if scores.ndim != 1 or np.isnan(scores).any():
        raise ConfigError(f"scores must be [N] without NaN, got shape {scores.shape}")
    first = -(-sink // page_entries)
    last = max(first, (len(scores) - recency) // page_entries)
    pages = scores[first * page_entries : last * page_entries].reshape(-1, page_entries)
    return pages.astype(np.float32).max(axis=1)


def _fit_bucket(maxima: Sequence[np.ndarray], kept_pages: float, bucket: int) -> float:
    """The lowest threshold that keeps at most `kept_pages` of the pages, samples weighing alike."""
    if not maxima:
        raise ConfigError(f"bucket {bucket} must have sampled scores with unforced pages, got none")
    values = np.concatenate(maxima)
    weights = np.concatenate([np.full(len(m), 1 / (len(m) * len(maxima))) for m in maxima])
    order = np.argsort(-values, kind="stable")
    kept = np.cumsum(weights[order])  # share kept when the page at this place is the last one kept
    # Shares are sums of rounded weights: a page that fits exactly must not be lost to rounding.
    excluded = int(np.searchsorted(kept, kept_pages + 1e-9, side="right"))
    if excluded < len(values):
        threshold = float(values[order[excluded]])  # strict >: it and its equals are not kept
    else:
        threshold = float(np.nextafter(values.min(), np.float32(0)))
    if threshold > MAX_THRESHOLD:
        raise ConfigError(
            f"bucket {bucket} must have at most {kept_pages} of its pages at score 1, got more: "
            "no threshold below 1 tells them apart"
        )
    return max(threshold, float(np.finfo(np.float32).tiny))


def fit_thresholds(
    samples: Iterable[np.ndarray],
    *,
    edges: Sequence[int],
    kept_pages: float,
    page_entries: int,
    recency: int,
    sink: int = 0,
) -> Calibration:
    """Thresholds that keep, on average over the samples of a bucket, at most `kept_pages` of pages.

    A sample is the score [N] of every entry of one history. Its complete pages count, except those
    that `recency` and `sink` (in entries) force, which are resident at any threshold. At equal
    scores fewer pages are kept, never more. Every bucket needs a sample.
    """
    _check_share(kept_pages)
    buckets: list[list[np.ndarray]] = [[] for _ in range(len(edges) + 1)]
    for scores in samples:
        maxima = _free_page_maxima(scores, page_entries, recency, sink)
        if len(maxima):
            buckets[bisect.bisect_right(edges, len(scores))].append(maxima)
    fitted = (_fit_bucket(maxima, kept_pages, i) for i, maxima in enumerate(buckets))
    return Calibration(tuple(edges), tuple(fitted), kept_pages)
