"""Cells of a table: questions, and the variants that answer them. A file says several."""

import argparse
import contextlib
import dataclasses
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evals.suite.cases import Case
from evals.suite.options import CELL_OPTIONS
from evals.suite.variants import Variant
from lsa_jax.config import ConfigError
from lsa_jax.config_checks import refusal


class Grid(Protocol):
    """What is to be asked; `cases` come in the same order every time."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of the haystacks."""
        ...

    @property
    def work(self) -> int:
        """About how much it is, in the units of `running.work_of`."""
        ...

    def tasks_at(self, length: int) -> Sequence[str]:
        """The tasks at one of the lengths."""
        ...

    def cases(self) -> Iterator[Case[Any]]:
        """The haystacks with their questions."""
        ...


@dataclasses.dataclass(frozen=True)
class Block:
    """What a `[[cells]]` asks for: every variant answers all questions of the grid."""

    grid: Grid
    variants: Sequence[Variant]


class Given(NamedTuple):
    """All options of one cell, and what errors about it begin with."""

    where: str
    options: argparse.Namespace


def given(args: argparse.Namespace) -> list[Given]:
    """The cells of `--cells`, for which the options are defaults; else the one of the options.

    Raises ConfigError for a file that says no cells, or what no option takes.
    """
    if args.cells is None:
        return [Given("", args)]
    if args.suite != "mini":
        raise ConfigError(f"--cells needs --suite mini, got {args.suite}")
    found = []
    for number, table in enumerate(_tables(args.cells), start=1):
        where = f"{args.cells} cell {number}: "
        with named(where):
            own = {key: _value(key, value) for key, value in table.items()}
        found.append(Given(where, argparse.Namespace(**vars(args) | own)))
    return found


@contextlib.contextmanager
def named(where: str) -> Iterator[None]:
    """Puts `where` in front of a ConfigError from within."""
    try:
        yield
    except ConfigError as why:
        raise ConfigError(f"{where}{why}") from None


def _tables(path: Path) -> list[dict[str, Any]]:
    """The tables of a file. Floats stay as they are written, because budgets do."""
    try:
        raw = tomllib.loads(path.read_text("utf-8"), parse_float=str)
    except (ValueError, RecursionError) as why:
        raise ConfigError(f"{path} must be TOML: {why}") from None
    for key in sorted(raw.keys() - {"cells"}):
        raise refusal(f"{path} key", key, "within [[cells]]")
    cells = raw.get("cells", [])
    if not isinstance(cells, list) or not all(isinstance(cell, dict) for cell in cells):
        raise refusal(f"{path} cells", cells, "tables [[cells]]")
    if not cells:
        raise ConfigError(f"{path} must have one [[cells]] or more, got none")
    return cells


def _value(key: str, value: object) -> Any:
    """A value, or a list of them, as the option of that name takes it."""
    if key not in CELL_OPTIONS:
        raise refusal("key", key, f"among {', '.join(CELL_OPTIONS)}")
    values = value if isinstance(value, list) else [value]
    try:
        return CELL_OPTIONS[key](",".join(map(str, values)))
    except argparse.ArgumentTypeError as why:
        # A budget's error begins with the name already.
        raise ConfigError(f"{key} {str(why).removeprefix(f'{key} ')}") from None


def merged(blocks: Sequence[Block]) -> tuple[Block, ...]:
    """One block for all that ask the same: their haystacks are prefilled once."""
    found: list[Block] = []
    for block in blocks:
        at = next((i for i, other in enumerate(found) if other.grid == block.grid), len(found))
        before = found[at].variants if at < len(found) else ()
        found[at : at + 1] = [Block(block.grid, list(dict.fromkeys([*before, *block.variants])))]
    return tuple(found)


def all_variants(blocks: Sequence[Block]) -> list[Variant]:
    """The variants of all blocks, each once, in their order."""
    return list(dict.fromkeys(variant for block in blocks for variant in block.variants))


def averaged(blocks: Sequence[Block]) -> dict[int, set[str]]:
    """The tasks that averages at each length are of: those of its first block, and of others with
    just the same variants.

    So what an ablation asks of other variants has no part in them, be it a few tasks of the table
    or one that nobody else is asked; and a table may be split by tasks.
    """
    first: dict[int, Block] = {}
    tasks: dict[int, set[str]] = {}
    for block in blocks:
        for length in block.grid.lengths:
            if set(block.variants) == set(first.setdefault(length, block).variants):
                tasks.setdefault(length, set()).update(block.grid.tasks_at(length))
    return tasks
