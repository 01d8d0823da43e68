"""From records to figures: accuracies with intervals, differences to full attention, bytes.

Intervals are bootstraps over haystacks, because questions about one haystack share its text.
Differences are paired: of the same questions, resampled together.
"""

import collections
import dataclasses
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from evals.suite.cases import RETRIEVAL
from evals.suite.records import Record
from evals.suite.variants import Variant
from train.quality.intervals import Interval, bootstrap, paired_difference, resampled

LEVEL = 0.95
FULL = Variant(arm="full")
AVERAGES: dict[str, tuple[str, ...] | None] = {"retrieval": RETRIEVAL, "all": None}  # None: all run

Document = tuple[int, int]  # seed and haystack
Sums = dict[Document, tuple[float, int]]  # of scores, and how many


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """What one variant reached on one task, or on the average of several, at one length.

    Shares are of the KV bytes of full attention: `device` occupied, `reserved` as allocated,
    `logical` the fraction of CSA entries, `both` device and host. `evidence` is the share of the
    entries of the answers' evidence that the first cycle could read, and any cycle.
    """

    task: str
    length: int
    variant: Variant
    questions: int
    haystacks: int
    accuracy: Interval
    minus_full: Interval | None
    logical: float
    device: float
    both: float
    reserved: float
    device_bytes: float
    reserved_bytes: float
    full_bytes: float
    evidence: tuple[float, float] | None
    fallbacks: int
    exceeded: int  # answers that took more than their budget; a fallback may
    slack: int  # the most whole pages wanted that a budget had room for


class _Part(NamedTuple):
    sums: Sums
    records: list[Record]


def _parts(records: Iterable[Record]) -> dict[tuple[str, int, Variant], _Part]:
    grouped: dict[tuple[str, int, Variant], list[Record]] = collections.defaultdict(list)
    for record in records:
        at = record["task"], record["length"], Variant(**record["variant"])
        grouped[at].append(record)
    out = {}
    for at, own in grouped.items():
        own.sort(key=lambda r: (r["seed"], r["haystack"], r["question"]))
        sums: Sums = {}
        for r in own:
            total, count = sums.get((r["seed"], r["haystack"]), (0.0, 0))
            sums[r["seed"], r["haystack"]] = (total + r["score"], count + 1)
        out[at] = _Part(sums, own)
    return out


def _array(sums: Sums, documents: Iterable[Document]) -> np.ndarray:
    """[D, 1, 2]: sums of scores, and counts."""
    return np.array([sums[document] for document in documents], float)[:, None]


def _common(first: Sums, second: Sums) -> tuple[np.ndarray, np.ndarray] | None:
    documents = sorted(first.keys() & second.keys())
    if not documents:
        return None
    return _array(first, documents), _array(second, documents)


def _seed(task: str) -> int:
    """Tasks are resampled each for itself."""
    return zlib.crc32(task.encode())


def summarise(
    records: Sequence[Record], variants: Sequence[Variant], averaged: Mapping[int, Collection[str]]
) -> list[Line]:
    """A line for every task, length and variant, then for the averages; only of `variants`.

    Averages at a length are of the tasks that `averaged` says, and of variants that have answered
    all of these. A variant that has answered fewer (an ablation) has none, and one that has
    answered others too has the average without them: all averages of a length are comparable.
    """
    parts = _parts(records)
    shapes = sorted({(length, task) for task, length, _ in parts})
    lines = []
    for length, task in shapes:
        full = parts.get((task, length, FULL))
        for variant in variants:
            part = parts.get((task, length, variant))
            if part is not None:
                lines.append(_line(task, length, variant, part, full))
    return lines + _averages(parts, lines, variants, averaged)


def _line(task: str, length: int, variant: Variant, part: _Part, full: _Part | None) -> Line:
    (accuracy,) = bootstrap(_array(part.sums, sorted(part.sums)), level=LEVEL, seed=_seed(task))
    pair = None if full is None else _common(part.sums, full.sums)
    minus = None
    if pair is not None and variant != FULL:
        (minus,) = paired_difference(*pair, level=LEVEL, seed=_seed(task))
    return Line(
        task=task,
        length=length,
        variant=variant,
        questions=len(part.records),
        haystacks=len(part.sums),
        accuracy=accuracy,
        minus_full=minus,
        **_bytes(part.records),
    )


def _bytes(records: Sequence[Record]) -> dict[str, Any]:
    def total(name: str) -> float:
        return float(sum(r[name] for r in records))

    full, count = total("full"), len(records)
    entries, first, any_cycle = (sum(r["evidence"][i] for r in records) for i in range(3))
    return {
        "logical": total("kept") / count,
        "device": total("device") / full,
        "both": (total("device") + total("host")) / full,
        "reserved": total("device_reserved") / total("full_reserved"),
        "device_bytes": total("device") / count,
        "reserved_bytes": total("device_reserved") / count,
        "full_bytes": full / count,
        "evidence": (first / entries, any_cycle / entries) if entries else None,
        "fallbacks": sum(r.get("growth", 0) > 0 for r in records),
        "exceeded": sum(bool(r.get("exceeded")) for r in records),
        "slack": max(r.get("slack", 0) for r in records),
    }


def _averages(
    parts: Mapping[tuple[str, int, Variant], _Part],
    lines: Sequence[Line],
    variants: Sequence[Variant],
    averaged: Mapping[int, Collection[str]],
) -> list[Line]:
    """Means over tasks, each weighing alike, of variants that have answered all of them."""
    out = []
    for length in sorted(averaged):
        here = [line for line in lines if line.length == length]
        for name, wanted in AVERAGES.items():
            tasks = sorted(t for t in averaged[length] if wanted is None or t in wanted)
            if len(tasks) > 1:
                out += [
                    average
                    for variant in variants
                    if (average := _average(name, tasks, variant, here, parts)) is not None
                ]
    return out


def _average(
    name: str,
    tasks: Sequence[str],
    variant: Variant,
    lines: Sequence[Line],
    parts: Mapping[tuple[str, int, Variant], _Part],
) -> Line | None:
    own = [line for line in lines if line.variant == variant and line.task in tasks]
    if len(own) < len(tasks):
        return None
    length = own[0].length
    mine = [parts[task, length, variant].sums for task in tasks]
    full = [parts.get((task, length, FULL)) for task in tasks]
    pairs = [None if f is None else _common(m, f.sums) for m, f in zip(mine, full, strict=True)]
    minus = None
    known = [pair for pair in pairs if pair is not None]
    if variant != FULL and len(known) == len(tasks):
        minus = _mean_of_tasks(tasks, known)
    arrays = [(_array(sums, sorted(sums)), None) for sums in mine]

    def mean(field: str) -> float:
        return float(np.mean([getattr(line, field) for line in own]))

    means = ("logical", "device", "both", "reserved", "device_bytes", "reserved_bytes")
    found = [line.evidence for line in own if line.evidence is not None]
    first, ever = (float(x) for x in np.mean(found, axis=0)) if found else (0.0, 0.0)
    return Line(
        task=name,
        length=length,
        variant=variant,
        questions=sum(line.questions for line in own),
        haystacks=sum(line.haystacks for line in own),
        accuracy=_mean_of_tasks(tasks, arrays),
        minus_full=minus,
        **{field: mean(field) for field in means},
        full_bytes=mean("full_bytes"),
        evidence=(first, ever) if found else None,
        fallbacks=sum(line.fallbacks for line in own),
        exceeded=sum(line.exceeded for line in own),
        slack=max(line.slack for line in own),
    )


def _mean_of_tasks(
    tasks: Sequence[str], arrays: Sequence[tuple[np.ndarray, np.ndarray | None]]
) -> Interval:
    """The mean over tasks of a ratio, or of a difference of two, with its interval."""
    values, samples = [], []
    for task, (first, second) in zip(tasks, arrays, strict=True):
        value, again = resampled(first, seed=_seed(task))
        if second is not None:
            other, other_again = resampled(second, seed=_seed(task))
            value, again = value - other, again - other_again
        values.append(value[0])
        samples.append(again[:, 0])
    mean = np.mean(samples, axis=0)
    mean = mean[~np.isnan(mean)]
    tails = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
    low, high = np.quantile(mean, tails) if len(mean) else (np.nan, np.nan)
    return Interval(float(np.mean(values)), float(low), float(high))
