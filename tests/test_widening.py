"""A widened indexer starts with exactly the logits of the backbone's lightning indexer."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsa_jax.cache import codec
from lsa_jax.config import ComputeConfig, ConfigError
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.widening import widen
from lsa_jax.nn import lightning_indexer
from lsa_jax.nn.transformer import DeepSeekV4
from tests import small_model

# Two CSA layers behind other kinds, so that ordinal 1 is layer 4.
MODEL = dataclasses.replace(
    small_model.CONFIG,
    layer_types=("sliding", "csa", "hca", "hca", "csa"),
    mlp_types=("hash", "score", "score", "score", "score"),
)
ERROR = 1e-5  # of the RMS: float32 sums of the same terms, and zeros, in other orders


def native_logits(leaves, layer: int, x, positions, keys) -> np.ndarray:
    attn = DeepSeekV4(MODEL, ComputeConfig(dtype="float32"), leaves).layers[layer].attn

    @nnx.jit
    def score(attn, x, positions, keys):
        q, w = attn.indexer.queries(attn.q_norm(attn.wq_a(x)), x, positions)
        return lightning_indexer.index_scores(q, w, codec.DensePlanes(keys))

    return np.asarray(score(attn, x[:, None], positions[:, None], keys))[:, 0]


@pytest.mark.parametrize(
    ("weights", "heads", "rank"), [("f32", 64, 64), ("keep", 64, 64), ("keep", 40, 33)]
)
def test_logits_are_the_native_indexers(weights, heads, rank):
    leaves = small_model.leaves(weights, MODEL)
    cfg = IndexerConfig.for_model(MODEL, target_layers=(0, 1), n_heads=heads, q_lora_rank=rank)
    wide = widen(cfg, MODEL, leaves, jax.random.key(0))
    rng = np.random.default_rng(0)
    # Small enough inputs for the norm's epsilon to count: half of the mean square and more.
    hidden = rng.standard_normal((2, 3, MODEL.hidden_size), dtype=np.float32)
    hidden *= np.array([1, 1e-1, 1e-3], np.float32)[:, None]
    keys = rng.standard_normal((2, 3, 20, MODEL.index_head_dim), dtype=np.float32)
    positions = jnp.array([3, 100, 500])
    planes = [codec.DensePlanes(jnp.asarray(k)) for k in keys]
    got = np.asarray(nnx.jit(lambda m, *args: m(*args))(wide, hidden, positions, planes))
    for i, layer in enumerate((1, 4)):
        want = native_logits(leaves, layer, jnp.asarray(hidden[i]), positions, jnp.asarray(keys[i]))
        for row in range(3):
            rms = np.sqrt(np.mean(want[row] ** 2))
            assert rms > 0
            np.testing.assert_allclose(got[i, row], want[row], atol=ERROR * rms)


def test_new_heads_and_ranks_can_learn():
    cfg = IndexerConfig.for_model(MODEL, target_layers=(1,), n_heads=64, q_lora_rank=48)
    wide = widen(cfg, MODEL, small_model.leaves("f32", MODEL), jax.random.key(0))
    assert wide.cfg.norm_eps == pytest.approx(1e-6 * 32 / 48)
    name = "retrievers.l1."
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((4, MODEL.hidden_size), dtype=np.float32))
    keys = codec.DensePlanes(jnp.asarray(rng.standard_normal((4, 30, 32), dtype=np.float32)))

    def loss(leaves):
        module = type(wide)(wide.cfg, leaves)
        return jnp.sum(module.layer_logits(0, x, jnp.arange(4), keys) ** 2)

    leaves = wide.leaves()
    grads = jax.jit(jax.grad(loss))(leaves)
    assert (np.asarray(leaves[f"{name}wq_a.weight"])[32:] == 0).all()
    assert (np.abs(grads[f"{name}wq_a.weight"][32:]).max(axis=1) > 0).all()
    assert (np.asarray(leaves[f"{name}weights_proj.weight"])[32:] == 0).all()
    assert (np.abs(grads[f"{name}weights_proj.weight"][32:]).max(axis=1) > 0).all()


def test_shrinking_is_refused():
    for field, value in (("n_heads", 31), ("q_lora_rank", 16)):
        cfg = IndexerConfig.for_model(MODEL, target_layers=(0,), **{field: value})
        with pytest.raises(ConfigError, match=f"indexer.{field} must be >= the model's 32"):
            widen(cfg, MODEL, {}, jax.random.key(0))
