"""A run's directory: its configuration, its checkpoints, and what any other program needs of them.

    RUN/config.json            the configuration, written first
    RUN/checkpoints/STEP/      params, optimizer, progress, indexer_config, checksums: Orbax items
    RUN/metrics.jsonl          `train.run.progress`
    RUN/indexer.safetensors    the best indexer, written last
    RUN/lock                   held by the process that trains (its first one, of several)

A checkpoint gets its name when all of it is written; what a killed run leaves has another name, is
never read, and is removed by the next one. It is the state after STEP steps. Whatever is read of it
is held against its checksums.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding
from orbax.checkpoint import checkpoint_managers

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config_checks import number, table
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_shapes
from train import tables
from train.run import checksums, config
from train.run.config import TrainConfig
from train.run.optimizer import OptimizerConfig, TrainState, init_state
from train.traces.trace_info import digest

CONFIG = "config.json"
CHECKPOINTS = "checkpoints"
INDEXER = "indexer.safetensors"
LOCK = "lock"
SCHEMA = 2  # 1 had no checksums

_UNFINISHED = "*.orbax-checkpoint-tmp*"  # what Orbax calls them
_DELETED = "deleted"  # checkpoints leave under this name first: half of one is none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """Where a run stands after `step` steps, besides its arrays.

    `data` is the data iterator's state; `best` the step of the best validation so far, -1 before
    the first one, with its recall `score`; `worse` the validations since then.
    """

    step: int
    data: Mapping[str, Any]
    config_digest: str
    best: int = -1
    score: float = -1.0
    worse: int = 0


class _Preserved:
    """Keeps the newest checkpoints, and the best one (Orbax's `PreservationPolicy`)."""

    def __init__(self, keep: int) -> None:
        self.keep, self.best = keep, -1

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """One answer for each, the oldest first."""
        first = len(checkpoints) - self.keep
        return [i >= first or info.step == self.best for i, info in enumerate(checkpoints)]


def config_digest(cfg: TrainConfig) -> str:
    """Digest of what decides what is trained."""
    return digest(config.trained_fields(cfg))


@contextlib.contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Makes a run's directory, if it is not there, and holds its lock, which dies with the process.

    CheckpointError where another process has it, or the directory holds something else.
    """
    _check_own(run)
    run.mkdir(parents=True, exist_ok=True)
    with (run / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            wanted = "wait until it has ended, or choose another --out"
            raise CheckpointError(f"{run} is being trained by another process: {wanted}") from None
        yield


def _check_own(run: Path) -> None:
    """Refuses a directory that holds files but no run."""
    if (run / CONFIG).exists() or not run.is_dir():
        return
    if any(path.name not in (LOCK, f"{CONFIG}.partial") for path in run.iterdir()):
        raise CheckpointError(
            f"{run} holds files, but no run with a {CONFIG}: choose another --out"
        )


def begin(run: Path, cfg: TrainConfig) -> None:
    """Makes a run's directory, or finds that it was begun with the same configuration.

    ConfigError where a checkpoint is of another, naming the fields; CheckpointError where the
    directory holds something else. Without a checkpoint there is nothing yet to go on with.
    """
    file = run / CONFIG
    _check_own(run)
    if file.exists() and finished_steps(run):
        begun, now = (config.trained_fields(one) for one in (read_config(run), cfg))
        tables.check_same(begun, now, run)
    run.mkdir(parents=True, exist_ok=True)
    if not finished_steps(run):  # an indexer whose checkpoints were deleted is none of this run's
        (run / INDEXER).unlink(missing_ok=True)
    partial = file.with_name(f"{CONFIG}.partial")
    partial.write_text(json.dumps({"schema": SCHEMA, "config": tables.to_json(cfg)}, indent=1))
    partial.rename(file)


def read_config(run: Path) -> TrainConfig:
    """The configuration that a run was begun with."""
    file = Path(run) / CONFIG
    try:
        raw = table(CONFIG, json.loads(file.read_text("utf-8")))
        if raw.get("schema") != SCHEMA:
            raise CheckpointError(f"{file} must be of schema {SCHEMA}, got {raw.get('schema')!r}")
        return tables.build(TrainConfig, raw["config"])
    except FileNotFoundError:
        raise FileNotFoundError(f"{run} is no training run: it has no {CONFIG}") from None
    except (KeyError, ValueError) as why:
        if isinstance(why, CheckpointError):
            raise
        raise CheckpointError(f"{file} is damaged ({' '.join(str(why).split())})") from None


class Checkpoints:
    """Saves a run's checkpoints while it goes on, and restores them; a context manager.

    In a run of several processes all of them call the same methods in the same order. `close`, or
    the end of the context, waits for what is being saved.
    """

    def __init__(self, run: Path, *, keep: int) -> None:
        self._preserved = _Preserved(keep)
        self._root = (Path(run) / CHECKPOINTS).absolute()
        if jax.process_index() == 0:
            # Orbax would do so in a thread that nobody waits for, which an early end breaks off.
            for left in (self._root / _DELETED, *self._root.glob(_UNFINISHED)):
                shutil.rmtree(left, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._preserved,
            todelete_subdir=_DELETED,
            enable_async_checkpointing=True,
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(1),
        )
        self._manager = ocp.CheckpointManager(self._root, options=options)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Waits until everything is saved."""
        self._manager.close()
        if jax.process_index() == 0:
            shutil.rmtree(self._root / _DELETED, ignore_errors=True)

    @property
    def latest(self) -> int | None:
        """The newest finished checkpoint's step."""
        return self._manager.latest_step()

    def save(
        self, state: TrainState, progress: Progress, cfg: IndexerConfig, *, wait: bool = False
    ) -> None:
        """Begins to save; the state may be given away when it returns.

        The best checkpoint is kept from then on until there is a better one.
        """
        self._preserved.best = progress.best
        optimizer = state._asdict()
        params = optimizer.pop("params")
        texts = {"progress": dataclasses.asdict(progress)}
        texts["indexer_config"] = indexer_config.to_json(cfg)
        sums = {"texts": digest(texts), **_sums(params=params, optimizer=optimizer)}
        self._manager.save(
            progress.step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(params),
                optimizer=ocp.args.PyTreeSave(optimizer),
                checksums=ocp.args.JsonSave(sums),
                **{name: ocp.args.JsonSave(text) for name, text in texts.items()},
            ),
        )
        if wait:
            self._manager.wait_until_finished()

    def restore(
        self, optimizer: OptimizerConfig, sharding: Sharding
    ) -> tuple[TrainState, Progress, IndexerConfig]:
        """The newest checkpoint, whole on every device of `sharding`, however many it is for.

        CheckpointError where it cannot be read.
        """
        step = self.latest
        assert step is not None
        cfg, raw, sums = _read_json(self._root, step)
        progress = Progress(**raw)
        self._preserved.best = progress.best

        def on_devices(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        params = {n: jax.ShapeDtypeStruct(s, np.float32) for n, s in leaf_shapes(cfg).items()}
        shapes = jax.eval_shape(lambda p: init_state(optimizer, p), params)
        rest = jax.tree.map(on_devices, shapes)._asdict()
        wanted = rest.pop("params")
        restore_args = ocp.checkpoint_utils.construct_restore_args(rest)
        try:
            for item in ("params", "optimizer"):
                checksums.check_readable(self._root / str(step) / item)
            found = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(wanted),
                    optimizer=ocp.args.PyTreeRestore(rest, restore_args=restore_args),
                ),
            )
        except (ValueError, KeyError, OSError) as why:
            raise _unreadable(self._root / str(step), why) from why
        read = _sums(params=found["params"], optimizer=found["optimizer"])
        _check_sums(self._root / str(step), read, sums)
        return TrainState(params=found["params"], **found["optimizer"]), progress, cfg


def _unreadable(path: Path, why: BaseException) -> CheckpointError:
    reason = " ".join(str(why).split())[:200]
    return CheckpointError(f"{path} is damaged ({type(why).__name__}: {reason})")


def _sums(**items: object) -> dict[str, checksums.Checksums]:
    """Checksums of the leaves of some of a checkpoint's items."""
    return {name: checksums.checksums(tree) for name, tree in items.items()}


def _check_sums(
    path: Path, read: Mapping[str, checksums.Checksums], stored: Mapping[str, Any]
) -> None:
    """CheckpointError naming each leaf of these items that is not what was saved."""
    wrong = [
        f"{item}/{leaf}"
        for item, sums in read.items()
        for leaf in checksums.damaged(sums, stored.get(item, {}))
    ]
    if wrong:
        raise CheckpointError(
            f"{path} is damaged: other checksums than were saved of {', '.join(wrong)}"
        )


def _read_json(root: Path, step: int) -> tuple[IndexerConfig, dict[str, Any], dict[str, Any]]:
    """A checkpoint's indexer configuration, progress and checksums; no array is read."""
    path = root / str(step)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            names = ("progress", "indexer_config", "checksums")
            items = {name: ocp.args.JsonRestore() for name in names}
            found = reader.restore(path, args=ocp.args.Composite(**items))
        texts = {name: found[name] for name in names[:2]}
        if digest(texts) != found["checksums"]["texts"]:
            raise ValueError(f"{' and '.join(texts)} have another digest than was saved")
        sums = table("checksums", found["checksums"])
        return indexer_config.from_json(texts["indexer_config"]), texts["progress"], sums
    except (ValueError, KeyError, TypeError, OSError) as why:
        raise _unreadable(path, why) from why


def finished_steps(run: Path) -> list[int]:
    """Steps of a run's finished checkpoints, ascending."""
    root = Path(run) / CHECKPOINTS
    names = os.listdir(root) if root.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def load_params(
    run: Path, step: int | None = None
) -> tuple[IndexerConfig, dict[str, np.ndarray], int]:
    """A checkpoint's indexer on the host: configuration, float32 leaves by name, and its step.

    Without a step it is the best one so far, or the newest where nothing was validated. Raises
    FileNotFoundError where the run, or the step, has no finished checkpoint.
    """
    run = Path(run)
    read_config(run)
    steps, root = finished_steps(run), run.absolute() / CHECKPOINTS
    if not steps or (step is not None and number("step", step, int) not in steps):
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        raise FileNotFoundError(f"{run} has no {what}, only of steps {steps}")
    chosen = steps[-1] if step is None else step
    if step is None:
        best = _read_json(root, chosen)[1]["best"]
        chosen = best if best in steps else chosen
    cfg, _, sums = _read_json(root, chosen)
    params = {n: np.zeros(s, np.float32) for n, s in leaf_shapes(cfg).items()}
    try:
        checksums.check_readable(root / str(chosen) / "params")
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            items = ocp.args.Composite(params=ocp.args.StandardRestore(params))
            found = reader.restore(root / str(chosen), args=items)["params"]
    except (ValueError, KeyError, OSError) as why:
        raise _unreadable(root / str(chosen), why) from why
    _check_sums(root / str(chosen), _sums(params=found), sums)
    return cfg, {name: np.asarray(found[name]) for name in params}, chosen
