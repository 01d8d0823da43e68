"""The command line of `evals.run`, and its file of cells: what cannot be is refused in one line."""

import re
from pathlib import Path

import pytest

from evals import run as command
from evals.suite import options, tables
from evals.suite.cases import TASKS
from evals.suite.cells import given

ROOT = Path(__file__).parents[1]
CKPT = str(ROOT / "infer/weights/checkpoint")
EMBEDDED = ["--ckpt", CKPT, "--indexer", str(ROOT / "infer/weights/indexer.safetensors")]


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "a/2", "1/2/3", "1/1000"])
def test_a_part_that_is_none_is_refused_in_one_line(text, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parse(["--ckpt", "a", "--out", "b", "--part", text])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and "must be I/N with 1 <= I" in error


# Cells

CELLS = """
[[cells]]
lengths = [16_384, 8192]
arms = ["full", "lsa"]
kv_budget = [0.10, "64KiB"]
questions = 170

[[cells]]
tasks = "mrcr"
seeds = 1
policy = ["budget", "threshold"]
lookahead = [16, 64]
page_entries = 2
threshold = 1e-6
recall_gate = 1.0
ensemble = "mean"
fallback = ["off", 0.05]
patience = [3, 6]
"""


def told(tmp_path, text, *more):
    path = tmp_path / "cells.toml"
    path.write_text(text)
    return options.parse(["--ckpt", "a", "--out", "b", "--cells", str(path), *more])


def test_a_cell_says_what_is_not_as_the_options_say(tmp_path):
    args = told(tmp_path, CELLS, "--questions", "8", "--tasks", "vt,cwe", "--kv-budget", "0.2")
    first, second = given(args)
    assert first.where == f"{args.cells} cell 1: " and second.where == f"{args.cells} cell 2: "
    wanted = {"lengths": (16384, 8192), "arms": ("full", "lsa"), "questions": 170}
    wanted["kv_budget"] = ("0.10", "64KiB")  # as written, for a record's key has its text
    assert vars(first.options) == vars(args) | wanted
    wanted = {"tasks": ("mrcr",), "seeds": 1, "policy": ("budget", "threshold")}
    wanted |= {
        "lookahead": (16, 64),
        "page_entries": (2,),
        "threshold": (1e-6,),
        "recall_gate": (1.0,),
    }
    wanted |= {"ensemble": ("mean",), "fallback": (None, 0.05), "patience": (3, 6)}
    assert vars(second.options) == vars(args) | wanted


def test_only_a_fallback_is_patient(tmp_path):
    _, second = given(told(tmp_path, CELLS, "--arms", "recency", "--lookahead", "16"))
    found = [(v.fallback, v.patience) for v in command.axes(second.options).variants()]
    assert found == 2 * [(None, None), (0.05, 3), (0.05, 6)]  # for lookaheads 16 and 64


def test_without_cells_the_options_are_the_only_one():
    args = options.parse(["--ckpt", "a", "--out", "b", "--lengths", "640"])
    assert given(args) == [("", args)]


def refused(tmp_path, capsys, text, *more, weights=EMBEDDED):
    """The line that a run of these cells ends with, and the file's path in it."""
    path, out = tmp_path / "cells.toml", tmp_path / "out"
    path.write_text(text)
    assert command.main([*weights, "--out", str(out), "--cells", str(path), *more]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("error: ") and not out.exists()
    return error.removeprefix("error: "), path


FINE = "[[cells]]\nlengths = [8192]\n"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        ('budget = "0.10"', "key must be among arms, kv_budget, "),
        ("dtype = 'float32'", "patience, got 'dtype'\n"),
        ("arms = ['full', 'none']", "arms must be among full, no_csa, "),
        ("arms = []", "got ''\n"),
        ("kv_budget = 1", "kv_budget must be 1.0 for everything or 1B for one byte, got '1'\n"),
        ("kv_budget = ['0.1', '0.1']", "kv_budget must be distinct values, got '0.1,0.1'\n"),
        ("questions = 0", "questions must be an integer >= 1, got '0'\n"),
        ("questions = [8, 9]", "questions must be an integer >= 1, got '8,9'\n"),
        ("seeds = true", "seeds must be an integer >= 1, got 'True'\n"),
        ("lengths = [[8192]]", "lengths must be an integer >= 1, got '[8192]'\n"),
        ("page_entries = { a = 2 }", "page_entries must be an integer in [1, 2^31), got "),
        ("patience = 6", "--patience needs a --fallback, got off\n"),
        ("fallback = 1.5", "fallback must be a number in (0, 1), got '1.5'\n"),
        ("tasks = ['niah']", "tasks must be one of recall, "),
        ("lengths = [131072]", "lengths must be at most 131072 with 16 for answers, got 131072\n"),
        ("kv_budget = '0.02'", "kv_budget must be at least the floor of "),
    ],
)
def test_a_bad_cell_is_refused_by_its_number_and_key(tmp_path, capsys, cell, said):
    error, path = refused(tmp_path, capsys, f"{FINE}[[cells]]\n{cell}\n")
    assert error.startswith(f"{path} cell 2: ") and said in error and "got " in error


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must have one [[cells]] or more, got none\n"),
        ("cells = []", "must have one [[cells]] or more, got none\n"),
        ("[cells]\nquestions = 8", "cells must be tables [[cells]], got {'questions': 8}\n"),
        ("cells = [8]", "cells must be tables [[cells]], got [8]\n"),
        (f"questions = 8\n{FINE}", "key must be within [[cells]], got 'questions'\n"),
        ("[[cells]", "must be TOML: "),
    ],
)
def test_a_file_without_cells_is_refused(tmp_path, capsys, text, said):
    error, path = refused(tmp_path, capsys, text)
    assert error.startswith(f"{path} {said}")


def test_cells_of_files_are_refused(tmp_path, capsys):
    error, _ = refused(tmp_path, capsys, FINE, "--suite", "official", "--ruler", "vt.jsonl")
    assert error == "--cells needs --suite mini, got official\n"


def test_lsa_in_any_cell_needs_an_indexer(tmp_path, capsys):
    text = f"{FINE}arms = ['full']\n[[cells]]\narms = ['lsa']\n"
    error, path = refused(tmp_path, capsys, text, weights=["--ckpt", CKPT])
    assert error == f"{path} cell 2: --arms lsa needs --indexer FILE, got none\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("file", ["mini_table", "mini_ablations", "mini_budgets"])
def test_the_published_tables_can_be_asked_of_the_embedded_model(tmp_path, file, dtype):
    """Budgets have room for what must be on the device, and the model for the lengths."""
    table, out = str(ROOT / f"configs/{file}.toml"), tmp_path / "out"
    args = options.parse([*EMBEDDED, "--out", str(out), "--cells", table, "--dtype", dtype])
    setup = command.prepare(args)
    assert not out.exists()
    if file == "mini_table":
        whole = {4096, 8192, 16384}  # longer ones leave out what one question a text asks for
        assert {n for n, tasks in setup.averaged.items() if tasks == set(TASKS)} == whole
        assert set(TASKS) - setup.averaged[65536] == {"cwe", "fwe"} and setup.seeds == (3,)
        first = next(block for block in setup.blocks if block.grid.lengths == (16384,))
        assert len(first.variants) == 6  # one prefill for all arms


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"no marks\n", r"it.md must have the lines <!-- evals.run: begin -->"),
        (b"\xff\xfe", r"--write-into must be UTF-8 text, got .*it.md"),
        (None, r"No such file or directory: .*it.md"),
    ],
)
def test_documents_that_cannot_be_written_into_are_refused_first(tmp_path, capsys, content, said):
    fine, document, out = tmp_path / "fine.md", tmp_path / "it.md", tmp_path / "out"
    fine.write_text("\n".join(tables.MARKS["overview"]) + "\n")
    if content is not None:
        document.write_bytes(content)
    into = ["--write-into", str(fine), str(document)]
    assert command.main([*EMBEDDED, "--out", str(out), "--arms", "full", *into]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and error.count("\n") == 1 and not out.exists()


def test_averages_are_of_the_cells_as_they_are_written(tmp_path):
    """Cells that ask the same are one for the prefills, not for what is averaged."""
    table, out = tmp_path / "cells.toml", tmp_path / "out"
    one, two = (f"[[cells]]\nlengths = 8192\ntasks = '{task}'\n" for task in ("vt", "qa_1"))
    table.write_text(f"{one}arms='full'\n{two}arms='full'\n{one}arms='recency'\n")
    setup = command.prepare(options.parse([*EMBEDDED, "--out", str(out), "--cells", str(table)]))
    assert setup.averaged == {8192: {"vt", "qa_1"}}
    assert [[v.arm for v in block.variants] for block in setup.blocks] == [
        ["full", "recency"],
        ["full"],
    ]
