"""Documents of `evals.indexers`: haystacks with all of their questions, and traces of them."""

import argparse
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

import numpy as np

from evals.suite.cases import RETRIEVAL, TASKS
from evals.suite.options import listed, one_of, part, separated
from evals.suite.records import WHOLE
from evals.suite.running import write_text
from evals.tasks.examples import example
from evals.tasks.question import Split
from infer import arguments
from lsa_jax.checkpoint import manifest
from lsa_jax.config import ConfigError
from lsa_jax.lsa.accounting import Layout
from train import dump_traces
from train.quality.evaluation import open_traces
from train.tables import check_same

SPLITS: dict[str, Split] = {"train": "train", "held_out": "test"}
_WHAT_TRACES_DEPEND_ON = (  # beside the checkpoint
    *("documents", "held_out", "tokens", "questions", "tasks", "more", "data_seed", "targets"),
    *("min_layers", "page_entries", "prefill_chunk"),
)


class Stopped(Exception):
    """A stage that ended with an exit code of its own, having said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def stage(command: Callable[[list[str]], int], argv: Sequence[object]) -> None:
    """Runs a command in this process; Stopped where it fails."""
    code = command([str(word) for word in argv])
    if code:
        raise Stopped(code)


def add_documents(parser: argparse.ArgumentParser) -> None:
    """The options that say what is recorded."""
    add = parser.add_argument_group("documents").add_argument
    whole = arguments.positive
    add("--documents", type=whole, default=40, help="to train on; default 40")
    add("--held-out", type=whole, default=40, help="to judge with; default 40")
    help_ = "of a document's haystack, default 8192; of several lengths each round has the next"
    add("--tokens", type=listed(whole), default=(8192,), metavar="N,..", help=help_)
    add("--questions", type=whole, default=8, help="of a haystack, at most; default 8")
    tasks = one_of(TASKS)
    help_ = f"a round: a document of each; default: all, such as {RETRIEVAL[0]}"
    add("--tasks", type=listed(tasks), default=TASKS, help=help_)
    help_ = "further documents of every round of training, such as vt,vt; default none"
    more = separated(tasks)
    add("--more", type=more, default=(), metavar="TASK,..", help=help_)
    add("--data-seed", type=arguments.seed, default=0, help="of the documents; default 0")
    add("--targets", type=arguments.ordinals, default=(3,), help="CSA ordinals; default 3")
    help_ = "layers whose votes make an entry golden; default 1"
    add("--min-layers", type=whole, default=1, help=help_)
    add("--page-entries", type=whole, default=4, help="default 4")
    add("--prefill-chunk", type=whole, default=1024, help="tokens; default 1024")
    add("--layout", choices=get_args(Layout), default="planes640", help="default planes640: fp8")
    help_ = "records the I-th of N parts of the documents, and ends; the command without it goes on"
    add("--part", type=part, default=WHOLE, metavar="I/N", help=help_)


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
    asked = [ids for question in made.questions for ids in (question.prompt, question.answer)]
    line = {"ids": made.haystack.tolist(), "answer": np.concatenate(asked).tolist()}
    return json.dumps(line | {"task": task, "split": split, "index": index})


def counts(args: argparse.Namespace) -> dict[str, int]:
    """Documents of each split."""
    return {"train": args.documents, "held_out": args.held_out}


def lengths(tokens: Sequence[int], documents: int, tasks: int) -> list[int]:
    """Tokens of each document: the same in a round of all tasks, the next in the next round."""
    return [tokens[index // tasks % len(tokens)] for index in range(documents)]


def prompts(args: argparse.Namespace, name: str) -> str:
    """The documents of a split, a line each, task after task in turn."""
    split, tasks = SPLITS[name], args.tasks
    tasks += args.more if name == "train" else ()
    lines = []
    for index, tokens in enumerate(lengths(args.tokens, counts(args)[name], len(tasks))):
        place = index % len(tasks)
        room = (tokens, args.questions, args.data_seed)
        lines.append(document(tasks[place], split, *room, index))
    return "".join(line + "\n" for line in lines)


def write_prompts(path: Path, text: str) -> None:
    """Writes a split's documents; ConfigError where others are there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    elif path.read_text("utf-8") != text:
        raise ConfigError(f"{path} must be what evals.tasks draws now: choose another --out")


def dump(args: argparse.Namespace, name: str, text: str) -> None:
    """The traces of a split, or of this process's part, those that are not there yet.

    Raises ConfigError where one is not to be had.
    """
    count, out = counts(args)[name], args.out / "traces" / name
    path = args.out / "prompts" / f"{name}.jsonl"
    write_prompts(path, text)
    first, end = ((args.part.index - 1 + i) * count // args.part.count for i in (0, 1))
    if first == end:
        return
    longest = max(len(json.loads(line)["answer"]) for line in text.splitlines())
    options = ["--ckpt", args.ckpt, "--prompts", path, "--out", out, "--replay"]
    options += ["--start-idx", first, "--end-idx", end]
    options += ["--max-new-tokens", longest, "--min-layers", args.min_layers]
    options += ["--targets", ",".join(map(str, args.targets)), "--page-entries", args.page_entries]
    stage(dump_traces.main, [*options, "--prefill-chunk", args.prefill_chunk])
    if args.part == WHOLE and (found := len(open_traces([out]))) != count:
        raise ConfigError(f"{out} must have the {count} documents of {path}, got {found}")


def begin(args: argparse.Namespace) -> None:
    """Notes what the traces are of, or holds it against what OUT was begun with.

    Runs have notes of their own, which `train.indexer` keeps.
    """
    digest = manifest.file_digest(args.ckpt / manifest.NAME)
    given = {name: getattr(args, name) for name in _WHAT_TRACES_DEPEND_ON}
    now = {"checkpoint": digest, **given}
    now = {name: list(x) if isinstance(x, tuple) else x for name, x in now.items()}
    path = args.out / "settings.json"
    if path.exists():
        check_same(json.loads(path.read_text("utf-8")), now, args.out)
        return
    args.out.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(now, indent=1) + "\n")
