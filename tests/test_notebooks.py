"""Notebooks are what their text says, name options that exist, and CI sees what a user would."""

import importlib.util
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from infer import embedded, starter
from lsa_jax.config_io import load_config
from lsa_jax.lsa.targets import default_target_layers

ROOT = Path(__file__).parents[1]
NAMES = ("01_generate", "02_train_indexer", "03_memory_vs_quality")
HEADER = """---
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---
"""
_SPEC = importlib.util.spec_from_file_location("ci_notebooks", ROOT / ".ci" / "notebooks.py")
assert _SPEC is not None and _SPEC.loader is not None
notebooks = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(notebooks)


def code(name: str) -> str:
    """A notebook's code, magics left out."""
    cells = notebooks.make(ROOT / "notebooks" / f"{name}.md").cells
    lines = "\n\n".join(cell.source for cell in cells if cell.cell_type == "code").splitlines()
    return "\n".join(re.sub(r"^( *)%.*", r"\1pass", line) for line in lines)


def test_there_are_three_notebooks():
    assert [source.stem for source in notebooks.sources()] == list(NAMES)
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_text_without_outputs(name):
    file = ROOT / "notebooks" / f"{name}.ipynb"
    made = notebooks.make(file.with_suffix(".md"))
    again = "run `python .ci/notebooks.py write`"
    assert file.read_text("utf-8") == notebooks.text_of(made), again
    cells = nbformat.read(file, as_version=4).cells
    assert len({cell.id for cell in cells}) == len(cells)
    for cell in cells:
        assert cell.cell_type != "code" or (not cell.outputs and cell.execution_count is None)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_opens_in_colab_installs_says_where_it_runs_and_what_is_next(name):
    text = (ROOT / "notebooks" / f"{name}.md").read_text("utf-8")
    (repository,) = set(re.findall(r"github(?:\.com)?/([^/\s]+/lsa_jax)", text))
    badge = "https://colab.research.google.com/github"
    assert f"{badge}/{repository}/blob/main/notebooks/{name}.ipynb" in text
    compile(code(name), name, "exec")
    assert "%pip install" in text and "starter.device()" in text
    assert text.index("starter.weights(") > text.index("%pip install")
    assert "## What to try next" in text


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_links_to_exists(name):
    text = (ROOT / "notebooks" / f"{name}.md").read_text("utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and all((ROOT / "notebooks" / link).exists() for link in links)
    modules = set(re.findall(r"python -m ([\w.]+)", text))
    modules |= set(re.findall(r'starter\.command\(\s*"([\w.]+)"', text))
    assert modules and all(importlib.util.find_spec(module) for module in modules)


def output(text, name="stderr"):
    return new_output("stream", name=name, text=text)


@pytest.mark.parametrize(
    ("found", "faults"),
    [
        (output("prefill: 40 % of 4,096 tokens, 90 tokens/s\n"), 0),
        (output("x.py:3: DeprecationWarning: old\n  import x\n"), 1),
        (output("UserWarning: no accelerator\n", "stdout"), 1),
        (output("W1122 10:00:00.000000 1 file.cc:1] slow\n"), 1),
        (new_output("error", ename="E", evalue="e", traceback=["Traceback (most"]), 1),
        (new_output("display_data", {"text/plain": "<Figure size 1x1>", "image/png": "AA"}), 0),
        (new_output("display_data", {"text/plain": "<Figure size 1x1>"}), 1),
    ],
)
def test_what_a_user_should_not_see_is_a_fault(found, faults):
    notebook = new_notebook(cells=[new_code_cell("x", outputs=[found])])
    assert len(notebooks.faults(notebook)) == faults


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cell", "wanted"),
    [
        ("print('fine')", None),
        ("import warnings\nwarnings.warn('look', stacklevel=1)", "UserWarning: look"),
        ("raise ValueError('broken')", "broken"),
    ],
)
def test_a_notebook_that_warns_or_fails_does_not_pass(tmp_path, cell, wanted):
    source = tmp_path / "made.md"
    source.write_text(f"{HEADER}\n```{{code-cell}}\n{cell}\n```\n")
    if wanted is None:
        notebooks.run(source, tmp_path / "out")
        return
    with pytest.raises(Exception, match=wanted):
        notebooks.run(source, tmp_path / "out")
    assert (tmp_path / "out" / "made" / "made.ipynb").exists()


def test_starting_weights_are_the_embedded_ones_or_say_that_they_are_random(
    tmp_path, capsys, monkeypatch
):
    tokenizer = ROOT / "evals" / "mini" / "tokenizer.json"
    own = embedded.Weights(tmp_path / "checkpoint", tmp_path / "indexer")
    monkeypatch.setattr(embedded, "find", lambda: own)
    start = starter.weights(tmp_path, tokenizer)
    assert (start.checkpoint, start.indexer) == (own.checkpoint, own.indexer)
    assert start.trained and "trained" in start.label
    monkeypatch.setattr(embedded, "find", lambda: None)
    monkeypatch.setattr(starter, "PRESET", "tiny")
    tokenizer = tmp_path / "tokenizer.json"
    tokenizer.write_text("{}")
    start = starter.weights(tmp_path / "made", tokenizer)
    out = capsys.readouterr().out
    assert start.checkpoint.is_dir() and start.indexer.is_file()
    assert not start.trained and start.label == "random weights"
    assert start.targets == ",".join(map(str, default_target_layers(load_config("tiny"))))
    assert "$ python -m lsa_jax.synthesize --config tiny" in out and "accuracy says nothing" in out


def test_a_command_that_fails_ends_the_cell(capsys):
    with pytest.raises(RuntimeError, match=r"lsa_jax.footprint ended with exit code 2"):
        starter.command("lsa_jax.footprint", "--config", "v4_flash", "--context", "much")
    with pytest.raises(RuntimeError, match="exit code 2"):
        starter.command("lsa_jax.footprint", "--no-such-option")
    assert "error: " in capsys.readouterr().err
    starter.command("lsa_jax.footprint", "--config", "tiny", "--context", 512)
    assert "$ python -m lsa_jax.footprint --config tiny --context 512" in capsys.readouterr().out
    assert starter.device().startswith(("CPU", "GPU", "TPU")) and sys.version
