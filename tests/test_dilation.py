"""The memory indexer's `dilation`: a logit counts for the entries beside its own too."""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.memory_indexer import MemoryIndexer, dilated
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from tests import evaluation_cases
from tests.lsa_models import CAPACITY, TARGETS, Run, cache, indexer, model, prompt
from train.quality import evaluation
from train.quality.evaluation import Recording, decisions, open_traces

LOGITS = np.array(
    [[0.0, 3.0, -1.0, -2.0, 5.0, 1.0], [2.0, -3.0, -4.0, -5.0, -6.0, 9.0]], np.float32
)
BY_HAND = {  # by dilation and falloff
    (0, 0.5): LOGITS,
    (1, 0.0): np.array([[3, 3, 3, 5, 5, 5], [2, 2, -3, -4, 9, 9]]),
    (2, 0.0): np.array([[3, 3, 5, 5, 5, 5], [2, 2, 2, 9, 9, 9]]),
    (64, 0.0): np.array([[5, 5, 5, 5, 5, 5], [9, 9, 9, 9, 9, 9]]),
    (1, 0.5): np.array([[2.5, 3, 2.5, 4.5, 5, 4.5], [2, 1.5, -3.5, -4.5, 8.5, 9]]),
    (2, 0.5): np.array([[2.5, 3, 3, 4.5, 5, 4.5], [2, 1.5, 0, 7, 8.5, 9]]),
}
MANY = jnp.array([LOGITS.shape[1]])


@pytest.mark.parametrize(("how", "want"), BY_HAND.items())
def test_an_entry_has_the_highest_logit_of_those_beside_it(how, want) -> None:
    np.testing.assert_array_equal(dilated(jnp.asarray(LOGITS)[:, None], MANY, *how)[:, 0], want)
    np.testing.assert_array_equal(evaluation.dilated(LOGITS, *how), want)


def test_what_no_entry_holds_yet_says_nothing_of_others() -> None:
    rows = jnp.asarray(LOGITS).at[:, 4:].set(jnp.nan)
    got = dilated(jnp.stack([rows, rows], axis=1), jnp.array([4, 0]), 2, 0.5)
    np.testing.assert_array_equal(got[:, 0, :4], evaluation.dilated(LOGITS[:, :4], 2, 0.5))
    assert (got[:, 1] == -np.inf).all()


def test_what_is_no_number_stays_in_sight() -> None:
    """A fire raises for it, so the highest of it and a number must not be the number."""
    logits = LOGITS.copy()
    logits[0, 3] = np.nan
    for got in (
        dilated(jnp.asarray(logits)[:, None], MANY, 1, 0.5)[:, 0],
        evaluation.dilated(logits, 1, 0.5),
    ):
        np.testing.assert_array_equal(np.isnan(got[0]), np.isin(np.arange(6), (2, 3, 4)))
        assert not np.isnan(got[1]).any()


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_decisions_on_traces_are_dilated_as_fires_are(tmp_path, score) -> None:
    trace = open_traces([evaluation_cases.traces_of_model(tmp_path / "traces")])[0]
    recording, at = Recording.of(trace), np.array([1, 20])
    plain, wide = (evaluation_cases.indexer(score=score, dilation=n, falloff=0.25) for n in (0, 2))
    pairs = zip(
        decisions(plain, trace, recording, at), decisions(wide, trace, recording, at), strict=True
    )
    for one, other in pairs:
        assert (other.logits > one.logits).any()
        np.testing.assert_array_equal(other.logits, evaluation.dilated(one.logits, 2, 0.25))


def pages(dilation: int) -> set[int]:
    """Pages of one entry that a session wants first, without any that it must have."""
    cfg = dataclasses.replace(indexer().cfg, score="softmax", dilation=dilation)
    of = MemoryIndexer(cfg, indexer().leaves())
    lsa = LsaConfig(
        targets=TARGETS,
        lookahead=16,
        policy=PolicyConfig(recency=0),
        budget=parse_budget("1.0"),
        resident_path="mask",
    )
    small = dataclasses.replace(cache(), page_entries=1)
    run = Run(LsaSession(model(), small, lsa, of, rows=1, capacity=CAPACITY, prefill_chunk=64))
    run.admit(prompt(150, seed=3), 4)
    return set(run.session.batch.events[0].pages)


def test_a_session_recalls_the_entries_beside_each_that_it_wants() -> None:
    found, last = pages(0), 150 // 4 - 1
    beside = {page + step for page in found for step in (-1, 1)} & set(range(last + 1))
    assert found and not beside <= found
    assert pages(1) == found | beside


def test_the_dilation_is_kept_with_the_indexer_and_bounded() -> None:
    cfg = dataclasses.replace(indexer().cfg, dilation=1, falloff=0.25)
    raw = indexer_config.to_json(cfg)
    assert indexer_config.from_json(raw) == cfg
    del raw["dilation"], raw["falloff"]
    assert indexer_config.from_json(raw) == indexer().cfg
    for wrong in (-1, 65):
        with pytest.raises(
            ConfigError, match=rf"indexer\.dilation must be in 0\.\.64, got {wrong}"
        ):
            dataclasses.replace(cfg, dilation=wrong)
    with pytest.raises(ConfigError, match=r"indexer\.dilation must be"):
        dataclasses.replace(cfg, dilation=1.5)
    for bad in (-0.5, math.inf, math.nan, "1"):
        with pytest.raises(ConfigError, match=rf"indexer\.falloff must be .*, got {bad!r}"):
            dataclasses.replace(cfg, falloff=bad)
