"""Two recipes for the memory indexer on one backbone's traces, judged at equal device bytes:
`python -m evals.indexers --ckpt DIR --out DIR`.

    prompts   haystacks of `evals.tasks` and, to be replayed, their questions with the answers;
              training documents of the training split, held-out ones of the test split
    traces    `train.dump_traces` of both
    runs      `train.indexer` on the training traces: every recipe with every seed, the same steps
    report    `train.evaluate`'s study of the held-out traces; report.json, report.md, pareto.png

All by the commands' own code. What a stage left in OUT is not made again, so the same command goes
on with one that was stopped, and takes more recipes, seeds and budgets. A small model leaves a GPU
idle most of the time: several processes, each with --part I/N, make the traces together, and the
command without --part then goes on. Exit codes: 0, 2 after an error (one line), 130 after Ctrl-C.
"""

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax

from evals.indexers_checks import check_report, check_run, check_sets
from evals.indexers_documents import SPLITS, Stopped, add_documents, begin, dump, prompts, stage
from evals.indexers_report import Judged, Place, write
from evals.suite.cases import check_tasks
from evals.suite.options import listed, one_of
from evals.suite.records import WHOLE
from infer import arguments
from lsa_jax import cli, model_io
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.targets import check_targets
from train import indexer
from train.data.labels import ResidentRule
from train.outputs import check_directory
from train.quality.baselines import BASELINES, PagePolicy
from train.quality.evaluation import open_traces
from train.quality.metrics import MetricsConfig
from train.quality.pareto import DeviceRoom, parse_budgets
from train.quality.study import Protocol, Study, study
from train.run.checkpoints import INDEXER
from train.run.config import load_train_config
from train.study_options import settings

RECIPES: dict[str, tuple[str, ...]] = {
    "authors": (),
    "ours": (
        *("sampling.causal=true", "objective.focal=0.0", "objective.share=1.0"),
        "indexer.score=softmax",
    ),
    "distilled": ("sampling.evictable_only=true", "objective.focal=0.0", "objective.mass=1.0"),
    "evictable": ("sampling.evictable_only=true",),
    "mass": ("objective.focal=0.0", "objective.mass=1.0"),
    "missed": ("sampling.evictable_only=true", "objective.focal=0.0", "objective.missed=1.0"),
}
"""What each recipe sets on top of `configs/indexer.toml`, which is the authors'."""


def overrides(args: argparse.Namespace, recipe: str, seed: int) -> list[str]:
    """The `--set` of a run: sizes that are the same in every recipe, the recipe's own, the seed."""
    same = {
        "indexer.n_heads": args.heads,
        "indexer.q_lora_rank": args.rank,
        "sampling.window": args.lookahead,
        "sampling.resident.recency": args.recency,
        "sampling.resident.page_entries": args.page_entries,
        "data.workers": 0,
        "data.batch_size": args.batch_size,
        "optimizer.learning_rate": args.learning_rate,
        "run.steps": args.steps,
    }
    seeds = {name: seed for name in ("run.seed", "data.seed", "sampling.seed")}
    words = [f"{name}={value}" for name, value in (same | seeds).items()]
    return [*words, *args.set, *RECIPES[recipe]]


def train(args: argparse.Namespace, recipe: str, seed: int) -> Path:
    """The indexer of a recipe and a seed; one that is there is held to the settings only."""
    run = args.out / "runs" / f"{recipe}_{seed}"
    options = ["--config", "indexer", "--data", args.out / "traces" / "train", "--out", run]
    sets = [word for text in overrides(args, recipe, seed) for word in ("--set", text)]
    stage(indexer.main, [*options, *sets])
    return run / INDEXER


def judge(
    args: argparse.Namespace, cfg: ModelConfig, files: Mapping[str, Sequence[Path]]
) -> dict[str, Judged]:
    """A study of every recipe's indexers on the held-out traces, seed by seed."""
    traces = open_traces([args.out / "traces" / "held_out"])
    rule = ResidentRule(recency=args.recency, page_entries=args.page_entries)
    metrics = MetricsConfig(ks=(), resident=rule)
    sizes = {"layout": args.layout, "targets": args.targets, "page_entries": args.page_entries}
    room = DeviceRoom(cfg=cfg, lookahead=args.lookahead, **sizes)
    budgets, window = parse_budgets(",".join(args.budgets)), args.lookahead
    decisions = sum(-(-trace.tokens // window) for trace in traces)
    total = decisions * sum(map(len, files.values()))
    found: dict[str, Judged] = {}
    with cli.token_progress(total, "evaluate") as progress:
        for recipe, paths in files.items():
            studies: list[Study] = []
            for seed, path in enumerate(paths):
                file = read_indexer(path, cfg)
                protocol = Protocol(
                    metrics=metrics,
                    budgets=budgets,
                    interval=window,
                    window=window,
                    taus=(window,),
                    policy=args.policy,
                    baselines=BASELINES,
                    seed=seed,
                )
                studies.append(study(from_file(file), traces, room, protocol, progress))
            found[recipe] = Judged(studies, RECIPES[recipe])
    return found


def check(args: argparse.Namespace) -> ModelConfig:
    """Everything that can be checked before a weight is read; ConfigError says what is wrong."""
    check_directory("--out", args.out)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, got none: pip install 'lsa_jax[plot]'")
    cfg = model_io.read_config(args.ckpt)
    check_tasks(cfg, args.tasks, args.tokens)
    check_targets(cfg, args.targets)
    check_sets(args.set, {recipe: RECIPES[recipe] for recipe in args.recipes})
    for recipe in args.recipes:
        check_run(load_train_config("indexer", overrides(args, recipe, 0)))
    if not args.overwrite:
        check_report(args.out / "report.json", settings(args))
    return cfg


def run(args: argparse.Namespace) -> str:
    """All stages; returns the tables."""
    cfg = check(args)
    texts = {name: prompts(args, name) for name in SPLITS}  # before anything is written
    begin(args)
    for name, text in texts.items():
        dump(args, name, text)
    if args.part != WHOLE:
        return f"part {args.part.index} of {args.part.count} is done"
    files = {
        recipe: [train(args, recipe, seed) for seed in range(args.seeds)] for recipe in args.recipes
    }
    place = Place(jax.devices()[0].device_kind, jax.__version__, settings(args))
    return write(args.out, judge(args, cfg, files), args.budgets, place, plot=args.plot)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m evals.indexers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="directory of the backbone's checkpoint")
    add("--out", type=Path, required=True, metavar="DIR", help="all stages; made if not there")
    recipes = listed(one_of(tuple(RECIPES)))
    add("--recipes", type=recipes, default=("authors", "ours"), help=", ".join(RECIPES))
    add("--seeds", type=arguments.positive, default=3, help="0, 1, .. of each recipe; default 3")
    add("--budgets", type=listed(_budget), default=("0.08", "0.10", "0.135", "0.20"))
    policies = get_args(PagePolicy)
    add("--policy", choices=policies, default="budget", help="of pages; default budget")
    add("--plot", action="store_true", help="pareto.png too; needs matplotlib")
    help_ = "replaces a report with other recipes or budgets, more seeds, another policy or layout"
    add("--overwrite", action="store_true", help=help_)
    add_documents(parser)
    _add_training(parser)
    return parser.parse_args(argv)


def _budget(text: str) -> str:
    arguments.budget(text)
    return text


def _add_training(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("training, the same for every recipe").add_argument
    whole = arguments.positive
    add("--steps", type=whole, default=1000, help="default 1000")
    rate = arguments.checked(float, lambda x: 0 < x < 1, "a number in (0, 1)")
    add("--learning-rate", type=rate, default=1e-4, help="default: the authors' 1e-4")
    add("--batch-size", type=whole, default=64, help="default 64")
    add("--heads", type=whole, default=64, help="of the memory indexer; default 64")
    add("--rank", type=whole, default=256, help="of its queries; default 256")
    add("--lookahead", type=whole, default=16, help="tokens that a decision serves; default 16")
    add("--recency", type=arguments.count, default=16, help="newest entries, kept; default 16")
    help_ = "any field of configs/indexer.toml that no option or recipe sets, for every recipe"
    add("--set", action="append", default=[], metavar="TABLE.FIELD=VALUE", help=help_)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)
    stopped = 0

    def body() -> None:
        nonlocal stopped
        try:
            print(run(args))
        except Stopped as why:
            stopped = why.code

    return cli.exit_code(body, interrupted="interrupted: what was made is kept") or stopped


if __name__ == "__main__":
    sys.exit(main())
