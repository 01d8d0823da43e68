"""The memory indexer on the host, and our own file format for it.

The format is the released layout, which every safetensors reader opens: for each target layer
`retrievers.l{CSA ordinal}.{wq_a.weight, q_norm_weight, wq_b.weight, weights_proj.weight}`; plus one
metadata entry with the configuration and whatever calibration belongs to the weights. NumPy only.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_shapes

METADATA_KEY = "lsa_jax.indexer"
SCHEMA = 1
DTYPE_NAMES: Mapping[np.dtype, str] = {
    np.dtype(np.float32): "F32",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}


def fault(path: Path, what: str) -> CheckpointError:
    """The one-line error for an indexer file; the caller raises it."""
    return CheckpointError(f"indexer {path}: {what}")


@dataclasses.dataclass(frozen=True)
class IndexerFile:
    """An indexer on the host: leaves are float32 or bfloat16 by `leaf_shapes(config)`'s names.

    `calibration` is a JSON table that belongs to the weights, such as thresholds by length.
    """

    config: IndexerConfig
    leaves: Mapping[str, np.ndarray]
    calibration: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves."""
        return sum(leaf.nbytes for leaf in self.leaves.values())

    def astype(self, dtype: np.dtype) -> "IndexerFile":
        """The same indexer with all leaves in `dtype`."""
        cast = {name: leaf.astype(dtype, copy=False) for name, leaf in self.leaves.items()}
        return dataclasses.replace(self, leaves=cast)


def _header(indexer: IndexerFile) -> tuple[bytes, list[str]]:
    """Header of a safetensors file, and the leaves in the order of their bytes: widest items first,
    so that each begins at a multiple of its item size."""
    leaves = indexer.leaves
    order = sorted(leaves, key=lambda name: -leaves[name].itemsize)
    ours = {
        "schema": SCHEMA,
        "config": indexer_config.to_json(indexer.config),
        "calibration": indexer.calibration,
    }
    metadata = {"format": "pt", METADATA_KEY: json.dumps(ours, allow_nan=False)}
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name in order:
        leaf = leaves[name]
        span = [at, at + leaf.nbytes]
        header[name] = {
            "dtype": DTYPE_NAMES[leaf.dtype],
            "shape": list(leaf.shape),
            "data_offsets": span,
        }
        at += leaf.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, order


def write_indexer(dst: Path, indexer: IndexerFile) -> None:
    """Writes our own format; `dst` appears complete or not at all.

    Raises FileExistsError where `dst` is there already, CheckpointError where the leaves do not fit
    the configuration.
    """
    dst = Path(dst)
    if os.path.lexists(dst):
        raise FileExistsError(f"{dst} exists already: delete it or choose another destination")
    got = {name: leaf.shape for name, leaf in indexer.leaves.items()}
    if got != leaf_shapes(indexer.config):
        raise fault(dst, "leaves must be those of the configuration, in name and shape")
    for name, leaf in indexer.leaves.items():
        if leaf.dtype not in DTYPE_NAMES:
            raise fault(dst, f"{name}: dtype must be float32 or bfloat16, got {leaf.dtype}")
    header, order = _header(indexer)
    partial = dst.with_name(dst.name + ".partial")
    try:
        with partial.open("wb") as f:
            f.write(header)
            for name in order:
                f.write(np.ascontiguousarray(indexer.leaves[name]).reshape(-1).view(np.uint8))
            f.flush()
            os.fsync(f.fileno())
        partial.rename(dst)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
