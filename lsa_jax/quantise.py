"""Quantises a float checkpoint to the forms of a V4 release: `python -m lsa_jax.quantise SRC DST`.

SRC holds float32 or bfloat16 leaves, as training writes them.
"""

import argparse
import dataclasses
import hashlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal, get_args

import jax
import ml_dtypes
import numpy as np

from lsa_jax import cli, model_io
from lsa_jax.checkpoint import formats, layout, manifest, store
from lsa_jax.checkpoint.leaf import CheckpointError, LeafInfo, Storage, leaf_infos, weight_path
from lsa_jax.checkpoint.writer import partial_path, write_checkpoint
from lsa_jax.parameters import ParamSpec, Table, parameter_table

Experts = Literal["fp8", "fp4"]

_PLAIN = {"matrix": ml_dtypes.bfloat16, "norm": ml_dtypes.bfloat16, "f32": np.float32}
_FLOATS = (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16))


def storages(table: Table, experts: Experts) -> dict[str, Storage]:
    """How a release stores every parameter (9.1); `experts` says which of its two kinds of one."""

    def storage(spec: ParamSpec) -> Storage:
        if spec.kind == "expert" and experts == "fp4":
            return Storage(spec, "fp4", np.dtype(np.uint8))
        if spec.kind in ("linear", "expert"):
            return Storage(spec, "fp8", np.dtype(ml_dtypes.float8_e4m3fn))
        return Storage(spec, "plain", np.dtype(_PLAIN.get(spec.kind, np.int32)))

    return {path: storage(spec) for path, spec in table.items()}


def check_source(src: Path, leaves: Mapping[str, LeafInfo], table: Table) -> None:
    """CheckpointError unless the leaves are those of the model, none of them quantised."""
    for path, spec in table.items():
        if path not in leaves:
            raise CheckpointError(f"{src}: leaf {path} is missing")
        dtype = leaves[path].dtype
        if spec.kind != "table" and dtype not in _FLOATS:
            wanted = f"must be float32 or bfloat16, got {dtype}"
            raise CheckpointError(f"{src} is quantised already: leaf {path} {wanted}")


def quantised(values: np.ndarray, storage: Storage) -> tuple[np.ndarray, np.ndarray | None]:
    """A parameter as it is stored, and the scales of a quantised one. ValueError unless finite."""
    if not np.isfinite(values).all():
        raise ValueError("its values must be finite")
    if storage.form == "plain":
        return values.astype(storage.dtype), None
    quantise = formats.quantize_fp8 if storage.form == "fp8" else formats.quantize_fp4
    codes, scales = quantise(values.astype(np.float32))
    return codes.view(storage.dtype), scales


def reader(leaves: Mapping[str, jax.Array], stored: Mapping[str, Storage]) -> Callable:
    """What `write_checkpoint` reads rows with. The parameter in hand is quantised once."""
    held: dict[str, tuple[np.ndarray, np.ndarray | None]] = {}

    def read(path: str, start: int, stop: int) -> np.ndarray:
        owner = path if path in stored else weight_path(path)
        if owner not in held:
            held.clear()
            try:
                held[owner] = quantised(np.asarray(leaves[owner]), stored[owner])
            except ValueError as why:
                raise CheckpointError(f"leaf {owner}: {why}") from why
        weight, scale = held[owner]
        rows = weight if path == owner else scale
        assert rows is not None  # a plain leaf has no path of scales
        return rows[start:stop]

    return read


def quantise(src: Path, dst: Path, experts: Experts, *, drop_mtp: bool = False) -> int:
    """Writes the checkpoint `dst` from `src`, which is held in host memory. Its bytes of leaves.

    Without its multi-token prediction module a model generates the same: decoding drafts nothing.
    Raises CheckpointError (a quantised or damaged source, a value that is not finite),
    FileNotFoundError and FileExistsError.
    """
    cfg = model_io.read_config(src)
    if drop_mtp:
        cfg = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    if dst.exists():
        raise FileExistsError(f"{dst} exists already: delete it or choose another destination")
    contents, table = manifest.read(src), parameter_table(cfg)
    check_source(src, contents.leaves, table)
    stored = storages(table, experts)
    host = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    _, leaves = store.load_checkpoint(
        src, shardings=lambda path, leaf: host, wanted=table.__contains__
    )
    infos = leaf_infos(stored, "keep")
    own = (layout.CONFIG, f"{layout.PARAMS}/_METADATA")
    source = hashlib.sha256((src / manifest.NAME).read_bytes()).hexdigest()
    write_checkpoint(
        dst,
        cfg,
        infos,
        reader(leaves, stored),
        {name: src / name for name in contents.files if name not in own},
        identity={"source": f"quantised from {source}", "weights": f"experts {experts}"},
    )
    return sum(info.nbytes for info in infos.values())


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m lsa_jax.quantise", description=__doc__, allow_abbrev=False)
    parser.add_argument("src", type=Path, help="directory of a checkpoint in float32 or bfloat16")
    parser.add_argument("dst", type=Path, help="directory to create")
    parser.add_argument(
        "--experts",
        choices=get_args(Experts),
        default="fp8",
        help="fp8 (default) as in the Base releases, fp4 as in the others",
    )
    drop = "leave out the multi-token prediction module, which generating does not use"
    parser.add_argument("--drop-mtp", action="store_true", help=drop)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        size = quantise(args.src, args.dst, args.experts, drop_mtp=args.drop_mtp)
        print(f"{args.dst}: {size:,} bytes of weights")

    where = partial_path(args.dst)
    return cli.exit_code(body, interrupted=f"interrupted; run it again to go on from {where}")


if __name__ == "__main__":
    sys.exit(main())
