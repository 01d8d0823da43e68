"""Full-candidate evaluation on traces: every entry that exists at a token competes.

A *decision* is a token at which level 1 fires: it sees the token's hidden states and the entries
that exist then, and is judged by what the tokens from it on read (LSA spec 5.4, 8 row 16).
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lsa_jax.config_checks import refusal
from lsa_jax.lsa.indexer_config import IndexerConfig, Score
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from train.data.labels import Document, window_mass
from train.quality.metrics import MetricsConfig, Tally, add_tallies, named_scores, token_tally
from train.quality.scoring import Scorer
from train.traces.columns import TraceError
from train.traces.trace import MANIFEST, Trace, finished_traces, open_trace
from train.traces.trace_info import Keys, check_consecutive, indexer_fields

_BLOCK = 64  # decisions whose logits are on the host at once


class Decision(NamedTuple):
    """A token, the entries that exist at it, and the target layers' logits [L, entries], or, of an
    indexer with the score "softmax", logarithms of shares, of all tokens that it asks; dilated."""

    token: int
    entries: int
    logits: np.ndarray


@dataclasses.dataclass(frozen=True)
class Recording:
    """What a document says about who reads which entry when."""

    name: str
    positions: np.ndarray
    document: Document
    has_mass: bool

    @classmethod
    def of(cls, trace: Trace) -> "Recording":
        """Reads it from a trace."""
        mass = trace.mass()
        document = Document(0, trace.votes(), trace.read("formed_at"), mass=mass)
        return cls(trace.info.name, trace.read("positions"), document, mass is not None)

    def decisions(self, interval: int) -> np.ndarray:
        """Every `interval`-th token from the first, where an entry exists."""
        if interval < 1:
            raise refusal("interval", interval, ">= 1")
        tokens = np.arange(0, len(self.positions), interval)
        return tokens[self.document.entries_at(tokens) > 0]

    def golden(self, first: int, last: int, entries: int) -> np.ndarray:
        """Which of the first `entries` entries are golden at a token in first .. last - 1; bool."""
        votes = self.document.votes
        ends = votes.pointers[np.clip([first, last], 0, len(votes))]
        index = votes.indices[slice(*ends)]
        found = np.zeros(entries, bool)
        found[index[index < entries]] = True
        return found

    def mass(self, first: int, last: int, entries: int) -> np.ndarray | None:
        """Attention mass of these entries at these tokens, float32; None if not recorded."""
        if not self.has_mass:
            return None
        total = self.document.n_entries
        return window_mass(self.document.mass, first, last - first, total)[:entries]


def open_traces(directories: Sequence[Path], *, verify: bool = False) -> list[Trace]:
    """The traces of trace sets, and single traces; TraceError where a directory has none."""
    paths: list[Path] = []
    for directory in directories:
        found = [directory] if (directory / MANIFEST).exists() else finished_traces(directory)
        if not found:
            raise TraceError(f"{directory} must have finished traces, got none")
        paths += found
    for before, path in itertools.pairwise(sorted(path.resolve() for path in paths)):
        if before == path:
            raise TraceError(f"traces must be given once, got {path} twice")
    return [open_trace(path, verify=verify) for path in paths]


def check_distinct(traces: Sequence[Trace]) -> None:
    """TraceError where two traces hold the same arrays: intervals are over documents, and one that
    counted twice would make them too narrow."""
    found: dict[tuple[str, ...], Trace] = {}
    for trace in traces:
        arrays = tuple(trace.columns[name].sha256 for name in sorted(trace.columns))
        first = found.setdefault(arrays, trace)
        if first is not trace:
            got = f"the same arrays in {first.path} and {trace.path}"
            raise TraceError(f"traces must be of different documents, got {got}")


def check_trace(cfg: IndexerConfig, trace: Trace) -> None:
    """TraceError where an indexer cannot score a trace's keys with its hidden states, or where
    tokens that it asks are missing."""
    hidden, keys = (trace.columns[name].shape[2] for name in ("hidden", "keys"))
    wanted = indexer_fields(trace.info, hidden_size=hidden, head_dim=keys)
    for name in ("hidden_size", "head_dim", "rope_head_dim", "rope_theta", "yarn"):
        if getattr(cfg, name) != wanted[name]:
            got = f"the trace's is {wanted[name]!r}, the indexer's {getattr(cfg, name)!r}"
            raise TraceError(f"{trace.path}: {name} must be the indexer's: {got}")
    if cfg.lookback > 1:
        check_consecutive(trace.path, trace.read("positions"))
    missing = set(cfg.target_layers) - set(trace.info.target_layers)
    if missing:
        got = f"got {list(trace.info.target_layers)}"
        raise TraceError(f"{trace.path} must have the indexer's layers {sorted(missing)}, {got}")


def decisions(
    indexer: MemoryIndexer, trace: Trace, recording: Recording, tokens: np.ndarray
) -> Iterator[Decision]:
    """Decisions at some tokens of a trace, in their order. An indexer that looks back asks the
    tokens before them too, as far as they were recorded."""
    check_trace(indexer.cfg, trace)
    scorer = Scorer(indexer.cfg)
    layers = [trace.info.target_layers.index(o) for o in indexer.cfg.target_layers]
    keys = trace.keys()
    keys = Keys(keys.values[:, layers], None if keys.scale is None else keys.scale[:, layers])
    counts = recording.document.entries_at(tokens)
    back = indexer.cfg.lookback
    for start in range(0, len(tokens), _BLOCK):
        part = slice(start, start + _BLOCK)
        spans = [np.arange(max(0, token - back + 1), token + 1) for token in tokens[part]]
        asked = np.unique(np.concatenate(spans))
        hidden, most = trace.read("hidden", asked)[:, layers], int(counts[part].max())
        logits = scorer.logits(indexer, hidden, recording.positions[asked], keys, most)
        for span, count in zip(spans, counts[part], strict=True):
            found = logits[np.searchsorted(asked, span), :, :count]
            said = together(found, indexer.cfg.score)
            said = dilated(said, indexer.cfg.dilation, indexer.cfg.falloff)
            yield Decision(int(span[-1]), int(count), said)


def dilated(logits: np.ndarray, dilation: int, falloff: float) -> np.ndarray:
    """`lsa_jax.lsa.memory_indexer.dilated`, in NumPy, of entries that all exist."""
    out = logits.copy()
    for distance in range(1, min(dilation, logits.shape[-1] - 1) + 1):
        near = logits - logits.dtype.type(falloff * distance**2)
        np.maximum(out[..., distance:], near[..., :-distance], out=out[..., distance:])
        np.maximum(out[..., :-distance], near[..., distance:], out=out[..., :-distance])
    return out


def together(logits: np.ndarray, score: Score) -> np.ndarray:
    """What several tokens' logits [T, L, N] say: `MemoryIndexer.recent`, in NumPy; [L, N]."""
    if score == "sigmoid":
        return logits.max(axis=0)
    top = logits.max(axis=2, keepdims=True)
    weight = np.exp((logits - top).astype(np.float64))
    share = np.mean(weight / weight.sum(axis=2, keepdims=True), axis=0)
    return np.log(np.maximum(share, np.finfo(np.float64).tiny))


def ensemble_weight(indexer: MemoryIndexer) -> np.ndarray | None:
    """The leaf of a learned ensemble."""
    weight = indexer.ensemble_weight
    return None if weight is None else np.asarray(weight[...], np.float32)


def scores_at(indexer: MemoryIndexer, decision: Decision) -> Mapping[str, np.ndarray]:
    """Probabilities of the entries by name: "layer.<ordinal>", "ensemble.<kind>"."""
    weight = ensemble_weight(indexer)
    return named_scores(decision.logits, indexer.cfg.target_layers, weight, indexer.cfg.score)


def evaluate_traces(
    indexer: MemoryIndexer,
    traces: Sequence[Trace],
    metrics: MetricsConfig,
    *,
    interval: int = 64,
    window: int = 64,
    scores: Collection[str] | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Tally]:
    """Metrics of every document, at every `interval`-th token; one tally each, in their order.

    An entry is positive that exists at the token and is golden at one of the `window` tokens from
    it on. `scores` names what is measured ("ensemble.max", "layer.10"); None is all of it.
    `progress` gets the decisions of each document when it is done.
    """
    found = []
    for trace in traces:
        recording, parts = Recording.of(trace), []
        for at in decisions(indexer, trace, recording, recording.decisions(interval)):
            bounds = at.token, at.token + window, at.entries
            named = scores_at(indexer, at)
            if scores is not None:
                named = {name: named[name] for name in scores}
            mass, sized = recording.mass(*bounds), metrics.at(at.entries, indexer.cfg.score)
            parts.append(token_tally(named, recording.golden(*bounds), sized, mass=mass))
        found.append(add_tallies(parts))
        progress(len(parts))
    return found
