"""The loop of a run: haystacks in order, one prefill each, the answers that are still missing."""

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from evals.suite.answers import Answers
from evals.suite.cases import Case, Cell, capacity_for
from evals.suite.cells import Block
from evals.suite.measure import Measure
from evals.suite.prefix import Prefixes, join, widen
from evals.suite.records import WHOLE, Key, Log, Part, key_of
from evals.suite.variants import Variant


def work_of(case: Case[Any]) -> int:
    """Questions times tokens: what a case is likely to take."""
    return len(case.questions) * case.cell.length


@dataclasses.dataclass
class Progress:
    """Work done, for a line such as "42 % (vt, 8192 tokens), 1:02:03 left"."""

    total: int
    seen: int = 0
    run: int = 0
    began: float = dataclasses.field(default_factory=time.monotonic)

    def add(self, work: int, *, new: bool) -> None:
        """Counts a case; `new` says that it was run now, and tells of speed."""
        self.seen += work
        self.run += work if new else 0

    def line(self, case: Case[Any]) -> str:
        """Where the run is, and how long the rest will take at the speed so far."""
        share = min(1.0, self.seen / max(1, self.total))
        where = f"{100 * share:.0f} % ({case.cell.task}, {case.cell.length:,} tokens)"
        if not self.run:
            return where
        left = (time.monotonic() - self.began) / self.run * max(0, self.total - self.seen)
        minutes, seconds = divmod(round(left), 60)
        return f"{where}, {minutes // 60}:{minutes % 60:02}:{seconds:02} left"


def capacity_of(case: Case[Any]) -> int:
    """Tokens that each row of a case has room for."""
    return max(capacity_for(case.cell.length), case.most_tokens)


@dataclasses.dataclass(frozen=True)
class Machine:
    """A loaded model with what asks it; `rows` questions of a haystack are answered at a time."""

    prefixes: Prefixes
    answers: Answers
    measure: Measure
    rows: int

    def answer(
        self, cases: Sequence[Case[Any]], variants: Sequence[Variant], log: Log, together: int = 1
    ) -> None:
        """Prefills each haystack once, and logs what each variant answers to all of them.

        The cases, up to `together`, have one capacity and one seed. Batches have `rows` rows for
        each of `together` haystacks, the last ones of each idle, so that few programs are compiled;
        a question without others has a batch of one where `together` is 1.
        """
        alone = together == 1 and len(cases[0].questions) == 1
        rows, capacity = 1 if alone else self.rows, capacity_of(cases[0])
        parts, new = [], []
        for case in cases:
            state = self.prefixes.read(case.haystack, capacity)
            prompts = [question.prompt.tolist() for question in case.questions]
            parts.append(widen(self.prefixes.ask(state, prompts), rows))
            new += [*case.new_tokens, *[1] * (rows - len(prompts))]
        asked = widen(join(parts), rows * together)
        new += [1] * (rows * together - len(new))
        options = {"new_tokens": new, "capacity": capacity, "seed": cases[0].cell.seed}
        for variant in variants:
            replies = self.answers.run(asked, variant, **options)
            for at, case in enumerate(cases):
                own = replies[at * rows : at * rows + len(case.questions)]
                log.append(self.measure.records(case, variant, own))


def groups(
    cases: Iterable[Case[Any]], missing: Callable[[Case[Any]], Sequence[Variant]], most: int
) -> Iterator[tuple[list[Case[Any]], list[Variant]]]:
    """Cases in order, with the variants that they miss: up to `most` that follow each other in one
    group, where they have one capacity and one seed and miss the same."""
    group: list[Case[Any]] = []
    key: tuple[Any, ...] = ()
    for case in cases:
        own = (capacity_of(case), case.cell.seed, tuple(missing(case)))
        if group and (own != key or len(group) == most):
            yield group, list(key[-1])
            group = []
        group.append(case)
        key = own
    if group:
        yield group, list(key[-1])


def _missing(variants: Sequence[Variant], log: Log, case: Case[Any]) -> list[Variant]:
    return [variant for variant in variants if not log.has(case.cell, variant)]


def run(
    blocks: Sequence[Block],
    log: Log,
    load: Callable[[], Machine],
    show: Callable[[str], None],
    part: Part = WHOLE,
    together: int = 1,
) -> set[Key]:
    """Answers everything of a part that `log` does not have, block by block, questions of up to
    `together` haystacks at a time; the model is loaded where something is missing.

    Haystacks are numbered over all blocks, for `part`. One that comes again keeps its number: no
    two parts have the same. `show` is called with a line after every group of haystacks that was
    read. Returns the keys of all answers that the part is made of, those of earlier runs too.
    """
    progress, machine = Progress(sum(block.grid.work for block in blocks) // part.count), None
    numbers: dict[Cell, int] = {}
    keys: set[Key] = set()
    for block in blocks:
        own = (
            case
            for case in block.grid.cases()
            if part.has(numbers.setdefault(case.cell, len(numbers)))
        )
        missing = functools.partial(_missing, block.variants, log)
        for group, wanted in groups(own, missing, together):
            keys |= {key_of(case.cell, variant) for case in group for variant in block.variants}
            if wanted:
                machine = machine or load()
                machine.answer(group, wanted, log, together)
            progress.add(sum(map(work_of, group)), new=bool(wanted))
            if wanted:
                show(progress.line(group[-1]))
    return keys


def write_text(path: Path, text: str) -> None:
    """Writes beside `path` and renames; other processes may do so too."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
