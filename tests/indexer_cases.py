"""Random memory indexers, small and of true shapes, and what the reference makes of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lsa_jax.cache import codec
from lsa_jax.config_io import load_config
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_name, leaf_shapes
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from tests.reference import indexer_reference as reference

V4 = load_config("v4_flash")
POSITIONS = (0, 63, 4096, 65535, 131072, 524287, 1048575)
LAYER_LEAVES = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")
SMALL = IndexerConfig(
    target_layers=(0, 2, 5),
    hidden_size=24,
    n_heads=6,
    q_lora_rank=20,
    head_dim=32,
    rope_head_dim=16,
)
# Float32 sums of up to 4096 terms, in other orders than the reference's: 3e-6 of the RMS at true
# shapes. A float64 angle would be off by 4e-3 and more at the last positions.
LOGITS_ERROR = 2e-5


def random_weights(cfg: IndexerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    out = {}
    for name, shape in leaf_shapes(cfg).items():
        values = rng.standard_normal(shape, dtype=np.float32)
        out[name] = 1 + values / 10 if len(shape) == 1 else values * np.float32(shape[-1] ** -0.5)
    return out


def indexer(cfg: IndexerConfig, weights: dict[str, np.ndarray], dtype=None) -> MemoryIndexer:
    return MemoryIndexer(cfg, {n: jnp.asarray(w, dtype=dtype) for n, w in weights.items()})


@functools.cache
def scorer(cfg: IndexerConfig):
    """(leaves, hidden, positions, keys) -> logits [L, B, N], compiled."""
    return jax.jit(lambda leaves, *args: MemoryIndexer(cfg, leaves)(*args))


def inputs(cfg: IndexerConfig, batch: int, n: int, seed: int = 1):
    """Hidden states [L, B, D] and keys [L, B, N, K], float32."""
    rng = np.random.default_rng(seed)
    layers = len(cfg.target_layers)
    hidden = rng.standard_normal((layers, batch, cfg.hidden_size), dtype=np.float32)
    return hidden, rng.standard_normal((layers, batch, n, cfg.head_dim), dtype=np.float32)


def of_layer(weights: dict[str, np.ndarray], ordinal: int) -> dict[str, np.ndarray]:
    return {n: weights[leaf_name(ordinal, n)].astype(np.float64) for n in LAYER_LEAVES}


def expected(cfg, weights, ordinal, x, position, keys) -> np.ndarray:
    """The reference's logits [N] of one token."""
    theta = reference.thetas(cfg.rope_head_dim, cfg.rope_theta, cfg.yarn)
    layer = of_layer(weights, ordinal)
    q, w = reference.queries(layer, x.astype(np.float64), position, theta, cfg.norm_eps)
    return reference.logits(q, w, np.asarray(keys, np.float64))


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(np.asarray(x, np.float64)))))


@functools.cache
def true_shapes() -> tuple[IndexerConfig, dict[str, np.ndarray]]:
    cfg = IndexerConfig.for_model(V4, target_layers=(10,))
    assert (cfg.n_heads, cfg.q_lora_rank, cfg.head_dim, cfg.hidden_size) == (128, 2048, 128, 4096)
    return cfg, random_weights(cfg)


@functools.cache
def true_logits(mode: str, dtype: str, n: int = 300):
    """Logits [B, N] of one random token per position, on fp8 keys; the inputs that they are of."""
    cfg, weights = true_shapes()
    hidden, keys = inputs(cfg, len(POSITIONS), n)
    planes = codec.encode_keys("fp8", jnp.asarray(keys[0]))
    module = indexer(dataclasses.replace(cfg, query_mode=mode), weights, dtype)
    logits = nnx.jit(lambda m, *args: m.layer_logits(0, *args))(
        module, jnp.asarray(hidden[0]), jnp.asarray(POSITIONS), planes
    )
    values = np.asarray(planes.values).astype(np.float64)
    return np.asarray(logits), hidden[0], values * np.asarray(planes.scale)[..., None]


def small_logits(weights):
    hidden, keys = inputs(SMALL, 2, 40)
    planes = [codec.DensePlanes(jnp.asarray(k)) for k in keys]
    return np.asarray(scorer(SMALL)(weights, hidden, jnp.array([5, 70]), planes))


def with_leaf(weights, name, change):
    """The weights with one kind of leaf changed in every layer."""
    return {n: change(w) if n.endswith(name) else w for n, w in weights.items()}
