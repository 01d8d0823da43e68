"""The backbone as it is trained is the backbone that serves; its losses are what they say."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lsa_jax.cache.resident import take_entries
from lsa_jax.config import CacheConfig, ComputeConfig, ConfigError
from lsa_jax.nn import attend_blocks
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.parameters import parameter_table
from tests import small_model
from train.pretraining import index_teacher, lm_init, lm_step, sequence
from train.pretraining.index_teacher import Lesson
from train.pretraining.lm_step import LmBatch, LmState, LossConfig

COMPUTE = ComputeConfig(dtype="float32", backend="xla")
CONFIG = dataclasses.replace(
    small_model.CONFIG,
    layer_types=("sliding", "csa", "hca", "csa", "hca"),
    mlp_types=("hash", "score", "score", "score", "score"),
    num_nextn_predict_layers=1,
)
IDS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 41))
KINDS = np.random.default_rng(1).integers(-1, 3, IDS.shape)
BATCH = LmBatch(jnp.asarray(IDS), jnp.asarray(KINDS))


@functools.cache
def leaves() -> dict[str, jax.Array]:
    drawn = lm_init.initial_leaves(CONFIG, seed=0, scales=lm_init.Scales(0.15, 0.15))
    return {path: jnp.asarray(leaf) for path, leaf in drawn.items()}


def parts() -> tuple[dict, dict]:
    fixed = {path for path in leaves() if lm_step.is_fixed(path)}
    params = {path: leaf for path, leaf in leaves().items() if path not in fixed}
    return params, {path: leaves()[path] for path in fixed}


def served(cfg=CONFIG) -> tuple[DeepSeekV4, jax.Array]:
    """The model that serves, and its streams over the sequences."""
    model = DeepSeekV4(cfg, COMPUTE, leaves())
    cache = CacheConfig(kv_format="float32")
    batch, tokens = IDS[:, :-1].shape
    state = model.empty_state(cache, batch=batch, capacity=tokens)
    return model, model(jnp.asarray(IDS[:, :-1]), state, jnp.full(batch, tokens))[0]


@pytest.mark.parametrize(
    ("kinds", "want"),
    [
        ("abbbb", (1, 1, 4)),
        ("acbcbc", (0, 2, 2)),  # a cb cb c would leave four layers to compile, as ac + bc + bc does
        ("abab", (0, 2, 2)),
        ("xabcabcy", (1, 3, 2)),
        ("abc", (0, 3, 1)),
        ("a", (0, 1, 1)),
    ],
)
def test_the_repetition_that_leaves_the_fewest_layers_is_found(kinds, want):
    found = sequence.repeated_layers(kinds)
    first, period, repeats = dataclasses.astuple(found)
    unit = kinds[first : first + period]
    assert kinds[first : first + period * repeats] == unit * repeats
    best = len(kinds) - (want[2] - 1) * want[1]
    assert len(kinds) - (repeats - 1) * period == best


def test_initial_weights_fit_the_model_and_follow_from_the_seed():
    table = parameter_table(CONFIG)
    drawn = lm_init.initial_leaves(CONFIG, seed=0)
    assert {path: leaf.shape for path, leaf in drawn.items()} == {
        path: spec.shape for path, spec in table.items()
    }
    again, other = (lm_init.initial_leaves(CONFIG, seed=s) for s in (0, 1))
    assert all(np.array_equal(drawn[path], again[path]) for path in drawn)
    assert not np.array_equal(drawn["embed.weight"], other["embed.weight"])
    chosen = drawn["layers.0.ffn.gate.tid2eid"]
    assert all(len(set(row)) == CONFIG.num_experts_per_tok for row in chosen.tolist())
    counts = np.bincount(chosen.reshape(-1), minlength=CONFIG.n_routed_experts)
    assert counts.max() - counts.min() <= CONFIG.num_experts_per_tok


def test_what_is_attended_to_may_begin_with_another_gain():
    drawn, sharp = (
        lm_init.initial_leaves(CONFIG, seed=0, scales=lm_init.Scales(gain=gain))
        for gain in (1.0, 3.0)
    )
    changed = {path for path in drawn if not np.array_equal(drawn[path], sharp[path])}
    attentions = CONFIG.num_layers + CONFIG.num_nextn_predict_layers
    compressors = sum(kind != "sliding" for kind in CONFIG.layer_types)
    assert len(changed) == attentions + compressors
    assert all("norm" in path and (sharp[path] == 3).all() for path in changed)
    assert not any("indexer" in path or "q_norm" in path for path in changed)


def test_embeddings_and_mixing_begin_at_scales_of_their_own():
    drawn, other = (
        lm_init.initial_leaves(CONFIG, seed=0, scales=scales)
        for scales in (lm_init.Scales(), lm_init.Scales(embedding=1.0, mixing=0.01))
    )
    changed = {path for path in drawn if not np.array_equal(drawn[path], other[path])}
    mixing = {path for path in drawn if path.endswith("scale")}
    assert changed == {"embed.weight"} | mixing
    np.testing.assert_allclose(other["embed.weight"], 50 * drawn["embed.weight"], rtol=1e-5)
    assert all((other[path] == np.float32(0.01)).all() for path in mixing)


def test_entries_may_begin_as_averages_of_what_they_stand_for():
    drawn, mean, slots = (
        lm_init.initial_leaves(CONFIG, seed=0, entries=how)
        for how in ("random", "average", "slots")
    )
    made = [path for path in drawn if path.endswith("attn.compressor.wkv.weight")]
    assert {drawn[path].shape[0] // CONFIG.head_dim for path in made} == {1, 2}  # HCA, CSA
    changed = {path for path in drawn if not np.array_equal(drawn[path], mean[path])}
    assert changed == set(made)
    for path in made:
        attn = path.removesuffix("compressor.wkv.weight")
        raw, ratio = mean[attn + "wkv.weight"], len(mean[attn + "compressor.ape"])
        halves = mean[path].reshape(-1, *raw.shape)
        assert (halves == raw).all() and (slots[path] == mean[path]).all()
        bias = slots[attn + "compressor.ape"]
        if len(halves) == 1:
            assert not bias.any()
            continue
        # One token a channel, the window before as often as the window itself.
        tokens = np.concatenate([bias[:, : len(raw)], bias[:, len(raw) :]])
        assert (np.count_nonzero(tokens, axis=0) == 1).all()
        counts = np.count_nonzero(tokens, axis=1)
        assert len(counts) == 2 * ratio and np.ptp(counts) <= 1


@pytest.mark.slow
def test_training_computes_what_serves_through_top_k_windows_and_mtp():
    model, want = served()
    got, seen = sequence.forward(CONFIG, COMPUTE, leaves(), jnp.asarray(IDS[:, :-1]))
    assert IDS.shape[1] // CONFIG.csa_ratio > CONFIG.index_topk  # the top-k binds
    want_logits = np.asarray(model.logits(want))
    # Float32 sums in another order: all experts at once, layers in a scan.
    np.testing.assert_allclose(model.logits(got), want_logits, rtol=0, atol=2e-5)
    assert np.abs(want_logits).max() > 0.5
    next_ids = jnp.asarray(IDS[:, 1:])
    mtp, _ = sequence.mtp_streams(model, want, next_ids)
    np.testing.assert_allclose(mtp, model.mtp_logits(want, next_ids)[1], rtol=0, atol=2e-5)
    for layer in seen:
        assert abs(float(layer.load.sum()) - 1) < 1e-6
        assert layer.index is None


def loss_of(params: dict[str, jax.Array]) -> jax.Array:
    args = (CONFIG, COMPUTE, LossConfig(), params, parts()[1], BATCH)
    return lm_step.loss_and_loads(*args, Lesson(jnp.array([5, 17, 39]), 3))[0]


def gradients() -> dict[str, jax.Array]:
    return jax.jit(lambda params: jax.grad(loss_of)(params))(parts()[0])


def close_gradients(got: dict[str, jax.Array], want: dict[str, jax.Array]) -> None:
    for path, leaf in want.items():
        size = float(jnp.abs(leaf).max())
        np.testing.assert_allclose(got[path], leaf, rtol=0, atol=1e-5 * max(size, 1))


@pytest.mark.slow
def test_gradients_through_the_scan_equal_those_without_it(monkeypatch):
    scanned = gradients()
    whole = sequence.Pattern(0, len(CONFIG.layer_types), 1)
    monkeypatch.setattr(sequence, "repeated_layers", lambda _: whole)
    close_gradients(scanned, gradients())
    assert all(float(jnp.abs(g).max()) > 0 for g in scanned.values())


@pytest.mark.slow
def test_gradients_through_gathered_entries_equal_those_through_masked_ones(monkeypatch):
    masked = gradients()
    monkeypatch.setattr(attend_blocks, "DENSE_LIMIT", 0)
    close_gradients(gradients(), masked)


@pytest.mark.parametrize("kept", [True, False])
def test_the_backward_pass_reads_the_picks_that_the_forward_pass_made(monkeypatch, kept):
    monkeypatch.setattr(attend_blocks, "DENSE_LIMIT", 0)
    if not kept:
        monkeypatch.setattr(sequence, "_kept", None)
    program = str(jax.make_jaxpr(lambda params: jax.grad(loss_of)(params))(parts()[0]))
    assert CONFIG.index_topk != CONFIG.num_experts_per_tok
    picks = re.findall(rf"top_k\[[^]]*k={CONFIG.index_topk}]", program)  # one body for both layers
    assert len(picks) == (1 if kept else 2)


def test_gradients_of_taken_entries_are_summed_in_float32():
    plane, index = jnp.ones((1, 2, 3), jnp.bfloat16), jnp.zeros((1, 1000, 1), jnp.int32)
    total = jax.grad(lambda x: take_entries(x, index).astype(jnp.float32).sum())(plane)
    # In bfloat16 a sum of ones ends at 256.
    np.testing.assert_array_equal(total[0, :, 0].astype(np.float32), [1000, 0])


def test_the_divergence_is_that_of_numpy_and_zero_at_the_target():
    rng = np.random.default_rng(0)
    target = rng.random((3, 7)).astype(np.float32)
    target[0, 2] = target[2] = 0
    visible = np.arange(7) < np.array([7, 5, 7])[:, None]
    target = np.where(visible, target, 0).astype(np.float32)
    logits = rng.normal(size=(3, 7)).astype(np.float32)
    got = index_teacher.divergence(target, logits, visible)
    for row in range(3):
        total = target[row].sum()
        z = np.exp(logits[row][visible[row]].astype(np.float64))
        fit = np.log(z / z.sum())
        p = target[row][visible[row]] / max(total, 1e-20)
        want = sum(a * (np.log(a) - b) for a, b in zip(p, fit, strict=True) if a > 0)
        assert abs(float(got[row]) - want) < 1e-5
    exact = np.log(np.maximum(target[:2], 1e-30))
    assert np.abs(index_teacher.divergence(target[:2], exact, visible[:2])).max() < 1e-5


@pytest.mark.slow
def test_the_teacher_is_the_layers_own_attention_and_its_pupil_the_layers_own_scores():
    """Against the attention of one query that a decode step computes, with and without top-k."""
    cfg = dataclasses.replace(CONFIG, index_topk=1000)
    model = DeepSeekV4(cfg, COMPUTE, leaves())
    block = model.layers[1]
    tokens = IDS.shape[1] - 1
    streams = model.streams(jnp.asarray(IDS[:, :-1]))
    state = model.empty_state(CacheConfig(kv_format="float32"), batch=2, capacity=tokens).layers[1]
    zeros = jnp.zeros(2, jnp.int32)
    _, state, x = block.attend(streams, state, zeros, zeros + tokens)
    at = jnp.array([11, tokens - 1])
    assert state.entries is not None
    entries = np.asarray(state.entries.values).reshape(2, -1, cfg.head_dim)
    got = np.asarray(index_teacher.entry_attention(block.attn, x, jnp.asarray(entries), at))
    positions = jnp.broadcast_to(jnp.arange(tokens), (2, tokens))
    q = np.asarray(block.attn.queries(block.attn.latent_query(x), positions), np.float64)
    kv = np.asarray(block.attn.window_entries(x, positions), np.float64)
    sink = np.asarray(block.attn.sink_logit[...], np.float64)
    for b in range(2):
        for i, p in enumerate(at.tolist()):
            visible = (p + 1) // cfg.csa_ratio
            window = kv[b, max(0, p - cfg.sliding_window + 1) : p + 1]
            keys = np.concatenate([entries[b, :visible], window])
            scores = np.exp(q[b, p] @ keys.T * cfg.head_dim**-0.5)
            share = scores / (scores.sum(axis=1, keepdims=True) + np.exp(sink)[:, None])
            np.testing.assert_allclose(
                got[b, i, :visible], share[:, :visible].mean(axis=0), rtol=0, atol=1e-6
            )
            assert not got[b, i, visible:].any()
    logits = np.asarray(index_teacher.index_logits(block.attn, x, entries.shape[1], at))
    assert block.attn.indexer is not None and state.index_keys is not None
    latent = block.attn.latent_query(x)
    query, weight = block.attn.indexer.queries(latent, x, positions)
    keys = np.asarray(state.index_keys.values).reshape(2, -1, cfg.index_head_dim)
    for b in range(2):
        for i, p in enumerate(at.tolist()):
            visible = (p + 1) // cfg.csa_ratio
            dots = np.maximum(np.asarray(query[b, p]) @ keys[b, :visible].T, 0)
            want = np.asarray(weight[b, p]) @ dots
            np.testing.assert_allclose(logits[b, i, :visible], want, rtol=0, atol=1e-5)


def test_a_routers_bias_moves_against_its_load():
    load = jnp.array([0.5, 0.25, 0.125, 0.125])
    moved = lm_step.balanced(jnp.zeros(4), load, 0.01)
    np.testing.assert_allclose(moved, [-0.01, 0, 0.01, 0.01], atol=1e-9)


@pytest.mark.slow
def test_steps_lower_the_loss_and_one_that_is_not_finite_changes_nothing_but_the_count():
    params, fixed = parts()
    optimizer = optax.adamw(3e-3)
    state = LmState(params, fixed, optimizer.init(params), jnp.zeros((), jnp.int32))

    @jax.jit
    def step(state, batch):
        return lm_step.step(CONFIG, COMPUTE, LossConfig(), optimizer, state, batch, 1.0)

    losses = []
    for _ in range(12):
        state, shown = step(state, BATCH)
        losses.append(float(shown["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    broken = state._replace(
        params={**state.params, "head.weight": state.params["head.weight"] * jnp.nan}
    )
    after, shown = step(broken, BATCH)
    assert bool(shown["skipped"]) and int(after.step) == 13
    for path, leaf in broken.params.items():
        np.testing.assert_array_equal(after.params[path], leaf)
    for path, leaf in broken.fixed.items():
        np.testing.assert_array_equal(after.fixed[path], leaf)


def test_kernels_without_a_gradient_and_quantised_leaves_are_refused():
    params, fixed = parts()
    state = LmState(params, fixed, None, jnp.zeros((), jnp.int32))
    auto = ComputeConfig(dtype="float32")
    with pytest.raises(ConfigError, match="backend must be xla to train, got auto"):
        lm_step.step(CONFIG, auto, LossConfig(), optax.sgd(1.0), state, BATCH, 1.0)
    odd = {**leaves(), "head.scale": jnp.zeros(1)}
    with pytest.raises(ConfigError, match="leaves must be dense to be trained, got quantised"):
        sequence.forward(CONFIG, COMPUTE, odd, jnp.asarray(IDS))
