"""The weights that come with the package, where they do: what runs without --ckpt.

    infer/weights/checkpoint             what `lsa_jax.quantise` wrote, with its tokenizer
    infer/weights/indexer.safetensors    its memory indexer
    infer/weights/SHA256SUMS             digests of the indexer and of the checkpoint's manifest,
                                         which has those of every other file of the checkpoint
    infer/weights/CARD.md                how all this was made

They are part of the package by its list of data files.
"""

import dataclasses
import sys
from pathlib import Path

from lsa_jax.checkpoint import manifest
from lsa_jax.checkpoint.leaf import CheckpointError

DIRECTORY = Path(__file__).parent / "weights"
SUMS = "SHA256SUMS"  # as `sha256sum` writes and checks them


@dataclasses.dataclass(frozen=True)
class Weights:
    """A checkpoint's directory and its memory indexer's file."""

    checkpoint: Path
    indexer: Path


def find(directory: Path = DIRECTORY) -> Weights | None:
    """The embedded weights; None in a package without them.

    Raises CheckpointError where the indexer or the checkpoint's manifest is not what SHA256SUMS
    says. The checkpoint's other files are checked when it is loaded.
    """
    found = Weights(directory / "checkpoint", directory / "indexer.safetensors")
    if not (found.checkpoint.is_dir() and found.indexer.is_file()):
        return None
    stated = directory / SUMS
    if not stated.is_file():
        raise CheckpointError(f"embedded weights: {stated} is missing")
    digests = read_sums(stated)
    wanted = {found.indexer.name, f"{found.checkpoint.name}/{manifest.NAME}"}
    if digests.keys() != wanted:
        raise CheckpointError(f"{stated} must list {sorted(wanted)}, got {sorted(digests)}")
    if wrong := sorted(manifest.damaged(directory, digests)):
        raise CheckpointError(f"embedded weights: {', '.join(wrong)} is missing or damaged")
    return found


def read_sums(file: Path) -> dict[str, str]:
    """File name -> hex SHA-256, from lines of a digest, two blanks and a name."""
    lines = (line.partition("  ") for line in file.read_text("utf-8").splitlines())
    return {name: digest for digest, _, name in lines}


def announce(checkpoint: Path) -> None:
    """Says on stderr that a command runs these weights, where it does."""
    if checkpoint == DIRECTORY / "checkpoint":
        print("the weights are the embedded model's (infer/weights/CARD.md)", file=sys.stderr)
