"""A training run, from wherever it stands to its end.

The device computes a step while a thread takes and sends the batches of the next ones, and the loop
reads the report of the one before. Whatever depends on a report is decided where all processes read
the same one.
"""

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lsa_jax import shardings
from lsa_jax.config import ConfigError
from lsa_jax.lsa.indexer_file import IndexerFile, write_indexer
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from train.data.batch import Batch
from train.data.corpus import Corpus
from train.data.dataset import Batches
from train.data.workers import Taker
from train.quality import evaluation
from train.quality.metrics import MetricsConfig, add_tallies
from train.run import checkpoints
from train.run.checkpoints import INDEXER, Checkpoints, Progress
from train.run.config import TrainConfig
from train.run.initial import Start, begin_with, step_of
from train.run.interrupts import NotedSignals
from train.run.key_pool import KeyPool
from train.run.progress import VALIDATION, MetricsLog, TensorBoard, Window
from train.run.splits import open_batches
from train.run.step import Report, Taken, check_rows, taken_from
from train.run.validation import check_top

AHEAD = 8  # batches that are on the devices before their steps: workers deliver unevenly
Observer = Callable[[int, Batch], None]
Shown = Callable[[int, float], None]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `train` ended: after `step` of `total` steps, by a signal or by itself.

    `best` is the step of the checkpoint that the indexer file has, -1 where nothing was validated.
    """

    step: int
    total: int
    skipped: int
    best: int
    score: float
    signal: int | None


class TrainingError(ConfigError):
    """A run that cannot go on; what it reached is saved."""


class _Run:
    """The moving parts of one call of `train`."""

    def __init__(
        self,
        cfg: TrainConfig,
        corpora: Mapping[str, Corpus],
        saved: Checkpoints,
        data: Batches,
        pool: KeyPool,
        total: int,
        mesh: Mesh,
        start: Start | None,
    ) -> None:
        self.cfg, self.saved, self.data, self.total = cfg, saved, data, total
        self.pool = pool
        self.validation = corpora.get("validation")
        self.writers: list[MetricsLog | TensorBoard] = []
        self.skipped_in_a_row, self.asked_to_stop = 0, False
        replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        if saved.latest is None:
            start = start or begin_with(cfg, corpora["train"], total, mesh)
            self.indexer, self.step, self.state = start
            self.progress = Progress(
                step=0, data=data.get_state(), config_digest=checkpoints.config_digest(cfg)
            )
        else:
            self.state, self.progress, self.indexer = saved.restore(cfg.optimizer, replicated)
            if self.progress.config_digest != checkpoints.config_digest(cfg):
                raise ConfigError(
                    "the newest checkpoint must be of the run's configuration, got another digest"
                )
            self.step = step_of(cfg, self.indexer, total, mesh)
            data.set_state(self.progress.data)
        self.window = Window(cfg.data.batch_size)

    @property
    def ended(self) -> bool:
        """Whether all steps are done, or validations have been worse for too long."""
        patience = self.cfg.run.patience
        return self.progress.step >= self.total or 0 < patience <= self.progress.worse

    def write(self, line: Mapping[str, Any]) -> None:
        """A metrics line, to everything that takes them."""
        for writer in self.writers:
            writer.write(line)

    def validate(self) -> None:
        """Scores the validation traces and remembers whether they never were better.

        The first process does it, the others wait for what it found.
        """
        assert self.validation is not None
        run, kind = self.cfg.run, self.indexer.ensemble
        prefix = f"ensemble.{kind}/{run.validate_pool}/"
        metric = f"{prefix}recall@{run.validate_top}"
        recall = 0.0
        if jax.process_index() == 0:
            leaves = {name: x.addressable_data(0) for name, x in self.state.params.items()}
            tallies = evaluation.evaluate_traces(
                MemoryIndexer(self.indexer, leaves),
                self.validation.traces,
                MetricsConfig(ks=(run.validate_top,), resident=self.cfg.sampling.resident),
                interval=run.validate_interval,
                window=self.cfg.sampling.window,
                scores=(f"ensemble.{kind}",),
            )
            sums = {
                name.removeprefix(prefix): pair
                for name, pair in add_tallies(tallies).items()
                if name.startswith(prefix)
            }
            ratios = {n: float(a / b) if b else math.nan for n, (a, b) in sums.items()}
            recall = ratios.get(f"recall@{run.validate_top}", math.nan)
            line = {"kind": VALIDATION, "step": self.progress.step, "metric": metric}
            self.write({**line, "recall": recall, "metrics": ratios})
        if jax.process_count() > 1:
            recall = float(multihost_utils.broadcast_one_to_all(np.float32(recall)))
        if math.isnan(recall):
            raise ConfigError(f"data.validation must have a positive for {metric}, got none")
        self.progress = _judged(self.progress, recall)

    def due(self, every: int) -> bool:
        """Whether this step is a multiple of `every`, or the last."""
        step = self.progress.step
        return step == self.total or bool(every and step % every == 0)

    def account(self, report: Report, waited: float) -> None:
        """Takes note of what a step reported."""
        self.window.add(report, waited)
        self.skipped_in_a_row = report.skipped_in_a_row
        self.asked_to_stop |= report.asked_to_stop

    def flush(self) -> None:
        """A metrics line of the steps since the last one."""
        if self.window.reports:
            self.write(self.window.line(self.progress.step))

    def save(self, *, wait: bool) -> None:
        """A checkpoint of where the run stands."""
        self.flush()
        self.saved.save(self.state, self.progress, self.indexer, wait=wait)

    def run(self, signals: NotedSignals, shown: Shown, observe: Observer | None) -> None:
        """Steps until the run has ended or is to stop; the last one's checkpoint is saved."""
        if not self.progress.step and self.validation is not None:
            self.validate()  # finds what is wrong with it now rather than in an hour
        if self.ended:
            return
        with contextlib.closing(Taker(taken_from(self.data, self.step.mesh), ahead=AHEAD)) as taken:
            self._steps(taken, signals, shown, observe)

    def _steps(
        self,
        batches: Iterator[Taken],
        signals: NotedSignals,
        shown: Shown,
        observe: Observer | None,
    ) -> None:
        self.window.began = time.monotonic()
        pending: tuple[Any, float] | None = None
        while not self.ended:
            began = time.monotonic()
            number, taken = self.progress.step + 1, next(batches)
            if observe is not None:
                observe(number, taken.batch)
            self.pool.supply(taken.demand)
            waited = time.monotonic() - began
            stop = signals.caught is not None
            self.state, packed = self.step(self.state, taken.placed, self.pool.planes, stop=stop)
            if pending is not None:
                self._read(pending, number - 1, shown)
            self.progress = dataclasses.replace(self.progress, step=number, data=taken.state)
            pending = self._after(packed, waited, shown)
            if self._stopping:
                return

    def _after(self, packed: Any, waited: float, shown: Shown) -> tuple[Any, float] | None:
        """Validates, logs and saves what is due after a step; None where its report was read."""
        run = self.cfg.run
        validate = self.validation is not None and self.due(run.validate_every)
        save = validate or self._stopping or self.due(run.checkpoint_every)
        last = self.skipped_in_a_row + 1 >= run.max_bad_steps  # allowed, should it be bad too
        if not save and not last and not self.due(run.log_every):
            return packed, waited
        self._read((packed, waited), self.progress.step, shown)
        save |= self._stopping
        if not save and not self.due(run.log_every):
            return None
        self.flush()
        if validate:
            self.validate()
        if save:
            self.save(wait=self._stopping or self.ended)
        self.window.began = time.monotonic()  # neither counts as training
        return None

    def _read(self, pending: tuple[Any, float], step: int, shown: Shown) -> None:
        packed, waited = pending
        report = self.step.report(packed)
        self.account(report, waited)
        shown(step, report.loss)

    @property
    def _stopping(self) -> bool:
        return self.asked_to_stop or self.skipped_in_a_row >= self.cfg.run.max_bad_steps


def _judged(progress: Progress, recall: float) -> Progress:
    """The progress after a validation; what came before the first step is not to be kept."""
    if not progress.step:
        return progress
    if recall > progress.score:
        return dataclasses.replace(progress, best=progress.step, score=recall, worse=0)
    return dataclasses.replace(progress, worse=progress.worse + 1)


def _finish(run: Path) -> None:
    """Writes the best checkpoint's indexer. All processes read it: Orbax has them wait."""
    if not (run / INDEXER).exists():
        cfg, leaves, _ = checkpoints.load_params(run)
        if jax.process_index() == 0:
            write_indexer(run / INDEXER, IndexerFile(cfg, leaves))


@contextlib.contextmanager
def _writers(run: Path, step: int, *, tensorboard: bool) -> Iterator[list[Any]]:
    """What takes metrics lines; the first process's alone."""
    found: list[MetricsLog | TensorBoard] = []
    if jax.process_index() == 0:
        found = [MetricsLog(run, step=step)]
        found += [TensorBoard(run, step=step)] if tensorboard else []
    try:
        yield found
    finally:
        for writer in found:
            writer.close()


def _begin(cfg: TrainConfig, run: Path, held: contextlib.ExitStack) -> None:
    """Makes or checks the run's directory, once, and locks it."""
    if jax.process_index() == 0:
        held.enter_context(checkpoints.exclusive(run))
        checkpoints.begin(run, cfg)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("begun")


def _silent(total: int) -> contextlib.AbstractContextManager[Shown]:
    return contextlib.nullcontext(lambda step, loss: None)


def train(
    cfg: TrainConfig,
    corpora: Mapping[str, Corpus],
    run: Path,
    *,
    tensorboard: bool = False,
    progress: Callable[[int], contextlib.AbstractContextManager[Shown]] = _silent,
    observe: Observer | None = None,
) -> Outcome:
    """Begins a run, or goes on with it from its newest checkpoint, on all of JAX's devices.

    A step whose gradients are not finite changes nothing but a count, the position in the schedule
    included. Going on gives the same bits on CPU, and the same up to rounding on other numbers of
    devices or processes. Only for a process's main thread.

    Args:
      cfg: what to train; the same, up to `config.FREE_FIELDS`, as the run was begun with.
      corpora: what `splits.open_corpora` found for it.
      run: the run's directory.
      tensorboard: whether to write events beside the metrics.
      progress: makes, of the number of steps, something to call with (step, loss).
      observe: is called with each step's number and batch before the step.

    Returns how it ended. Raises ConfigError and CheckpointError for what does not fit, and
    TrainingError, the state saved, after too many steps in a row without finite gradients.
    """
    check_top(cfg, corpora.get("validation"))
    mesh = shardings.make_mesh(data=jax.device_count())
    check_rows(cfg.data.batch_size, mesh, cfg.optimizer.accumulate)
    with contextlib.ExitStack() as held:
        data, total = open_batches(cfg, corpora["train"])
        held.callback(data.close)
        start = None
        if not checkpoints.finished_steps(run):  # what cannot begin leaves no directory
            start = begin_with(cfg, corpora["train"], total, mesh)
        _begin(cfg, run, held)
        with (
            contextlib.closing(KeyPool(corpora["train"], cfg.data, data.table, mesh)) as pool,
            Checkpoints(run, keep=cfg.run.keep) as saved,
            NotedSignals() as signals,
        ):
            moving = _Run(cfg, corpora, saved, data, pool, total, mesh, start)
            writers = _writers(run, moving.progress.step, tensorboard=tensorboard)
            with writers as moving.writers, progress(total) as shown:
                moving.run(signals, shown, observe)
        return _outcome(moving, run, signals)


def _outcome(moving: _Run, run: Path, signals: NotedSignals) -> Outcome:
    """Finishes what ended by itself; says what stopped the others."""
    progress, row = moving.progress, moving.skipped_in_a_row
    skipped = int(moving.state.skipped)
    if row >= moving.cfg.run.max_bad_steps:
        raise TrainingError(
            f"gradients were not finite in {row} steps in a row (run.max_bad_steps), up to step"
            f" {progress.step}; {skipped} of all steps were skipped; the state is saved in {run}"
        )
    caught = signals.caught or signal.SIGTERM if not moving.ended else None
    if moving.ended:
        _finish(run)
    return Outcome(progress.step, moving.total, skipped, progress.best, progress.score, caught)
