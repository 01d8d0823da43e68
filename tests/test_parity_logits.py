"""The model's logits are HuggingFace's: in one shot, prefilled and decoded, greedy, and MTP."""

import functools

import jax
import numpy as np
import pytest

from lsa_jax.config import ModelConfig
from lsa_jax.engine import Engine
from lsa_jax.sampling import Greedy
from tests.golden.cases import CASES
from tests.golden.loader import load_case
from tests.parity_models import (
    CACHE,
    LOGITS_ERROR,
    SplitRun,
    close,
    empty,
    extend,
    model_of,
    mtp_logits,
    optimised_extend,
    run_splits,
    slow_but,
)

# Spec 4.7: every length, and every split into prefill and decode, that the model treats specially.
LENGTHS = (1, 2, 3, 4, 5, 7, 8, 127, 128, 129, 255, 256, 257)
# The MTP layer alone, from HF's own streams up to their float32 error.
MTP_ERROR = 1e-5


def split_points(cfg: ModelConfig, length: int) -> np.ndarray:
    """Prefill lengths: those of the spec, and around every period of the model."""
    periods = (cfg.csa_ratio, cfg.hca_ratio, cfg.sliding_window, cfg.index_topk * cfg.csa_ratio)
    around = {n * p + d for p in periods for n in (1, 2) for d in (-1, 0, 1)}
    residues = set(range(length // 3, length // 3 + min(cfg.hca_ratio, 32)))
    points = set(LENGTHS) | around | residues | {length}
    return np.array(sorted(p for p in points if 1 <= p <= length), np.int32)


# Long prompts, cut where the model changes; compiled in full, as a user's programs are.
LONG = ("tiny", "true_ratios")


@functools.cache
def run_of(name: str) -> SplitRun:
    """The two long prompts at their split points, the other models' at every single one."""
    case, length = load_case(name), CASES[name].length
    every = np.arange(1, length + 1, dtype=np.int32)
    split = split_points(case.cfg, length) if name in LONG else every
    return run_splits(case, model_of(name), split, optimised=name in LONG)


WITH_MTP = tuple(name for name, spec in CASES.items() if spec.cfg.num_nextn_predict_layers)


@pytest.mark.parametrize("name", slow_but("tiny"))
def test_prompts_of_every_length_give_huggingface_logits(name: str):
    run = run_of(name)
    for row, want, length in zip(run.logits, run.wanted, run.split, strict=True):
        close(row[:length], want[:length], LOGITS_ERROR)


@pytest.mark.parametrize("name", slow_but("tiny"))
def test_decoding_after_every_prefill_length_gives_huggingface_logits(name: str):
    run = run_of(name)
    for row, want, length in zip(run.logits, run.wanted, run.split, strict=True):
        close(row[length:], want[length:], LOGITS_ERROR)


def test_the_splits_meet_every_residue_and_both_sides_of_every_period():
    for name, spec in CASES.items():
        cfg, split = spec.cfg, split_points(spec.cfg, spec.length)
        assert {int(s) % cfg.csa_ratio for s in split} == set(range(cfg.csa_ratio)), name
        for period in (cfg.hca_ratio, cfg.sliding_window):
            assert {period - 1, period, period + 1} <= set(split.tolist()), name
    assert set(LENGTHS) <= set(split_points(CASES["tiny"].cfg, 257).tolist())
    assert set(LENGTHS) <= set(split_points(CASES["true_ratios"].cfg, 300).tolist())
    tiny = CASES["tiny"].cfg
    assert {int(s) % tiny.hca_ratio for s in split_points(tiny, 257)} == set(range(tiny.hca_ratio))


@pytest.mark.parametrize("name", slow_but(*LONG, having=WITH_MTP))
def test_the_mtp_layer_gives_huggingface_streams_and_logits(name: str):
    case, run = load_case(name), run_of(name)
    logits, streams = mtp_logits(model_of(name), run.streams[:, :-1], case.ids[:1, 1:])
    close(streams, case.outputs["mtp.streams"], MTP_ERROR)
    close(logits, case.outputs["mtp.logits"][:1], MTP_ERROR)


@pytest.mark.slow
def test_two_hundred_greedy_tokens_are_huggingface_tokens():
    case, key = load_case("tiny"), jax.random.key(0)
    want = case.outputs["greedy"][0].tolist()
    prompt, new = want[:11], len(want) - 11
    assert new == 200
    engine = Engine(model_of("tiny"), CACHE, prefill_chunk=16)
    state = engine.start(batch=1, capacity=len(want))
    last, state = engine.prefill(state, [prompt])
    assert isinstance(last, jax.Array)
    token = engine.sample(last, Greedy(), key, state)
    got, logits = [int(token[0])], [np.asarray(last)]
    for burst, _ in engine.stream(
        state, token, max_new_tokens=new, sampler=Greedy(), key=key, keep_logits=True
    ):
        n = int(burst.count[0])
        got += burst.tokens[0, :n].tolist()
        logits.append(np.asarray(burst.logits)[0, :n])
    assert got == want[11:]
    rows, length = len(split_points(case.cfg, 257)), 257  # the shapes of a program that exists
    ids = np.resize(np.array([want + [0] * (length - len(want))]), (rows, length))
    count = np.full(rows, len(want), np.int32)
    one_shot, _, _ = optimised_extend(
        model_of("tiny"), ids, empty(model_of("tiny"), rows, length), count
    )
    close(np.concatenate(logits), one_shot[0, len(prompt) - 1 : len(want) - 1], LOGITS_ERROR)


@pytest.mark.slow
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["tiny", "true_ratios"])
def test_a_program_of_exactly_the_prompts_length_gives_huggingface_logits(name: str, length: int):
    case, model = load_case(name), model_of(name)
    count = np.full(len(case.ids), length, np.int32)
    state = empty(model, len(case.ids), length)
    logits, _, _ = extend(model, case.ids[:, :length], state, count)
    close(logits, case.outputs["logits"][:, :length], LOGITS_ERROR)
