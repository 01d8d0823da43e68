"""An indexer judged as it will be deployed, beside untrained arms with the same device bytes.

Every decision forms, for every arm and budget, the set of pages that would be on the device: forced
ones, then by the arm's page scores, as many as the budget has room for; the page in formation is
there on top. Sets are judged by the window that was trained for, and by what is read later and
later after the decision, from `taus[i - 1] + 1` to `taus[i]` tokens on: how a set ages.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lsa_jax.config_checks import number, refusal
from lsa_jax.lsa.budget import Budget, Calibration
from lsa_jax.lsa.indexer_config import Score
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from train.quality.baselines import Baseline, PagePolicy, Scores, baseline_scores, of_probabilities
from train.quality.evaluation import Decision, Recording, decisions, scores_at
from train.quality.metrics import (
    MetricsConfig,
    Tally,
    add_tallies,
    calibration_sums,
    page_sums,
    token_tally,
)
from train.quality.pareto import DeviceRoom, forced_pages
from train.traces.trace import Trace

CANDIDATES = ("all", "evictable")
WINDOW = "window"
_OF_PROBABILITIES = ("precision", "recall", "f1", "kept")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """How arms are compared. `window` and `interval` are tokens; `taus` ascend.

    A tau's tokens count where all of them were recorded. `calibration` sets the threshold by
    length, else it is that of `metrics`; `seed` draws for the random arm.
    """

    metrics: MetricsConfig
    budgets: Mapping[str, Budget]
    interval: int = 64
    window: int = 64
    taus: tuple[int, ...] = (16, 32, 64, 128, 256)
    policy: PagePolicy = "budget"
    baselines: tuple[Baseline, ...] = ()
    calibration: Calibration | None = None
    bins: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("interval", "window", "bins"):
            if number(name, getattr(self, name), int) < 1:
                raise refusal(name, getattr(self, name), ">= 1")
        if list(self.taus) != sorted(set(self.taus)) or (self.taus and self.taus[0] < 1):
            raise refusal("taus", self.taus, "strictly ascending from 1")

    def metrics_at(self, entries: int, score: Score = "sigmoid") -> MetricsConfig:
        """With the threshold for scores of a history of so many entries."""
        if self.calibration is None:
            return self.metrics.at(entries, score)
        return dataclasses.replace(self.metrics, threshold=self.calibration.threshold(entries))

    def horizons(self, token: int, tokens: int) -> dict[str, tuple[int, int]]:
        """First and behind the last token that judge a set chosen at `token`, of `tokens`."""
        spans = {WINDOW: (token, token + self.window)}
        for before, tau in zip((0, *self.taus), self.taus, strict=False):
            if token + tau < tokens:
                spans[tau_name(before, tau)] = (token + before + 1, token + tau + 1)
        return spans


def tau_name(before: int, tau: int) -> str:
    """Name of the horizon of tokens `before` + 1 .. `tau` after a decision."""
    return f"tau {before + 1}-{tau}"


@dataclasses.dataclass
class ArmResult:
    """Of one arm, by document: sums named "<horizon>/<candidates>/<metric>", and, of
    probabilities (not of shares), what `calibration_sums` gives for each of `CANDIDATES`,
    [2, bins, 3]."""

    tallies: list[Tally] = dataclasses.field(default_factory=list)
    calibration: list[np.ndarray] = dataclasses.field(default_factory=list)


def set_sums(
    scores: Scores,
    labels: np.ndarray,
    mass: np.ndarray | None,
    pages: Mapping[str, int],
    cfg: MetricsConfig,
) -> Tally:
    """Recall and captured mass of the set at each budget: "<candidates>/recall@<budget>"."""
    weights = np.zeros(len(labels)) if mass is None else mass
    counts = sorted(set(pages.values()))
    sums = page_sums(scores.pages, labels, weights, counts, cfg.resident)
    names = ("recall",) if mass is None else ("recall", "mass")
    return {
        f"{candidates}/{name}@{budget}": sums[candidates][f"{name}@{count}p"]
        for candidates in CANDIDATES
        for name in names
        for budget, count in pages.items()
    }


def entry_sums(scores: Scores, labels: np.ndarray, cfg: MetricsConfig) -> Tally:
    """Metrics of single entries: "<candidates>/<metric>"; thresholds where they mean something."""
    found = token_tally({"": scores.entries}, labels, dataclasses.replace(cfg, pages=()))
    found = {name.removeprefix("/"): pair for name, pair in found.items()}
    if scores.probability:
        return found
    return {n: pair for n, pair in found.items() if n.split("/")[1] not in _OF_PROBABILITIES}


def _bins(scores: Scores, labels: np.ndarray, cfg: MetricsConfig, bins: int) -> np.ndarray:
    part = slice(*cfg.resident.evictable_range(len(labels)))
    return np.stack(
        [calibration_sums(scores.entries[p], labels[p], bins) for p in (np.s_[:], part)]
    )


def _judged(
    arms: Mapping[str, Scores],
    recording: Recording,
    token: int,
    pages: Mapping[str, int],
    protocol: Protocol,
    aged: set[str],
    score: Score,
) -> tuple[dict[str, Tally], dict[str, np.ndarray]]:
    """Sums and calibration of every arm at one decision; `aged` arms at all horizons."""
    entries = int(recording.document.entries_at(token))
    cfg = protocol.metrics_at(entries, score)
    tallies: dict[str, Tally] = {name: {} for name in arms}
    calibration = {}
    for horizon, span in protocol.horizons(token, len(recording.positions)).items():
        labels, mass = recording.golden(*span, entries), recording.mass(*span, entries)
        for name, scores in arms.items():
            sums: Tally = {}
            if horizon == WINDOW:
                sums = entry_sums(scores, labels, cfg)
                if scores.probability and score == "sigmoid":  # shares are no probabilities
                    calibration[name] = _bins(scores, labels, cfg, protocol.bins)
            if horizon == WINDOW or name in aged:
                sums |= set_sums(scores, labels, mass, pages, cfg)
            tallies[name] |= {f"{horizon}/{metric}": pair for metric, pair in sums.items()}
    return tallies, calibration


def device_sums(
    tokens: int, entries: int, pages: Mapping[str, int], room: DeviceRoom, cfg: Protocol
) -> Tally:
    """What sets of so many pages take: "share@<budget>" of the full KV bytes, "pages@<budget>",
    and "below_floor@<budget>": whether decoding would refuse the budget, as what always stays on
    the device and the forced pages are above it."""
    sizes = room.sizes(tokens)
    floor = sizes.used(forced_pages(entries, cfg.metrics.resident))
    sums: Tally = {}
    for name, count in pages.items():
        refused = floor > cfg.budgets[name].limit(sizes.full)
        sums[f"share@{name}"] = np.array([sizes.used(count), sizes.full], np.float64)
        sums[f"pages@{name}"] = np.array([count, 1], np.float64)
        sums[f"below_floor@{name}"] = np.array([refused, 1], np.float64)
    return sums


def deployed(indexer: MemoryIndexer) -> str:
    """Name of the scores that the indexer decides by."""
    return f"ensemble.{indexer.cfg.ensemble}"


def _arms(
    indexer: MemoryIndexer, recording: Recording, at: Decision, protocol: Protocol
) -> dict[str, Scores]:
    """The scores of all arms at a decision."""
    size = protocol.metrics.resident.page_entries
    threshold = protocol.metrics_at(at.entries, indexer.cfg.score).threshold
    assert threshold is not None
    arms = {
        name: of_probabilities(p, protocol.policy, threshold=threshold, page_entries=size)
        for name, p in scores_at(indexer, at).items()
    }
    options = {"window": protocol.window, "page_entries": size, "seed": protocol.seed}
    for kind in protocol.baselines:
        arms |= baseline_scores(kind, recording, at.token, **options)
    return arms


@dataclasses.dataclass
class Study:
    """Results by arm, and what all arms' sets took; `entries` of each document, in their order."""

    deployed: str
    arms: dict[str, ArmResult] = dataclasses.field(default_factory=dict)
    device: list[Tally] = dataclasses.field(default_factory=list)
    entries: list[int] = dataclasses.field(default_factory=list)
    decisions: int = 0


def study(
    indexer: MemoryIndexer,
    traces: Sequence[Trace],
    room: DeviceRoom,
    protocol: Protocol,
    progress: Callable[[int], None] = lambda _: None,
) -> Study:
    """Judges all arms on all traces: the indexer's layers and ensembles, and the baselines.

    Only what it decides by and the baselines are judged at taus. A document in which no entry
    exists at a decision does not count. `progress` gets the decisions done.
    """
    found = Study(deployed(indexer))
    for trace in traces:
        room.check(trace)
        recording = Recording.of(trace)
        tokens = recording.decisions(protocol.interval)
        sums: dict[str, list[Tally]] = {}
        bins: dict[str, list[np.ndarray]] = {}
        took = []
        for at in decisions(indexer, trace, recording, tokens):
            length = int(recording.positions[at.token]) + 1
            pages = room.pages(length, protocol.budgets)
            arms = _arms(indexer, recording, at, protocol)
            aged = {name for name, scores in arms.items() if not scores.probability}
            aged.add(found.deployed)
            kind = indexer.cfg.score
            tallies, binned = _judged(arms, recording, at.token, pages, protocol, aged, kind)
            for name, part in tallies.items():
                sums.setdefault(name, []).append(part)
            for name, part in binned.items():
                bins.setdefault(name, []).append(part)
            took.append(device_sums(length, at.entries, pages, room, protocol))
            progress(1)
        if len(tokens):
            _add(found, sums, bins)
            found.device.append(add_tallies(took))
            found.entries.append(trace.entries)
            found.decisions += len(tokens)
    return found


def _add(
    found: Study, sums: Mapping[str, list[Tally]], bins: Mapping[str, list[np.ndarray]]
) -> None:
    for name, parts in sums.items():
        result = found.arms.setdefault(name, ArmResult())
        result.tallies.append(add_tallies(parts))
        if name in bins:
            result.calibration.append(np.sum(bins[name], axis=0))
