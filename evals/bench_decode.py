"""`infer.generate` with kernels and without: the same tokens, how fast, and CUDA graphs.

    python -m evals.bench_decode [--ckpt DIR] [--attention full,lsa] [--backends xla,auto] \\
        [--json F] [-- further options of infer.generate]

Every case is `python -m infer.generate` in a process of its own, greedily, on one prompt: random
ids, or with --task a question of `evals.tasks` to a long text, which a trained model answers
without doubt. Rounding may flip a random model's tokens, so the first that differs is printed. The
first backend is what the others are held to: name "xla", the definition, first. On NVIDIA GPUs XLA
writes down which kernels of a step it launches in CUDA graphs (--xla_dump_to, while it compiles);
those in loops within a step count once, and a program that JAX's compilation cache has is not
written down. Exit codes: 0, 1 where a case fails (the others run on) or its tokens differ, 2 after
an error.
"""

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from evals.suite.cases import TASKS, check_tasks
from evals.suite.options import listed, one_of
from evals.suite.running import write_text
from evals.tasks.examples import example
from evals.thunks import Launches, launches_of_a_step
from infer import arguments, embedded
from lsa_jax import cli, model_io
from lsa_jax.config import Backend, ConfigError
from train.outputs import check_file

ATTENTIONS = ("full", "lsa")
STEP_PROGRAMS = {"full": "decode", "lsa": "cycle"}
_ERROR = re.compile(r"(error:|[\w.]*(Error|Exception|Unsupported)\b)")  # of a traceback, or ours
DUMPED = "*{program}.thunk_sequence_after_thunk_passes.txt"


@dataclasses.dataclass(frozen=True)
class Case:
    """A way to decode."""

    attention: str
    backend: str


class CaseFailed(Exception):
    """The command of a case did not do what it was asked; the message says why."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came out of it; rates are tokens per second."""

    case: Case
    ids: list[int]
    decode: float | None
    prefill: float | None
    compile_seconds: float
    device: str
    jax: str
    launches: Launches | None  # None: XLA wrote nothing down


def prompt_ids(args: argparse.Namespace, vocab_size: int) -> list[int]:
    """The prompt: random ids, or a text and the first question to it."""
    rng = np.random.default_rng(args.seed)
    if args.task is None:
        return rng.integers(0, vocab_size, args.tokens).tolist()
    made = example(args.task, rng, args.tokens, 1)
    return [*made.haystack.tolist(), *made.questions[0].prompt]


def command(args: argparse.Namespace, case: Case, prompt: Path, out: Path) -> list[str]:
    """The command of a case."""
    words = [sys.executable, "-m", "infer.generate", "--prompt-ids", prompt]
    words += [] if args.ckpt is None else ["--ckpt", args.ckpt]
    words += ["--max-new-tokens", args.max_new_tokens, "--backend", case.backend, "--json", out]
    words += [] if args.task is not None else ["--ignore-eos"]
    if case.attention == "lsa":
        words += ["--attention", "lsa", "--kv-budget", args.kv_budget]
        words += [] if args.indexer is None else ["--indexer", args.indexer]
    return [str(word) for word in [*words, *args.further]]


def run(args: argparse.Namespace, case: Case, prompt: Path, folder: Path) -> Outcome:
    """Runs a case; CaseFailed, with the command's own word, where it fails."""
    out, dump = folder / "out.json", folder / "dump"
    pattern = f"--xla_dump_to={dump} --xla_dump_hlo_module_re=.*_{STEP_PROGRAMS[case.attention]}.*"
    # There is no other way to ask for it, and XLA reads it as a process starts.
    flags = {"XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {pattern}"}
    child = subprocess.run(
        command(args, case, prompt, out),
        env=os.environ | flags,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if child.returncode:
        raise CaseFailed(f"exit code {child.returncode}: {last_word(child.stderr)}")
    said = json.loads(out.read_text("utf-8"))
    return Outcome(
        case=case,
        ids=said["ids"],
        decode=said["decode"]["tokens_per_second"],
        prefill=said["prefill"]["tokens_per_second"],
        compile_seconds=said["compile_seconds"],
        device=said["device"],
        jax=said["jax_version"],
        launches=find_launches(dump, STEP_PROGRAMS[case.attention]),
    )


def last_word(stderr: str) -> str:
    """The last line that names an error; where none does, the last one."""
    lines = stderr.strip().splitlines() or ["no word"]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1])


def find_launches(dump: Path, program: str) -> Launches | None:
    """Those of the largest program of a name that was dumped, if any was."""
    files = sorted(dump.glob(DUMPED.format(program=program)), key=lambda path: path.stat().st_size)
    return launches_of_a_step(files[-1].read_text("utf-8")) if files else None


def first_difference(ids: Sequence[int], wanted: Sequence[int]) -> int | None:
    """Index of the first token that differs, an end included; None: there is none."""
    if list(ids) == list(wanted):
        return None
    both = zip(ids, wanted, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), min(len(ids), len(wanted)))


def table(outcomes: Sequence[Outcome], first: str) -> list[str]:
    """A line for each case, in Markdown, after a heading; they are held to the backend `first`."""
    lines = [
        "| attention, backend | decode, tok/s | of the first | tokens | kernels in CUDA graphs |"
        " outside | prefill, tok/s | compilation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in outcomes:
        base, same, ratio = base_of(found, outcomes, first), "nothing to hold them to", ""
        if base is not None:
            where = first_difference(found.ids, base.ids)
            same = f"{len(found.ids)}, the same" if where is None else f"differ from token {where}"
            if found.decode and base.decode:
                ratio = f"{found.decode / base.decode:.2f}x"
        counted = ["", ""] if found.launches is None else [*map(str, found.launches)]
        rates = ["" if rate is None else f"{rate:,.1f}" for rate in (found.decode, found.prefill)]
        name = f"{found.case.attention}, {found.case.backend}"
        cells = [name, rates[0], ratio, same, *counted, rates[1], f"{found.compile_seconds:.0f} s"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def base_of(found: Outcome, outcomes: Sequence[Outcome], first: str) -> Outcome | None:
    """The case of the backend `first` with the same attention; None where that failed."""
    return next((x for x in outcomes if x.case == Case(found.case.attention, first)), None)


def bench(args: argparse.Namespace) -> bool:
    """Runs all cases and prints the table; whether none failed and all tokens are the same."""
    ckpt = args.ckpt or _embedded()
    cfg = model_io.read_config(ckpt)
    if args.json is not None:
        check_file("--json", args.json)
    if args.task is not None:
        check_tasks(cfg, (args.task,), (args.tokens,))
    cases = [Case(attention, backend) for attention in args.attention for backend in args.backends]
    outcomes: list[Outcome] = []
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        prompt = Path(folder) / "prompt"
        prompt.write_text(" ".join(map(str, prompt_ids(args, cfg.vocab_size))), "utf-8")
        for index, case in enumerate(cases):
            print(f"{case.attention}, {case.backend} ..", file=sys.stderr, flush=True)
            inner = Path(folder) / str(index)
            inner.mkdir()
            try:
                outcomes.append(run(args, case, prompt, inner))
            except CaseFailed as why:
                failures.append(f"failed: {case.attention}, {case.backend}: {why}")
                print(failures[-1], file=sys.stderr, flush=True)
            if args.json is not None:  # after every case: a later one may take the machine down
                write_text(args.json, json.dumps(content(args, outcomes, failures), indent=1))
    if outcomes:
        device, version = outcomes[0].device, outcomes[0].jax
        print(f"{ckpt}, {args.tokens:,} tokens; {device}, JAX {version}")
        print("\n".join(table(outcomes, args.backends[0])))
    bases = [(found, base_of(found, outcomes, args.backends[0])) for found in outcomes]
    return not failures and all(base and found.ids == base.ids for found, base in bases)


def _embedded() -> Path:
    weights = embedded.find()
    if weights is None:
        raise ConfigError("--ckpt must be given: the package has no weights")
    return weights.checkpoint


def content(
    args: argparse.Namespace, outcomes: Sequence[Outcome], failures: Sequence[str]
) -> dict[str, Any]:
    """The content of --json."""
    said = {name: value for name, value in vars(args).items() if name != "json"}
    return {
        "settings": {name: str(x) if isinstance(x, Path) else x for name, x in said.items()},
        "cases": [dataclasses.asdict(found) for found in outcomes],
        "failures": list(failures),
    }


def _parse(argv: list[str] | None) -> argparse.Namespace:
    given = list(sys.argv[1:] if argv is None else argv)
    cut = given.index("--") if "--" in given else len(given)
    parser = cli.Parser(
        prog="python -m evals.bench_decode",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--ckpt", type=Path, help="of the model (default: the embedded one, with its indexer)")
    add("--indexer", type=Path, help="the memory indexer for LSA")
    kinds, names = listed(one_of(ATTENTIONS)), listed(one_of(get_args(Backend)))
    add("--attention", type=kinds, default=ATTENTIONS, help="default full,lsa")
    add("--backends", type=names, default=("xla", "auto"), help="default xla,auto")
    add("--tokens", type=arguments.positive, default=8192, help="of the prompt; default 8192")
    add("--task", type=one_of(TASKS), help="a question of this task; default: random ids")
    add("--seed", type=arguments.seed, default=0, help="of the prompt; default 0")
    add("--max-new-tokens", type=arguments.positive, default=257, help="default 257")
    add("--kv-budget", default="0.3", help="of LSA; default 0.3")
    add("--json", type=Path, help="everything that was found, rewritten after every case")
    args = parser.parse_args(given[:cut])
    args.further = given[cut + 1 :]
    return args


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)
    same = True

    def body() -> None:
        nonlocal same
        same = bench(args)

    return cli.exit_code(body, interrupted="interrupted") or (0 if same else 1)


if __name__ == "__main__":
    sys.exit(main())
