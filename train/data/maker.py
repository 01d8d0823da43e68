"""Makes batches from labels alone, in whatever thread or process is asked to."""

import dataclasses
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

from train.data.batch import Drawn, Row, assemble
from train.data.documents import Cache, LabelledDocument, load_labels
from train.data.labels import SamplingConfig
from train.data.order import EpochOrder, SampleTable, epoch_order
from train.data.sampling import draw_sample, grade_count
from train.traces.trace import Trace

_OFFSETS = 1  # tells the stream of a sample's offset from that of its candidates


@dataclasses.dataclass(frozen=True)
class OrderConfig:
    """What an epoch's order is a function of, beside the samples; see `order.epoch_order`."""

    batch: int
    mixed_documents: int
    seed: int


class Orders:
    """The orders of epochs, made when first asked for; the last two are kept."""

    def __init__(self, table: SampleTable, cfg: OrderConfig) -> None:
        self.table, self.cfg = table, cfg
        self.steps_per_epoch = -(-len(table.tokens) // cfg.batch)
        self._lock = threading.Lock()
        self._made: dict[int, EpochOrder] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return Orders, (self.table, self.cfg)

    def __getitem__(self, epoch: int) -> EpochOrder:
        with self._lock:
            if epoch not in self._made:
                self._made = {e: o for e, o in self._made.items() if e == epoch - 1}
                self._made[epoch] = epoch_order(
                    self.table, epoch=epoch, **dataclasses.asdict(self.cfg)
                )
            return self._made[epoch]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What batches are a function of, beside their number; it can be sent to a process.

    A batch's `rows` are made, all other ones belong to other processes of the run. `limit_bytes`
    is for labels in memory.
    """

    traces: tuple[Trace, ...]
    hard: Mapping[str, np.ndarray]
    orders: Orders
    sampling: SamplingConfig
    rows: slice
    mass: bool
    max_offset: int
    seed: int
    limit_bytes: int


class BatchMaker:
    """Makes the batch of a number: `maker(step)`. Of any thread; a copy of it in any process."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.labels: Cache[LabelledDocument] = Cache(self._load, recipe.limit_bytes)

    def __reduce__(self) -> tuple[Any, ...]:
        return BatchMaker, (self.recipe,)

    def _load(self, number: int) -> LabelledDocument:
        trace = self.recipe.traces[number]
        hard = self.recipe.hard.get(trace.info.name)
        return load_labels(trace, number, hard=hard, mass=self.recipe.mass)

    def __call__(self, step: int) -> Drawn:
        """This process's rows of a global batch."""
        orders = self.recipe.orders
        epoch, step = divmod(int(step), orders.steps_per_epoch)
        order = orders[epoch]
        samples = order.samples[step, self.recipe.rows]
        rows = [self._row(epoch, sample) for sample in samples[samples >= 0]]
        return assemble(
            rows,
            size=len(samples),
            candidates=int(order.candidates[step]),
            grades=grade_count(self.recipe.sampling),
            mass=self.recipe.mass,
        )

    def _row(self, epoch: int, sample: int) -> Row:
        recipe, table = self.recipe, self.recipe.orders.table
        document = self.labels[int(table.documents[sample])]
        token, offset = int(table.tokens[sample]), 0
        if recipe.max_offset:
            key = (epoch, document.labels.number, token, _OFFSETS)
            rng = np.random.default_rng(np.random.SeedSequence(recipe.seed, spawn_key=key))
            offset = int(rng.integers(recipe.max_offset + 1))
        drawn = draw_sample(document.labels, token, recipe.sampling, epoch=epoch)
        return Row(document, token, offset, drawn)
