"""A pre-training run's directory: configuration, checkpoints, and the backbone at the end.

    RUN/config.json          the configuration, written first
    RUN/checkpoints/STEP/    state, progress: Orbax items; the state after STEP steps
    RUN/metrics.jsonl        `train.pretraining.metrics`
    RUN/backbone/            the checkpoint that `infer.generate` loads, written last
    RUN/lock                 held by the process that trains

A checkpoint gets its name when all of it is written. What is read is held against checksums.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Sharding

from lsa_jax import config_io
from lsa_jax.checkpoint.leaf import CheckpointError, LeafInfo
from lsa_jax.checkpoint.writer import write_checkpoint
from lsa_jax.config import ModelConfig
from lsa_jax.config_checks import refusal
from lsa_jax.parameters import parameter_table
from train import tables
from train.pretraining.lm_step import LmState
from train.pretraining.plan import FREE_FIELDS, PretrainConfig
from train.run import checksums

CONFIG, CHECKPOINTS, BACKBONE = "config.json", "checkpoints", "backbone"
SCHEMA = 1


def trained_fields(cfg: PretrainConfig) -> dict[str, Any]:
    """The fields that decide what is trained, by dotted name; `stages` is one of them."""
    return tables.fields(cfg, without=FREE_FIELDS)


def begin(run: Path, cfg: PretrainConfig, model: ModelConfig) -> None:
    """Writes the configuration of a new run, or finds that it was begun with the same one.

    ConfigError names the fields that differ. Without a checkpoint there is nothing to go on with.
    """
    file, now = run / CONFIG, {"config": tables.to_json(cfg), "model": config_io.to_json(model)}
    if file.exists() and _steps(run):
        before = _read(file)
        begun = trained_fields(tables.build(PretrainConfig, before["config"]))
        tables.check_same(begun, trained_fields(cfg), run)
        tables.check_same(before["model"], now["model"], run)
    partial = file.with_name(f"{CONFIG}.partial")
    partial.write_text(json.dumps({"schema": SCHEMA, **now}, indent=1))
    partial.rename(file)


def _read(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text("utf-8"))
        if raw["schema"] != SCHEMA:
            raise ValueError(f"its schema must be {SCHEMA}, got {raw['schema']!r}")
        return {name: raw[name] for name in ("config", "model")}
    except (ValueError, KeyError, TypeError) as why:
        raise CheckpointError(f"{file} is damaged ({' '.join(str(why).split())})") from None


def _steps(run: Path) -> list[int]:
    root = run / CHECKPOINTS
    names = [path.name for path in root.iterdir()] if root.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


class Saved:
    """Saves a run's states while it goes on, and restores the newest; a context manager."""

    def __init__(self, run: Path, *, keep: int) -> None:
        self._root = (run / CHECKPOINTS).absolute()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
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
        self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest finished checkpoint's step."""
        return self._manager.latest_step()

    def save(self, state: LmState, step: int, *, wait: bool) -> None:
        """Begins to save the state after `step` steps; it may be given away afterwards."""
        tree = state._asdict()
        progress = {"step": step, "checksums": checksums.checksums(tree)}
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree), progress=ocp.args.JsonSave(progress)
        )
        self._manager.save(step, args=args, force=True)
        if wait:
            self._manager.wait_until_finished()

    def restore(self, like: LmState, sharding: Sharding) -> LmState:
        """The newest state, whole on every device of `sharding`. CheckpointError names damage."""
        step = self.latest
        assert step is not None

        def on_devices(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        wanted = jax.tree.map(on_devices, like)._asdict()
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.Composite(
            state=ocp.args.PyTreeRestore(wanted, restore_args=restore_args),
            progress=ocp.args.JsonRestore(),
        )
        path = self._root / str(step)
        try:
            found = self._manager.restore(step, args=args)
            sums, stored = checksums.checksums(found["state"]), found["progress"]["checksums"]
        except (ValueError, KeyError, TypeError, OSError) as why:
            reason = " ".join(str(why).split())[:200]
            raise CheckpointError(f"{path} is damaged ({reason})") from None
        if wrong := checksums.damaged(sums, stored):
            raise CheckpointError(f"{path} is damaged: other checksums of {', '.join(wrong)}")
        return LmState(**found["state"])


def write_backbone(
    dst: Path,
    model: ModelConfig,
    state: LmState,
    files: Mapping[str, bytes | Path],
    *,
    source: str,
) -> None:
    """Writes the leaves as a checkpoint in float32, with `files` beside them. FileExistsError."""
    leaves = {p: np.asarray(x) for p, x in {**state.params, **state.fixed}.items()}
    table = parameter_table(model)
    if leaves.keys() != table.keys():
        raise refusal("leaves", sorted(leaves.keys() ^ table.keys()), "those of the model")
    infos = {path: LeafInfo(path, leaves[path].shape, leaves[path].dtype) for path in table}
    write_checkpoint(
        dst,
        model,
        infos,
        lambda path, start, stop: leaves[path][start:stop],
        files,
        identity={"source": source, "weights": "f32"},
    )
