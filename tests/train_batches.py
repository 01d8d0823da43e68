"""Small batches by hand for the training step, and an indexer's parameters to train."""

import jax.numpy as jnp
import numpy as np

from lsa_jax.lsa.indexer_config import IndexerConfig
from tests.indexer_cases import random_weights
from train.data.batch import Drawn
from train.run.key_pool import KeyPlanes
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
PAGES, PAGE, OWN = 11, 4, 3  # of the pool; entries of each; a document's


def parameters(seed: int = 0, cfg: IndexerConfig = CFG) -> dict[str, np.ndarray]:
    return random_weights(cfg, seed)


def planes(key_format: str = "fp8") -> KeyPlanes:
    """A pool of keys that is full."""
    rng, layers = np.random.default_rng(99), len(CFG.target_layers)
    keys = rng.standard_normal((layers, PAGES, PAGE, CFG.head_dim)).astype(np.float32)
    table = jnp.asarray([rng.permutation(PAGES)[:OWN] for _ in range(ROWS)], jnp.int32)
    if key_format == "float32":
        return KeyPlanes(tuple(map(jnp.asarray, keys)), (), table)
    scale = np.abs(keys).max(axis=-1) / np.float32(448)
    codes = (keys / scale[..., None]).astype(E4M3)
    return KeyPlanes(tuple(map(jnp.asarray, codes)), tuple(map(jnp.asarray, scale)), table)


def gathered(pool: KeyPlanes, inputs: Inputs) -> tuple[np.ndarray, np.ndarray | None]:
    """Keys [L, B, C, K] and scales [L, B, C] of the candidates, one by one; 0 for the others."""
    index = np.asarray(inputs.drawn.index)
    shape = (len(pool.keys), *index.shape)
    keys = np.zeros((*shape, pool.keys[0].shape[2]), pool.keys[0].dtype)
    scale = np.zeros(shape, np.float32) if pool.scale else None
    for layer, b, c in np.ndindex(shape):
        if index[b, c] >= 0:
            page, at = pool.table[b, index[b, c] // PAGE], index[b, c] % PAGE
            keys[layer, b, c] = pool.keys[layer][page, at]
            if scale is not None:
                scale[layer, b, c] = pool.scale[layer][page, at]
    return keys, scale


def batch(seed: int = 0, *, rows: int = ROWS) -> Inputs:
    """Ragged samples; what is not valid is garbage, the last row altogether."""
    rng = np.random.default_rng(seed)
    shape, layers = (rows, CANDIDATES), len(CFG.target_layers)
    valid = rng.random(shape) < 0.75
    valid[-1], valid[0, :2] = False, True
    labels = rng.random(shape) < 0.4
    labels[0, :2] = True, False
    index = np.stack([np.sort(rng.permutation(PAGE * OWN)[:CANDIDATES]) for _ in range(rows)])
    positions, entries = rng.integers(0, 100_000, rows), rng.integers(2, 5000, rows)
    stands_for = np.where(labels, 1, rng.uniform(1, 9, shape))
    grades = np.stack([labels, rng.uniform(0.5, 2, shape), stands_for], axis=2)
    number = np.arange(rows)
    return Inputs(
        hidden=rng.standard_normal((layers, rows, 1, CFG.hidden_size)).astype(np.float32),
        drawn=Drawn(
            np.stack([number, number, positions, entries], axis=1).astype(np.int32),
            grades.astype(np.float32),  # each candidate has one of its own
            np.where(valid, index, -1).astype(np.int32),
            np.tile(np.arange(CANDIDATES, dtype=np.uint8), (rows, 1)),
            rng.exponential(0.5, shape).astype(np.float32),
        ),
    )
