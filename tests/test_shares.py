"""The score "softmax": entries by their share of the attention to come, and its threshold."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.config import ConfigError
from lsa_jax.lsa import indexer_config, resident_set
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, Ensemble, IndexerConfig
from lsa_jax.lsa.memory_indexer import MemoryIndexer, log_shares, random_leaves
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from tests import evaluation_cases
from tests.lsa_models import CAPACITY, CONFIG, TARGETS, Run, cache, indexer, model, prompt
from train.quality.evaluation import Recording, decisions, open_traces, together
from train.quality.metrics import MetricsConfig, named_scores
from train.quality.scoring import Scorer
from train.run.losses import ObjectiveConfig
from train.run.optimizer import OptimizerConfig
from train.run.step import StepConfig

WIDTH, COLUMNS, ENTRIES = 3, 12, [10, 7]
CFG = IndexerConfig(
    target_layers=(1, 3),
    hidden_size=24,
    n_heads=4,
    q_lora_rank=16,
    head_dim=8,
    rope_head_dim=4,
    lookback=WIDTH,
    score="softmax",
)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def made(ensemble: Ensemble = "max") -> MemoryIndexer:
    cfg = dataclasses.replace(CFG, ensemble=ensemble)
    leaves = random_leaves(cfg, jax.random.key(1))
    if ensemble == "learned":
        leaves[ENSEMBLE_LEAF] = jnp.asarray([0.3, -0.4])
    return MemoryIndexer(cfg, leaves)


@pytest.fixture(scope="module")
def asked() -> tuple[np.ndarray, np.ndarray, list[codec.DensePlanes]]:
    """Hidden states, positions, keys; the second row is so short that a token is missing."""
    rng = np.random.default_rng(0)
    hidden = rng.normal(0, 1, (2, 2, WIDTH, CFG.hidden_size)).astype(np.float32)
    keys = rng.normal(0, 2, (2, 2, COLUMNS, CFG.head_dim)).astype(np.float32)
    for row, entries in enumerate(ENTRIES):
        keys[:, row, entries:] = np.nan  # of entries that do not exist
    planes = [codec.DensePlanes(jnp.asarray(layer)) for layer in keys]
    return hidden, np.array([40, WIDTH - 2]), planes


@pytest.mark.parametrize("ensemble", ["max", "mean", "learned"])
def test_a_score_is_the_mean_share_that_the_tokens_give_to_an_entry(asked, ensemble):
    hidden, positions, planes = asked
    module = made(ensemble)
    entries = jnp.asarray(ENTRIES)
    got = module.recent(jnp.asarray(hidden), jnp.asarray(positions), planes, entries)
    shares = np.zeros((2, 2, COLUMNS))
    for row, count in enumerate(ENTRIES):
        some = [age for age in range(WIDTH) if positions[row] - age >= 0]
        for layer in range(2):
            values = np.asarray(planes[layer].values)[row : row + 1, :count]
            plane = codec.DensePlanes(jnp.asarray(values))
            for age in some:
                x = jnp.asarray(hidden[layer, row, WIDTH - 1 - age])[None]
                at = jnp.asarray([positions[row] - age])
                logits = np.asarray(module.layer_logits(layer, x, at, plane))[0]
                shares[layer, row, :count] += softmax(logits) / len(some)
    np.testing.assert_allclose(np.exp(got), shares, atol=1e-6)
    weight = softmax(np.array([0.3, -0.4]))
    joined = {
        "max": shares.max(0),
        "mean": shares.mean(0),
        "learned": np.tensordot(weight, shares, 1),
    }
    np.testing.assert_allclose(module.ensemble(got), joined[ensemble], atol=1e-6)


def test_one_broken_entry_shows_in_its_row_and_one_that_does_not_exist_in_none():
    logits = np.zeros((2, 1, 5), np.float32)
    logits[0, 0, 4] = logits[1, 0, 1] = np.nan
    got = np.asarray(log_shares(jnp.asarray(logits), jnp.ones((2, 1), bool), jnp.asarray([4, 4])))
    np.testing.assert_allclose(np.exp(got[0]), [0.25, 0.25, 0.25, 0.25, 0], atol=1e-6)
    assert np.isnan(got[1, :4]).all()
    none = log_shares(jnp.zeros((1, 1, 5)), jnp.ones((1, 1), bool), jnp.asarray([0]))
    assert not np.exp(none).any()


def test_evaluation_scores_as_decoding_does(asked):
    hidden, positions, planes = asked
    module, count = made(), ENTRIES[0]
    entries = jnp.asarray(ENTRIES)
    recent = module.recent(jnp.asarray(hidden), jnp.asarray(positions), planes, entries)
    want = module.ensemble(recent)[0, :count]
    at = positions[0] - np.arange(WIDTH)[::-1]
    logits = np.stack(
        [
            np.asarray(
                module(
                    hidden[:, :1, t],
                    jnp.asarray([p]),
                    [codec.DensePlanes(k.values[:1]) for k in planes],
                )
            )
            for t, p in enumerate(at)
        ]
    )[:, :, 0, :count]
    scores = named_scores(together(logits, "softmax"), CFG.target_layers, score="softmax")
    np.testing.assert_allclose(scores["ensemble.max"], want, atol=1e-6)
    assert scores["layer.1"].sum() == pytest.approx(1)
    np.testing.assert_array_equal(together(logits, "sigmoid"), logits.max(axis=0))


def test_without_a_threshold_an_entry_wants_more_than_an_even_share():
    assert MetricsConfig().at(200, "softmax").threshold == 1 / 200
    assert MetricsConfig().at(200, "sigmoid").threshold == 0.5
    assert MetricsConfig(threshold=0.3).at(200, "softmax").threshold == 0.3
    even = resident_set.even_shares(jnp.asarray([0, 1, 200]))
    np.testing.assert_allclose(even, [0.5, 0.5, 1 / 200])


def wanted(score: str, threshold: float | None) -> int:
    cfg = dataclasses.replace(indexer().cfg, score=score)
    policy = PolicyConfig(recency=0, threshold=threshold)
    lsa = LsaConfig(targets=TARGETS, lookahead=16, policy=policy, resident_path="mask")
    of = MemoryIndexer(cfg, indexer().leaves())
    run = Run(LsaSession(model(), cache(), lsa, of, rows=1, capacity=CAPACITY, prefill_chunk=64))
    run.admit(prompt(150, seed=3), 4)
    return run.session.batch.events[0].wanted


def test_a_session_takes_the_threshold_of_its_indexers_scores():
    entries = 150 // CONFIG.csa_ratio
    assert 0 < wanted("softmax", None) == wanted("softmax", 1 / entries)
    assert wanted("softmax", 0.5) < wanted("softmax", None)
    assert wanted("sigmoid", None) == wanted("sigmoid", 0.5)


def test_the_score_is_kept_with_the_indexer_and_unknown_ones_are_refused():
    raw = indexer_config.to_json(CFG)
    assert indexer_config.from_json(raw) == CFG
    del raw["score"]
    assert indexer_config.from_json(raw).score == "sigmoid"
    with pytest.raises(
        ConfigError, match=r"indexer\.score must be one of sigmoid, softmax, got 'odds'"
    ):
        dataclasses.replace(CFG, score="odds")
    with pytest.raises(ConfigError, match=r"objective\.on_ensemble must be 0 with indexer\.score"):
        StepConfig(
            indexer=CFG,
            objective=ObjectiveConfig(share=1.0, on_ensemble=1.0),
            optimizer=OptimizerConfig(),
            total=1,
        )


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_a_decision_of_a_trace_asks_the_tokens_before_it_too(tmp_path, score):
    """As far as they were recorded, and no other ones."""
    trace = open_traces([evaluation_cases.traces_of_model(tmp_path / "traces")])[0]
    recording, at = Recording.of(trace), np.array([1, 20])
    back = evaluation_cases.indexer(lookback=4, score=score)
    single = evaluation_cases.indexer()
    found = list(decisions(back, trace, recording, at))
    assert [one.token for one in found] == at.tolist()
    for one in found:
        asked = np.arange(max(0, one.token - 3), one.token + 1)
        inputs = trace.read("hidden", asked), recording.positions[asked], trace.keys()
        logits = Scorer(single.cfg).logits(single, *inputs, one.entries)
        np.testing.assert_allclose(one.logits, together(logits, score), atol=1e-5)
