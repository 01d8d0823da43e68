"""Traces in, batches out: deterministic, resumable within an epoch, the same on any process count.

A global batch is a function of the corpus, the configurations and its number. Grain builds batches
ahead on threads; what a process gets of each is a range of its rows.
"""

import concurrent.futures
import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import grain
import numpy as np

from lsa_jax.config import ConfigError
from lsa_jax.config_checks import number, refusal
from train.data.batch import Batch, Row, assemble
from train.data.corpus import Corpus
from train.data.documents import DocumentCache
from train.data.labels import SamplingConfig
from train.data.order import EpochOrder, SampleTable, epoch_order
from train.data.sample_counts import SIZE_MULTIPLE, padded_sizes
from train.data.sampling import draw_sample
from train.traces.trace_info import digest

__all__ = ["Batches", "Corpus", "DataConfig", "batches", "sample_table"]

_OFFSETS = 1  # tells the stream of a sample's offset from that of its candidates


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where traces are, and how their samples become batches.

    `train`, `validation` and `test` are trace sets; `target_layers` chooses some of the traces'.
    `batch_size` is the global one, `sample_interval` the distance of samples in tokens. Up to
    `mixed_documents` documents are mixed at a time, so `cache_bytes`, a process's memory for
    documents, should hold twice as many. Candidates are padded to one of `sizes` sizes: each is a
    compiled step. `prefetch` batches are made ahead (0: none) by `threads` threads, and at least
    one by each. `max_offset` adds 0 .. max_offset to a sample's position, at random.
    `hard_negatives` is a file of `train.mine_hard`. Without `mass` targets have no attention mass,
    for objectives that do not need it.
    """

    train: tuple[str, ...] = ()
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    target_layers: tuple[int, ...] | None = None
    batch_size: int = 64
    sample_interval: int = 1
    mixed_documents: int = 32
    sizes: int = 8
    cache_bytes: int = 8 << 30
    prefetch: int = 2
    threads: int = 4
    max_offset: int = 0
    hard_negatives: str | None = None
    mass: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "sample_interval": 1, "mixed_documents": 1, "sizes": 1}
        least |= {"cache_bytes": 0, "prefetch": 0, "threads": 1, "max_offset": 0, "seed": 0}
        for name, bound in least.items():
            if number(f"data.{name}", getattr(self, name), int) < bound:
                raise refusal(f"data.{name}", getattr(self, name), f">= {bound}")
        if self.max_offset >= 2**30:
            raise refusal("data.max_offset", self.max_offset, "< 2^30")
        for name in ("train", "validation", "test"):
            sets = getattr(self, name)
            if not isinstance(sets, tuple) or not all(isinstance(path, str) for path in sets):
                raise refusal(f"data.{name}", sets, "a list of trace sets")
        if self.hard_negatives is not None and not isinstance(self.hard_negatives, str):
            raise refusal("data.hard_negatives", self.hard_negatives, "a file")
        if not isinstance(self.mass, bool):
            raise refusal("data.mass", self.mass, "true or false")
        layers = self.target_layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise refusal("data.target_layers", layers, "distinct ascending CSA ordinals")


def sample_table(corpus: Corpus, data: DataConfig, sampling: SamplingConfig) -> SampleTable:
    """All samples of a corpus; ConfigError where there is none."""
    counts = corpus.counts(sampling, interval=data.sample_interval)
    documents = np.repeat(np.arange(len(counts), dtype=np.int32), [len(c.tokens) for c in counts])
    if not len(documents):
        wanted = "such that a token has labels and candidates"
        raise refusal("sampling", f"no sample in {len(counts)} documents", wanted)
    slots = np.concatenate([c.slots for c in counts])
    multiple = int(np.lcm(SIZE_MULTIPLE, sampling.unit_entries))
    sizes = padded_sizes(slots, most=data.sizes, multiple=multiple)
    return SampleTable(documents, np.concatenate([c.tokens for c in counts]), slots, sizes)


class Batches:
    """An iterator over this process's rows of every batch; see `batches`."""

    def __init__(
        self,
        corpus: Corpus,
        data: DataConfig,
        sampling: SamplingConfig,
        *,
        process: tuple[int, int],
        epochs: int,
    ) -> None:
        self.data, self.sampling, self.epochs = data, sampling, epochs
        self.table = sample_table(corpus, data, sampling)
        self.steps_per_epoch = -(-len(self.table.tokens) // data.batch_size)
        self.cache = DocumentCache(
            corpus.traces,
            data.cache_bytes,
            target_layers=corpus.target_layers,
            hard=corpus.hard,
            mass=data.mass,
        )
        self._corpus = corpus
        rows = data.batch_size // process[1]
        self._rows = slice(process[0] * rows, (process[0] + 1) * rows)
        self._order_digest = _order_digest(corpus, data, sampling)
        self._orders: dict[int, EpochOrder] = {}
        self._lock = threading.Lock()
        self._ahead = concurrent.futures.ThreadPoolExecutor(1, "documents-ahead")
        self._iterator: Any = None
        self._begin(0)

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """Where the iterator is, for JSON: batches made ahead but not taken do not count."""
        return {"next_step": self._next, "order": self._order_digest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same corpus and order, whatever its process count was.

        ConfigError where the state is of other data or of another order.
        """
        if state.keys() != {"next_step", "order"} or state["order"] != self._order_digest:
            wanted = "one of the same traces, batch size, sampling and seeds"
            raise refusal("the data's state", dict(state), wanted)
        steps = self.steps_per_epoch * self.epochs
        if not 0 <= number("next_step of the data's state", state["next_step"], int) <= steps:
            raise refusal("next_step of the data's state", state["next_step"], f"in 0..{steps}")
        self._begin(state["next_step"])

    def close(self) -> None:
        """Ends the threads; the iterator is of no use afterwards."""
        self._iterator.close()
        self._ahead.shutdown(cancel_futures=True)

    def order(self, epoch: int) -> EpochOrder:
        """The batches of an epoch."""
        with self._lock:
            if epoch not in self._orders:
                self._orders = {e: o for e, o in self._orders.items() if e == epoch - 1}
                self._orders[epoch] = epoch_order(
                    self.table,
                    batch=self.data.batch_size,
                    mixed_documents=self.data.mixed_documents,
                    seed=self.data.seed,
                    epoch=epoch,
                )
            return self._orders[epoch]

    def _begin(self, step: int) -> None:
        if self._iterator is not None:
            self._iterator.close()
        threads = self.data.threads if self.data.prefetch else 0
        options = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(threads, self.data.prefetch)
        )
        steps = grain.MapDataset.range(step, self.steps_per_epoch * self.epochs)
        self._iterator = iter(steps.map(self._build).to_iter_dataset(options))
        self._next = step

    def _build(self, step: int) -> Batch:
        """This process's rows of a global batch."""
        epoch, step = divmod(int(step), self.steps_per_epoch)
        order = self.order(epoch)
        self._load_ahead(order, step)
        samples = order.samples[step, self._rows]
        rows = [self._row(epoch, sample) for sample in samples[samples >= 0]]
        return assemble(
            rows,
            size=len(samples),
            candidates=int(order.candidates[step]),
            like=rows[0].document if rows else self.cache[int(self.table.documents[0])],
        )

    def _row(self, epoch: int, sample: int) -> Row:
        loaded = self.cache[int(self.table.documents[sample])]
        token, doc = int(self.table.tokens[sample]), loaded.labels
        offset = 0
        if self.data.max_offset:
            key = (epoch, doc.number, token, _OFFSETS)
            rng = np.random.default_rng(np.random.SeedSequence(self.data.seed, spawn_key=key))
            offset = int(rng.integers(self.data.max_offset + 1))
        return Row(loaded, token, offset, draw_sample(doc, token, self.sampling, epoch=epoch))

    def _load_ahead(self, order: EpochOrder, step: int) -> None:
        """Begins to load the next group's documents, where there is room for both groups."""
        group, following, due = order.ahead(step)
        sizes = self._corpus.document_bytes
        if sizes[group].sum() + sizes[following].sum() > self.data.cache_bytes:
            return
        for document in due:
            self._ahead.submit(self.cache.__getitem__, int(document))


def _order_digest(corpus: Corpus, data: DataConfig, sampling: SamplingConfig) -> str:
    """Digest of all that a batch depends on but its number."""
    names = ("batch_size", "sample_interval", "mixed_documents", "sizes", "max_offset", "seed")
    traces = [
        [t.info.name, {name: column.sha256 for name, column in t.columns.items()}]
        for t in corpus.traces
    ]
    hard = {name: digest(entries.tolist()) for name, entries in corpus.hard.items()}
    settings = {name: getattr(data, name) for name in names}
    layers = list(corpus.target_layers)
    return digest([traces, hard, layers, settings, dataclasses.asdict(sampling)])


def batches(
    corpus: Corpus,
    data: DataConfig,
    sampling: SamplingConfig,
    *,
    process: tuple[int, int] = (0, 1),
    epochs: int = 1,
) -> Batches:
    """Batches of `epochs` epochs over a corpus; of `process` = (index, count), its rows of each.

    Every epoch has every sample once, in another order and with other negatives. Hard negatives
    take a corpus that has them and a `hard_share`; ConfigError where only one is given, or the
    batch cannot be split.
    """
    index, count = process
    if not 0 <= index < count or data.batch_size % count:
        raise refusal("data.batch_size", data.batch_size, f"a multiple of {count} processes")
    if bool(corpus.hard) != (sampling.hard_share > 0):
        raise ConfigError(
            "sampling.hard_share must be above 0 with data.hard_negatives and 0 without, got"
            f" {sampling.hard_share} {'with' if corpus.hard else 'without'}"
        )
    if number("epochs", epochs, int) < 1:
        raise refusal("epochs", epochs, ">= 1")
    return Batches(corpus, data, sampling, process=process, epochs=epochs)
