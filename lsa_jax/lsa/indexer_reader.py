"""Reads memory-indexer files: the released safetensors, three forms of torch's `.pt`, our own.

Files are told apart by content, never by name. A target layer's number comes from its keys, or from
the caller for a file of one layer, and is a CSA ordinal (LSA spec 2.2, 2.3). NumPy only.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lsa_jax.checkpoint import safetensors_io
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.config_checks import table
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, IndexerConfig, leaf_name, leaf_shapes
from lsa_jax.lsa.indexer_file import DTYPE_NAMES, METADATA_KEY, SCHEMA, IndexerFile, fault
from lsa_jax.lsa.torch_reader import ZIP_MAGIC, open_torch

_LAYER_KEY = re.compile(r"retrievers\.l(0|[1-9][0-9]{0,3})\.(.+)")
_IGNORED = "freqs_cis"  # a table of rotations; ours follow from the configuration
_PICKLE_MAGIC = b"\x80"  # first byte of torch's format before 1.6


@dataclasses.dataclass(frozen=True)
class _Stored:
    """What a file holds, by the file's own names; `read` gives a tensor's elements."""

    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]]
    read: Callable[[str], np.ndarray]
    metadata: Mapping[str, Any] | None = None


def _open_safetensors(path: Path) -> _Stored:
    try:
        found = safetensors_io.read_header(path)
    except CheckpointError as why:  # its problems are lines of their own; ours is one
        raise fault(path, "; ".join(why.problems)) from None
    with path.open("rb") as f:
        header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
    metadata = header.get("__metadata__") or {}
    text = metadata.get(METADATA_KEY) if isinstance(metadata, dict) else None
    try:
        ours = None if text is None else table(METADATA_KEY, json.loads(text))
    except (TypeError, ValueError, RecursionError) as why:
        raise fault(path, f"metadata {METADATA_KEY} is damaged ({why})") from None
    tensors = {name: (info.shape, info.dtype) for name, info in found.items()}
    return _Stored(tensors, lambda name: safetensors_io.read_rows(found[name]), ours)


def _open_torch(path: Path) -> _Stored:
    file = open_torch(path)
    tensors = {name: (t.shape, file.dtype(name)) for name, t in file.tensors.items()}
    return _Stored(tensors, file.read)


def _open(path: Path) -> _Stored:
    with path.open("rb") as f:
        head = f.read(9)
    if head.startswith(ZIP_MAGIC):
        return _open_torch(path)
    if head[8:9] == b"{":
        return _open_safetensors(path)
    if head.startswith(_PICKLE_MAGIC):
        how = "load it there and torch.save it again"
        raise fault(path, f"is in torch's format from before 1.6, which is not read: {how}")
    raise fault(path, f"must be a safetensors file or a zip of torch.save, begins with {head!r}")


def _canonical(path: Path, stored: _Stored, layer: int | None) -> dict[str, str]:
    """Released leaf name -> the file's own name, without tables of rotations."""
    names = [name for name in stored.tensors if name.rsplit(".", 1)[-1] != _IGNORED]
    joint = any(name.startswith("retrievers.") for name in names)
    if joint and layer is not None:
        raise fault(path, f"names its own layers, layer must not be given, got {layer}")
    if joint:
        return {name: name for name in names}
    if "wq_a.weight" not in names or "q_norm_weight" not in names:
        shown = ", ".join(sorted(names)[:6])
        raise fault(path, f"holds no memory indexer: no retrievers.l* keys, but {shown}")
    if layer is None:
        how = "give its CSA ordinal as layer (--layer)"
        raise fault(path, f"holds one layer and does not say which: {how}")
    if layer < 0:
        raise fault(path, f"layer must be a CSA ordinal >= 0, got {layer}")
    return {leaf_name(layer, name): name for name in names}


def _inferred(shapes: Mapping[str, tuple[int, ...]], model: ModelConfig | None) -> IndexerConfig:
    """The configuration that layer numbers and the first layer's shapes imply.

    RoPE is the model's, or DeepSeek-V4's without one. Raises ConfigError.
    """
    layers = sorted({int(m[1]) for m in map(_LAYER_KEY.fullmatch, shapes) if m})
    if not layers:
        raise ConfigError("has no keys of the form retrievers.l10.wq_a.weight")
    sizes: list[int] = []
    for leaf in ("wq_a.weight", "wq_b.weight", "weights_proj.weight"):
        name = leaf_name(layers[0], leaf)
        shape = shapes.get(name, ())
        if len(shape) != 2 or 0 in shape:
            raise ConfigError(f"{name} must be a matrix, got {shape or 'none'}")
        sizes += shape
    rank, hidden, width, _, heads, _ = sizes
    if width % heads:
        name = leaf_name(layers[0], "wq_b.weight")
        raise ConfigError(f"{name} must have a multiple of {heads} heads as rows, got {width}")
    options: dict[str, Any] = {}
    if model is not None:
        options = {"rope_head_dim": model.qk_rope_head_dim, "norm_eps": model.rms_norm_eps}
        options |= {"rope_theta": model.compress_rope_theta, "yarn": model.yarn}
    return IndexerConfig(
        target_layers=tuple(layers),
        hidden_size=hidden,
        q_lora_rank=rank,
        n_heads=heads,
        head_dim=width // heads,
        ensemble="learned" if ENSEMBLE_LEAF in shapes else "max",
        **options,
    )


def _read_leaf(path: Path, stored: _Stored, source: str) -> np.ndarray:
    """A tensor as float32 or bfloat16, whichever holds it exactly."""
    dtype = stored.tensors[source][1]
    if dtype == np.float16:
        dtype = np.dtype(np.float32)
    if dtype not in DTYPE_NAMES:
        raise fault(path, f"{source}: dtype must be float32, bfloat16 or float16, got {dtype}")
    leaf = stored.read(source).astype(dtype, copy=False)
    if not np.isfinite(leaf).all():
        raise fault(path, f"{source}: has elements that are not finite")
    return leaf


def _config_of(
    stored: _Stored, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig | None
) -> IndexerConfig:
    """The configuration that the file states, or implies; raises ConfigError."""
    ours = stored.metadata
    if ours is None:
        config = _inferred(shapes, model)
    elif ours.keys() != {"schema", "config", "calibration"} or ours["schema"] != SCHEMA:
        wanted = f"schema {SCHEMA} with config and calibration"
        raise ConfigError(f"metadata {METADATA_KEY} must have {wanted}, got {sorted(ours)}")
    else:
        config = indexer_config.from_json(table("config", ours["config"]))
        if ours["calibration"] is not None:
            table("calibration", ours["calibration"])
    if model is not None:
        config.check_model(model)
    return config


def _misfits(
    want: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
) -> list[str]:
    faults = [f"{name}: missing" for name in want if name not in shapes]
    for name, shape in shapes.items():
        if name not in want:
            faults.append(f"{name}: no leaf of this indexer")
        elif shape != want[name]:
            faults.append(f"{name}: shape must be {want[name]}, got {shape}")
    return faults


def read_indexer(
    path: Path, model: ModelConfig | None = None, *, layer: int | None = None
) -> IndexerFile:
    """The indexer in a file of any known format, checked.

    Args:
      path: released or own safetensors file; or a `.pt` with all layers, a full training
        checkpoint, or a single layer without prefix. Nothing in it is ever executed.
      model: the backbone that it is for: its RoPE is used where the file does not say, and the
        file is held to it.
      layer: CSA ordinal of a single-layer file's layer; of no other.

    Raises FileNotFoundError, and CheckpointError in one line that names the file, the key and what
    is wrong with it.
    """
    path = Path(path)
    stored = _open(path)
    names = _canonical(path, stored, layer)
    shapes = {name: stored.tensors[source][0] for name, source in names.items()}
    try:
        config = _config_of(stored, shapes, model)
    except ConfigError as why:
        raise fault(path, str(why)) from None
    want = leaf_shapes(config)
    faults = _misfits(want, shapes)
    if faults:
        raise fault(path, "; ".join(faults))
    leaves = {name: _read_leaf(path, stored, names[name]) for name in want}
    return IndexerFile(config, leaves, stored.metadata and stored.metadata["calibration"])
