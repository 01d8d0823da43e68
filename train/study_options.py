"""Options that `train.evaluate` and `train.calibrate` share, and what they come to."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.footprint import RUNNING_LAYOUT
from lsa_jax.lsa.accounting import Layout
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.indexer_file import IndexerFile
from lsa_jax.lsa.policy import PolicyConfig, check_threshold
from train.data.labels import ResidentRule
from train.export import Source, read_source
from train.quality.baselines import PagePolicy
from train.quality.pareto import DeviceRoom
from train.traces.trace import Trace


def counts(text: str) -> tuple[int, ...]:
    """For argparse: ascending positive integers such as "128,256"; none for an empty text."""
    parts = text.split(",") if text else []
    if not all(part.isdecimal() and 0 < len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"must be integers such as 128,256, got {text!r}")
    found = tuple(map(int, parts))
    if list(found) != sorted(set(found)) or 0 in found:
        raise argparse.ArgumentTypeError(f"must be positive and strictly ascending, got {text!r}")
    return found


def count(text: str) -> int:
    """For argparse: a positive integer."""
    if not text.isdecimal() or len(text) > 9 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def natural(text: str) -> int:
    """For argparse: an integer from 0."""
    return 0 if text == "0" else count(text)


def inner(text: str) -> float:
    """For argparse: a number strictly between 0 and 1."""
    try:
        value = float(text)
        check_threshold("it", value)
    except ValueError as why:  # ConfigError is one
        raise argparse.ArgumentTypeError(str(why)) from None
    return value


def add_study(parser: argparse.ArgumentParser) -> None:
    """Adds the options: which traces, where in them, and what a page takes."""
    add = parser.add_argument
    add(
        *("--traces", "-t"),
        type=Path,
        nargs="+",
        action="extend",
        required=True,
        metavar="DIR",
        help="trace sets, or single traces; may be repeated",
    )
    add("--config", default="v4_flash", help="the traces' backbone: a preset, .toml, config.json")
    layout = f"bytes of an entry (default: {RUNNING_LAYOUT})"
    add("--layout", choices=get_args(Layout), default=RUNNING_LAYOUT, help=layout)
    add("--interval", type=count, default=64, help="decisions at every so many tokens (64)")
    window = "tokens that a decision serves, from its own on (64)"
    add("--window", type=count, default=64, help=window)
    recency = "newest entries that are always on the device (default: as decoding's: a page; "
    recency += f"{PolicyConfig().recency} for the policy published)"
    add("--recency", type=natural, help=recency)
    add("--sink", type=natural, default=0, help="first entries that are, too (0)")
    add("--verify", action="store_true", help="hold all arrays against their digests first")


def page_entries(traces: Sequence[Trace]) -> int:
    """Entries of a page, one for all traces. Raises ConfigError."""
    first = traces[0]
    for trace in traces:
        if trace.info.page_entries != first.info.page_entries:
            pair = [f"{t.path}: {t.info.page_entries}" for t in (first, trace)]
            raise ConfigError(f"page_entries must be one for all traces, got {', '.join(pair)}")
    return first.info.page_entries


def resident_rule(
    args: argparse.Namespace, traces: Sequence[Trace], policy: PagePolicy = "budget"
) -> ResidentRule:
    """What is always on the device."""
    size, recency = page_entries(traces), args.recency
    if recency is None:
        recency = PolicyConfig().recency if policy == "published" else size
    return ResidentRule(recency=recency, sink=args.sink, page_entries=size)


def device_room(
    args: argparse.Namespace, cfg: ModelConfig, indexer: IndexerConfig, rule: ResidentRule
) -> DeviceRoom:
    """What an indexer's budgets have room for."""
    return DeviceRoom(
        cfg=cfg,
        layout=args.layout,
        targets=indexer.target_layers,
        page_entries=rule.page_entries,
        lookahead=args.window,
    )


def read_indexer(path: Path, cfg: ModelConfig | None = None, *, named: str = "") -> Source:
    """The indexer that --indexer gives, held to the backbone, if any, that --config calls `named`.

    Raises as `read_source`, naming the option to change.
    """
    if not path.exists():
        wanted = "a run's directory, an indexer file or an export"
        raise FileNotFoundError(f"--indexer must be {wanted}, got {str(path)!r}: nothing is there")
    try:
        return read_source(path, cfg)
    except CheckpointError as why:
        if "must be the model's" not in str(why):
            raise
        raise CheckpointError(f"{why} (the model is --config {named})") from None


def calibration_of(path: Path, file: IndexerFile) -> Calibration | None:
    """The thresholds that an indexer's file brings, if it does; CheckpointError on others."""
    if file.calibration is None:
        return None
    try:
        return Calibration.from_json(json.dumps(file.calibration))
    except ConfigError as why:
        raise CheckpointError(f"indexer {path}: {why} (--threshold goes without it)") from None


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The command line for a report."""

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return {name: plain(value) for name, value in sorted(vars(args).items())}
