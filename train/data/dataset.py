"""Traces in, batches out: deterministic, resumable within an epoch, the same on any process count.

A global batch is a function of the corpus, the configurations and its number. Samples are drawn
ahead, on threads or in worker processes; what a process gets of each batch is a range of its rows.
Hidden states are added last, by the process that trains.
"""

import concurrent.futures
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from lsa_jax.config import ConfigError
from lsa_jax.config_checks import number, refusal
from train.data.batch import Batch, Drawn
from train.data.corpus import Corpus
from train.data.documents import Cache, load_hidden
from train.data.labels import SamplingConfig
from train.data.maker import BatchMaker, OrderConfig, Orders, Recipe
from train.data.order import SampleTable
from train.data.sample_counts import SIZE_MULTIPLE, padded_sizes
from train.data.workers import Ahead
from train.traces.trace_info import check_consecutive, digest

_READ = 0.25  # of a group's batches: until then the next group's documents are only read

__all__ = ["Batches", "Corpus", "DataConfig", "Demand", "batches", "sample_table"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where traces are, and how their samples become batches.

    `train`, `validation` and `test` are trace sets; `target_layers` chooses some of the traces'.
    `batch_size` is the global one, `sample_interval` the distance of samples in tokens. Up to
    `mixed_documents` documents are mixed at a time. Their keys are on every device, which has up to
    `pool_bytes` for keys, and the rest in the memory of each process: up to `cache_bytes` for
    hidden states, and half as much for labels; all three should hold twice as many documents.
    Candidates are padded to one of `sizes` sizes: each is a compiled step. Samples are drawn by
    `workers` processes, each `prefetch` batches ahead, or with 0 by `threads` threads, `prefetch`
    batches ahead (0: none) and at least one each; a run takes eight more ahead, to the devices.
    `max_offset` adds 0 .. max_offset to a sample's position, at random. `hard_negatives` is a file
    of `train.mine_hard`. Without `mass` targets have no attention mass, for objectives that do not
    need it.
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
    pool_bytes: int = 8 << 30
    prefetch: int = 2
    workers: int = 0
    threads: int = 4
    max_offset: int = 0
    hard_negatives: str | None = None
    mass: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"batch_size": 1, "sample_interval": 1, "mixed_documents": 1, "sizes": 1}
        least |= {"cache_bytes": 0, "pool_bytes": 1, "prefetch": 0, "workers": 0, "threads": 1}
        least |= {"max_offset": 0, "seed": 0}
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


class Demand(NamedTuple):
    """Documents, int32: those of all rows of a batch, of its group, and of the next group.

    `due` of the next group's, in their order, are to be on the devices by now; the others follow.
    """

    batch: np.ndarray
    group: np.ndarray
    following: np.ndarray
    due: int


class Batches:
    """An iterator over this process's rows of every batch; see `batches`.

    `demand` is that of the batch taken last; `make` draws the batch of any number.
    """

    demand: Demand

    def __init__(
        self,
        corpus: Corpus,
        data: DataConfig,
        sampling: SamplingConfig,
        *,
        process: tuple[int, int],
        epochs: int,
        lookback: int,
    ) -> None:
        self.data, self.epochs = data, epochs
        self._back = np.arange(1 - lookback, 1)
        order = OrderConfig(data.batch_size, data.mixed_documents, data.seed)
        self.orders = Orders(sample_table(corpus, data, sampling), order)
        rows = data.batch_size // process[1]
        recipe = Recipe(
            corpus.traces,
            corpus.hard,
            self.orders,
            sampling,
            slice(process[0] * rows, (process[0] + 1) * rows),
            data.mass,
            data.max_offset,
            data.seed,
            data.cache_bytes // 2 // max(1, data.workers),
        )
        self.make = BatchMaker(recipe)
        traces, layers = corpus.traces, corpus.target_layers
        self.hidden = Cache(lambda d: load_hidden(traces[d], layers), data.cache_bytes)
        column = traces[0].columns["hidden"]
        self._hidden_shape = (len(layers), column.shape[2])
        self._hidden_dtype = column.numpy_dtype
        tokens = np.array([trace.tokens for trace in traces], np.int64)
        self._hidden_bytes = tokens * np.prod(self._hidden_shape) * column.numpy_dtype.itemsize
        self._order_digest = _order_digest(corpus, data, sampling)
        self._sets = sorted({str(trace.path.parent) for trace in traces})
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "hidden-ahead")
        self._iterator: Ahead[Drawn] | None = None
        self._group: tuple[int, int] | None = None
        self._coming: np.ndarray | None = None
        self._next = 0

    @property
    def table(self) -> SampleTable:
        """All samples."""
        return self.orders.table

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return self.orders.steps_per_epoch

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            data, steps = self.data, self.steps_per_epoch * self.epochs
            options = {name: getattr(data, name) for name in ("workers", "threads", "prefetch")}
            self._iterator = Ahead(self.make, self._next, steps, **options)
        drawn = Drawn(*map(np.array, next(self._iterator)))  # out of shared memory
        self.demand = self._demand()
        self._read_ahead(self.demand)
        batch = Batch(self.hidden_of(np.asarray(drawn.sample)), drawn)
        self._next += 1
        return batch

    def hidden_of(self, sample: np.ndarray) -> np.ndarray:
        """Hidden states [L, B, W, D] of samples and the tokens before them; 0 where there is no
        sample, a trace's first token's before it. Rows of a batch lie together.

        Samples of a document do too, mostly: so they are copied a stretch at a time.
        """
        shape = (len(sample), len(self._back), *self._hidden_shape)
        hidden = np.zeros(shape, self._hidden_dtype)
        # NumPy copies rows of its own types much faster.
        kind = {2: np.uint16, 4: np.uint32}[hidden.itemsize]
        out, documents = hidden.view(kind), sample[:, 0]
        cuts = np.flatnonzero(np.diff(documents)) + 1
        for first, end in itertools.pairwise([0, *cuts.tolist(), len(sample)]):
            document = int(documents[first])
            if document >= 0:
                states, tokens = self.hidden[document].view(kind), sample[first:end, 1, None]
                at = tokens + self._back
                np.take(states, at, axis=0, out=out[first:end], mode="clip")  # else: a copy
        return np.moveaxis(hidden, 2, 0)

    def _demand(self) -> Demand:
        """What the batch that is taken now takes and brings.

        The next group's documents are due one after another, but not before some of this one's
        batches are taken: they are read meanwhile. The same in all processes of a run.
        """
        epoch, step = divmod(self._next, self.steps_per_epoch)
        order = self.orders[epoch]
        samples = order.samples[step]
        group, following, share = order.around(step)
        if not len(following) and epoch + 1 < self.epochs:
            following = self.orders[epoch + 1].groups[0].documents
        due = int(len(following) * max(0.0, (share - _READ) / (1 - _READ)))
        return Demand(np.unique(self.table.documents[samples[samples >= 0]]), group, following, due)

    def _read_ahead(self, demand: Demand) -> None:
        """Begins to read hidden states of the next group, where there is room for both groups'."""
        if demand.following is self._coming:
            return
        self._coming = demand.following
        sizes = self._hidden_bytes
        if sizes[demand.group].sum() + sizes[demand.following].sum() <= self.data.cache_bytes:
            for document in demand.following:
                self._reader.submit(self.hidden.__getitem__, int(document))

    def get_state(self) -> dict[str, Any]:
        """Where the iterator is, for JSON: batches made ahead but not taken do not count."""
        return {"next_step": self._next, "order": self._order_digest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state of the same corpus and order, whatever its process count was.

        ConfigError where the state is of other data or of another order.
        """
        if state.keys() != {"next_step", "order"} or state["order"] != self._order_digest:
            wanted = "the traces and hard negatives that the run began with, and its [sampling],"
            raise ConfigError(
                f"data.train must have {wanted} batch size and seed, got others in"
                f" {', '.join(self._sets)}: put them back, or choose another --out"
            )
        steps = self.steps_per_epoch * self.epochs
        if not 0 <= number("next_step of the data's state", state["next_step"], int) <= steps:
            raise refusal("next_step of the data's state", state["next_step"], f"in 0..{steps}")
        self._stop()
        self._next = state["next_step"]

    def _stop(self) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def close(self) -> None:
        """Ends threads and processes; the iterator is of no use afterwards."""
        self._stop()
        self._reader.shutdown(cancel_futures=True)


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
    lookback: int = 1,
) -> Batches:
    """Batches of `epochs` epochs over a corpus; of `process` = (index, count), its rows of each.

    Every epoch has every sample once, in another order and with other negatives. Hard negatives
    take a corpus that has them and a `hard_share`; ConfigError where only one is given, or the
    batch cannot be split. Hidden states are those of the last `lookback` tokens; TraceError where
    a trace has gaps between its tokens then.
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
    for trace in corpus.traces if lookback > 1 else ():
        check_consecutive(trace.path, trace.read("positions"))
    options = {"process": process, "epochs": epochs, "lookback": lookback}
    return Batches(corpus, data, sampling, **options)
