"""An indexer's configuration and leaves, and the traps of layer numbers and positions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.config import ConfigError
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_shapes
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves, rope_frequencies
from tests.indexer_cases import (
    LOGITS_ERROR,
    SMALL,
    V4,
    expected,
    indexer,
    inputs,
    random_weights,
    rms,
    small_logits,
)
from tests.reference import indexer_reference as reference


def test_an_indexer_is_its_leaves_and_refuses_others_by_name():
    cfg = dataclasses.replace(SMALL, ensemble="learned")
    leaves = random_leaves(cfg, jax.random.key(1), jnp.bfloat16)
    assert {n: leaf.shape for n, leaf in leaves.items()} == leaf_shapes(cfg)
    back = MemoryIndexer(cfg, leaves).leaves()
    assert list(back) == list(leaves)
    for name, leaf in leaves.items():
        assert leaf.dtype == jnp.bfloat16
        np.testing.assert_array_equal(back[name], leaf)
    del leaves["retrievers.l2.wq_b.weight"]
    leaves["retrievers.l5.wq_a.weight"] = jnp.zeros((2, 2))
    with pytest.raises(ValueError, match=r"l2\.wq_b\.weight.*got None.*l5\.wq_a\.weight.*\(2, 2\)"):
        MemoryIndexer(cfg, leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_layers": ()}, r"indexer.target_layers .*got \(\)"),
        ({"target_layers": (3, 1)}, "ascending"),
        ({"target_layers": (1, 1)}, "ascending"),
        ({"target_layers": [1]}, r"got \[1\]"),
        ({"head_dim": 48}, "indexer.head_dim must be a power of two, got 48"),
        ({"rope_head_dim": 15}, "indexer.rope_head_dim must be even"),
        ({"rope_head_dim": 64}, "<= head_dim=32, got 64"),
        ({"n_heads": 0}, "indexer.n_heads must be >= 1, got 0"),
        ({"norm_eps": 0.0}, "indexer.norm_eps must be > 0"),
        ({"query_mode": "int8"}, "query_mode must be one of float32, bfloat16, fp8, got 'int8'"),
        ({"ensemble": "or"}, "ensemble must be one of max, mean, learned, got 'or'"),
    ],
)
def test_a_bad_configuration_is_refused_by_field(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(SMALL, **changes)


def test_an_indexer_for_other_index_keys_is_refused_by_field():
    assert IndexerConfig.for_model(V4, target_layers=(10, 12, 20)).hidden_size == 4096
    for name, value in (("hidden_size", 4095), ("head_dim", 64), ("rope_theta", 1e4)):
        with pytest.raises(ConfigError, match=f"indexer.{name} must be the model's"):
            IndexerConfig.for_model(V4, target_layers=(10,), **{name: value})


def test_a_configuration_survives_json():
    cfg = IndexerConfig.for_model(V4, target_layers=(1, 7), ensemble="learned", query_mode="fp8")
    assert indexer_config.from_json(indexer_config.to_json(cfg)) == cfg
    plain = dataclasses.replace(cfg, yarn=None)
    assert indexer_config.from_json(indexer_config.to_json(plain)) == plain
    with pytest.raises(ConfigError, match="table of target_layers, hidden_size"):
        indexer_config.from_json({"heads": 3})


# The layer-id and position traps of LSA spec 2.3. T7 (recency counts entries, not tokens) and the
# strict comparison of T8 are the resident set's; keys named by layer are in test_indexer_files.


def test_csa_ordinals_are_transformer_layers_of_csa_type_only():
    """T1, T9, and HCA ordinals, which are the same small integers."""
    every = IndexerConfig.for_model(V4, target_layers=tuple(range(21)))
    layers = every.transformer_layers(V4)
    assert layers == tuple(range(2, 43, 2))
    assert all(V4.layer_types[layer] == "csa" for layer in layers)
    released = dataclasses.replace(every, target_layers=(10, 12, 20))
    assert released.transformer_layers(V4) == (22, 26, 42)
    eight = dataclasses.replace(every, target_layers=(6, 8, 10, 12, 14, 16, 18, 20))
    assert eight.transformer_layers(V4) == (14, 18, 22, 26, 30, 34, 38, 42)


def test_ordinals_follow_the_models_own_order_of_layers():
    """T4: counted along layer_types, whatever their pattern; not 2 + 2 * ordinal."""
    kinds = ("csa", "hca", "hca", "csa", "sliding", "csa")
    model = dataclasses.replace(V4, layer_types=kinds, mlp_types=("hash",) * 6)
    cfg = IndexerConfig.for_model(model, target_layers=(0, 1, 2))
    assert cfg.transformer_layers(model) == (0, 3, 5)


def test_a_transformer_layers_number_is_no_ordinal():
    """T2: the error says which ordinal was meant."""
    with pytest.raises(ConfigError, match=r"0\.\.20.*got 22 \(transformer layer 22 is ordinal 10"):
        IndexerConfig.for_model(V4, target_layers=(10, 22))


def test_every_layer_scores_its_own_keys():
    """T5: one layer's keys for all heads is a known mistake."""
    weights, (hidden, keys) = random_weights(SMALL), inputs(SMALL, 2, 40)
    got = small_logits(weights)
    for i, ordinal in enumerate(SMALL.target_layers):
        for row, position in enumerate((5, 70)):
            want = expected(SMALL, weights, ordinal, hidden[i, row], position, keys[i, row])
            np.testing.assert_allclose(got[i, row], want, atol=LOGITS_ERROR * rms(want))
    planes = [codec.DensePlanes(jnp.asarray(keys[0]))]
    with pytest.raises(ValueError, match="3 target layers, got 3 and 1"):
        indexer(SMALL, weights)(jnp.asarray(hidden), jnp.array([5, 70]), planes)


def test_positions_are_absolute_tokens_and_keys_sit_at_their_first():
    """T6: moving the query by 4j tokens and keys by j entries, at 4j, changes no logit."""
    cfg, theta = dataclasses.replace(SMALL, target_layers=(0,)), rope_frequencies(SMALL)
    weights, (hidden, raw) = random_weights(cfg), inputs(cfg, 1, 30)
    module = indexer(cfg, weights)

    def logits(position: int, first_entry: int) -> np.ndarray:
        at = 4 * (first_entry + np.arange(30))
        rows = [reference.rope(raw[0, 0, [j]], p, theta)[0] for j, p in enumerate(at)]
        keys = reference.hadamard(np.stack(rows)).astype(np.float32)[None]
        planes = codec.DensePlanes(jnp.asarray(keys))
        return np.asarray(module.layer_logits(0, hidden[0], jnp.array([position]), planes))

    want = logits(200, 0)
    # float32 angles: each is off by up to 2^-24 of some hundred radians
    np.testing.assert_allclose(logits(200 + 4 * 16, 16), want, atol=1e-4 * rms(want))
    assert np.abs(logits(201, 0) - want).max() > 0.01 * rms(want)
    assert np.abs(logits(200 // 4, 0) - want).max() > 0.1 * rms(want)
