"""Lower precision, on purpose: the released model's simulated quantisation, and small KV formats.

Simulated quantisation is a discontinuous function: where a value lies within float32's error of a
rounding boundary, two correct implementations differ by a whole step. Its prompts are the ones, of
many random ones, that keep the farthest from every boundary (the reference reports how far).
"""

import dataclasses
import functools

import numpy as np
import pytest

from lsa_jax.config import CacheConfig, ComputeConfig, KVFormat
from tests.golden.loader import Case, load_case
from tests.parity_models import (
    FLOAT32,
    LOGITS_ERROR,
    SplitRun,
    close,
    empty,
    extend,
    feed,
    model_of,
    mtp_logits,
    run_splits,
    slow_but,
)
from tests.reference.numpy_reference import Reference

SWITCHES = ("simulate_kv", "simulate_index", "simulate_activations")
KV_INDEX, ALL = SWITCHES[:2], SWITCHES
# float32's error on what is rounded, relative to the largest value of its quantisation group.
ROUNDING_CLEARANCE = 2e-7


def simulating(*switches: str) -> ComputeConfig:
    return dataclasses.replace(FLOAT32, **dict.fromkeys(switches, True))


def check_simulation(case: Case, compute: ComputeConfig, ids: np.ndarray) -> None:
    """A prompt clear of every boundary gives the reference's logits; decoded too, with all on."""
    reference, length = Reference(case.cfg, case.weights, compute), ids.shape[1]
    want, _ = reference.forward(ids)
    assert min(reference.margins.values()) > ROUNDING_CLEARANCE
    exact, _ = Reference(case.cfg, case.weights).forward(ids)
    assert np.abs(want - exact).max() > 100 * LOGITS_ERROR  # the simulation is visible
    model, count = model_of(case.name, compute), np.array([length], np.int32)
    logits, _, _ = extend(model, ids, empty(model, 1, length), count)
    close(logits, want, LOGITS_ERROR)
    if compute == simulating(*ALL):
        logits, _ = feed(model, ids, empty(model, 1, length), count)
        close(logits, want, LOGITS_ERROR)


@pytest.mark.parametrize("name", slow_but())
def test_simulating_every_quantisation_gives_the_references_logits(name: str):
    case = load_case(name)
    check_simulation(case, simulating(*ALL), case.outputs["quant.all.ids"])


@pytest.mark.parametrize("name", slow_but("minimal"))
def test_simulating_kv_and_index_quantisation_gives_the_references_logits(name: str):
    case = load_case(name)
    check_simulation(case, simulating(*KV_INDEX), case.outputs["quant.kv_index.ids"])


# Seeds of random prompts that keep clear of the boundaries of one switch alone, of 150 tried.
@pytest.mark.parametrize(
    ("name", "switch", "length", "seed"),
    [
        ("minimal", "simulate_kv", 32, 56),
        ("minimal", "simulate_index", 32, 117),
        ("minimal", "simulate_activations", 8, 136),
        pytest.param("tiny", "simulate_kv", 32, 100, marks=pytest.mark.slow),
        pytest.param("tiny", "simulate_index", 32, 46, marks=pytest.mark.slow),
        pytest.param("tiny", "simulate_activations", 8, 65, marks=pytest.mark.slow),
        pytest.param("hca_first", "simulate_kv", 32, 141, marks=pytest.mark.slow),
        pytest.param("hca_first", "simulate_index", 32, 72, marks=pytest.mark.slow),
        pytest.param("hca_first", "simulate_activations", 8, 148, marks=pytest.mark.slow),
    ],
)
def test_each_simulation_alone_gives_the_references_logits(
    name: str, switch: str, length: int, seed: int
):
    case = load_case(name)
    ids = np.random.default_rng(seed).integers(0, case.cfg.vocab_size, (1, length))
    check_simulation(case, simulating(switch), ids)


def test_mtp_under_simulated_quantisation_gives_the_references_logits():
    case, compute = load_case("minimal"), simulating(*ALL)
    ids, reference = case.outputs["quant.all.ids"], Reference(case.cfg, case.weights, compute)
    streams, _ = reference.streams(ids)
    _, want, _ = reference.mtp(streams[:, :-1], ids[:, 1:])
    assert min(reference.margins.values()) > ROUNDING_CLEARANCE
    model = model_of("minimal", compute)
    got, _ = mtp_logits(model, streams[:, :-1].astype(np.float32), ids[:, 1:])
    close(got, want, LOGITS_ERROR)


# KV formats ---------------------------------------------------------------------------------

# Rounding an entry changes each of its values by up to 2^-9 (bfloat16) or 2^-4 (e4m3 with a
# power-of-two scale) of it, by 0.4 of that in the mean square. Attention outputs average entries
# whose errors are independent, and half of a model's residual never meets an entry; on the other
# hand a few layers' errors add up. So logits of variance 1 get about the rms error of one entry
# value (measured: 1.2 and 0.5 times), and the largest of their 10^4 errors a tail of a mixture of
# near and far tokens (measured: 8.5 and 2.7 times): bounds are 2 and 16 times.
RMS_STEP: dict[KVFormat, float] = {"bfloat16": 0.4 * 2**-9, "fp8": 0.4 * 2**-4}
SMOOTH = {"index_topk": 64}  # `all_hash` attends to every entry then: no choice can flip


@functools.cache
def stored_as(kv_format: KVFormat, name: str = "all_hash", smooth: bool = True) -> SplitRun:
    """Every row prefilled up to another point and decoded from there."""
    case, cache = load_case(name), CacheConfig(kv_format=kv_format, page_entries=4)
    model = model_of(name, FLOAT32, **(SMOOTH if smooth else {}))
    length = case.ids.shape[1]
    split = np.array([length // 3, length // 2, length, length], np.int32)
    return run_splits(case, model, split, cache)


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", RMS_STEP)
def test_small_kv_formats_change_logits_as_little_as_their_rounding(kv_format: KVFormat):
    error = stored_as(kv_format).logits - stored_as("float32").logits
    step = RMS_STEP[kv_format]
    rms = np.sqrt(np.mean(error**2))
    assert 0.1 * step < rms < 2 * step
    assert np.abs(error).max() < 16 * step


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", RMS_STEP)
def test_small_kv_formats_decode_what_they_prefill(kv_format: KVFormat):
    logits = stored_as(kv_format).logits
    # The same prompt in rows 0 and 2, 1 and 3. float32 errors of an entry may cross a rounding
    # boundary: one value of an entry then differs by a whole step, the rest by nothing.
    close(logits[:2], logits[2:], RMS_STEP[kv_format])


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", RMS_STEP)
def test_small_kv_formats_rarely_change_the_likeliest_token(kv_format: KVFormat):
    # Here rounding may flip a top-k or router choice, which moves a token's logits by O(0.1): their
    # largest error has no useful bound, but flips are rare and small on the whole.
    got, want = (stored_as(f, "tiny", False).logits for f in (kv_format, "float32"))
    assert np.mean(got.argmax(-1) == want.argmax(-1)) > 0.95
    assert np.sqrt(np.mean((got - want) ** 2)) < 10 * RMS_STEP[kv_format]
