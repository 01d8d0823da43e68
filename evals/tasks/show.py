"""Prints an example as text with its evidence marked: python -m evals.tasks.show --family vt.

With --bench, prints how many tokens of training rows one core draws in a second, by length.
"""

import sys
import time
from typing import get_args

import numpy as np

from evals.mini.vocabulary import Vocabulary, vocabulary
from evals.tasks.config import MixtureConfig
from evals.tasks.examples import example
from evals.tasks.families import FAMILIES, check_families
from evals.tasks.plan import TooShort
from evals.tasks.question import Example, Question, Split
from evals.tasks.rows import rows
from lsa_jax import cli
from lsa_jax.config import ConfigError

_OPEN, _CLOSE = "\n>>>", " <<<\n"
_LENGTHS = (512, 1024, 2048, 4096)
_BATCH_TOKENS = 1 << 15


def text_of(ids: np.ndarray | list[int], table: Vocabulary | None = None) -> str:
    """Text of ids that have one; a byte that is no ASCII character becomes U+FFFD."""
    texts = (table or vocabulary()).texts
    return "".join(texts[int(id_)] or "\ufffd" for id_ in ids)


def marked(haystack: np.ndarray, questions: tuple[Question, ...]) -> str:
    """The haystack's text, every piece of evidence on a line of its own between arrows."""
    spans = sorted({span for question in questions for span in question.evidence})
    out, done = [], 0
    for start, end in spans:
        out += [text_of(haystack[done:start]), _OPEN, text_of(haystack[start:end]), _CLOSE]
        done = end
    return "".join([*out, text_of(haystack[done:])])


def describe(made: Example) -> str:
    """An example for people."""
    lines = [marked(made.haystack, made.questions), ""]
    for i, question in enumerate(made.questions):
        held = ", held out" if question.held_out else ""
        lines.append(f"{i}: {text_of(question.prompt)} => {text_of(question.answer)}")
        lines.append(f"   phrasing {question.template}{held}; evidence {list(question.evidence)}")
    return "\n".join(lines)


def bench(family: str, tokens: int, seconds: float = 2.0) -> float:
    """Tokens a second of rows of one family, with echoes, in this process's CPU time."""
    mixture = MixtureConfig(weights={family: 1.0}, echoes=(6, 10))
    rng, batch = np.random.default_rng(0), _BATCH_TOKENS // tokens
    rows(mixture, rng, batch, tokens)
    began, count = time.process_time(), 0
    while time.process_time() - began < seconds:
        rows(mixture, rng, batch, tokens)
        count += batch * tokens
    return count / (time.process_time() - began)


def show(family: str, tokens: int, questions: int, split: Split, seed: int) -> None:
    """Prints one example."""
    try:
        made = example(family, np.random.default_rng(seed), tokens, questions, split)
    except TooShort as why:
        raise ConfigError(f"--tokens {tokens}: {why}") from why
    print(describe(made))


def show_bench(family: str) -> None:
    """Prints throughput by length."""
    check_families("--family", [family])
    for tokens in _LENGTHS:
        print(f"{family}, {tokens} tokens: {bench(family, tokens):,.0f} tokens/s")


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = cli.Parser(prog="python -m evals.tasks.show", description=__doc__)
    parser.add_argument("--family", default="niah_single_2", help=", ".join(FAMILIES))
    parser.add_argument("--tokens", type=int, default=1024, help="of haystack and question")
    parser.add_argument("--questions", type=int, default=4)
    parser.add_argument("--split", choices=get_args(Split), default="test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bench", action="store_true", help="time training rows instead")
    args = parser.parse_args(argv)
    if args.bench:
        return cli.exit_code(lambda: show_bench(args.family), interrupted="interrupted")
    shape = (args.family, args.tokens, args.questions, args.split, args.seed)
    return cli.exit_code(lambda: show(*shape), interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
