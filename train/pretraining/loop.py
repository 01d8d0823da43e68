"""A pre-training run, from wherever it stands to its end."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lsa_jax import shardings
from lsa_jax.config import ComputeConfig, ConfigError, ModelConfig
from lsa_jax.config_checks import refusal
from train.pretraining import lm_init, lm_step, saved
from train.pretraining.feed import Feed, Source, taught_positions
from train.pretraining.index_teacher import Lesson
from train.pretraining.lm_step import LmBatch, LmState
from train.pretraining.metrics import Window
from train.pretraining.plan import PretrainConfig, Stage, learning_rate, make_optimizer
from train.run.interrupts import NotedSignals
from train.run.progress import MetricsLog

Shown = Callable[[int, float], None]

COMPILER_OPTIONS: dict[str, dict[str, bool | int]] = {
    # XLA's own matrix kernels are slow untuned, and to tune a step's 550 products takes minutes:
    # with cuBLAS's heuristics a step of 32 x 256 tokens took 37 ms, not 98 (H200, JAX 0.11.2).
    "gpu": {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0},
}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a call of `pretrain` ended: after `step` of `total` steps, by a signal or by itself."""

    step: int
    total: int
    signal: int | None


def initial_state(cfg: PretrainConfig, model: ModelConfig) -> LmState:
    """The state before the first step, on the host."""
    leaves = lm_init.initial_leaves(
        model,
        seed=cfg.run.seed,
        scales=lm_init.Scales(
            scale=cfg.run.init_scale,
            embedding=cfg.run.init_embedding,
            gain=cfg.run.init_gain,
            mixing=cfg.run.init_mixing,
        ),
        entries=cfg.run.init_entries,
    )
    params = {path: jnp.asarray(x) for path, x in leaves.items() if not lm_step.is_fixed(path)}
    fixed = {path: jnp.asarray(x) for path, x in leaves.items() if lm_step.is_fixed(path)}
    return LmState(
        params, fixed, make_optimizer(cfg.optimizer).init(params), jnp.zeros((), jnp.int32)
    )


class _Steps:
    """The step's programs, one a stage, on a mesh that batches are spread over."""

    def __init__(self, cfg: PretrainConfig, model: ModelConfig, mesh: Mesh) -> None:
        self.cfg, self.model, self.mesh = cfg, model, mesh
        self.optimizer = make_optimizer(cfg.optimizer)
        self.compute = ComputeConfig(dtype=cfg.run.compute_dtype, backend="xla", picking="auto")
        self.whole = NamedSharding(mesh, PartitionSpec())
        self.rows = NamedSharding(mesh, PartitionSpec("data"))
        self._programs: dict[int, concurrent.futures.Future[Callable[..., Any]]] = {}
        self._tracing = threading.Lock()

    def _step(self, stage: Stage) -> Callable[..., tuple[LmState, dict[str, Any]]]:
        model = stage.model(self.model)
        top_k = min(self.model.index_topk, stage.top_k or self.model.index_topk)

        def step(
            state: LmState, batch: LmBatch, rate: Any, at: Any
        ) -> tuple[LmState, dict[str, Any]]:
            lesson = None if at is None else Lesson(at, top_k)
            parts = (self.compute, self.cfg.loss, self.optimizer)
            return lm_step.step(model, *parts, state, batch, rate, lesson)

        return step

    def compile(self, like: LmState, first: int) -> None:
        """Begins to compile the programs of the stages from step `first` on: a later stage's is
        ready by the time that it begins. They are traced one by one: the first is soon under way.
        """
        number = self.cfg.at(first)[0]
        pool = concurrent.futures.ThreadPoolExecutor(len(self.cfg.stages), "compile")
        for i, stage in enumerate(self.cfg.stages[number:], number):
            self._programs[i] = pool.submit(self._compiled, like, stage)
        pool.shutdown(wait=False)

    def _compiled(self, like: LmState, stage: Stage) -> Callable[..., Any]:
        def placed(x: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        ids = jax.ShapeDtypeStruct((stage.batch, stage.tokens), np.int32, sharding=self.rows)
        state = jax.tree.map(lambda x: placed(x, self.whole), like)
        rate = jax.ShapeDtypeStruct((), np.float32, sharding=self.whole)
        at = jax.ShapeDtypeStruct((stage.taught,), np.int32, sharding=self.whole)
        program = jax.jit(self._step(stage), donate_argnums=0, out_shardings=self.whole)
        args = (state, LmBatch(ids, ids), rate, at if stage.taught else None)
        with self._tracing:
            lowered = program.lower(*args)
        return lowered.compile(COMPILER_OPTIONS.get(self.mesh.devices.flat[0].platform))

    def __call__(
        self, number: int, state: LmState, ids: np.ndarray, kinds: np.ndarray
    ) -> tuple[LmState, dict[str, Any]]:
        """Step `number`, from 0."""
        batch = jax.device_put(LmBatch(ids, kinds.astype(np.int32)), self.rows)
        extras = (np.float32(learning_rate(self.cfg, number)), taught_positions(self.cfg, number))
        program = self._programs[self.cfg.at(number)[0]].result()
        return program(state, batch, *jax.device_put(extras, self.whole))


@dataclasses.dataclass
class _Run:
    """The moving parts of one call of `pretrain`."""

    cfg: PretrainConfig
    steps: _Steps
    feed: Feed
    store: saved.Saved
    log: MetricsLog
    window: Window

    def go(
        self, state: LmState, first: int, signals: NotedSignals, shown: Shown
    ) -> tuple[LmState, int]:
        """Steps from `first` on until the last, or a signal; what was reached is saved."""
        self.window.began = time.monotonic()
        for step in range(first, self.cfg.total):
            began = time.monotonic()
            rows = next(self.feed)
            self.window.waited += time.monotonic() - began
            state, report = self.steps(step, state, rows.ids, rows.kinds)
            self.window.add(report, rows.groups, rows.ids.size)
            done, run = step + 1, self.cfg.run
            stop, last = signals.caught is not None, done == self.cfg.total
            save = stop or last or done % run.checkpoint_every == 0
            if save or done % run.log_every == 0:
                self._write(step, shown)
            if save:
                self.store.save(state, done, wait=stop or last)
                self.window.began = time.monotonic()  # saving does not count as training
            if stop:
                return state, done
        return state, self.cfg.total

    def _write(self, step: int, shown: Shown) -> None:
        line = self.window.line(step + 1, self.cfg.at(step)[0])
        self.log.write(line)
        if not math.isfinite(line["loss"]) or line["skipped"]:
            raise ConfigError(
                f"gradients must be finite, got {line['skipped']} steps that were not up to step"
                f" {step + 1}; a lower optimizer.learning_rate may help"
            )
        shown(step + 1, line["loss"])


def _check(cfg: PretrainConfig, model: ModelConfig, mesh: Mesh) -> None:
    for i, stage in enumerate(cfg.stages):
        if stage.batch % mesh.size:
            wanted = f"a multiple of {mesh.size} devices"
            raise refusal(f"stages[{i}].batch", stage.batch, wanted)
        if stage.tokens > model.max_position_embeddings:
            wanted = f"at most the model's {model.max_position_embeddings} positions"
            raise refusal(f"stages[{i}].tokens", stage.tokens, wanted)


def _silent(total: int) -> contextlib.AbstractContextManager[Shown]:
    return contextlib.nullcontext(lambda step, loss: None)


@contextlib.contextmanager
def _log(run: Path, step: int) -> Iterator[MetricsLog]:
    log = MetricsLog(run, step=step)
    try:
        yield log
    finally:
        log.close()


def pretrain(
    cfg: PretrainConfig,
    model: ModelConfig,
    run: Path,
    source: Source,
    groups: Sequence[str],
    *,
    files: Mapping[str, bytes | Path],
    progress: Callable[[int], contextlib.AbstractContextManager[Shown]] = _silent,
) -> Outcome:
    """Begins a run, or goes on with it from its newest checkpoint, on all of JAX's devices.

    Going on gives the same bits on CPU. Only for a process's main thread, which holds the run's
    lock (`train.run.checkpoints.exclusive`).

    Args:
      cfg: what to train; the same, up to `plan.FREE_FIELDS`, as the run was begun with.
      model: the backbone.
      run: the run's directory.
      source: makes the rows of a step.
      groups: what the numbers in `Rows.groups` stand for.
      files: go beside the backbone's weights, such as its tokenizer.
      progress: makes, of the number of steps, something to call with (step, loss).

    Raises ConfigError, CheckpointError for what does not fit; ConfigError where a step's gradients
    were not finite, the last checkpoint before it kept.
    """
    mesh = shardings.make_mesh(data=jax.device_count())
    _check(cfg, model, mesh)
    saved.begin(run, cfg, model)
    steps = _Steps(cfg, model, mesh)
    with saved.Saved(run, keep=cfg.run.keep) as store, NotedSignals() as signals:
        first = store.latest or 0
        like = jax.eval_shape(functools.partial(initial_state, cfg, model))
        steps.compile(like, min(first, cfg.total - 1))
        if first:
            state = store.restore(like, steps.whole)
        else:
            state = jax.device_put(initial_state(cfg, model), steps.whole)
        with (
            _log(run, first) as log,
            Feed(source, cfg, first) as feed,
            progress(cfg.total) as shown,
        ):
            moving = _Run(cfg, steps, feed, store, log, Window(groups))
            state, step = moving.go(state, first, signals, shown)
    if step < cfg.total:
        return Outcome(step, cfg.total, signals.caught)
    if not (run / saved.BACKBONE).exists():
        saved.write_backbone(run / saved.BACKBONE, model, state, files, source=str(run))
    return Outcome(step, cfg.total, None)
