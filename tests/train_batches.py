"""Small batches by hand for the training step, and an indexer's parameters to train."""

import numpy as np

from lsa_jax.lsa.indexer_config import IndexerConfig
from tests.indexer_cases import random_weights
from train.run.losses import Targets
from train.run.step import Inputs
from train.traces.trace_info import E4M3

CFG = IndexerConfig(
    target_layers=(1, 4),
    hidden_size=12,
    n_heads=3,
    q_lora_rank=10,
    head_dim=8,
    rope_head_dim=4,
    norm_eps=1e-3,  # large enough to matter
)
ROWS, CANDIDATES = 8, 9


def parameters(seed: int = 0, cfg: IndexerConfig = CFG) -> dict[str, np.ndarray]:
    return random_weights(cfg, seed)


def batch(seed: int = 0, *, rows: int = ROWS, key_format: str = "fp8") -> Inputs:
    """Ragged samples; what is not valid is garbage, the last row altogether."""
    rng = np.random.default_rng(seed)
    shape, layers = (rows, CANDIDATES), len(CFG.target_layers)
    valid = rng.random(shape) < 0.75
    valid[-1], valid[0, :2] = False, True
    labels = rng.random(shape) < 0.4
    labels[0, :2] = True, False
    keys = rng.standard_normal((layers, *shape, CFG.head_dim)).astype(np.float32)
    scale = None
    if key_format == "fp8":
        scale = np.abs(keys).max(axis=-1) / np.float32(448)
        keys = (keys / scale[..., None]).astype(E4M3)
        scale = np.where(valid, scale, np.float32(1e20))
    targets = Targets(
        labels=labels.astype(np.float32),
        weights=rng.uniform(0.5, 2, shape).astype(np.float32),
        mass=rng.exponential(0.5, shape).astype(np.float32),
        valid=valid,
        stands_for=np.where(labels, 1, rng.uniform(1, 9, shape)).astype(np.float32),
    )
    return Inputs(
        hidden=rng.standard_normal((layers, rows, CFG.hidden_size)).astype(np.float32),
        positions=rng.integers(0, 100_000, rows).astype(np.int32),
        entries=rng.integers(2, 5000, rows).astype(np.int32),
        keys=keys,
        key_scale=scale,
        targets=targets,
    )
