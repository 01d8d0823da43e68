"""The memory indexer computes what LSA spec 2.1 says, at true shapes and in every mode."""

import dataclasses
import functools
import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_config import leaf_shapes
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves, rope_frequencies, score_keys
from lsa_jax.nn import rope
from tests.indexer_cases import (
    LOGITS_ERROR,
    POSITIONS,
    SMALL,
    V4,
    expected,
    indexer,
    inputs,
    random_weights,
    rms,
    scorer,
    small_logits,
    true_logits,
    true_shapes,
    with_leaf,
)
from tests.reference import indexer_reference as reference


def test_logits_are_those_of_the_reference_at_true_shapes_and_every_position():
    cfg, weights = true_shapes()
    got, x, keys = true_logits("float32", "float32")
    for i, position in enumerate(POSITIONS):
        want = expected(cfg, weights, 10, x[i], position, keys[i])
        assert np.abs(got[i] - want).max() <= LOGITS_ERROR * rms(want), position


# What the roundings leave of 128 heads' sum: bfloat16 rounds by 2^-9, three times; e4m3 by up to
# 2^-4, uniformly, which is 2^-4 / sqrt(3) of each element in RMS. Signs of weights are random, so
# relative errors add like the terms themselves.
@pytest.mark.parametrize(("mode", "error"), [("bfloat16", 3 * 2**-9), ("fp8", 2**-4 / 3**0.5)])
def test_rounded_modes_stay_within_their_format_of_float32(mode, error):
    want, _, _ = true_logits("float32", "float32")
    got, _, _ = true_logits(mode, "bfloat16")
    assert 2**-12 < rms(got - want) / rms(want) < error


@pytest.mark.parametrize("density", [0.01, 0.03, 0.1, 0.25, 0.5])
def test_fp8_queries_keep_the_resident_set_of_float32(density, record_property):
    """An entry flips where noise carries it over the threshold: at relative noise s and near-normal
    logits a share E|noise| pdf(z) = 0.8 s pdf(z) of all. The noise measured is 0.026, the Jaccard
    .956 .953 .964 .968 .980; the floor is for the most that e4m3 allows, 2^-4 / sqrt(3) = 0.036.
    """
    exact, _, _ = true_logits("float32", "float32", 4096)
    rounded, _, _ = true_logits("fp8", "float32", 4096)
    theta = np.quantile(exact, 1 - density, axis=1, keepdims=True)
    a, b = exact > theta, rounded > theta
    jaccard = (a & b).sum() / (a | b).sum()
    record_property("jaccard", float(jaccard))
    normal = statistics.NormalDist()
    flips = 0.8 * 2**-4 / 3**0.5 * normal.pdf(normal.inv_cdf(density))
    assert 1 > jaccard >= 1 - flips / density


def test_yarn_angles_are_the_golden_ones():
    theta = rope_frequencies(true_shapes()[0])
    golden = {0: 1, 14: 0.00528686, 15: 0.00363554, 20: 2.96978e-4, 24: 1.95313e-5, 31: 5.68053e-7}
    np.testing.assert_allclose(theta[list(golden)], list(golden.values()), rtol=4e-6)
    np.testing.assert_array_equal(theta, reference.thetas(64, 160000.0, V4.yarn))
    plain = 160000.0 ** (-np.arange(32) / 32)
    np.testing.assert_allclose(theta[:16], plain[:16], rtol=1e-7)  # low = 15
    np.testing.assert_allclose(theta[25:], plain[25:] / 16, rtol=1e-7)  # high = 25
    assert (theta[16:25] < 0.999 * plain[16:25]).all()


@pytest.mark.parametrize(
    ("position", "cos_0", "sin_15"),
    [
        (63, 0.985897, 0.227042),
        (4096, 0.803991, 0.728957),
        (65535, 0.192344, -0.484701),
        (131072, 0.042091, -0.844044),
        (524287, 0.673704, 0.771496),
        (1048575, 0.788042, -0.982395),
    ],
)
def test_rotations_are_the_golden_ones_under_jit(position, cos_0, sin_15):
    theta = rope_frequencies(true_shapes()[0])
    ones = np.zeros((1, 128), np.float32)
    ones[:, 64::2] = 1  # 1 + 0i in every pair
    turned = jax.jit(lambda p: rope.rotate(jnp.asarray(ones), p, theta))(jnp.array([position]))
    got = np.asarray(turned)[0, [64, 64 + 2 * 15 + 1]]
    np.testing.assert_allclose(got, [cos_0, sin_15], atol=1e-6)  # printed to six digits
    np.testing.assert_array_equal(np.asarray(turned)[0, :64], 0)


def test_every_code_of_an_fp8_key_is_decoded_and_only_nan_codes_score_nan():
    cfg = dataclasses.replace(SMALL, target_layers=(4,))
    weights = random_weights(cfg)
    hidden, _ = inputs(cfg, 1, 1)
    rng = np.random.default_rng(3)
    rows = rng.integers(0, 0x7F, (256, cfg.head_dim + 4), np.uint8)
    rows[np.arange(256), np.arange(256) % cfg.head_dim] = np.arange(256)
    rows[:, -4:] = rng.uniform(1e-3, 2, 256).astype("<f4").view(np.uint8).reshape(256, 4)
    planes = codec.Fp8Keys(
        jax.lax.bitcast_convert_type(jnp.asarray(rows[None, :, :-4]), jnp.float8_e4m3fn),
        jnp.asarray(np.ascontiguousarray(rows[None, :, -4:]).view("<f4")[..., 0]),
    )
    keys = reference.decode_rows(rows)
    want = expected(cfg, weights, 4, hidden[0, 0], 77, keys)
    assert np.flatnonzero(np.isnan(want)).tolist() == [0x7F, 0xFF]
    finite = ~np.isnan(want)
    # Rounded queries of few heads: see above for the errors that 128 have.
    for mode, error in (("float32", LOGITS_ERROR), ("bfloat16", 0.02), ("fp8", 0.1)):
        run = scorer(dataclasses.replace(cfg, query_mode=mode))
        got = np.asarray(run(weights, hidden, jnp.array([77]), [planes]))[0, 0]
        assert np.isnan(got).tolist() == np.isnan(want).tolist()
        assert rms(got[finite] - want[finite]) <= error * rms(want[finite])


def test_logits_are_linear_in_the_head_weights():
    weights, other = random_weights(SMALL), random_weights(SMALL, seed=8)
    proj = "weights_proj.weight"
    both = {n: w + other[n] if n.endswith(proj) else w for n, w in weights.items()}
    second = {n: other[n] if n.endswith(proj) else w for n, w in weights.items()}
    got, want = small_logits(both), small_logits(weights) + small_logits(second)
    np.testing.assert_allclose(got, want, atol=1e-5 * rms(want))


def test_the_order_of_heads_does_not_matter():
    weights, order = random_weights(SMALL), np.array([3, 1, 5, 0, 2, 4])
    rows = np.arange(6 * 32).reshape(6, 32)[order].ravel()
    permuted = with_leaf(weights, "wq_b.weight", lambda w: w[rows])
    want = small_logits(weights)
    assert np.abs(small_logits(permuted) - want).max() > 0.1 * rms(want)
    permuted = with_leaf(permuted, "weights_proj.weight", lambda w: w[order])
    np.testing.assert_allclose(small_logits(permuted), want, atol=1e-5 * rms(want))


def test_turning_queries_and_keys_alike_changes_nothing():
    rng = np.random.default_rng(5)
    q, w, k = (rng.standard_normal(s, dtype=np.float32) for s in ((1, 8, 32), (1, 8), (1, 50, 32)))
    turn = np.linalg.qr(rng.standard_normal((32, 32)))[0].astype(np.float32)
    want = score_keys(q, w, codec.DensePlanes(jnp.asarray(k)))
    got = score_keys(q @ turn, w, codec.DensePlanes(jnp.asarray(k @ turn)))
    np.testing.assert_allclose(got, want, atol=1e-5 * rms(want))
    one_side = score_keys(q @ turn, w, codec.DensePlanes(jnp.asarray(k)))
    assert np.abs(one_side - want).max() > 0.1 * rms(want)


def test_128_heads_score_like_two_groups_of_64_added():
    rng = np.random.default_rng(4)
    shapes = ((1, 128, 128), (1, 128), (1, 200, 128))
    q, w, k = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
    planes = codec.encode_keys("fp8", jnp.asarray(k))
    parts = [score_keys(q[:, s], w[:, s], planes) for s in (slice(64), slice(64, 128))]
    want = score_keys(q, w, planes)
    np.testing.assert_allclose(parts[0] + parts[1], want, atol=1e-5 * rms(want))


@pytest.mark.parametrize("ensemble", ["max", "mean", "learned"])
@pytest.mark.parametrize("mode", ["float32", "bfloat16", "fp8"])
def test_a_zero_key_has_probability_one_half_exactly(mode, ensemble):
    """So that a strict threshold of 0.5 leaves rows that hold nothing out (T8)."""
    cfg = dataclasses.replace(SMALL, query_mode=mode, ensemble=ensemble)
    weights = random_weights(cfg)
    hidden, keys = inputs(cfg, 2, 9)
    keys[:, :, 4] = 0
    planes = [codec.encode_keys("fp8", jnp.asarray(k)) for k in keys]
    logits = scorer(cfg)(weights, hidden, jnp.array([5, 70]), planes)
    scores = np.asarray(indexer(cfg, weights).ensemble(logits))
    assert (scores[:, 4] == 0.5).all()
    assert (scores == 0.5).mean() < 0.3  # the others, unless every head of a layer is silent


@pytest.mark.parametrize(
    ("n", "kv_format"),
    [(1, "fp8"), (127, "fp8"), (129, "fp8"), (1000, "fp8"), (300, "float32"), (300, "bfloat16")],
)
def test_blocks_of_keys_score_like_all_at_once(n, kv_format):
    rng = np.random.default_rng(n)
    q, w = rng.standard_normal((3, 8, 32), np.float32), rng.standard_normal((3, 8), np.float32)
    planes = codec.encode_keys(kv_format, jnp.asarray(rng.standard_normal((3, n, 32), np.float32)))
    want = score_keys(q, w, planes)
    for keys_a_block in (100, 256):
        got = score_keys(q, w, planes, block_bytes=keys_a_block * 3 * 8 * 4)
        np.testing.assert_allclose(got, want, atol=1e-6 * rms(want), rtol=1e-6)


def test_memory_does_not_grow_with_the_history():
    """At 128 heads all scores of 65,536 keys take 33 MB, and so do the keys in float32.

    XLA for CPUs copies the stored bytes of the keys, 8 MB, into its loop.
    """
    n, heads, dim, block = 65536, 128, 128, 1 << 20
    shape = jax.ShapeDtypeStruct
    planes = codec.Fp8Keys(shape((1, n, dim), jnp.float8_e4m3fn), shape((1, n), jnp.float32))
    score = jax.jit(functools.partial(score_keys, block_bytes=block))
    q, w = shape((1, heads, dim), jnp.float32), shape((1, heads), jnp.float32)
    memory = score.lower(q, w, planes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < n * dim + 4 * block  # scores, keys decoded, their copies


def test_ensembles_are_what_they_say():
    cfg = dataclasses.replace(SMALL, ensemble="learned")
    weights = random_weights(cfg)
    weights[indexer_config.ENSEMBLE_LEAF] = np.array([0.5, -1, 2], np.float32)
    logits = np.random.default_rng(2).standard_normal((3, 2, 50)).astype(np.float32) * 3
    sigmoid = 1 / (1 + np.exp(-logits.astype(np.float64)))
    share = np.exp([0.5, -1, 2]) / np.exp([0.5, -1, 2]).sum()
    mixed = np.tensordot(share, logits.astype(np.float64), 1)
    wants = {"max": sigmoid.max(0), "mean": sigmoid.mean(0), "learned": 1 / (1 + np.exp(-mixed))}
    for ensemble, want in wants.items():
        cfg = dataclasses.replace(SMALL, ensemble=ensemble)
        module = indexer(cfg, {name: weights[name] for name in leaf_shapes(cfg)})
        got = np.asarray(module.ensemble(jnp.asarray(logits)))
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_nan_logit_is_a_nan_score():
    logits = jnp.zeros((3, 1, 4)).at[1, 0, 2].set(jnp.nan)
    for ensemble in ("max", "mean", "learned"):
        cfg = dataclasses.replace(SMALL, ensemble=ensemble)
        scores = MemoryIndexer(cfg, random_leaves(cfg, jax.random.key(0))).ensemble(logits)
        assert np.isnan(np.asarray(scores))[0].tolist() == [False, False, True, False]


def test_rotated_queries_have_the_norm_of_plain_ones():
    """The Hadamard rotation is its own inverse: H . H = I."""
    x = np.random.default_rng(0).standard_normal((4, 128))
    np.testing.assert_allclose(reference.hadamard(reference.hadamard(x)), x, atol=1e-12)
    module = indexer(SMALL, random_weights(SMALL))
    hidden, _ = inputs(SMALL, 1, 1)
    near, far = (module.queries(0, hidden[0], jnp.array([p]))[0] for p in (0, 900000))
    assert math.isclose(rms(near), rms(far), rel_tol=1e-6)
