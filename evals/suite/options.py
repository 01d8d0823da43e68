"""The command line of `python -m evals.run`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from evals.suite.cases import TASKS
from evals.suite.records import WHOLE, Part
from evals.suite.variants import ARMS, LsaPolicy
from infer import arguments
from lsa_jax import cli
from lsa_jax.config import KVFormat
from lsa_jax.lsa.indexer_config import Ensemble

DESCRIPTION = """\
Asks a model questions about long texts, with each arm of attention at the same KV bytes on the
device. Every haystack is prefilled once, for all arms and questions. Answers are appended to
OUT/answers.jsonl as they come, and the same command goes on from there; then OUT/results.json and
OUT/results.md are written. A small model leaves a GPU idle most of the time: --together N answers
the questions of N haystacks in one batch, which in bfloat16 may round otherwise, and several
processes may share the GPU, each with --part I/N; the command without --part then writes the
results. --cells FILE.toml has several products of options in one run, each a table [[cells]]; those
that ask the same share prefills. Exit codes: 0, 2 after an error (one line), 130 after Ctrl-C."""

KV_FORMATS: dict[str, KVFormat] = {"f32": "float32", "bf16": "bfloat16", "fp8": "fp8"}


SUITES = "mini (default): generated tasks; official: files of benchmarks that are given"


def separated[T](convert: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Values separated by commas, each as `convert` reads it."""
    return lambda text: tuple(convert(part) for part in text.split(","))


def listed[T](convert: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Distinct values separated by commas, each as `convert` reads it."""

    def read(text: str) -> tuple[T, ...]:
        found = separated(convert)(text)
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"must be distinct values, got {text!r}")
        return found

    return read


def one_of(names: Sequence[str]) -> Callable[[str], str]:
    """One of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise argparse.ArgumentTypeError(f"must be among {', '.join(names)}, got {text!r}")
        return text

    return read


def part(text: str) -> Part:
    """Such as 2/8."""
    numbers = text.split("/")
    if len(numbers) == 2 and all(n.isascii() and n.isdecimal() and len(n) < 4 for n in numbers):
        found = Part(*map(int, numbers))
        if 1 <= found.index <= found.count:
            return found
    raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N < 1000, got {text!r}")


def budget(text: str) -> str:
    """A budget as it is written, once it is known to be one."""
    arguments.budget(text)
    return text


# What a cell of --cells may say, as the options of these names.
CELL_OPTIONS: dict[str, Callable[[str], Any]] = {
    "arms": listed(one_of(ARMS)),
    "kv_budget": listed(budget),
    "tasks": listed(str),
    "lengths": listed(arguments.positive),
    "seeds": arguments.positive,
    "questions": arguments.positive,
    "lookahead": listed(arguments.positive_count),
    "page_entries": listed(arguments.positive_count),
    "policy": listed(one_of(get_args(LsaPolicy))),
    "threshold": listed(arguments.inner),
    "recall_gate": listed(arguments.positive_number),
    "ensemble": listed(one_of(get_args(Ensemble))),
    "fallback": listed(arguments.bound),
    "patience": listed(arguments.positive_count),
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options; bad ones end the process with one line and exit code 2."""
    parser = cli.Parser(prog="python -m evals.run", description=DESCRIPTION, allow_abbrev=False)
    add = parser.add_argument
    add("--suite", choices=("mini", "official"), default="mini", help=SUITES)
    add("--ckpt", type=Path, required=True, help="directory of the checkpoint")
    add("--indexer", type=Path, metavar="FILE", help="memory indexer, for the arm lsa")
    add("--out", type=Path, required=True, metavar="DIR", help="answers, tables, figures")
    of, arms = CELL_OPTIONS, ("full", "lsa", "recency", "random")
    add("--arms", type=of["arms"], default=arms, help=", ".join(ARMS))
    add("--kv-budget", type=of["kv_budget"], default=("0.10",), help="one or more; default 0.10")
    _add_questions(parser)
    _add_files(parser)
    _add_axes(parser)
    _add_machine(parser)
    return parser.parse_args(argv)


def _add_files(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("files, for --suite official").add_argument
    ends = {"ruler": ".jsonl, one of each task", "longbench": "data.json of LongBench-v2"}
    ends |= {
        "longmemeval": ".json; containment stands in for its judge",
        "mrcr": ".parquet, .jsonl",
    }
    for name, help_ in ends.items():
        add(f"--{name}", type=Path, nargs="+", default=(), metavar="FILE", help=help_)
    help_ = "leave longer items out, which is said; default: refuse what the model has no room for"
    add("--max-tokens", type=arguments.positive, help=help_)


def _add_questions(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("questions, for --suite mini").add_argument
    of = CELL_OPTIONS
    help_ = "several products of options: tables [[cells]] with what is not as the options say, of "
    add("--cells", type=Path, metavar="FILE.toml", help=help_ + ", ".join(CELL_OPTIONS))
    add("--tasks", type=of["tasks"], default=TASKS, help=f"default: {', '.join(TASKS)}")
    add("--lengths", type=of["lengths"], default=(8192,), help="tokens, one or more; default 8192")
    add("--seeds", type=of["seeds"], default=3, help="seeds 0, 1, ..; default 3")
    help_ = "at least so many of each task, length and seed; default 40"
    add("--questions", type=of["questions"], default=40, help=help_)
    help_ = "questions about one haystack, answered at a time; default 8"
    add("--per-haystack", type=arguments.positive, default=8, help=help_)


def _add_axes(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("settings of the arms (several: ablations)").add_argument
    of = CELL_OPTIONS
    help_ = "steps between recalls; default 16"
    add("--lookahead", type=of["lookahead"], default=(16,), help=help_)
    add("--page-entries", type=of["page_entries"], default=(4,), help="default 4")
    help_ = "of lsa: budget (default), threshold"
    add("--policy", type=of["policy"], default=("budget",), help=help_)
    help_ = "of lsa; default: as calibrated in the indexer's file, else 0.5"
    add("--threshold", type=of["threshold"], default=(None,), help=help_)
    help_ = "of lsa: what its best entries must be worth; default: none"
    add("--recall-gate", type=of["recall_gate"], default=(None,), help=help_)
    help_ = "of lsa; default: the indexer's own"
    add("--ensemble", type=of["ensemble"], default=(None,), help=help_)
    help_ = "off (default) or missed mass; several"
    add("--fallback", type=of["fallback"], default=(None,), help=help_)
    help_ = "tokens in a row that miss more than --fallback; default: judged at boundaries only"
    add("--patience", type=of["patience"], default=(None,), help=help_)
    help_ = "last entries that are always wanted; default 16"
    add("--recency", type=arguments.count, default=16, help=help_)
    add("--sink", type=arguments.count, default=0, help="first ones; default 0")
    add("--target-layers", type=arguments.ordinals, help="default: the indexer's, else the model's")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how it runs").add_argument
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--kv", choices=("auto", *KV_FORMATS), default="auto", help="default: as --dtype")
    add("--prefill-chunk", type=arguments.positive, default=1024, help="tokens; default 1024")
    help_ = "haystacks of a size and a seed whose questions are answered at a time; default 1"
    add("--together", type=arguments.positive, default=1, metavar="N", help=help_)
    help_ = "answer every N-th haystack from the I-th on, and write no results"
    add("--part", type=part, default=WHOLE, metavar="I/N", help=help_)
    add("--plot", action="store_true", help="figures too; needs matplotlib")
    help_ = "Markdown whose generated blocks are replaced: of all tables, or of their averages"
    add("--write-into", type=Path, nargs="+", default=(), metavar="FILE.md", help=help_)
