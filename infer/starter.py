"""What the notebooks begin with: where they run, weights, and commands within this process.

A process that holds an accelerator leaves none to another, so a notebook's commands run in its own.
"""

import dataclasses
import importlib
import os
import shlex
from pathlib import Path

import jax

from infer import embedded
from lsa_jax.lsa.indexer_reader import read_indexer

PRESET = "mini_model"  # has the shapes of the model that is embedded where it is


@dataclasses.dataclass(frozen=True)
class Start:
    """A checkpoint and its memory indexer; whether they were trained, or are random numbers."""

    checkpoint: Path
    indexer: Path
    trained: bool

    @property
    def label(self) -> str:
        """What numbers that are measured with them must be labelled."""
        return "mini, trained" if self.trained else "random weights"

    @property
    def targets(self) -> str:
        """The indexer's target layers, as `train.dump_traces --targets` takes them."""
        return ",".join(map(str, read_indexer(self.indexer).config.target_layers))


def device() -> str:
    """What JAX runs on, for people."""
    here = jax.devices()[0]
    size = f"{os.cpu_count()} cores" if here.platform == "cpu" else f"{jax.device_count()} of them"
    return f"{here.platform.upper()}: {here.device_kind}, {size}; JAX {jax.__version__}"


def weights(folder: Path, tokenizer: Path) -> Start:
    """The embedded trained model; in a package without it, a random one that is made in `folder`.

    Says on stdout which it is. `tokenizer` is the `tokenizer.json` of a random one.
    """
    own = embedded.find()
    if own is not None:
        print(f"trained weights: {own.checkpoint}")
        return Start(own.checkpoint, own.indexer, trained=True)
    start = Start(folder / "checkpoint", folder / "indexer.safetensors", trained=False)
    if not start.indexer.exists():
        options = ("--config", PRESET, "--weights", "f32", "--tokenizer", tokenizer)
        command("lsa_jax.synthesize", *options, start.checkpoint)
        command("lsa_jax.widen", start.checkpoint, start.indexer)
    print(
        "This package has no trained weights yet: these are random. Shapes, bytes, pages and "
        "speed are real; text is noise, and accuracy says nothing."
    )
    return start


def command(module: str, *arguments: object) -> None:
    """`python -m module arguments`, shown and run in this process. RuntimeError where it fails,
    after the command has said why."""
    words = [str(argument) for argument in arguments]
    print(f"$ python -m {module} {shlex.join(words)}", flush=True)
    try:
        code = importlib.import_module(module).main(words)
    except SystemExit as stop:  # how parsers end
        code = stop.code
    if code:
        raise RuntimeError(f"python -m {module} ended with exit code {code}")
