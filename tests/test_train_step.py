"""The training step against a naive formula and AdamW in NumPy; parts, skipped updates, limits."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax import shardings
from lsa_jax.cache import codec
from lsa_jax.config import ConfigError
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_name
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from tests.reference import indexer_reference as reference
from tests.train_batches import CFG, ROWS, batch, gathered, parameters, planes
from train.run import forward, losses, optimizer
from train.run.key_pool import KeyPlanes, gather
from train.run.losses import ObjectiveConfig
from train.run.optimizer import OptimizerConfig
from train.run.step import (
    Inputs,
    Packed,
    Step,
    StepConfig,
    check_rows,
    gradients,
    loss_of_part,
    place,
)

TOTAL, RATE, CLIP = 5, 0.03, 0.05


def step_config(**changes: Any) -> StepConfig:
    defaults = {
        "indexer": CFG,
        "objective": ObjectiveConfig(),
        "optimizer": OptimizerConfig(learning_rate=RATE, weight_decay=0.1, clip=CLIP),
        "total": TOTAL,
        "compute_dtype": "float32",
    }
    return StepConfig(**{**defaults, **changes})


def naive_logits(params, layer: int, x, position, keys) -> jax.Array:
    """Logits [C] of one sample at one layer, head by head."""
    leaf = {
        name: params[leaf_name(CFG.target_layers[layer], name)]
        for name in ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")
    }
    latent = leaf["wq_a.weight"] @ x
    latent = latent / jnp.sqrt(jnp.mean(latent**2) + CFG.norm_eps) * leaf["q_norm_weight"]
    angle = position * reference.thetas(CFG.rope_head_dim, CFG.rope_theta, CFG.yarn)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    plain, size = CFG.head_dim - CFG.rope_head_dim, range(CFG.head_dim)
    # Sylvester's matrix: the sign is the parity of the common bits.
    signs = np.array([[(-1) ** (i & j).bit_count() for j in size] for i in size], np.float32)
    total = jnp.zeros(len(keys))
    for head in range(CFG.n_heads):
        q = leaf["wq_b.weight"][head * CFG.head_dim : (head + 1) * CFG.head_dim] @ latent
        even, odd = q[plain::2], q[plain + 1 :: 2]
        turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=1)
        q = jnp.concatenate([q[:plain], turned.reshape(-1)]) @ signs / math.sqrt(CFG.head_dim)
        w = leaf["weights_proj.weight"][head] @ x / math.sqrt(CFG.head_dim * CFG.n_heads)
        total += w * jnp.maximum(keys @ q, 0)
    return total


def naive_loss(params, inputs: Inputs, keys: np.ndarray) -> jax.Array:
    """Focal loss with gamma 2 of probabilities, as published, mean over the layers."""
    t, out = inputs.drawn.targets, jnp.zeros(())
    position = inputs.drawn.positions.astype(jnp.float32)
    for layer in range(len(CFG.target_layers)):
        score = jax.vmap(lambda *args, layer=layer: naive_logits(params, layer, *args))
        p = 1 / (1 + jnp.exp(-score(inputs.hidden[layer, :, 0], position, keys[layer])))
        right = jnp.where(t.labels == 1, p, 1 - p)
        cost = t.weights * (1 - right) ** 2 * -jnp.log(right)
        out += jnp.sum(jnp.where(t.valid, cost, 0))
    return out / jnp.sum(t.valid) / len(CFG.target_layers)


@pytest.fixture(scope="module")
def step() -> Step:
    return Step(step_config(), shardings.make_mesh())


def test_three_steps_are_adamw_in_numpy_on_gradients_of_a_naive_formula(step):
    batches, state, reports = [batch(seed) for seed in range(3)], step.init(parameters()), []
    pool = planes()
    for inputs in batches:
        state, packed = step(state, step.place(inputs), pool)
        reports.append(step.report(packed))
    naive = jax.jit(jax.value_and_grad(naive_loss))
    params = {name: x.astype(np.float64) for name, x in parameters().items()}
    m, v = ({name: np.zeros(x.shape) for name, x in params.items()} for _ in range(2))
    for t, (inputs, report) in enumerate(zip(batches, reports, strict=True)):
        keys, scale = gathered(pool, inputs)
        assert scale is not None
        keys = keys.astype(np.float32) * scale[..., None]
        loss, grads = naive({n: x.astype(np.float32) for n, x in params.items()}, inputs, keys)
        grads = {name: np.asarray(g, np.float64) for name, g in grads.items()}
        norm = math.sqrt(sum((g**2).sum() for g in grads.values()))
        rate = RATE * (1 + math.cos(math.pi * t / TOTAL)) / 2
        assert norm > CLIP  # else clipping would not be tested
        np.testing.assert_allclose(
            [report.loss, report.norm, report.rate], [float(loss), norm, rate], rtol=1e-5
        )
        for name, g in grads.items():
            g = g * CLIP / norm
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g**2
            hat = m[name] / (1 - 0.9 ** (t + 1))
            adam = hat / (np.sqrt(v[name] / (1 - 0.999 ** (t + 1))) + 1e-8)
            params[name] = params[name] - rate * (adam + 0.1 * params[name])
    for name, want in params.items():
        # Adam divides a gradient by its size: its float32 roundings, some 1e-5, times the rate.
        np.testing.assert_allclose(state.params[name], want, atol=2e-6, err_msg=name)
    assert int(state.updates) == 3 and int(state.skipped) == 0


@pytest.mark.parametrize("key_format", ["fp8", "float32"])
def test_logits_are_those_of_the_indexer_that_serves(key_format):
    inputs, pool, params = batch(3), planes(key_format), parameters()
    leaves = {name: jnp.asarray(x) for name, x in params.items()}
    stored, (keys, scales) = [], gathered(pool, inputs)
    for layer, part in enumerate(keys):
        values = jnp.asarray(part)
        scale = None if scales is None else jnp.asarray(scales[layer])
        stored.append(codec.DensePlanes(values) if scale is None else codec.Fp8Keys(values, scale))
    serve = jax.jit(lambda leaves, *args: MemoryIndexer(CFG, leaves)(*args))
    want = serve(leaves, inputs.hidden[:, :, 0], inputs.drawn.positions, stored)
    got = jax.jit(logits)(leaves, inputs, pool)
    valid, want = inputs.drawn.targets.valid, np.asarray(want)
    rms = np.sqrt(np.mean(want[:, valid] ** 2))
    error = np.abs(np.asarray(got) - want)[:, valid].max()
    assert error < 2e-6 * rms  # sums of some ten terms in another order
    half = forward.compute_leaves(leaves, jnp.bfloat16)
    rounded = jax.jit(logits)(half, inputs, pool)
    error = np.abs(np.asarray(rounded) - want)[:, valid].max()
    # bfloat16 rounds operands by up to 2^-9; four products in a row, with luck against each other.
    assert 1e-4 * rms < error < 0.05 * rms


def logits(leaves, inputs: Inputs, pool: KeyPlanes) -> jax.Array:
    keys, scale = gather(pool, inputs.drawn.sample[:, 0], inputs.drawn.index)
    return forward.indexer_logits(CFG, leaves, inputs.hidden, inputs.drawn, keys, scale)


@pytest.mark.parametrize("key_format", ["fp8", "float32"])
def test_keys_are_those_of_the_documents_pages_and_zero_where_there_is_no_candidate(key_format):
    inputs, pool = batch(2), planes(key_format)
    keys, scale = jax.jit(gather)(pool, inputs.drawn.sample[:, 0], inputs.drawn.index)
    want_keys, want_scale = gathered(pool, inputs)
    absent = inputs.drawn.index < 0
    assert absent.any() and not np.stack(keys).astype(np.float32)[:, absent].any()
    assert np.stack(keys).tobytes() == want_keys.tobytes()
    assert (scale is None) == (want_scale is None) == (key_format == "float32")
    if scale is not None:
        np.testing.assert_array_equal(np.stack(scale), want_scale)


@pytest.mark.slow
def test_gradients_in_bfloat16_point_where_those_in_float32_do():
    inputs, params = batch(4), {n: jnp.asarray(x) for n, x in parameters().items()}
    find = jax.jit(gradients, static_argnums=0)
    exact, rough = (
        find(step_config(compute_dtype=dtype), params, inputs, planes())[2]
        for dtype in ("float32", "bfloat16")
    )
    for name, want in exact.items():
        assert rough[name].dtype == jnp.float32
        a, b = np.asarray(want).ravel(), np.asarray(rough[name]).ravel()
        assert a @ b > 0.999 * np.linalg.norm(a) * np.linalg.norm(b), name


MANY = ObjectiveConfig(bce=1.0, bpr=0.5, missed=2.0, mass=0.5, share=0.7, on_ensemble=0.5)
PAGES = ObjectiveConfig(missed=1.0, focal=0.0, page_entries=3, kept_shares=(0.2, 0.5))


@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(ObjectiveConfig(mass=0.5), id="elements", marks=pytest.mark.slow),
        pytest.param(MANY, id="many", marks=pytest.mark.slow),
        pytest.param(PAGES, id="pages", marks=pytest.mark.slow),
    ],
)
def test_a_batch_in_parts_gives_the_losses_and_gradients_of_the_whole(objective):
    inputs = batch(5)
    # Parts differ in what they count: else means of means would do.
    inputs.drawn.index[1::2, 3:] = -1
    pool = planes()
    params = {n: jnp.asarray(x) for n, x in parameters().items()}
    find = jax.jit(gradients, static_argnums=0)
    cfg = step_config(objective=objective)
    whole, parts = (
        find(
            dataclasses.replace(cfg, optimizer=OptimizerConfig(accumulate=n)), params, inputs, pool
        )
        for n in (1, 4)
    )

    @jax.jit
    def direct(params, inputs, pool):
        return losses.objective(logits(params, inputs, pool), inputs.drawn.targets, objective)[0]

    np.testing.assert_allclose(whole[0], direct(params, inputs, pool), rtol=1e-6)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        # Float32 sums in another order, of gradients up to 1.
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_a_step_without_finite_gradients_changes_only_counters(step):
    good, bad, pool = batch(0), batch(1), planes()
    bad.hidden[0, 0, 0, 0] = np.nan
    state, _ = step(step.init(parameters()), step.place(good), pool)
    before = jax.tree.map(np.array, state)
    for count in (1, 2):
        state, packed = step(state, step.place(bad), pool)
        report = step.report(packed)
        assert not report.taken
        assert (report.skipped, report.skipped_in_a_row) == (count, count)
    for name in ("params", "moments", "updates"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))
    state, packed = step(state, step.place(good), pool)
    report = step.report(packed)
    assert report.taken and (report.skipped, report.skipped_in_a_row) == (2, 0)
    # The schedule stood still too: this was its second update.
    assert report.rate == pytest.approx(RATE * (1 + math.cos(math.pi / TOTAL)) / 2, rel=1e-6)
    assert any((np.asarray(state.params[n]) != before.params[n]).any() for n in before.params)


def test_a_request_to_stop_is_in_the_report_of_its_step(step):
    state, inputs, pool = step.init(parameters()), step.place(batch(0)), planes()
    state, quiet = step(state, inputs, pool)
    state, asked = step(state, inputs, pool, stop=True)
    assert not step.report(quiet).asked_to_stop and step.report(asked).asked_to_stop


def test_the_schedule_warms_up_linearly_and_ends_at_zero():
    rates = optimizer.schedule(OptimizerConfig(learning_rate=1.0, warmup_steps=4), 14)
    want = [0.2, 0.4, 0.6, 0.8] + [(1 + math.cos(math.pi * k / 10)) / 2 for k in range(11)]
    np.testing.assert_allclose(jax.vmap(rates)(jnp.arange(15)), want, atol=1e-6)
    with pytest.raises(ConfigError, match=r"optimizer.warmup_steps must be below the run's 4"):
        optimizer.schedule(OptimizerConfig(warmup_steps=4), 4)


def test_log_n_scales_logits_by_the_lengths_of_their_samples():
    scale = forward.log_length_scale(jnp.array([1, 2, 1000, 10**6]), 1000)
    two = math.log(2) / math.log(1000)
    np.testing.assert_allclose(scale, [two, two, 1, 2], rtol=1e-6)

    @jax.jit
    def both(params, inputs, pool):
        plain = logits(params, inputs, pool)
        longer = plain * (jnp.log(inputs.drawn.entries) / math.log(50))[:, None]
        want = (losses.bce(z, inputs.drawn.targets).mean() for z in (longer, plain))
        return (loss_of_part(cfg, params, inputs, pool, {"bce": jnp.ones(())})[0], *want)

    cfg = step_config(objective=ObjectiveConfig(bce=1.0, focal=0.0), log_n_reference=50)
    got, want, plain = both(parameters(), batch(6), planes())
    np.testing.assert_allclose(got, want, rtol=1e-5)
    assert abs(plain - want) > 1e-3


@pytest.mark.slow
def test_a_learned_ensembles_weight_is_trained():
    cfg = dataclasses.replace(CFG, ensemble="learned")
    objective = ObjectiveConfig(on_ensemble=1.0, ensemble="learned")
    params = {n: jnp.asarray(x) for n, x in parameters(cfg=cfg).items()}
    config = step_config(indexer=cfg, objective=objective)
    grads = jax.jit(gradients, static_argnums=0)(config, params, batch(7), planes())[2]
    assert np.abs(grads["ensemble.weight"]).max() > 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_n_reference": 1}, r"run.log_n_reference must be 0 or >= 2, got 1"),
        (
            {"log_n_reference": 8, "indexer": dataclasses.replace(CFG, ensemble="mean")},
            r"indexer.ensemble must be max or learned with run.log_n_reference, got 'mean'",
        ),
        (
            {"indexer": dataclasses.replace(CFG, ensemble="learned")},
            r"objective.on_ensemble must be > 0, as indexer.ensemble is learned, got 0.0",
        ),
        (
            {"objective": ObjectiveConfig(on_ensemble=1.0, ensemble="mean")},
            r"objective.ensemble must be indexer.ensemble, 'max', got 'mean'",
        ),
        ({"compute_dtype": "float16"}, r"run.compute_dtype must be bfloat16 or float32"),
    ],
)
def test_a_step_that_cannot_be_meant_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        step_config(**changes)


def test_a_batch_that_does_not_divide_is_refused():
    mesh = jax.sharding.AbstractMesh((4, 1, 1), shardings.MESH_AXES)
    check_rows(24, mesh, 3)
    with pytest.raises(ConfigError, match=r"data.batch_size must be a multiple of 4 devices .*=3"):
        check_rows(20, mesh, 3)


def test_rows_are_spread_over_the_devices():
    """On however many devices the tests run."""
    mesh = shardings.make_mesh(data=math.gcd(jax.device_count(), ROWS))
    want, packed = batch(8), place(batch(8), mesh)
    shards = {shard.data.shape[0] for shard in packed.words.addressable_shards}
    assert shards == {ROWS // mesh.size}
    found = jax.jit(lambda packed: packed.unpacked())(packed)
    for got, x in zip(jax.tree.leaves(found), jax.tree.leaves(want), strict=True):
        assert got.dtype == x.dtype and np.asarray(got).tobytes() == x.tobytes()
    np.testing.assert_array_equal(found.drawn.targets.labels, want.drawn.targets.labels)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_does_not_fill_words_is_packed_exactly_too(dtype):
    """Odd numbers of halves and bytes, and arrays without any."""
    inputs = batch(9)
    hidden = np.moveaxis(inputs.hidden[..., :11].astype(dtype), 1, 0).copy()
    none = inputs.drawn.mass[:, :0]
    inputs = Inputs(np.moveaxis(hidden, 0, 1), inputs.drawn._replace(mass=none))
    packed = Packed.of(inputs)
    assert packed.words.shape[1] == {"bfloat16": 11, "float32": 22}[dtype] + 4 + 27 + 9 + 3
    found = jax.jit(lambda packed: packed.unpacked())(packed)
    for got, x in zip(jax.tree.leaves(found), jax.tree.leaves(inputs), strict=True):
        assert got.dtype == x.dtype and np.asarray(got).tobytes() == x.tobytes()


def test_the_case_has_what_the_tests_need():
    assert isinstance(CFG, IndexerConfig) and len(CFG.target_layers) == 2
    valid = batch().drawn.targets.valid
    assert not valid[-1].any() and valid.sum(axis=1).std() > 0
