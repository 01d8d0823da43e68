"""`python -m infer.generate --demo`: one long text, questions about it, full attention beside LSA.

The text is prefilled once. Every question is answered twice from there, with all KV on the device
and with what the memory indexer keeps of it; a map shows which pages those were.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evals.suite.answers import Answers
from evals.suite.cases import Case, Cell, capacity_for, check_tasks, draw
from evals.suite.measure import Measure, evidence_entries
from evals.suite.prefix import Asked, Prefixes
from evals.suite.replies import Reply
from evals.suite.variants import Base, Variant
from evals.tasks.question import Question
from evals.tasks.show import text_of
from infer import arguments, embedded, report
from lsa_jax import cli, model_io
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import CacheConfig, ComputeConfig, ConfigError
from lsa_jax.lsa import indexer_io
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.indexer_file import IndexerFile
from lsa_jax.lsa.indexer_reader import read_indexer

TASK, QUESTIONS = "niah_multikey_1", 8
LOOKAHEAD, PAGE_ENTRIES, RECENCY = 16, 2, 16
COLUMNS = 64  # of the map as text
HOST, RESIDENT, FOUND, LOST = range(4)
_MARKS = ".#O!"
_LEGEND = ". on the host   # on the device   O evidence on the device   ! evidence on the host"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Demo:
    """The options, and where the weights are."""

    ckpt: Path
    indexer: Path
    context: int
    seed: int
    kv_budget: str
    json: Path | None
    plot: Path | None


def parse(argv: list[str]) -> Demo:
    """The options; bad ones end the process with one line and exit code 2."""
    parser = cli.Parser(
        prog="python -m infer.generate --demo", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--demo", action="store_true", help=argparse.SUPPRESS)
    add("--ckpt", type=Path, help="a checkpoint that knows the tasks; default: the embedded one")
    add("--indexer", type=Path, metavar="FILE", help="its memory indexer; default: the embedded")
    add("--context", type=arguments.positive, default=8192, help="tokens; default 8192")
    add("--seed", type=arguments.seed, default=0, help="another text; default 0")
    add("--kv-budget", default="0.10", help="KV on the device with LSA; default 0.10 of all")
    add("--json", type=Path, metavar="FILE", help="correct answers and bytes of both")
    add("--plot", type=Path, metavar="FILE.png", help="the map; needs matplotlib")
    given = vars(parser.parse_args(argv))
    given.pop("demo")
    try:
        arguments.budget(given["kv_budget"])
        given |= _weights(given["ckpt"], given["indexer"])
        return Demo(**given)
    except (argparse.ArgumentTypeError, CheckpointError, ConfigError) as why:
        parser.error(str(why))


def _weights(ckpt: Path | None, indexer: Path | None) -> dict[str, Path]:
    """Both as given, or both embedded."""
    if ckpt is not None and indexer is not None:
        return {"ckpt": ckpt, "indexer": indexer}
    if ckpt is not None or indexer is not None:
        raise ConfigError("--ckpt and --indexer must be given together with --demo, got one")
    own = embedded.find()
    if own is None:
        raise ConfigError("--demo needs --ckpt DIR and --indexer FILE: no weights are embedded")
    return {"ckpt": own.checkpoint, "indexer": own.indexer}


def _check_files(demo: Demo) -> None:
    """Raises ConfigError unless the files that are asked for can be written."""
    for option, path in (("--json", demo.json), ("--plot", demo.plot)):
        if path is None:
            continue
        if path.is_dir() or not os.access(path.absolute().parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{option} must be a file that can be written, got {path}")
    if demo.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, got none: pip install 'lsa_jax[plot]'")


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is known before a weight is read."""

    base: Base
    compute: ComputeConfig
    indexer: IndexerFile
    lsa: Variant
    case: Case[Question]


def prepare(demo: Demo) -> Setup:
    """Reads configurations and draws the text; ConfigError where something does not fit."""
    _check_files(demo)
    cfg = model_io.read_config(demo.ckpt)
    check_tasks(cfg, [TASK], [demo.context])
    file = read_indexer(demo.indexer, cfg)
    compute = ComputeConfig(dtype="float32" if jax.default_backend() == "cpu" else "bfloat16")
    base = Base(
        cfg=cfg,
        cache=CacheConfig(kv_format=compute.dtype, page_entries=PAGE_ENTRIES),
        targets=file.config.target_layers,
        recency=RECENCY,
        sink=0,
        window_bytes=4 if compute.dtype == "float32" else 2,
        lookback=file.config.lookback,
    )
    lsa = Variant(
        arm="lsa",
        budget=demo.kv_budget,
        lookahead=LOOKAHEAD,
        page_entries=PAGE_ENTRIES,
        policy="budget",
    )
    base.check([lsa], [demo.context])
    cell = Cell(task=TASK, length=demo.context, seed=demo.seed, haystack=0)
    case = draw(cell, QUESTIONS)
    if len(case.questions) < QUESTIONS:
        got = f"{demo.context} tokens hold {len(case.questions)}"
        raise ConfigError(f"--context must have room for {QUESTIONS} questions, {got}")
    return Setup(base, compute, file, lsa, case)


@dataclasses.dataclass(frozen=True)
class Side:
    """One way to answer: what was said, and the records of it."""

    name: str
    replies: list[Reply]
    records: list[dict[str, Any]]

    @property
    def correct(self) -> int:
        """Answers that are right."""
        return sum(record["score"] == 1 for record in self.records)

    @property
    def device_bytes(self) -> int:
        """KV bytes of a request, the most of them all."""
        return max(record["device"] for record in self.records)

    @property
    def share(self) -> float:
        """The KV share of that request."""
        return max(record["device"] / record["full"] for record in self.records)

    def as_json(self) -> dict[str, int]:
        """For `--json`."""
        total = len(self.records)
        return {"correct": self.correct, "total": total, "kv_device_bytes": self.device_bytes}


def read_and_answer(demo: Demo, setup: Setup) -> tuple[Side, Side]:
    """Loads the model, prefills the text once, and answers everything with both."""
    embedded.announce(demo.ckpt)
    print(f"loading {demo.ckpt}", file=sys.stderr)
    model = model_io.load_model(demo.ckpt, compute=setup.compute)
    calibration = None
    if setup.indexer.calibration is not None:
        calibration = Calibration.from_json(json.dumps(setup.indexer.calibration))
    indexer = indexer_io.from_file(setup.indexer)
    prefixes = Prefixes(model, setup.base.cache, setup.base.targets, lookback=setup.base.lookback)
    answers = Answers(setup.base, model, indexer, calibration)
    case, capacity = setup.case, capacity_for(demo.context)
    questions = [question.prompt.tolist() for question in case.questions]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        ready = pool.submit(_rehearse, prefixes, answers, setup.lsa, questions, capacity)
        with cli.token_progress(len(case.haystack), "prefill") as advance:
            state = prefixes.read(case.haystack, capacity, _steps(advance))
        ready.result()
    asked = prefixes.ask(state, questions)
    run = functools.partial(_side, answers, Measure(setup.base), case, asked, capacity)
    return run("full attention", Variant(arm="full")), run("LSA", setup.lsa)


def _rehearse(
    prefixes: Prefixes, answers: Answers, lsa: Variant, questions: list[list[int]], capacity: int
) -> None:
    """Asks about no text and drops the answers: what reads questions and answers is compiled by
    then. A CPU prefills on one core, so that this costs no time on two."""
    asked = prefixes.ask(prefixes.empty(capacity), questions)
    for variant in (Variant(arm="full"), lsa):
        answers.run(asked, variant, new_tokens=[2] * len(questions), capacity=capacity)


def _steps(advance: Callable[[int], None]) -> Callable[[int], None]:
    """From tokens done so far to tokens since the last call."""
    shown = 0

    def update(done: int) -> None:
        nonlocal shown
        advance(done - shown)
        shown = done

    return update


def _side(
    answers: Answers,
    measure: Measure,
    case: Case[Question],
    asked: Asked,
    capacity: int,
    name: str,
    variant: Variant,
) -> Side:
    print(f"answering with {name}", file=sys.stderr)
    replies = answers.run(asked, variant, new_tokens=case.new_tokens, capacity=capacity)
    return Side(name, replies, measure.records(case, variant, replies))


def residency(setup: Setup, replies: Sequence[Reply]) -> np.ndarray:
    """uint8 [questions, pages of the text]: what was where in the cycles of each answer."""
    size = PAGE_ENTRIES * setup.base.cfg.csa_ratio
    grid = np.zeros((len(replies), -(-len(setup.case.haystack) // size)), np.uint8)
    for row, (question, reply) in enumerate(zip(setup.case.questions, replies, strict=True)):
        pages = sorted({page for cycle in reply.cycles for page in cycle.pages})
        pages += range(min(cycle.complete for cycle in reply.cycles), grid.shape[1])
        evidence = evidence_entries(question, setup.base.cfg.csa_ratio) // PAGE_ENTRIES
        grid[row, [page for page in pages if page < grid.shape[1]]] = RESIDENT
        grid[row, evidence] = np.where(grid[row, evidence] == HOST, LOST, FOUND)
    return grid


def as_text(grid: np.ndarray) -> list[str]:
    """A line of marks for each question; a mark shows the most telling of its pages."""
    parts = np.array_split(grid, min(COLUMNS, grid.shape[1]), axis=1)
    return ["".join(_MARKS[part[row].max()] for part in parts) for row in range(len(grid))]


def show(setup: Setup, full: Side, lsa: Side, grid: np.ndarray) -> None:
    """Prints what was asked, what both said, and the map."""
    for i, question in enumerate(setup.case.questions):
        print(f"\n{i}: {text_of(question.prompt)} (right: {text_of(question.answer)})")
        for side in (full, lsa):
            mark = "+" if side.records[i]["score"] == 1 else "-"
            print(f"   {mark} {side.name}: {text_of(side.replies[i].tokens)}")
    print(f"\nResident pages of the text for each answer with LSA\n{_LEGEND}")
    for i, line in enumerate(as_text(grid)):
        print(f"{i} |{line}|")
    tokens = len(setup.case.haystack)
    print(f"\n{tokens:,} tokens, prefilled once; KV bytes of a request, the most of all")
    for side in (full, lsa):
        size = f"{side.device_bytes / 1e6:.3f} MB ({100 * side.share:.1f} %)"
        right = f"{side.correct} of {len(side.records)} correct"
        print(f"{side.name:>15}: {right}, KV on the device {size}")


def run(demo: Demo) -> None:
    """The demonstration, from the text to the files."""
    began = time.perf_counter()
    setup = prepare(demo)
    full, lsa = read_and_answer(demo, setup)
    grid = residency(setup, lsa.replies)
    show(setup, full, lsa, grid)
    seconds = time.perf_counter() - began
    print(f"{seconds:.1f} s")
    if demo.plot is not None:
        plots = importlib.import_module("evals.suite.plots")  # needs matplotlib, which is optional
        size = PAGE_ENTRIES * setup.base.cfg.csa_ratio
        figure = plots.residency(grid, page_tokens=size)
        report.write(demo.plot, lambda file: figure.savefig(file, format="png"))
    if demo.json is not None:
        content = {"full": full.as_json(), "lsa": lsa.as_json()}
        content |= {"context": demo.context, "seconds": seconds}
        text = json.dumps(content, indent=1).encode()
        report.write(demo.json, lambda file: file.write(text))


def main(argv: list[str]) -> int:
    """Entry point; returns the exit code."""
    demo = parse(argv)
    cli.show_log()
    return cli.exit_code(lambda: run(demo), interrupted="interrupted")
