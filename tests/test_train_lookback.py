"""An indexer that asks the last tokens together is trained on what they say together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.config import ConfigError
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from tests import train_runs
from tests.batch_cases import DATA, SAMPLING, facts_of, two_sets
from tests.train_batches import CFG, batch, gathered, parameters, planes
from train.data.dataset import Corpus, batches
from train.quality.evaluation import Recording, check_trace, decisions, open_traces
from train.run import forward, initial, losses
from train.run.initial import random_leaves
from train.run.key_pool import gather
from train.run.losses import ObjectiveConfig
from train.run.optimizer import OptimizerConfig
from train.run.splits import open_corpora
from train.run.step import Inputs, StepConfig
from train.traces.columns import TraceError
from train.traces.trace import Trace

WIDTH = 5


def config(score: str):
    return dataclasses.replace(CFG, lookback=WIDTH, score=score)


def wide(seed: int) -> Inputs:
    """Samples at tokens 0, 1, .. of their documents: some have fewer than WIDTH tokens so far."""
    inputs = batch(seed)
    shape = (*inputs.hidden.shape[:2], WIDTH, inputs.hidden.shape[3])
    hidden = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return Inputs(hidden, inputs.drawn)


def logits(cfg, leaves, inputs: Inputs, pool) -> jax.Array:
    keys, scale = gather(pool, inputs.drawn.sample[:, 0], inputs.drawn.index)
    return forward.indexer_logits(cfg, leaves, inputs.hidden, inputs.drawn, keys, scale)


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    return two_sets(tmp_path_factory.mktemp("sets"))


def test_batches_have_the_hidden_states_of_the_last_tokens(sets):
    corpus = Corpus.open(sets)
    stream, seen = batches(corpus, DATA, SAMPLING, lookback=WIDTH), 0
    for made in stream:
        assert made.hidden.shape[2] == WIDTH
        for b in np.flatnonzero(made.sample[:, 0] >= 0):
            facts = facts_of(corpus.traces[made.sample[b, 0]].path)
            at = np.maximum(made.sample[b, 1] + np.arange(1 - WIDTH, 1), 0)
            np.testing.assert_array_equal(made.hidden[:, b], facts.hidden[at].swapaxes(0, 1))
            seen += 1
        assert not made.hidden[:, made.sample[:, 0] < 0].astype(float).any()
    stream.close()
    assert seen == len(stream.table.tokens)


@pytest.fixture
def gaps(monkeypatch):
    """Every trace lacks a token after its seventh."""
    read = Trace.read

    def with_gap(self, name, *rows):
        found = read(self, name, *rows)
        return found + (np.arange(len(found)) > 6) if name == "positions" else found

    monkeypatch.setattr(Trace, "read", with_gap)


NO_GAPS = r"doc-0-0: positions must be consecutive for indexer.lookback > 1, got a step of 2 at 6"


def test_tokens_that_do_not_follow_each_other_are_refused(sets, gaps):
    corpus = Corpus.open(sets)
    with pytest.raises(TraceError, match=NO_GAPS):
        batches(corpus, DATA, SAMPLING, lookback=2)
    batches(corpus, DATA, SAMPLING).close()


def test_gaps_are_refused_wherever_the_tokens_before_are_asked(tmp_path, gaps):
    """In validation before anything is trained, and by what train.evaluate, train.calibrate and
    train.mine_hard read traces with."""
    root = train_runs.traces(tmp_path)
    tables = {"data": {"validation": [str(root / "train")]}, "indexer": {"lookback": 2}}
    with pytest.raises(TraceError, match=NO_GAPS):
        open_corpora(train_runs.config(root, **tables))
    open_corpora(train_runs.config(root, data=tables["data"]))
    trace = open_traces([root / "train"])[0]
    cfg = initial.indexer_config(train_runs.config(root), Corpus([trace]))
    back = dataclasses.replace(cfg, lookback=2)
    module = MemoryIndexer(back, {k: jnp.asarray(x) for k, x in random_leaves(back, 0).items()})
    with pytest.raises(TraceError, match=NO_GAPS):
        next(decisions(module, trace, Recording.of(trace), np.arange(3)))
    check_trace(cfg, trace)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_what_the_last_tokens_say_together_is_what_a_fire_says(score):
    """Of a full pool. Rows of the batch with fewer tokens so far have positions to match."""
    inputs, pool, cfg = wide(3), planes("float32"), config(score)
    drawn = inputs.drawn._replace(rows=inputs.drawn.rows.copy())
    drawn.rows[:, 2] = drawn.rows[:, 1]  # token n of a document is at position n
    drawn.grades[..., 2] = 1.0
    full = np.tile(np.arange(9, dtype=np.int32), (len(drawn.index), 1))
    inputs = Inputs(inputs.hidden, drawn._replace(index=full))
    leaves = {name: jnp.asarray(x) for name, x in parameters().items()}
    keys, _ = gathered(pool, inputs)
    stored = [codec.DensePlanes(jnp.asarray(part)) for part in keys]
    entries = jnp.full(len(full), full.shape[1])
    serve = jax.jit(lambda leaves, *args: MemoryIndexer(cfg, leaves).recent(*args))
    want = serve(leaves, inputs.hidden, drawn.positions, stored, entries)
    got = jax.jit(functools.partial(logits, cfg))(leaves, inputs, pool)
    np.testing.assert_allclose(got, want, atol=1e-5)
    alone = dataclasses.replace(cfg, lookback=1)
    hidden = inputs.hidden[:, :, -1:]
    last = forward.indexer_logits(alone, leaves, hidden, drawn, jnp.asarray(keys), None)
    assert np.abs(np.asarray(last - last.max(-1, keepdims=True)) - want).max() > 0.1


def test_a_candidate_that_stands_for_three_is_in_the_shares_three_times():
    cfg, rng = config("softmax"), np.random.default_rng(0)
    scores = jnp.asarray(rng.standard_normal((2, WIDTH, 4)), jnp.float32)
    counts = jnp.asarray([[False, False, True, True, True], [True] * 5])
    some = forward.together(cfg, scores, counts, jnp.log(jnp.asarray([[1.0, 3, 1, 0]] * 2)))
    thrice = jnp.asarray([0, 1, 1, 1, 2])
    whole = forward.together(cfg, scores[..., thrice], counts, jnp.zeros((2, 5)))
    np.testing.assert_allclose(some[:, :3], whole[:, jnp.asarray([0, 1, 4])], atol=1e-6)
    shares = np.exp(np.asarray(scores)) / np.exp(np.asarray(scores)[..., thrice]).sum(-1)[..., None]
    want = [np.log(shares[b][np.asarray(counts)[b]].mean(0)) for b in range(2)]
    np.testing.assert_allclose(some[:, :3], np.stack(want)[:, :3], atol=1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gradients_are_finite_and_those_of_differences(score):
    """Rows without a sample or a candidate among them."""
    inputs, pool, cfg = wide(4), planes("float32"), config(score)
    inputs.drawn.rows[-1, :2] = -1
    on: dict[str, Any] = {"focal": 0.0, "share": 1.0} if score == "softmax" else {}
    objective = ObjectiveConfig(**on)
    params = {name: jnp.asarray(x, jnp.float32) for name, x in parameters().items()}

    @jax.jit
    def loss(params):
        return losses.objective(logits(cfg, params, inputs, pool), inputs.drawn.targets, objective)[
            0
        ]

    found = jax.grad(loss)(params)
    assert all(np.isfinite(x).all() for x in found.values())
    rng = np.random.default_rng(5)
    step = {n: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for n, x in params.items()}
    want = sum(float(jnp.sum(found[name] * step[name])) for name in params)
    moved = [{n: x + h * step[n] for n, x in params.items()} for h in (1e-3, -1e-3)]
    got = (float(loss(moved[0])) - float(loss(moved[1]))) / 2e-3
    assert got == pytest.approx(want, rel=2e-2)
    assert abs(want) > 1e-3


def test_logits_scaled_by_length_are_refused_with_a_lookback():
    with pytest.raises(ConfigError, match=r"indexer\.lookback must be 1 with run\.log_n_reference"):
        StepConfig(
            indexer=config("sigmoid"),
            objective=ObjectiveConfig(),
            optimizer=OptimizerConfig(),
            total=1,
            log_n_reference=100,
        )
