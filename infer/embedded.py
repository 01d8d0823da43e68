"""The weights that come with the package, where they do: what runs without --ckpt.

`infer/weights` holds `checkpoint` (what `lsa_jax.convert` writes, with its tokenizer) and
`indexer.safetensors`; they become part of the package by its list of data files.
"""

import dataclasses
from pathlib import Path

DIRECTORY = Path(__file__).parent / "weights"


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint's directory and its memory indexer's file."""

    checkpoint: Path
    indexer: Path


def find(directory: Path = DIRECTORY) -> Weights | None:
    """The embedded weights; None in a package without them."""
    found = Weights(directory / "checkpoint", directory / "indexer.safetensors")
    return found if found.checkpoint.is_dir() and found.indexer.is_file() else None
