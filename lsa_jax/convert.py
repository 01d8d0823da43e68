"""Converts a released DeepSeek-V4 or HF checkpoint: `python -m lsa_jax.convert SRC DST`.

A conversion that was killed, or stopped with Ctrl-C, goes on when the same command is given again.
Where SRC is a file it is a memory indexer, safetensors or torch's `.pt`, and DST is the safetensors
file to create; nothing in a `.pt` is executed.
"""

import argparse
import functools
import hashlib
import resource
import sys
import time
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np

from lsa_jax import cli
from lsa_jax.checkpoint.leaf import Weights
from lsa_jax.checkpoint.source import open_source
from lsa_jax.checkpoint.writer import partial_path, write_checkpoint
from lsa_jax.config import ConfigError
from lsa_jax.lsa.indexer_file import write_indexer
from lsa_jax.lsa.indexer_reader import read_indexer


def fingerprint(src: Path) -> str:
    """Digest of the names, sizes and modification times of the files in `src`.

    Telling whether the source of a half-done conversion has changed must not take reading it all.
    """
    files = sorted(file for file in src.iterdir() if file.is_file())
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(repr(stats).encode()).hexdigest()


def convert(src: Path, dst: Path, weights: Weights) -> int:
    """Writes the checkpoint `dst` from `src`, with progress on stderr. Returns its leaf bytes."""
    source = open_source(src)
    leaves = source.leaves(weights)
    total = sum(leaf.nbytes for leaf in leaves.values())
    identity = {"source": fingerprint(src), "weights": weights}
    with cli.byte_progress(total, "convert") as progress:
        write_checkpoint(
            dst,
            source.config,
            leaves,
            functools.partial(source.read, weights=weights),
            source.extra_files,
            identity=identity,
            progress=progress,
        )
    return total


def convert_indexer(src: Path, dst: Path, weights: Weights, layer: int | None) -> int:
    """Writes the memory indexer `dst` from the file `src`. Returns its leaf bytes."""
    indexer = read_indexer(src, layer=layer)
    if weights != "keep":
        indexer = indexer.astype(np.dtype(np.float32 if weights == "f32" else ml_dtypes.bfloat16))
    write_indexer(dst, indexer)
    return indexer.nbytes


def _peak_rss_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts KiB


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m lsa_jax.convert", description=__doc__)
    src = "directory of *.safetensors and config.json; or a memory indexer's file"
    parser.add_argument("src", type=Path, help=src)
    parser.add_argument("dst", type=Path, help="directory to create; a file, for an indexer")
    parser.add_argument(
        "--weights",
        choices=get_args(Weights),
        default="keep",
        help="keep: quantised weights stay fp4 and fp8 (default); bf16, f32: dequantise all",
    )
    layer = "CSA ordinal of the layer in an indexer file that does not name its one layer"
    parser.add_argument("--layer", type=int, help=layer)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)
    cli.show_log()

    def body() -> None:
        began = time.monotonic()
        if not args.src.is_dir():
            size = convert_indexer(args.src, args.dst, args.weights, args.layer)
        elif args.layer is not None:
            raise ConfigError(f"layer is for a memory indexer's file, {args.src} is none")
        else:
            size = convert(args.src, args.dst, args.weights)
        seconds = time.monotonic() - began
        peak = _peak_rss_bytes() / 2**20
        print(f"{args.dst}: {size:,} bytes in {seconds:.1f} s, peak memory {peak:,.0f} MiB")

    where = partial_path(args.dst)
    return cli.exit_code(body, interrupted=f"interrupted; run it again to go on from {where}")


if __name__ == "__main__":
    sys.exit(main())
