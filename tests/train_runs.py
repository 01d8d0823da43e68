"""Small training runs on planted traces, and what tests compare of them."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from tests.train_traces import PAGE, planted_traces
from train.data.batch import Batch
from train.run import loop
from train.run.checkpoints import load_params
from train.run.config import TrainConfig
from train.run.progress import read_metrics
from train.run.splits import open_corpora
from train.tables import build


def shared_programs(cache: Path) -> dict[str, str]:
    """Environment of processes that run one after another: what one compiled, the next loads."""
    return {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


@contextlib.contextmanager
def compiled_once(cache: Path) -> Iterator[None]:
    """Runs in this process share their programs through a folder, as processes could."""
    settings = {
        "jax_compilation_cache_dir": str(cache),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


CLOCKED = ("steps_per_second", "samples_per_second", "wait_share")


def traces(root: Path) -> Path:
    """Three documents of 32 tokens to train on and one to validate with, below `root`."""
    size = {"tokens": 32, "prompt_entries": 60}
    planted_traces(root / "train", documents=3, **size)
    planted_traces(root / "validation", documents=1, seed=1, **size)
    return root


def config(root: Path, **tables: dict[str, Any]) -> TrainConfig:
    """A run of 12 steps with checkpoints at 4, 8 and 12; `tables` add to or replace fields."""
    raw: dict[str, dict[str, Any]] = {
        "data": {
            "train": [str(root / "train")],
            "batch_size": 8,
            "sizes": 1,  # one program to compile
            "threads": 1,
        },
        "sampling": {"window": 8, "resident": {"recency": 2 * PAGE, "page_entries": PAGE}},
        "indexer": {"n_heads": 4, "q_lora_rank": 12},
        "optimizer": {"learning_rate": 0.01},
        "run": {
            "steps": 12,
            "checkpoint_every": 4,
            "log_every": 3,
            "compute_dtype": "float32",
            "validate_interval": 8,
            "validate_top": 8,
        },
    }
    for name, fields in tables.items():
        raw.setdefault(name, {}).update(fields)
    return build(TrainConfig, raw)


class Audit:
    """Which samples each step was computed from; stops the run in a step's middle if asked to."""

    def __init__(self) -> None:
        self.samples: dict[int, list[list[int]]] = {}

    def __call__(self, step: int, batch: Batch) -> None:
        self.samples[step] = batch.sample.tolist()


def train(cfg: TrainConfig, run: Path, observe: loop.Observer | None = None) -> loop.Outcome:
    return loop.train(cfg, open_corpora(cfg), run, observe=observe)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The run's metrics without what a clock decides."""
    return [{k: x for k, x in line.items() if k not in CLOCKED} for line in read_metrics(run)]


def assert_same_run(got: Path, want: Path) -> None:
    """Bit for bit the same parameters and, clocks aside, the same metrics."""
    (_, a, step), (_, b, other) = load_params(got), load_params(want)
    assert step == other
    for name, leaf in b.items():
        np.testing.assert_array_equal(a[name].view(np.uint32), leaf.view(np.uint32), err_msg=name)
    assert (got / "indexer.safetensors").read_bytes() == (want / "indexer.safetensors").read_bytes()
    assert metrics(got) == metrics(want)


def toml(cfg: TrainConfig, path: Path) -> Path:
    """The configuration as a file."""
    lines: list[str] = []

    def write(table: dict[str, Any], name: str) -> None:
        lines.append(f"[{name}]" if name else "")
        inner = {key: x for key, x in table.items() if isinstance(x, dict)}
        for key, value in table.items():
            if key not in inner:
                lines.append(f"{key} = {json.dumps(False if value is None else value)}")
        for key, value in inner.items():
            write(value, f"{name}.{key}".lstrip("."))

    write(dataclasses.asdict(cfg), "")
    path.write_text("\n".join(lines))
    return path
