"""The memory indexer's `dilation`: a logit counts for the entries after its own too."""

import dataclasses

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
BY_HAND = {
    0: LOGITS,
    1: np.array([[0, 3, 3, -1, 5, 5], [2, 2, -3, -4, -5, 9]]),
    2: np.array([[0, 3, 3, 3, 5, 5], [2, 2, 2, -3, -4, 9]]),
    64: np.array([[0, 3, 3, 3, 5, 5], [2, 2, 2, 2, 2, 9]]),
}


@pytest.mark.parametrize(("dilation", "want"), BY_HAND.items())
def test_an_entry_has_the_highest_logit_of_those_before_it(dilation, want) -> None:
    np.testing.assert_array_equal(dilated(jnp.asarray(LOGITS), dilation), want)
    np.testing.assert_array_equal(evaluation.dilated(LOGITS, dilation), want)


def test_what_no_entry_holds_yet_says_nothing_of_earlier_ones() -> None:
    logits = jnp.asarray(LOGITS).at[:, 4:].set(jnp.nan)
    np.testing.assert_array_equal(dilated(logits, 2)[:, :4], BY_HAND[2][:, :4])


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
def test_decisions_on_traces_are_dilated_as_fires_are(tmp_path, score) -> None:
    trace = open_traces([evaluation_cases.traces_of_model(tmp_path / "traces")])[0]
    recording, at = Recording.of(trace), np.array([1, 20])
    plain, wide = (evaluation_cases.indexer(score=score, dilation=n) for n in (0, 1))
    pairs = zip(
        decisions(plain, trace, recording, at), decisions(wide, trace, recording, at), strict=True
    )
    for one, other in pairs:
        assert (one.logits[:, 1:] < one.logits[:, :-1]).any()  # so that it matters
        np.testing.assert_array_equal(other.logits, evaluation.dilated(one.logits, 1))


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


def test_a_session_recalls_the_entry_after_each_that_it_wants() -> None:
    found, last = pages(0), 150 // 4 - 1
    after = {page + 1 for page in found if page < last}
    assert found and not after <= found
    assert pages(1) == found | after


def test_the_dilation_is_kept_with_the_indexer_and_bounded() -> None:
    cfg = dataclasses.replace(indexer().cfg, dilation=1)
    raw = indexer_config.to_json(cfg)
    assert indexer_config.from_json(raw) == cfg
    del raw["dilation"]
    assert indexer_config.from_json(raw) == indexer().cfg
    for wrong in (-1, 65):
        with pytest.raises(
            ConfigError, match=rf"indexer\.dilation must be in 0\.\.64, got {wrong}"
        ):
            dataclasses.replace(cfg, dilation=wrong)
    with pytest.raises(ConfigError, match=r"indexer\.dilation must be"):
        dataclasses.replace(cfg, dilation=1.5)
