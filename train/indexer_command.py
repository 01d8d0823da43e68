"""Trains a memory indexer on traces: `python -m train.indexer --config indexer --out RUN`.

The same command goes on with a run that was stopped: by Ctrl-C (exit code 130) or SIGTERM (143),
which save first where a step was begun, by kill -9, or by a crash. Every process of a run of
several is started with the same arguments but its own --process-id, and stopping one stops all.
"""

import argparse
import functools
import json
import signal
import sys
from pathlib import Path

import jax

from lsa_jax import cli
from lsa_jax.config import ConfigError
from train.data.statistics import describe
from train.outputs import check_directory, check_file
from train.run import loop
from train.run.checkpoints import INDEXER
from train.run.config import TrainConfig, load_train_config
from train.run.interrupts import end_at_signals
from train.run.progress import read_metrics, require
from train.run.splits import open_corpora


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m train.indexer", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--config", required=True, help="TOML file, or indexer: the authors' recipe"
    )
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        help="override a field, such as run.steps=1000; may be repeated",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="trace sets to train on, in place of data.train; may be repeated",
    )
    parser.add_argument(
        "--validation",
        nargs="+",
        action="extend",
        metavar="DIR",
        help="in place of data.validation; may be repeated",
    )
    parser.add_argument(
        "--coordinator", type=_coordinator, metavar="HOST:PORT", help="of the first process"
    )
    parser.add_argument("--processes", type=int, help="how many there are")
    parser.add_argument("--process-id", type=int, help="which one this is, from 0")
    parser.add_argument("--tensorboard", action="store_true", help="events in RUN/tensorboard")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw losses and recall at the end"
    )
    args = parser.parse_args(argv)
    together = (args.coordinator, args.processes, args.process_id)
    if any(x is None for x in together) and any(x is not None for x in together):
        parser.error("--coordinator, --processes and --process-id must be given together")
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes must be >= 1, got {args.processes}")
    if args.processes is not None and not 0 <= args.process_id < args.processes:
        parser.error(f"--process-id must be in 0..{args.processes - 1}, got {args.process_id}")
    return args


def _coordinator(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not (port.isascii() and port.isdecimal() and 0 < int(port[:6]) < 2**16):
        raise argparse.ArgumentTypeError(f"must be HOST:PORT, got {text!r}")
    return text


def _config(args: argparse.Namespace) -> TrainConfig:
    overrides = list(args.set)
    for split, dirs in (("train", args.data), ("validation", args.validation)):
        if dirs:
            overrides.append(f"data.{split}={json.dumps(dirs)}")
    return load_train_config(args.config, overrides)


def _train(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code of a run that ended or was stopped."""
    cfg = _config(args)
    _check_outputs(args)
    if args.coordinator is not None:
        _join(args)
    corpora = open_corpora(cfg)
    first = jax.process_index() == 0
    if first:
        for line in describe(corpora, cfg.sampling, cfg.data).lines():
            print(line, file=sys.stderr)
    outcome = loop.train(
        cfg,
        corpora,
        args.out,
        tensorboard=args.tensorboard,
        progress=functools.partial(cli.step_progress, shown=first),
    )
    if first:
        _report(args, outcome)
    return 0 if outcome.signal is None else 128 + outcome.signal


def _check_outputs(args: argparse.Namespace) -> None:
    """Refuses what could not be written, now rather than after hours of training."""
    check_directory("--out", args.out)
    if args.plot is not None:
        require("--plot", "matplotlib", "plot")
        from train.run.curves import formats

        check_file("--plot", args.plot, suffixes=formats())
    if args.tensorboard:
        require("--tensorboard", "tensorboardX", "tensorboard")


def _join(args: argparse.Namespace) -> None:
    """Meets the other processes; ConfigError where they do not come."""
    try:
        jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
    except RuntimeError as why:
        reason = " ".join(str(why).split())[:200]
        wanted = f"where {args.processes} processes meet"
        raise ConfigError(
            f"--coordinator must be {wanted}, got {args.coordinator} ({reason})"
        ) from None
    end_at_signals()  # it has put a handler of its own for SIGTERM


def _report(args: argparse.Namespace, outcome: loop.Outcome) -> None:
    """Says how it ended; draws it."""
    counts = f"step {outcome.step:,} of {outcome.total:,}, {outcome.skipped:,} skipped"
    if outcome.signal is not None:
        name = signal.Signals(outcome.signal).name
        print(f"{name}: saved at {counts}; run it again to go on", file=sys.stderr)
        return
    best = (
        f"best at step {outcome.best:,}: recall {outcome.score:.4f}; " if outcome.best > 0 else ""
    )
    print(f"{args.out / INDEXER}: {best}{counts}")
    if args.plot is not None:
        from train.run.curves import run_curves

        run_curves(read_metrics(args.out), title=str(args.out)).savefig(args.plot)


def main(argv: list[str] | None) -> int:
    """The command but for its signals; returns the exit code."""
    args = _parse(argv)
    code = 0

    def body() -> None:
        nonlocal code
        code = _train(args)

    return cli.exit_code(body, interrupted="interrupted") or code
