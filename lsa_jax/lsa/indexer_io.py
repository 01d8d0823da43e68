"""Indexer file <-> memory indexer on the devices."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import DTypeLike

from lsa_jax.config import ModelConfig
from lsa_jax.lsa.indexer_config import QueryMode
from lsa_jax.lsa.indexer_file import IndexerFile, write_indexer
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.memory_indexer import MemoryIndexer


def from_file(
    file: IndexerFile, *, query_mode: QueryMode | None = None, dtype: DTypeLike | None = None
) -> MemoryIndexer:
    """The indexer on JAX's default device; `query_mode` and `dtype` replace the file's."""
    mode = query_mode or file.config.query_mode
    leaves = {name: jnp.asarray(leaf, dtype=dtype) for name, leaf in file.leaves.items()}
    return MemoryIndexer(dataclasses.replace(file.config, query_mode=mode), leaves)


def load_indexer(
    path: Path,
    model: ModelConfig | None = None,
    *,
    layer: int | None = None,
    query_mode: QueryMode | None = None,
    dtype: DTypeLike | None = None,
) -> MemoryIndexer:
    """The memory indexer of a file, held to `model` where one is given.

    Files without our metadata say nothing of `query_mode`: it is float32 unless given. `dtype` is
    that of the parameters, the file's own by default. Raises as `read_indexer` does.
    """
    return from_file(read_indexer(path, model, layer=layer), query_mode=query_mode, dtype=dtype)


def save_indexer(
    dst: Path, indexer: MemoryIndexer, calibration: Mapping[str, Any] | None = None
) -> None:
    """Writes an indexer as `read_indexer` reads it, with what was calibrated for it.

    Raises as `write_indexer` does.
    """
    leaves = {name: np.asarray(jax.device_get(leaf)) for name, leaf in indexer.leaves().items()}
    write_indexer(dst, IndexerFile(indexer.cfg, leaves, calibration))
