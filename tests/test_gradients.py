"""Gradients that are written by hand are those of the plain definitions."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsa_jax.cache.state import write_pages
from lsa_jax.config import ComputeConfig
from lsa_jax.nn import attend_blocks
from lsa_jax.nn.layers import Leaves, take_rows
from lsa_jax.nn.moe import Moe
from lsa_jax.parameters import parameter_table
from pallas_kernels.compress import reference as compress_reference
from pallas_kernels.hc_mix import reference
from tests import small_model
from train.pretraining import lm_init, lm_step, sequence

EPS = 1e-6


def _plain_sinkhorn(soft: jax.Array, iterations: int) -> jax.Array:
    """Columns, then rows and columns in turn, on the matrix itself."""
    comb = soft / (jnp.sum(soft, axis=-2, keepdims=True) + EPS)
    for _ in range(iterations - 1):
        comb = comb / (jnp.sum(comb, axis=-1, keepdims=True) + EPS)
        comb = comb / (jnp.sum(comb, axis=-2, keepdims=True) + EPS)
    return comb


@pytest.mark.parametrize(("streams", "iterations"), [(4, 1), (4, 20), (3, 2)])
def test_sinkhorns_gradient_is_that_of_the_definition(streams, iterations):
    rng = np.random.default_rng(0)
    soft = np.exp(3 * rng.normal(size=(2, 5, streams, streams)))
    soft = soft / soft.sum(axis=-1, keepdims=True) + EPS
    cotangent = rng.normal(size=soft.shape)

    def pulled(f: Callable[[jax.Array], jax.Array]) -> tuple[jax.Array, jax.Array]:
        out, pull = jax.vjp(f, soft)
        return out, pull(cotangent)[0]

    with jax.enable_x64(True):
        plain = functools.partial(_plain_sinkhorn, iterations=iterations)
        want, wanted = jax.jit(lambda: pulled(plain))()
        got, gradient = jax.jit(lambda: pulled(lambda x: reference.normalise(x, iterations, EPS)))()
        assert gradient.dtype == jnp.float64
    np.testing.assert_allclose(got, want, rtol=1e-12)  # float64 in another order
    size = np.abs(wanted).max()
    np.testing.assert_allclose(gradient, wanted, rtol=0, atol=1e-11 * size)
    same = reference.normalise(jnp.float32(soft), iterations, EPS)  # what serves
    np.testing.assert_allclose(got, same, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_taken_rows_adds_up_the_rows_that_repeat(dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(7, 5)), dtype)
    index = jnp.asarray(rng.integers(0, 6, (3, 11)))  # row 6 is never taken
    cotangent = jnp.asarray(rng.normal(size=(3, 11, 5)), dtype)
    got, pull = jax.vjp(lambda x: take_rows(x, index), table)
    np.testing.assert_array_equal(got, table[index])
    want = np.zeros((7, 5))
    np.add.at(want, np.asarray(index), np.asarray(cotangent, np.float64))
    tol = 8 * float(jnp.finfo(dtype).eps)  # one rounding of sums of up to some ten numbers
    np.testing.assert_allclose(pull(cotangent)[0].astype(jnp.float32), want, rtol=tol, atol=tol)
    assert pull(cotangent)[0].dtype == dtype and not want[6].any()


def test_the_gradient_of_aligned_windows_takes_each_slot_back_to_its_token():
    rng = np.random.default_rng(0)
    ratio, tokens = 4, 9
    x = jnp.asarray(rng.normal(size=(4, tokens, 3)), jnp.float32)
    offset = jnp.arange(4)
    got, pull = jax.vjp(lambda x: compress_reference.into_windows(x, offset, ratio, -7.0), x)
    slots = np.asarray(got).reshape(4, -1, 3)
    cotangent = rng.normal(size=got.shape).astype(np.float32)
    back, given = np.asarray(pull(jnp.asarray(cotangent))[0]), cotangent.reshape(slots.shape)
    for b in range(4):
        np.testing.assert_array_equal(slots[b, b : b + tokens], x[b])
        assert (slots[b, :b] == -7).all() and (slots[b, b + tokens :] == -7).all()
        np.testing.assert_array_equal(back[b], given[b, b : b + tokens])


def test_the_gradient_of_written_pages_reaches_what_was_written_and_what_was_left():
    rng = np.random.default_rng(0)
    pool = jnp.asarray(rng.normal(size=(2, 3, 4, 2)), jnp.float32)
    rows = jnp.asarray(rng.normal(size=(2, 5, 2)), jnp.float32)
    first, count = jnp.array([2, 6]), jnp.array([5, 3])
    _, pull = jax.vjp(lambda pool, rows: write_pages(pool, rows, first, count), pool, rows)
    cotangent = rng.normal(size=(2, 12, 2)).astype(np.float32)
    to_pool, to_rows = pull(jnp.asarray(cotangent.reshape(pool.shape)))
    want_pool, want_rows = cotangent.copy(), np.zeros(rows.shape, np.float32)
    for b, (start, size) in enumerate(((2, 5), (6, 3))):
        want_rows[b, :size] = cotangent[b, start : start + size]
        want_pool[b, start : start + size] = 0
    np.testing.assert_array_equal(to_rows, want_rows)
    np.testing.assert_array_equal(np.asarray(to_pool).reshape(want_pool.shape), want_pool)


@pytest.mark.parametrize(("window", "step"), [(3, 4), (4, 4), (10, 4)])
def test_each_group_of_queries_has_the_window_before_it_and_its_own_keys(window, step):
    rng = np.random.default_rng(0)
    past = jnp.asarray(rng.normal(size=(2, window, 3)), jnp.float32)
    kv = jnp.asarray(rng.normal(size=(2, 7, 3)), jnp.float32)
    keys, _ = attend_blocks.window_keys(past, kv, jnp.array([0, 20]), 8, step)
    band = np.concatenate([past, kv, np.zeros((2, 1, 3))], axis=1)
    want = np.stack([band[:, at : at + window + step] for at in (0, 4)], axis=1)
    np.testing.assert_array_equal(keys, want)


@pytest.mark.parametrize("layer", [0, 1])
def test_all_experts_weighted_are_the_chosen_ones(layer):
    """A hash-routed layer and one that is routed by scores."""
    cfg = small_model.CONFIG
    kind = cfg.mlp_types[layer]
    drawn = lm_init.initial_leaves(cfg, seed=0, scales=lm_init.Scales(0.3, 0.3))
    leaves = {path: jnp.asarray(leaf) for path, leaf in drawn.items()}
    view = Leaves(leaves, parameter_table(cfg)).sub(f"layers.{layer}.ffn")
    moe = Moe(view, cfg, ComputeConfig(dtype="float32", backend="xla"), kind)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 9, cfg.hidden_size)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, cfg.vocab_size, (2, 9)))
    got, load, _ = jax.jit(lambda: sequence._moe(moe, x, ids))()
    want = jax.jit(lambda: moe(x, ids))()
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)  # sums in another order
    experts = moe.gate(x.reshape(18, -1), ids.reshape(-1)).experts
    count = np.bincount(np.asarray(experts).reshape(-1), minlength=cfg.n_routed_experts)
    np.testing.assert_allclose(load, count / experts.size, atol=1e-6)


def test_the_cross_entropy_is_optaxs():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(5 * rng.normal(size=(2, 6, 9)), jnp.float32)
    ids = jnp.asarray(rng.integers(0, 9, (2, 6)))
    kinds = jnp.asarray(rng.integers(-1, 3, (2, 6)))

    def plain(logits: jax.Array) -> jax.Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, ids)
        return jnp.sum(jnp.where(kinds >= lm_step.ANSWER, losses, 0)) / jnp.sum(kinds >= 1)

    def ours(logits: jax.Array) -> jax.Array:
        return lm_step._cross_entropy(logits, ids, kinds)[0]

    want, want_gradient = jax.jit(jax.value_and_grad(plain))(logits)
    got, gradient = jax.jit(jax.value_and_grad(ours))(logits)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_allclose(gradient, want_gradient, rtol=0, atol=1e-7)
