"""Trains a small DeepSeek-V4 backbone from scratch: `python -m train.backbone`.

The same command goes on with a run that was stopped: by Ctrl-C (exit code 130) or SIGTERM (143),
which save first, by kill -9, or by a crash. RUN/backbone is what `infer.generate --ckpt` loads.
"""

import argparse
import signal
import sys
from pathlib import Path

import numpy as np

from evals.mini import vocabulary
from evals.tasks.config import read_mixture
from evals.tasks.rows import family_names
from evals.tasks.source import source
from lsa_jax import cli, config_io
from train import tables
from train.outputs import check_directory
from train.pretraining import loop
from train.pretraining.plan import PretrainConfig
from train.pretraining.saved import BACKBONE
from train.run.checkpoints import exclusive

_TOKENIZER = Path(vocabulary.__file__).with_name("tokenizer.json")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m train.backbone", description=__doc__, allow_abbrev=False)
    parser.add_argument("--config", required=True, help="TOML file, or mini: the shipped model's")
    parser.add_argument("--out", type=Path, required=True, help="directory of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="TABLE.FIELD=VALUE",
        help="override a field, such as run.seed=1; may be repeated",
    )
    return parser.parse_args(argv)


def _train(args: argparse.Namespace) -> int:
    """Runs the command; returns the exit code of a run that ended or was stopped."""
    cfg = tables.load(PretrainConfig, args.config, args.set, preset="mini")
    for i, stage in enumerate(cfg.stages):  # finds now what the stage would find in an hour
        read_mixture(stage.rows, f"stages[{i}].rows")
        source(stage.rows, np.random.default_rng(0), 1, stage.tokens)
    model = config_io.load_config(cfg.model)
    check_directory("--out", args.out)
    with exclusive(args.out):
        outcome = loop.pretrain(
            cfg,
            model,
            args.out,
            source,
            family_names(),
            files={_TOKENIZER.name: _TOKENIZER},
            progress=cli.step_progress,
        )
    if outcome.signal is not None:
        name, counts = signal.Signals(outcome.signal).name, f"{outcome.step:,} of {outcome.total:,}"
        print(f"{name}: saved at step {counts}; run it again to go on", file=sys.stderr)
        return 128 + outcome.signal
    print(f"{args.out / BACKBONE}: trained in {outcome.total:,} steps")
    return 0


def main(argv: list[str] | None) -> int:
    """The command but for its signals; returns the exit code."""
    args = _parse(argv)
    code = 0

    def body() -> None:
        nonlocal code
        code = _train(args)

    return cli.exit_code(body, interrupted="interrupted") or code
