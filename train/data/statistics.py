"""What is about to be trained on, and whether a document of one split is in another, too."""

import dataclasses
import hashlib
from collections import defaultdict
from collections.abc import Mapping

import numpy as np

from train.data.corpus import Corpus
from train.data.dataset import DataConfig, sample_table
from train.data.labels import SamplingConfig
from train.data.order import epoch_order
from train.traces.trace import Trace

PREFIX_ENTRIES = 256  # prompts that agree so far are of one text
_SHOWN = 10  # leaks that are named


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitStatistics:
    """Figures of one split. `entries` and `positives` are (least, median, most).

    `positives` are entries (or pages) with a label in a sample's window, before they are capped,
    and `label_density` their share of the candidates; `padding` is the share of a batch's
    candidates that only fill it. `mixed_bytes` is what the documents mixed at a time take.
    """

    documents: int
    tokens: int
    samples: int
    batches: int
    entries: tuple[float, float, float]
    positives: tuple[float, float, float]
    positives_mean: float
    label_density: float
    dropped_labels: int
    sizes: tuple[int, ...]
    padding: float
    mixed_bytes: int


@dataclasses.dataclass(frozen=True)
class Leak:
    """Two documents of different splits, "split/name" each, and what they share.

    Of many that share it, the first one stands with each of the others.
    """

    first: str
    second: str
    shared: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Figures by split, and what is in more than one of them."""

    splits: Mapping[str, SplitStatistics]
    leaks: tuple[Leak, ...]
    unit: str

    def lines(self) -> list[str]:
        """Text to be printed before training."""
        text = [line for name, split in self.splits.items() for line in self._split(name, split)]
        if len(self.splits) < 2:
            return text
        names = ", ".join(self.splits)
        if not self.leaks:
            return [*text, f"leakage: none found between {names}"]
        text.append(f"leakage: {len(self.leaks)} pairs of documents between {names}")
        for leak in self.leaks[:_SHOWN]:
            text.append(f"  {leak.first} and {leak.second}: same {', '.join(leak.shared)}")
        if len(self.leaks) > _SHOWN:
            text.append(f"  and {len(self.leaks) - _SHOWN} more")
        return text

    def _split(self, name: str, split: SplitStatistics) -> list[str]:
        plural = {"entry": "entries", "page": "pages"}[self.unit]
        sizes = ", ".join(map(str, split.sizes))
        return [
            f"{name}: {split.documents:,} documents, {split.tokens:,} tokens,"
            f" {split.samples:,} samples in {split.batches:,} batches",
            f"  entries per document: {_spread(split.entries)}",
            f"  positive {plural} per sample: {_spread(split.positives)},"
            f" mean {split.positives_mean:.1f}; label density {split.label_density:.2%}",
            f"  labels dropped by the import: {split.dropped_labels:,}",
            f"  candidates padded to {sizes}: {split.padding:.1%} padding",
            f"  documents mixed at a time: {split.mixed_bytes / 2**30:.2f} GiB",
        ]


def _spread(values: tuple[float, float, float]) -> str:
    return " / ".join(f"{value:,.0f}" for value in values) + " (min / median / max)"


def _three(values: np.ndarray) -> tuple[float, float, float]:
    return float(values.min()), float(np.median(values)), float(values.max())


def describe_split(corpus: Corpus, sampling: SamplingConfig, data: DataConfig) -> SplitStatistics:
    """Figures of one split, sampled and batched as for training."""
    table = sample_table(corpus, data, sampling)
    counts = corpus.counts(sampling, interval=data.sample_interval)
    positives, pool = (np.concatenate([c[i] for c in counts]).astype(np.int64) for i in (1, 2))
    mixed = data.mixed_documents
    order = epoch_order(
        table, batch=data.batch_size, mixed_documents=mixed, seed=data.seed, epoch=0
    )
    return SplitStatistics(
        documents=len(corpus.traces),
        tokens=sum(trace.tokens for trace in corpus.traces),
        samples=len(table.tokens),
        batches=len(order.samples),
        entries=_three(np.array([trace.entries for trace in corpus.traces])),
        positives=_three(positives),
        positives_mean=float(positives.mean()),
        label_density=float(positives.sum() / pool.sum()),
        dropped_labels=sum(trace.info.dropped_labels for trace in corpus.traces),
        sizes=tuple(map(int, table.sizes)),
        padding=float(1 - table.slots.sum() / (order.candidates.sum() * data.batch_size)),
        mixed_bytes=int(np.sort(corpus.document_bytes)[-mixed:].sum()),
    )


def _identities(trace: Trace, columns: np.ndarray) -> dict[str, str]:
    """What tells a document: equal values in two traces make them suspect."""
    found = {"source": trace.info.source, "keys": trace.columns["keys"].sha256}
    count = min(PREFIX_ENTRIES, trace.info.prompt_tokens // trace.info.csa_ratio, trace.entries)
    if count and len(columns):
        keys = trace.keys(np.s_[:count])
        start = hashlib.sha256(np.ascontiguousarray(keys.values[:, columns]).tobytes())
        found[f"first {count} entries of the prompt"] = start.hexdigest()
    return found


def find_leaks(corpora: Mapping[str, Corpus]) -> tuple[Leak, ...]:
    """Pairs of documents of different splits with the same source, keys, or start of the prompt.

    The start is compared at the target layers that all splits have.
    """
    common = set.intersection(*(set(corpus.target_layers) for corpus in corpora.values()))
    holders: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for split, corpus in corpora.items():
        for trace in corpus.traces:
            layers = trace.info.target_layers
            columns = np.array([layers.index(i) for i in sorted(common)], np.int64)
            for identity in _identities(trace, columns).items():
                holders[identity].append((split, trace.info.name))
    shared: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (what, _), documents in holders.items():
        split, name = documents[0]
        for other, twin in documents[1:]:
            if other != split:
                shared[f"{split}/{name}", f"{other}/{twin}"].append(what)
    return tuple(Leak(*pair, tuple(what)) for pair, what in shared.items())


def describe(
    corpora: Mapping[str, Corpus], sampling: SamplingConfig, data: DataConfig
) -> Statistics:
    """Figures of every split by its name, and leaks between them; reads all votes."""
    splits = {name: describe_split(corpus, sampling, data) for name, corpus in corpora.items()}
    leaks = find_leaks(corpora) if len(corpora) > 1 else ()
    return Statistics(splits, leaks, sampling.unit)
