"""Two recipes for the memory indexer on one backbone's traces, judged at equal device bytes:
`python -m evals.indexers --ckpt DIR --out DIR`.

    prompts   haystacks of `evals.tasks` and, to be replayed, their questions with the answers;
              training documents of the training split, held-out ones of the test split
    traces    `train.dump_traces` of both
    runs      `train.indexer` on the training traces: every recipe with every seed, the same steps
    report    `train.evaluate`'s study of the held-out traces; report.json, report.md, pareto.png

All by the commands' own code. What a stage left in OUT is not made again, so the same command goes
on with one that was stopped, and takes more recipes, seeds and budgets. Exit codes: 0, 2 after an
error (one line), 130 after Ctrl-C.
"""

import argparse
import importlib
import importlib.util
import json
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import jax
import numpy as np

from evals.indexers_checks import check_report, check_run, check_sets
from evals.indexers_report import Judged, Place, write
from evals.suite.cases import RETRIEVAL, TASKS, check_tasks
from evals.suite.options import listed, one_of
from evals.suite.running import write_text
from evals.tasks.examples import example
from evals.tasks.question import Split
from infer import arguments
from lsa_jax import cli, model_io
from lsa_jax.checkpoint import manifest
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.lsa.accounting import Layout
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.targets import check_targets
from train import dump_traces, indexer
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
from train.tables import check_same

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

SPLITS: dict[str, Split] = {"train": "train", "held_out": "test"}
_DOCUMENTS = (  # what traces depend on, beside the checkpoint
    *("documents", "held_out", "tokens", "questions", "tasks", "data_seed", "targets"),
    *("min_layers", "page_entries", "prefill_chunk"),
)


class Stopped(Exception):
    """A stage that ended with an exit code of its own, having said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _stage(command: Callable[[list[str]], int], argv: Sequence[object]) -> None:
    code = command([str(word) for word in argv])
    if code:
        raise Stopped(code)


def key(split: Split, tokens: int, seed: int, index: int) -> list[int]:
    """Seeds a document's generator: other documents do not change it."""
    return [zlib.crc32(split.encode()), tokens, seed, index]


def document(task: str, split: Split, tokens: int, questions: int, seed: int, index: int) -> str:
    """A line for `train.dump_traces --replay`: a haystack, and all its questions with answers.

    The haystack and its longest question fit into `tokens` tokens. Raises ConfigError where the
    task does not fit.
    """
    rng = np.random.default_rng(key(split, tokens, seed, index))
    made = example(task, rng, tokens, questions, split)
    asked = [part for question in made.questions for part in (question.prompt, question.answer)]
    line = {"ids": made.haystack.tolist(), "answer": np.concatenate(asked).tolist()}
    return json.dumps(line | {"task": task, "split": split, "index": index})


def counts(args: argparse.Namespace) -> dict[str, int]:
    """Documents of each split."""
    return {"train": args.documents, "held_out": args.held_out}


def prompts(args: argparse.Namespace, name: str) -> str:
    """The documents of a split, a line each, task after task in turn."""
    split, tasks = SPLITS[name], args.tasks
    room = (args.tokens, args.questions, args.data_seed)
    lines = [document(tasks[i % len(tasks)], split, *room, i) for i in range(counts(args)[name])]
    return "".join(line + "\n" for line in lines)


def write_prompts(path: Path, text: str) -> None:
    """Writes a split's documents; ConfigError where others are there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    elif path.read_text("utf-8") != text:
        raise ConfigError(f"{path} must be what evals.tasks draws now: choose another --out")


def dump(args: argparse.Namespace, name: str, text: str) -> None:
    """The traces of a split, those that are not there yet. Raises ConfigError where one is not to
    be had."""
    count, out = counts(args)[name], args.out / "traces" / name
    path = args.out / "prompts" / f"{name}.jsonl"
    write_prompts(path, text)
    longest = max(len(json.loads(line)["answer"]) for line in text.splitlines())
    options = ["--ckpt", args.ckpt, "--prompts", path, "--out", out, "--replay"]
    options += ["--max-new-tokens", longest, "--min-layers", args.min_layers]
    options += ["--targets", ",".join(map(str, args.targets)), "--page-entries", args.page_entries]
    _stage(dump_traces.main, [*options, "--prefill-chunk", args.prefill_chunk])
    if (found := len(open_traces([out]))) != count:
        raise ConfigError(f"{out} must have the {count} documents of {path}, got {found}")


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
    _stage(indexer.main, [*options, *sets])
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


def begin(args: argparse.Namespace) -> None:
    """Notes what the traces are of, or holds it against what OUT was begun with.

    Runs have notes of their own, which `train.indexer` keeps.
    """
    digest = manifest.file_digest(args.ckpt / manifest.NAME)
    now = {"checkpoint": digest, **{name: getattr(args, name) for name in _DOCUMENTS}}
    now = {name: list(x) if isinstance(x, tuple) else x for name, x in now.items()}
    path = args.out / "settings.json"
    if path.exists():
        check_same(json.loads(path.read_text("utf-8")), now, args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(now, indent=1) + "\n")


def check(args: argparse.Namespace) -> ModelConfig:
    """Everything that can be checked before a weight is read; ConfigError says what is wrong."""
    check_directory("--out", args.out)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, got none: pip install 'lsa_jax[plot]'")
    cfg = model_io.read_config(args.ckpt)
    check_tasks(cfg, args.tasks, (args.tokens,))
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
    _add_documents(parser)
    _add_training(parser)
    return parser.parse_args(argv)


def _budget(text: str) -> str:
    arguments.budget(text)
    return text


def _add_documents(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("documents").add_argument
    whole = arguments.positive
    add("--documents", type=whole, default=40, help="to train on; default 40")
    add("--held-out", type=whole, default=40, help="to judge with; default 40")
    add("--tokens", type=whole, default=8192, help="of a document's haystack; default 8192")
    add("--questions", type=whole, default=8, help="of a haystack, at most; default 8")
    tasks = listed(one_of(TASKS))
    add("--tasks", type=tasks, default=TASKS, help=f"default: all, such as {RETRIEVAL[0]}")
    add("--data-seed", type=arguments.seed, default=0, help="of the documents; default 0")
    add("--targets", type=arguments.ordinals, default=(3,), help="CSA ordinals; default 3")
    help_ = "layers whose votes make an entry golden; default 1"
    add("--min-layers", type=whole, default=1, help=help_)
    add("--page-entries", type=whole, default=4, help="default 4")
    add("--prefill-chunk", type=whole, default=1024, help="tokens; default 1024")
    add("--layout", choices=get_args(Layout), default="planes640", help="default planes640: fp8")


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
