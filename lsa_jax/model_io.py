"""Checkpoint directory -> model on the devices."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.sharding import Mesh

from lsa_jax import shardings
from lsa_jax.checkpoint import manifest, store
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import ComputeConfig, ConfigError, ModelConfig
from lsa_jax.nn.transformer import DeepSeekV4
from pallas_kernels import dispatch


def read_config(directory: Path) -> ModelConfig:
    """The configuration of the model in a converted checkpoint; no array is read.

    Raises FileNotFoundError where there is no such directory, CheckpointError where it holds no
    finished checkpoint of ours; released and HF checkpoints are told apart by name.
    """
    converted = (directory / manifest.NAME).exists()
    if not converted and any(directory.glob("*.safetensors*")):
        how = f"python -m lsa_jax.convert {directory} DST"
        raise CheckpointError(f"{directory} holds safetensors, convert them first: {how}")
    return store.open_store(directory).config


@contextlib.contextmanager
def backend_refusals() -> Iterator[None]:
    """ConfigError in place of Unsupported, for what the kernels that a user named decline."""
    try:
        yield
    except dispatch.Unsupported as why:
        raise ConfigError(f"backend: {why}") from why


def load_model(
    directory: Path, *, compute: ComputeConfig, mesh: Mesh | None = None, drafter: bool = False
) -> DeepSeekV4:
    """The model of a converted checkpoint, every file of it checked, on JAX's devices.

    Args:
      directory: what `lsa_jax.convert` or `lsa_jax.synthesize` wrote.
      compute: arithmetic of the forward pass; leaves stay in the dtypes they are stored in.
      mesh: devices to spread the leaves over (`shardings.RULES`); the default device without it.
      drafter: whether to load the multi-token prediction module. Without it, the model's
        configuration has `num_nextn_predict_layers` = 0.

    Raises as `read_config` does, CheckpointError naming every damaged file or misfitting leaf, and
    ConfigError where the mesh does not divide a leaf or there is no drafter to load.
    """
    cfg = read_config(directory)
    if compute.kernel_backend is not None:
        with backend_refusals():
            dispatch.require(compute.kernel_backend)
    if drafter and not cfg.num_nextn_predict_layers:
        raise ConfigError(f"drafter needs num_nextn_predict_layers >= 1, {directory} has 0")
    stored, leaves = store.load_checkpoint(
        directory,
        shardings=mesh
        and (lambda path, leaf: shardings.leaf_sharding(cfg, mesh, path, leaf.shape)),
        wanted=lambda path: drafter or not path.startswith("mtp."),
    )
    cfg = stored if drafter else dataclasses.replace(stored, num_nextn_predict_layers=0)
    try:
        return DeepSeekV4(cfg, compute, leaves)
    except ValueError as why:  # written by a version with another parameter table
        raise CheckpointError(f"checkpoint {directory}: {why}") from why


def model_bytes(model: DeepSeekV4) -> int:
    """Bytes of all leaves; what a mesh replicates counts once."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(model))
