"""Accuracy of every arm at equal device bytes: `python -m evals.run --ckpt DIR --out DIR`."""

import argparse
import dataclasses
import datetime
import functools
import hashlib
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax

from evals.suite import tables
from evals.suite.answers import Answers
from evals.suite.cases import MiniGrid, check_lengths, check_tasks
from evals.suite.cells import Block, Given, all_variants, averaged, given, merged, named
from evals.suite.measure import Measure
from evals.suite.official import READERS, OfficialGrid, read_grid
from evals.suite.options import KV_FORMATS, parse
from evals.suite.prefix import Prefixes
from evals.suite.records import WHOLE, Log
from evals.suite.running import Machine, run, write_text
from evals.suite.summary import Line, summarise
from evals.suite.variants import Axes, Base
from lsa_jax import cli, model_io
from lsa_jax.checkpoint import manifest
from lsa_jax.config import (
    CacheConfig,
    ComputeConfig,
    ComputeDType,
    ConfigError,
    ModelConfig,
)
from lsa_jax.lsa import indexer_io
from lsa_jax.lsa.indexer_file import IndexerFile
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.targets import check_targets, default_target_layers
from lsa_jax.text.tokenizer import Tokenizer
from train.outputs import check_directory, check_file
from train.study_options import calibration_of

_LINE_SECONDS = 5.0  # between progress lines


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that is known before a weight is read."""

    base: Base
    compute: ComputeConfig
    indexer: IndexerFile | None
    blocks: tuple[Block, ...]
    averaged: Mapping[int, Collection[str]]  # tasks by length
    seeds: tuple[int, ...]  # how many, the counts of all blocks; none for files


def prepare(args: argparse.Namespace) -> Setup:
    """Reads configurations and the indexer, and checks all that can be; ConfigError says what."""
    check_directory("--out", args.out)
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, got none: pip install 'lsa_jax[plot]'")
    for path in args.write_into:
        check_file("--write-into", path)
        tables.marked(read_text(path), str(path))
    cfg = model_io.read_config(args.ckpt)
    cells = given(args)
    for cell in cells:
        if "lsa" in cell.options.arms and args.indexer is None:
            raise ConfigError(f"{cell.where}--arms lsa needs --indexer FILE, got none")
    file = None if args.indexer is None else read_indexer(args.indexer, cfg)
    targets = file.config.target_layers if file else args.target_layers
    if file and args.target_layers not in (None, targets):
        raise ConfigError(f"--target-layers must be the indexer's {targets}, or not be given")
    pages = {size for cell in cells for size in cell.options.page_entries}
    compute = compute_config(args.dtype)
    kv = compute.dtype if args.kv == "auto" else KV_FORMATS[args.kv]
    base = Base(
        cfg=cfg,
        # Full attention's pages, where cells do not agree, are as the option says.
        cache=CacheConfig(
            kv_format=kv, page_entries=pages.pop() if len(pages) == 1 else args.page_entries[0]
        ),
        targets=check_targets(cfg, targets or default_target_layers(cfg)),
        recency=args.recency,
        sink=args.sink,
        window_bytes=jax.numpy.dtype(compute.dtype).itemsize,
        lookback=file.config.lookback if file else 1,
    )
    blocks = [make_block(cell, base) for cell in cells]
    seeds = sorted({cell.options.seeds for cell in cells}) if args.suite == "mini" else ()
    return Setup(base, compute, file, merged(blocks), averaged(blocks), tuple(seeds))


def make_block(cell: Given, base: Base) -> Block:
    """What a cell asks of which variants; ConfigError for what cannot be, which names the cell."""
    with named(cell.where):
        grid = make_grid(cell.options, base.cfg)
        variants = axes(cell.options).variants()
        base.check(variants, grid.lengths)
    return Block(grid, variants)


def make_grid(args: argparse.Namespace, cfg: ModelConfig) -> MiniGrid | OfficialGrid:
    """What is asked; ConfigError where the model cannot be."""
    files = {name: getattr(args, name) for name in READERS}
    if args.suite == "official":
        tokenizer = Tokenizer.from_dir(args.ckpt, model_vocab_size=cfg.vocab_size)
        grid = read_grid(files, tokenizer, args.max_tokens)
        if grid.left_out:
            print(f"{grid.left_out} items are longer than --max-tokens", file=sys.stderr)
        check_lengths(cfg, grid.lengths)
        return grid
    if any(files.values()):
        raise ConfigError(f"--{next(n for n, f in files.items() if f)} needs --suite official")
    check_tasks(cfg, args.tasks, args.lengths)
    return MiniGrid(
        tasks=args.tasks,
        lengths=args.lengths,
        seeds=args.seeds,
        questions=args.questions,
        each=args.per_haystack,
    )


def compute_config(dtype: Literal["auto"] | ComputeDType) -> ComputeConfig:
    """Arithmetic: bfloat16 on accelerators and float32 on CPU, unless it is said."""
    auto: ComputeDType = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return ComputeConfig(dtype=auto if dtype == "auto" else dtype)


def axes(args: argparse.Namespace) -> Axes:
    """The combinations that the options ask for; ConfigError where one would mean nothing."""
    if any(args.patience) and not any(args.fallback):
        raise ConfigError("--patience needs a --fallback, got off")
    return Axes(
        arms=args.arms,
        budgets=args.kv_budget,
        lookaheads=args.lookahead,
        page_entries=args.page_entries,
        policies=args.policy,
        thresholds=args.threshold,
        recall_gates=args.recall_gate,
        ensembles=args.ensemble,
        fallbacks=args.fallback,
        patiences=args.patience,
    )


def settings(args: argparse.Namespace, setup: Setup) -> dict[str, Any]:
    """What every answer depends on beside its place and its variant."""
    base = setup.base
    digest = manifest.file_digest(args.ckpt / manifest.NAME)
    return {
        "suite": args.suite,
        "checkpoint": digest,
        "indexer": args.indexer and hashlib.sha256(args.indexer.read_bytes()).hexdigest(),
        "dtype": setup.compute.dtype,
        "kv_format": base.cache.kv_format,
        "targets": list(base.targets),
        "recency": base.recency,
        "sink": base.sink,
        "per_haystack": args.per_haystack,
        "files": [manifest.file_digest(file) for name in READERS for file in getattr(args, name)],
        "max_tokens": args.max_tokens,
    }


def load(args: argparse.Namespace, setup: Setup) -> Machine:
    """The model on the device, and what asks it."""
    print(f"loading {args.ckpt}", file=sys.stderr)
    model = model_io.load_model(args.ckpt, compute=setup.compute)
    indexer = calibration = None
    if setup.indexer is not None:
        indexer = indexer_io.from_file(setup.indexer)
        calibration = calibration_of(args.indexer, setup.indexer)
    base = setup.base
    return Machine(
        Prefixes(
            model,
            base.cache,
            base.targets,
            chunk=args.prefill_chunk,
            lookback=base.lookback,
        ),
        Answers(base, model, indexer, calibration),
        Measure(base),
        args.per_haystack if args.suite == "mini" else 1,  # an item of a file is one question
    )


def read_text(path: Path) -> str:
    """A document; ConfigError where it is not UTF-8."""
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"--write-into must be UTF-8 text, got {path}") from None


def write_results(
    args: argparse.Namespace,
    lines: list[Line],
    held: dict[str, Any],
    seeds: Sequence[int],
    made: Sequence[str],
) -> None:
    """Tables, and pictures where they are wanted. `made` says what made the answers."""
    drawn = f", {' or '.join(map(str, seeds))} seeds" if seeds else ""
    told = f"`{args.suite}` suite{drawn}, {held['dtype']}, KV as {held['kv_format']}"
    told = "; ".join([told, *made]) + "."
    text = tables.markdown(lines, heading=f"## Measured: {args.suite}", source=told)
    blocks = {"tables": text, "overview": tables.overview(lines, source=told)}
    content = tables.to_text(tables.as_json(lines, settings=held, made=list(made)))
    write_text(args.out / "results.json", content)
    write_text(args.out / "results.md", text)
    texts = {path: tables.into(read_text(path), blocks, str(path)) for path in args.write_into}
    for path, whole in texts.items():
        write_text(path, whole)
    if args.plot:
        plots = importlib.import_module("evals.suite.plots")  # needs matplotlib, which is optional
        for name, figure in plots.every(lines):
            figure.savefig(args.out / f"{name}.png")


def show_now_and_then() -> Callable[[str], None]:
    """Prints lines to stderr, at most one in a while."""
    last = -_LINE_SECONDS

    def show(line: str) -> None:
        nonlocal last
        if time.monotonic() - last >= _LINE_SECONDS:
            last = time.monotonic()
            print(f"suite: {line}", file=sys.stderr, flush=True)

    return show


def evaluate(args: argparse.Namespace) -> None:
    """Checks everything, asks what has not been asked, writes the results where that is all."""
    setup = prepare(args)
    held = settings(args, setup)
    kind, today = jax.devices()[0].device_kind, datetime.datetime.now(datetime.UTC).date()
    log = Log(args.out, held, args.part, made=f"{kind}, JAX {jax.__version__}, {today}")
    machine = functools.partial(load, args, setup)
    keys = run(setup.blocks, log, machine, show_now_and_then(), args.part, args.together)
    if args.part != WHOLE:
        print(f"part {args.part.index} of {args.part.count} is done", file=sys.stderr)
        return
    records = log.of(keys)
    lines = summarise(records, all_variants(setup.blocks), setup.averaged)
    made = sorted({record.get("made") or "answers of unknown hardware" for record in records})
    write_results(args, lines, held, setup.seeds, made)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse(argv)
    cli.show_log()
    return cli.exit_code(lambda: evaluate(args), interrupted="interrupted: answers are kept")


if __name__ == "__main__":
    sys.exit(main())
