"""What `evals.indexers` refuses before it begins: settings or a report that would be lost."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from lsa_jax import shardings
from lsa_jax.config import ConfigError
from lsa_jax.config_checks import refusal
from train.run.config import TrainConfig
from train.run.step import check_rows

GIVEN_BY = {
    "data.batch_size": "--batch-size",
    "data.seed": "--seeds",
    "data.target_layers": "--targets",
    "data.train": "--documents",
    "indexer.n_heads": "--heads",
    "indexer.q_lora_rank": "--rank",
    "optimizer.learning_rate": "--learning-rate",
    "run.seed": "--seeds",
    "run.steps": "--steps",
    "sampling.resident.page_entries": "--page-entries",
    "sampling.resident.recency": "--recency",
    "sampling.seed": "--seeds",
    "sampling.window": "--lookahead",
}
"""What --set must leave to the command: it judges by the same settings, and seeds differ by run."""


def check_sets(sets: Sequence[str], recipes: Mapping[str, Sequence[str]]) -> None:
    """ConfigError where --set gives what an option, or one of these recipes, sets."""
    given = dict(GIVEN_BY)
    for name, fields in recipes.items():
        given |= {_field(text): f"--recipes {name}" for text in fields}
    for text in sets:
        if (field := _field(text)) in given:
            raise ConfigError(f"--set must leave {field} to {given[field]}, got {text!r}")


def _field(text: str) -> str:
    return text.partition("=")[0].strip()


def check_run(cfg: TrainConfig) -> None:
    """ConfigError where a run could not begin, as far as can be told without its traces."""
    mesh = shardings.make_mesh(data=jax.device_count())
    check_rows(cfg.data.batch_size, mesh, cfg.optimizer.accumulate)
    if cfg.init.path and not Path(cfg.init.path).exists():
        raise refusal("init.path", cfg.init.path, "a file or directory that is there")


def check_report(path: Path, now: Mapping[str, Any]) -> None:
    """FileExistsError where a report is there with more than one of these settings would have."""
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text("utf-8"))["settings"]
        lost = [
            f"--{name} {','.join(before[name])}"
            for name in ("recipes", "budgets")
            if not set(before[name]) <= set(now[name])
        ]
        lost += [f"--seeds {before['seeds']}"] if before["seeds"] > now["seeds"] else []
        same = [name for name in ("policy", "layout") if before[name] != now[name]]
    except (ValueError, KeyError, TypeError) as why:
        wanted = f"a report of this command ({type(why).__name__})"
        raise FileExistsError(f"{path} must be {wanted}: --overwrite replaces it") from None
    lost += [f"--{name} {before[name]}" for name in same]
    if lost:
        how = "give these too, or replace it by --overwrite"
        raise FileExistsError(f"{path} is of {', '.join(lost)}, which would be lost: {how}")
