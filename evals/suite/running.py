"""The loop of a run: haystacks in order, one prefill each, the answers that are still missing."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from evals.suite.answers import Answers
from evals.suite.cases import Case, capacity_for
from evals.suite.measure import Measure
from evals.suite.prefix import Prefixes, widen
from evals.suite.records import WHOLE, Log, Part
from evals.suite.variants import Variant


class Grid(Protocol):
    """What is to be asked; `cases` come in the same order every time."""

    @property
    def work(self) -> int:
        """About how much it is, in the units of `work_of`."""
        ...

    def cases(self) -> Iterator[Case[Any]]:
        """The haystacks with their questions."""
        ...


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


@dataclasses.dataclass(frozen=True)
class Machine:
    """A loaded model with what asks it; `rows` questions are answered at a time."""

    prefixes: Prefixes
    answers: Answers
    measure: Measure
    rows: int

    def answer(self, case: Case[Any], variants: Sequence[Variant], log: Log) -> None:
        """Prefills a haystack once, and logs what each variant answers.

        Batches have `rows` rows or one, the last ones idle, so that few programs are compiled.
        """
        capacity = max(capacity_for(case.cell.length), case.most_tokens)
        state = self.prefixes.read(case.haystack, capacity)
        prompts = [question.prompt.tolist() for question in case.questions]
        asked = self.prefixes.ask(state, prompts)
        new = list(case.new_tokens)
        if len(new) > 1:
            asked = widen(asked, self.rows)
            new = new + [1] * (self.rows - len(new))
        for variant in variants:
            options = {"new_tokens": new, "capacity": capacity, "seed": case.cell.seed}
            replies = self.answers.run(asked, variant, **options)[: len(case.questions)]
            log.append(self.measure.records(case, variant, replies))


def run(
    grid: Grid,
    variants: Sequence[Variant],
    log: Log,
    load: Callable[[], Machine],
    show: Callable[[str], None],
    part: Part = WHOLE,
) -> None:
    """Answers everything of a part that `log` does not have; the model is loaded where something
    is missing.

    `show` is called with a line after every haystack that was read.
    """
    progress, machine = Progress(grid.work // part.count), None
    for number, case in enumerate(grid.cases()):
        if not part.has(number):
            continue
        missing = [variant for variant in variants if not log.has(case.cell, variant)]
        if missing:
            machine = machine or load()
            machine.answer(case, missing, log)
        progress.add(work_of(case), new=bool(missing))
        if missing:
            show(progress.line(case))


def write_text(path: Path, text: str) -> None:
    """Writes beside `path` and renames; other processes may do so too."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text, "utf-8")
    partial.replace(path)
