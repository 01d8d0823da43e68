"""Several cells in one run: what is answered once, and what the table and its averages are of."""

import collections
import dataclasses
import json

import numpy as np
import pytest

from evals.suite.cells import Block, averaged, merged
from evals.suite.records import Log, Part
from evals.suite.running import run
from evals.suite.summary import FULL, summarise
from tests.suite_knowing import (
    GRID,
    LSA,
    RECENCY,
    VARIANTS,
    Interrupted,
    Knowing,
    listed,
    planted,
    results,
)

TIGHT = dataclasses.replace(LSA, budget="0.4")
# More haystacks of a task than the first block has, another length, and a variant of its own.
MORE = dataclasses.replace(GRID, tasks=("vt",), questions=8)
LONGER = dataclasses.replace(GRID, tasks=("vt",), lengths=(768,), seeds=1)
BLOCKS = (Block(GRID, VARIANTS), Block(MORE, (LSA, TIGHT)), Block(LONGER, (FULL, TIGHT)))


def wanted():
    return {
        (case.cell, v) for block in BLOCKS for case in listed(block.grid) for v in block.variants
    }


def lines_of(text):
    found = json.loads(text)["lines"]
    return {(x["task"], x["length"], tuple(x["variant"].items())): x for x in found}


def at(task, length, variant):
    return task, length, tuple(variant.as_dict().items())


def test_what_two_cells_share_is_answered_once_and_the_larger_set_counts(tmp_path):
    machine = Knowing()
    *_, text = results(tmp_path, machine, *BLOCKS)
    assert len(machine.asked) == len(set(machine.asked)) and set(machine.asked) == wanted()
    lines = lines_of(text)
    few, more = lines[at("vt", 640, FULL)], lines[at("vt", 640, LSA)]
    assert few["questions"] == sum(len(c.questions) for c in listed(GRID) if c.cell.task == "vt")
    assert more["questions"] == sum(len(c.questions) for c in listed(MORE)) > few["questions"]
    assert more["minus_full"][0] == 0
    tight = {key[:2] for key in lines if key == at(*key[:2], TIGHT)}
    assert tight == {("vt", 640), ("vt", 768)}
    assert at("vt", 768, FULL) in lines and at("vt", 768, LSA) not in lines


def test_cells_that_ask_the_same_share_prefills():
    again = dataclasses.replace(GRID)
    blocks = merged([Block(GRID, (FULL, LSA)), Block(LONGER, (FULL,)), Block(again, (LSA, TIGHT))])
    assert blocks == (Block(GRID, [FULL, LSA, TIGHT]), Block(LONGER, [FULL]))


@pytest.mark.parametrize("together", [1, 2])
def test_cells_that_were_cut_off_go_on_to_the_same_tables(tmp_path, together):
    whole = results(tmp_path / "whole", Knowing(), *BLOCKS)
    cut, again, quiet = Interrupted(after=len(listed(GRID)) + 2), Knowing(), Knowing()
    with pytest.raises(KeyboardInterrupt):
        results(tmp_path / "cut", cut, *BLOCKS, together=together)
    assert results(tmp_path / "cut", again, *BLOCKS, together=together)[1:] == whole[1:]
    assert set(cut.asked) | set(again.asked) == wanted()
    assert set(cut.asked).isdisjoint(again.asked) and again.asked
    assert results(tmp_path / "cut", quiet, *BLOCKS)[1:] == whole[1:] and not quiet.asked


def test_parts_of_all_cells_have_every_haystack_once(tmp_path):
    whole, machines = results(tmp_path / "whole", Knowing(), *BLOCKS), [Knowing() for _ in range(3)]
    for index, machine in enumerate(machines, start=1):
        results(tmp_path / str(index), machine, *BLOCKS, part=Part(index, 3))  # at the same time
    parts = collections.defaultdict(set)
    for index, machine in enumerate(machines):
        for cell in machine.prefills:
            parts[cell].add(index)
    assert parts.keys() == {cell for cell, _ in wanted()}
    assert all(len(own) == 1 for own in parts.values())
    asked = [pair for machine in machines for pair in machine.asked]
    assert len(asked) == len(set(asked)) and set(asked) == wanted()
    counts = [len(set(machine.prefills)) for machine in machines]
    assert max(counts) - min(counts) <= 1  # numbers run on over the cells
    for index in (1, 2, 3):
        (file,) = (tmp_path / str(index)).glob("answers-*")
        (tmp_path / "all").mkdir(exist_ok=True)
        file.rename(tmp_path / "all" / file.name)
    assert results(tmp_path / "all", quiet := Knowing(), *BLOCKS)[1:] == whole[1:]
    assert not quiet.asked


def test_records_outside_the_cells_are_left_out(tmp_path):
    """Another task, seed, variant or length, and more haystacks than are asked now."""
    results(tmp_path, Knowing(), *BLOCKS)
    small = dataclasses.replace(GRID, tasks=("vt",), seeds=1, questions=3)
    only, quiet = Block(small, (FULL, LSA)), Knowing()
    found = results(tmp_path, quiet, only)
    assert lines_of(found[2]).keys() == {at("vt", 640, FULL), at("vt", 640, LSA)}
    assert found[1:] == results(tmp_path / "alone", Knowing(), only)[1:] and not quiet.asked


def test_progress_counts_all_cells(tmp_path):
    said, machine = [], Knowing()
    run(BLOCKS, Log(tmp_path, {}), lambda: machine, said.append)
    shares = [int(line.split(" %")[0]) for line in said]
    assert shares == sorted(shares) and shares[-1] == 100
    first = len(listed(GRID)) - 1
    assert shares[first] < 70 and len(said) == len(machine.prefills)


# Averages


def block(tasks, *variants, length=640):
    return Block(dataclasses.replace(GRID, tasks=tasks, lengths=(length,)), variants)


MAIN = block(("vt", "niah_single_1"), FULL, LSA, RECENCY)


def averages(*blocks):
    """What each variant's averages are of: tasks by variant; and the lines."""
    rng = np.random.default_rng(3)
    pairs = {(task, v): None for b in blocks for v in b.variants for task in b.grid.tasks}
    records = [record for task, v in pairs for record in planted(rng, v, task)]
    variants = list(dict.fromkeys(v for _, v in pairs))
    lines = summarise(records, variants, averaged(blocks))
    return {line.variant: line for line in lines if line.task == "all"}, lines


@pytest.mark.parametrize(
    "ablation",
    [
        block(("vt",), TIGHT),  # a task of the table
        block(("cwe",), FULL, LSA, TIGHT),  # one of its own, where a variant is the table's too
        block(("vt", "niah_single_1", "cwe"), FULL, LSA),  # more tasks than the table has
        block(("cwe", "fwe"), FULL, LSA, RECENCY, TIGHT),
    ],
)
def test_what_only_an_ablation_asks_leaves_the_averages_as_they_are(ablation):
    alone, _ = averages(MAIN)
    beside, lines = averages(MAIN, ablation)
    assert alone.keys() == beside.keys() == {FULL, LSA, RECENCY}
    assert all(beside[v].questions == alone[v].questions for v in alone)
    assert {line.task for line in lines} > set(ablation.grid.tasks)


def test_an_ablation_on_all_tasks_of_the_table_has_its_averages():
    found, _ = averages(MAIN, block(MAIN.grid.tasks, TIGHT))
    assert found.keys() == {FULL, LSA, RECENCY, TIGHT} and found[TIGHT].minus_full is not None


def test_a_table_may_be_split_by_tasks():
    split = block(("cwe",), *MAIN.variants)
    assert averaged([MAIN, block(("fwe",), LSA), split]) == {640: {"vt", "niah_single_1", "cwe"}}
    found, _ = averages(MAIN, split)
    assert {line.haystacks for line in found.values()} == {3 * 12}


def test_every_length_has_averages_of_its_own():
    other = block(("vt", "cwe"), FULL, TIGHT, length=768)
    assert averaged([MAIN, other]) == {640: {"vt", "niah_single_1"}, 768: {"vt", "cwe"}}
