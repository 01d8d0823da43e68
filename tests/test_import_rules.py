"""Who may import whom, who may print, and what nobody imports: checked on the syntax tree."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("lsa_jax", "pallas_kernels", "infer", "evals", "train", "configs")

# The longest prefix that matches a module rules it. A module without a line here fails.
CONFIG = ("lsa_jax.config", "lsa_jax.config_io", "lsa_jax.config_hf", "lsa_jax.config_checks")
TENSORS = ("lsa_jax.config", "lsa_jax.parameters", "lsa_jax.shardings", "lsa_jax.quant")
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "configs": (),
    "lsa_jax.config": (),
    "lsa_jax.config_checks": ("lsa_jax.config",),
    "lsa_jax.config_hf": ("lsa_jax.config", "lsa_jax.config_checks"),
    "lsa_jax.config_io": CONFIG,
    "lsa_jax.parameters": ("lsa_jax.config",),
    "lsa_jax.quant": ("lsa_jax.config",),
    "lsa_jax.shardings": ("lsa_jax.config", "lsa_jax.parameters"),
    "lsa_jax.nn": (
        *(
            "lsa_jax.nn",
            "lsa_jax.cache.state",
            "lsa_jax.cache.codec",
            "lsa_jax.cache.resident",
            "pallas_kernels",
        ),
        *TENSORS,
    ),
    "lsa_jax.cache": ("lsa_jax.cache", *TENSORS),
    "lsa_jax.checkpoint": ("lsa_jax.checkpoint", "lsa_jax.nn", *TENSORS, *CONFIG),
    "lsa_jax.text": ("lsa_jax.text", "lsa_jax.config"),
    "lsa_jax.engine": ("lsa_jax",),
    "lsa_jax.compile_clock": (),
    "lsa_jax.lsa": (
        *("lsa_jax.lsa", "lsa_jax.cache", "lsa_jax.nn", "lsa_jax.checkpoint", "lsa_jax.engine"),
        *("lsa_jax.sampling", "lsa_jax.compile_clock", "pallas_kernels", *TENSORS, *CONFIG),
    ),
    "lsa_jax.planning": ("lsa_jax", "pallas_kernels"),
    "lsa_jax.plan": ("lsa_jax", "pallas_kernels"),
    "lsa_jax.checks": ("lsa_jax", "pallas_kernels"),
    "lsa_jax.selftest": ("lsa_jax", "pallas_kernels"),
    "lsa_jax.footprint": ("lsa_jax",),
    "lsa_jax.widen": ("lsa_jax",),
    "lsa_jax.quantise": ("lsa_jax",),
    "lsa_jax.sampling": ("lsa_jax",),
    "lsa_jax.model_io": ("lsa_jax", "pallas_kernels"),
    "lsa_jax.cli": ("lsa_jax",),
    "lsa_jax.convert": ("lsa_jax",),
    "lsa_jax.synthesize": ("lsa_jax",),
    "pallas_kernels": ("pallas_kernels",),
    "infer": ("infer", "lsa_jax"),
    "evals": ("evals", "infer", "train", "lsa_jax", "pallas_kernels"),
    "train": ("train", "lsa_jax"),
    "train.traces": ("train.traces", "lsa_jax"),
    "train.data": ("train.data", "train.traces", "lsa_jax"),
    "train.quality": ("train.quality", "train.data.labels", "train.traces", "lsa_jax"),
    "train.run": (
        *("train.run", "train.data", "train.quality", "train.tables", "train.traces", "lsa_jax"),
    ),
    "train.pretraining": ("train.pretraining", "train.tables", "train.run", "lsa_jax"),
    "train.tables": ("lsa_jax",),
    "infer.demo": ("infer", "lsa_jax", "evals.suite", "evals.tasks", "evals.mini"),
    "train.backbone_command": ("train", "evals.mini", "evals.tasks", "lsa_jax"),
}
TRAIN_COMMANDS = (
    *("backbone", "backbone_command", "import_docs", "dump_traces", "dump_options", "indexer"),
    *("indexer_command", "evaluate", "calibrate", "study_options", "export", "verify"),
    "mine_hard",
)
COMMANDS = (
    "lsa_jax.cli",
    "lsa_jax.convert",
    "lsa_jax.synthesize",
    "lsa_jax.footprint",
    "lsa_jax.widen",
    "lsa_jax.quantise",
    "lsa_jax.plan",
    "lsa_jax.selftest",
    "pallas_kernels.aot",
    "pallas_kernels.aot_worker",
    "pallas_kernels.bench",
    "infer",
    "evals",
    *(f"train.{name}" for name in TRAIN_COMMANDS),
)
STDLIB_ONLY = (*CONFIG, "lsa_jax.parameters", "configs")  # readable without starting a backend
ORACLE = ("torch", "transformers", "accelerate")
MAY_IMPORT_ORACLE = ("evals.hf_peer", "evals.torch_kernel_peers", "evals.torch_train_peer")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def imported_names(tree: ast.AST) -> Iterator[str]:
    """Dotted names behind every import statement, and behind imports by a literal string."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                yield "." * node.level + (node.module or "")
            else:
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else node.func
            called = called.id if isinstance(called, ast.Name) else called
            if called in ("import_module", "__import__"):
                yield str(node.args[0].value)


def import_faults(module: str, tree: ast.AST) -> Iterator[str]:
    rule = max((key for key in MAY_IMPORT if within(module, (key,))), key=len, default=None)
    if rule is None and module != "lsa_jax":  # whose __init__ imports nothing of ours
        yield "has no line in MAY_IMPORT"
    oracle = ORACLE if within(module, MAY_IMPORT_ORACLE) else ()
    allowed = (*(MAY_IMPORT[rule] if rule else ()), *oracle)
    for name in imported_names(tree):
        top = name.split(".")[0]
        if not top:
            yield f"imports {name} relatively"
        elif top in (*PACKAGES, *ORACLE) and not within(name, allowed):
            yield f"imports {name}"
        elif within(name, COMMANDS) and not within(module, COMMANDS):
            yield f"imports {name}, which is a command"
        elif (
            within(module, STDLIB_ONLY)
            and top not in PACKAGES
            and top not in sys.stdlib_module_names
        ):
            yield f"imports {name}, which is not in the standard library"


def command_faults(module: str, tree: ast.AST) -> Iterator[str]:
    if within(module, COMMANDS):
        return
    if any(within(name, ("argparse",)) for name in imported_names(tree)):
        yield "imports argparse"
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "print":
            yield f"prints on line {node.lineno}"


def faults(module: str, source: str) -> list[str]:
    tree = ast.parse(source)
    return [*import_faults(module, tree), *command_faults(module, tree)]


OURS = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", OURS, ids=lambda path: module_name(path))
def test_a_module_imports_and_prints_only_what_its_place_allows(path: Path) -> None:
    assert faults(module_name(path), path.read_text("utf-8")) == []


def test_the_checks_above_saw_the_whole_library() -> None:
    seen = {module_name(path) for path in OURS}
    assert {"lsa_jax", "lsa_jax.config", "lsa_jax.parameters", "infer", "configs"} <= seen
    assert {"pallas_kernels.dispatch", "evals.hf_peer"} <= seen


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lsa_jax.config", "import lsa_jax.parameters"),
        ("lsa_jax.config", "import numpy"),
        ("lsa_jax.config_io", "from lsa_jax.parameters import parameter_table"),
        ("lsa_jax.parameters", "import jax.numpy as jnp"),
        ("lsa_jax.nn.moe", "from lsa_jax.checkpoint import store"),
        ("lsa_jax.nn.moe", "from lsa_jax.cache import pages"),
        ("lsa_jax.nn.moe", "from lsa_jax import cache"),
        ("lsa_jax.nn.moe", "import lsa_jax"),
        ("lsa_jax.nn.moe", "def f():\n    from lsa_jax.text import tokenizer"),
        ("lsa_jax.nn.moe", "from . import rope"),
        ("lsa_jax.cache.state", "from lsa_jax.nn.moe import Moe"),
        ("lsa_jax.checkpoint.store", "import lsa_jax.text.tokenizer"),
        ("lsa_jax.text.tokenizer", "from lsa_jax.checkpoint.leaf import CheckpointError"),
        ("lsa_jax.text.tokenizer", "importlib.import_module('lsa_jax.nn.moe')"),
        ("lsa_jax", "from lsa_jax.config import ModelConfig"),
        ("lsa_jax.engine", "from infer import generate"),
        ("lsa_jax.engine", "from lsa_jax.convert import main"),
        ("infer.generate", "import train.run.loop"),
        ("train.run.loop", "from infer.generate import main"),
        ("infer.generate", "import torch"),
        ("lsa_jax.engine", "def f():\n    from transformers import AutoTokenizer"),
        ("lsa_jax.engine", "__import__('torch')"),
        ("lsa_jax.engine", "import argparse"),
        ("lsa_jax.engine", "from argparse import ArgumentParser"),
        ("lsa_jax.engine", "print('x')"),
        ("lsa_jax.engine", "show = print"),
        ("lsa_jax.cache.codec", "from pallas_kernels import dispatch"),
        ("lsa_jax.engine", "from evals import bench_backbone"),
        ("pallas_kernels.hc_mix", "from lsa_jax.config import ModelConfig"),
        ("pallas_kernels.hc_mix.reference", "print('x')"),
        ("infer.generate", "from evals import bench_backbone"),
        ("evals.bench_backbone", "import torch"),
        ("lsa_jax.new_module", "import math"),
        ("lsa_jax.new_package.part", "import math"),
    ],
)
def test_the_checker_finds_a_planted_fault(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("lsa_jax.config_io", "import json\nfrom lsa_jax.config_hf import read_hf"),
        ("lsa_jax.nn.moe", "import jax\nfrom lsa_jax.cache.state import Tail"),
        ("lsa_jax.checkpoint.store", "import numpy\nfrom lsa_jax import config_io"),
        ("lsa_jax.engine", "import lsa_jax\nfrom lsa_jax.text.tokenizer import Tokenizer"),
        ("lsa_jax.convert", "import argparse\nfrom lsa_jax import cli\nprint('done')"),
        ("infer.generate", "import argparse\nfrom lsa_jax.engine import Engine\nprint('token')"),
        ("lsa_jax.nn.moe", "from pallas_kernels import dispatch"),
        ("evals.bench_backbone", "from evals import hf_peer\nfrom infer.session import Session"),
        ("evals.hf_peer", "import torch\nfrom lsa_jax.checkpoint.names import canonical_name"),
    ],
)
def test_the_checker_passes_what_the_rules_allow(module: str, source: str) -> None:
    assert faults(module, source) == []
