"""Indexers leave training: `python -m train.export SRC DST`.

SRC is a run's directory, an indexer file (ours, the released safetensors, torch's `.pt`), or what
this wrote. DST that ends in .safetensors has the released layout, which a torch user opens with
safetensors alone; any other DST becomes a directory for Orbax: `params/`, a checkpoint of the
leaves by their released names, and `indexer.json`, their configuration, calibration and digests.
Leaves are copied bit for bit. DST appears complete or not at all.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

from lsa_jax import cli
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.config_checks import refusal, table
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_config import leaf_shapes
from lsa_jax.lsa.indexer_file import DTYPE_NAMES, IndexerFile, fault, write_indexer
from lsa_jax.lsa.indexer_reader import read_indexer
from train.run import checkpoints

SCHEMA = 1
MANIFEST, PARAMS = "indexer.json", "params"


def leaf_digests(leaves: Mapping[str, np.ndarray]) -> dict[str, str]:
    """sha256 of each leaf's bytes."""
    flat = {name: np.ascontiguousarray(leaf).reshape(-1) for name, leaf in leaves.items()}
    return {name: hashlib.sha256(leaf.view(np.uint8)).hexdigest() for name, leaf in flat.items()}


def write_orbax(dst: Path, indexer: IndexerFile) -> None:
    """Writes a directory that `read_orbax` reads; FileExistsError where `dst` is there already."""
    if os.path.lexists(dst):
        raise FileExistsError(f"{dst} exists already: delete it or choose another destination")
    partial = dst.with_name(dst.name + ".partial").absolute()
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    leaves = dict(indexer.leaves)
    manifest = {
        "schema": SCHEMA,
        "config": indexer_config.to_json(indexer.config),
        "calibration": indexer.calibration,
        "sha256": leaf_digests(leaves),
    }
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(partial / PARAMS, leaves)
        with (partial / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1, allow_nan=False)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(dst)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _restored(src: Path, names: set[str]) -> dict[str, np.ndarray]:
    """The leaves of a checkpoint on the host, wherever they were when it was written."""
    options = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            args = ocp.args.PyTreeRestore(restore_args=options)
            return checkpointer.restore((src / PARAMS).absolute(), args)
    except (ValueError, KeyError, TypeError, OSError) as why:
        reason = str(why).splitlines()[0][:200] if str(why) else type(why).__name__
        raise fault(src, f"{PARAMS} cannot be read: {reason}") from None


def read_orbax(src: Path) -> IndexerFile:
    """The indexer in a directory that `write_orbax` wrote, held against its digests.

    Raises FileNotFoundError, and CheckpointError naming what is damaged.
    """
    try:
        raw = table("manifest", json.loads((src / MANIFEST).read_text("utf-8")))
        if raw.keys() != {"schema", "config", "calibration", "sha256"} or raw["schema"] != SCHEMA:
            raise ConfigError(f"must have schema {SCHEMA}, and nothing missing or unknown")
        config = indexer_config.from_json(table("config", raw["config"]))
        digests = table("sha256", raw["sha256"])
    except (ValueError, TypeError) as why:  # JSON's errors and ConfigError are ValueErrors
        raise fault(src, f"{MANIFEST} is damaged: {' '.join(str(why).split())}") from None
    leaves = _restored(src, set(digests))
    want = {name: (shape, digests.get(name)) for name, shape in leaf_shapes(config).items()}
    sums = leaf_digests(leaves)
    got = {name: (leaf.shape, sums[name]) for name, leaf in leaves.items()}
    wrong = sorted(name for name in want.keys() | got.keys() if want.get(name) != got.get(name))
    wrong += [name for name, leaf in leaves.items() if leaf.dtype not in DTYPE_NAMES]
    if wrong:
        raise fault(src, f"{', '.join(wrong)}: not what {MANIFEST} says: damaged or missing")
    return IndexerFile(config, {name: leaves[name] for name in want}, raw["calibration"])


@dataclasses.dataclass(frozen=True)
class Source:
    """An indexer, and the step of the run that it is of."""

    indexer: IndexerFile
    step: int | None = None


def read_source(
    src: Path,
    model: ModelConfig | None = None,
    *,
    step: int | None = None,
    layer: int | None = None,
) -> Source:
    """The indexer at `src`, whatever it is.

    Args:
      src: a run's directory, an indexer file, or an exported directory.
      model: the backbone that it is for, which it is held to.
      step: of a run: which checkpoint; by default the best, the last where none was validated.
      layer: of a `.pt` with a single layer: its CSA ordinal.

    Raises FileNotFoundError, ConfigError where an option does not apply, and CheckpointError.
    """
    is_run = (src / "checkpoints").is_dir()
    if step is not None and not is_run:
        raise refusal("--step", step, f"left out, as {src} is no directory of a run")
    if layer is not None and src.is_dir():
        raise refusal("--layer", layer, f"left out, as {src} names its own layers")
    if is_run:
        config, leaves, found = checkpoints.load_params(src, step)
        source = Source(IndexerFile(config, leaves), found)
    elif not src.is_dir():
        return Source(read_indexer(src, model, layer=layer))
    elif (src / MANIFEST).exists():
        source = Source(read_orbax(src))
    else:
        raise fault(src, f"must have checkpoints/, as a run, or {MANIFEST}, as an export")
    try:
        if model is not None:
            source.indexer.config.check_model(model)
    except ConfigError as why:
        raise fault(src, str(why)) from None
    return source


def write(dst: Path, indexer: IndexerFile) -> None:
    """Writes a file or a directory by the name of `dst`; FileExistsError where it is there."""
    (write_indexer if dst.suffix == ".safetensors" else write_orbax)(dst, indexer)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m train.export", description=__doc__, allow_abbrev=False)
    parser.add_argument("src", type=Path, help="run, indexer file, or exported directory")
    parser.add_argument("dst", type=Path, help="NAME.safetensors, or a directory for Orbax")
    parser.add_argument("--step", type=int, help="of a run: its checkpoint (default: its best)")
    parser.add_argument("--layer", type=int, help="of a .pt with a single layer: its CSA ordinal")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        source = read_source(args.src, step=args.step, layer=args.layer)
        write(args.dst, source.indexer)
        layers = ", ".join(map(str, source.indexer.config.target_layers))
        of = "" if source.step is None else f", step {source.step} of {args.src}"
        print(f"{args.dst}: {source.indexer.nbytes:,} bytes of weights, CSA layers {layers}{of}")

    return cli.exit_code(body, interrupted="interrupted; nothing was exported")


if __name__ == "__main__":
    sys.exit(main())
