"""Dense decode attention: the definition against float64, kernels against the definition.

The kernel through Triton runs on GPUs only: `python -m pallas_kernels.checks` compares it there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_interpreted import Interpreter
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import casebook, dispatch, rows
from pallas_kernels.casebook import Case
from pallas_kernels.decode_hopper.steps import Tuning
from pallas_kernels.dense_decode import dense_decode, mosaic_gpu, mosaic_tpu, reference
from pallas_kernels.dense_decode.cases import CASES, small
from pallas_kernels.split_softmax_cases import SCALE

FP8 = small("some", 64, (64, 33, 0), (128, 3, 0), "fp8")


Drawn = tuple[tuple[Any, ...], np.ndarray]


def drawn(case: Case) -> Drawn:
    """A case's arguments, and what they give in float64."""
    args = case.arguments(jax.random.key(0))
    return args, in_float64(args, case.static["scale"])


def in_float64(args: tuple[Any, ...], scale: float) -> np.ndarray:
    q, window, window_count, entries, count, sink = args
    if not isinstance(entries, rows.Fp8Rows):
        entries = entries.reshape(*entries.shape[:2], -1)
    values = np.asarray(rows.decode(entries, q.shape[-1], 64, jnp.float32), np.float64)
    out = np.zeros(q.shape)
    for b, (recent, seen) in enumerate(zip(window_count, count, strict=True)):
        keys = np.concatenate([np.asarray(window[b, :recent], np.float64), values[b, :seen]])
        scores = np.asarray(q[b], np.float64) @ keys.T * scale
        scores = np.concatenate([scores, np.asarray(sink, np.float64)[:, None]], axis=1)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b] = (weights / weights.sum(axis=1, keepdims=True))[:, :-1] @ keys
    return out


def agree(case: Case, got: Any, want: Any) -> None:
    wanted = np.asarray(want, np.float32)
    result = casebook.compare(case.tolerance, np.asarray(got, np.float32), wanted)
    assert result.ok, result.why


@pytest.fixture(scope="module")
def few() -> Drawn:
    """Drawn by NumPy: compiling JAX's random numbers takes longer than the tests."""
    rng = np.random.default_rng(0)
    q, window, rope = (rng.standard_normal((3, n, 512), np.float32) for n in (64, 128, 64))
    window[1, 3:] = window[2] = np.nan
    codes = rng.integers(0, 256, (3, 64, 512), np.uint8)
    codes[codes & 0x7F == 0x7F] = 0  # NaN
    codes[..., 448:455] = rng.integers(119, 123, (3, 64, 7), np.uint8)
    codes[1, 33:], codes[2] = 0xFF, 0xFF
    rope[1, 33:] = rope[2] = np.nan
    q, window, rope = (jnp.asarray(x, jnp.bfloat16) for x in (q, window, rope[..., :64]))
    entries = rows.Fp8Rows(jnp.asarray(codes.reshape(3, 64, 4, 128)), rope)
    recent, count = (jnp.array(x, jnp.int32) for x in ((128, 3, 0), (64, 33, 0)))
    args = (q, window, recent, entries, count, jnp.asarray(rng.standard_normal(64, np.float32)))
    return args, in_float64(args, SCALE)


def right_by_float64(case: Case, given: Drawn) -> None:
    args, want = given
    agree(case, jax.jit(lambda *a: case.run(a, "xla"))(*args), want)


def test_the_definition_is_softmax_with_a_sink_over_window_and_entries(few: Drawn) -> None:
    right_by_float64(FP8, few)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_is_right_in_every_case(case: Case) -> None:
    right_by_float64(case, drawn(case))


@pytest.mark.parametrize("block", [48])  # a ragged end
def test_blocks_do_not_change_the_definition(block: int) -> None:
    rng = np.random.default_rng(1)
    q, entries = (rng.standard_normal((2, n, 128), np.float32) for n in (4, 64))
    window, count = np.full((2, 8, 128), np.nan, np.float32), np.array([64, 17], np.int32)
    args = (q, window, np.zeros(2, np.int32), entries, count, np.zeros(4, np.float32))
    options = {"scale": 0.1, "group": 64, "block": block}
    got = jax.jit(lambda *a: reference.dense_decode(*a, **options))(*args)
    np.testing.assert_allclose(got, in_float64(args, 0.1), atol=1e-6)  # float32 sums of O(1)


def interpreted_tpu_agrees(case: Case, given: Drawn, interpret: Any, block: int) -> None:
    args, want = given
    agree(
        case, mosaic_tpu.dense_decode(*args, interpret=interpret, block=block, **case.static), want
    )


def test_tpu_kernel_matches_the_definition_when_interpreted(few: Drawn) -> None:
    interpreted_tpu_agrees(FP8, few, True, 64)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "case", [c for c in CASES if dispatch.MOSAIC_TPU not in c.declined], ids=str
)
def test_tpu_kernel_fetches_what_it_reads(case: Case) -> None:
    interpreted_tpu_agrees(case, drawn(case), pltpu.InterpretParams(), 64)


def interpreted_hopper_agrees(
    interpreter: Interpreter, case: Case, given: Drawn, **tuning: Any
) -> None:
    args, want = given
    agree(case, interpreter.call("dense_decode", args, dict(case.static), **tuning), want)


@pytest.mark.parametrize("scorer", [False, True])
def test_hopper_kernel_matches_the_definition_when_interpreted(
    interpreter: Interpreter, few: Drawn, scorer: bool
) -> None:
    interpreted_hopper_agrees(interpreter, FP8, few, splits=2, scorer=scorer)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "kv", "splits", "parts", "scorer"),
    [
        ("all, some, one, none", "bfloat16", 1, "float32", False),
        ("all, some, one, none", "fp8", 1, "float32", False),
        ("all, some, one, none", "bfloat16", 6, "bfloat16", False),
        ("all, some, one, none", "fp8", 3, "bfloat16", False),
        ("a window alone", "bfloat16", 3, "float32", False),
        ("all, some, one, none", "bfloat16", 6, "float32", True),
        ("all, some, one, none", "fp8", 1, "float32", True),
        ("a window alone", "bfloat16", 3, "bfloat16", True),
    ],
)
def test_hopper_kernel_splits_rows_of_any_length(
    interpreter: Interpreter, name: str, kv: str, splits: int, parts: str, scorer: bool
) -> None:
    case = next(c for c in CASES if c.name == name and c.shape["kv"] == kv)
    tuning = {"splits": splits, "parts": parts, "scorer": scorer}
    interpreted_hopper_agrees(interpreter, case, drawn(case), **tuning)


def test_a_scorer_and_its_summers_cover_dims_that_are_no_power_of_two(
    interpreter: Interpreter,
) -> None:
    rng = np.random.default_rng(2)
    q, window, entries = (rng.standard_normal((1, n, 384), np.float32) for n in (64, 64, 64))
    entries[0, 40:] = np.nan
    arrays = (jnp.asarray(x, jnp.bfloat16) for x in (q, window, entries))
    q, window, entries = arrays
    counts = [jnp.array([n], jnp.int32) for n in (64, 40)]
    args = (q, window, counts[0], entries, counts[1], jnp.zeros(64))
    options = {"scale": 384**-0.5, "group": 64}
    got = interpreter.call("dense_decode", args, options, splits=1, scorer=True)
    agree(FP8, got, in_float64(args, options["scale"]))


@pytest.mark.parametrize(
    ("dims", "tuning", "why"),
    [
        (512, {"splits": 9, "scorer": True, "cluster": True}, "at most 8 blocks, got 9"),
        (256, {"splits": 2, "scorer": True, "cluster": True}, "512 dims, got 256"),
        (512, {"splits": 2, "cluster": True}, "need a warpgroup that scores"),
        (512, {"splits": 2, "scorer": True, "stages": 3}, "2 stages, got 3"),
    ],
)
def test_tunings_that_do_not_go_together_are_declined(
    dims: int, tuning: dict[str, Any], why: str
) -> None:
    shape = jax.ShapeDtypeStruct((1, 64, dims), jnp.bfloat16)
    count = jax.ShapeDtypeStruct((1,), jnp.int32)
    call = functools.partial(mosaic_gpu.dense_decode, scale=1.0, group=64, tuning=Tuning(**tuning))
    args = (shape, shape, count, shape, count, jax.ShapeDtypeStruct((64,), jnp.float32))
    with pytest.raises(dispatch.Unsupported, match=why):
        jax.eval_shape(call, *args)


@pytest.mark.parametrize("case", [c for c in CASES if c.declined], ids=str)
def test_kernels_decline_what_the_cases_say(case: Case) -> None:
    args = case.abstract()
    kernels = {dispatch.MOSAIC_GPU: mosaic_gpu, dispatch.MOSAIC_TPU: mosaic_tpu}
    for name in case.declined:
        with pytest.raises(dispatch.Unsupported, match=r"must be|needs"):
            call = kernels[name].dense_decode
            jax.eval_shape(lambda *a, call=call: call(*a, **case.static), *args)


def test_arguments_that_do_not_agree_are_refused_by_name() -> None:
    q, window, recent, entries, count, sink = FP8.abstract()
    call = functools.partial(dense_decode, scale=1.0)
    floats = jax.ShapeDtypeStruct(count.shape, "float32")
    with pytest.raises(ValueError, match=r"count must be int32 \[3\], got float32 \[3\]"):
        jax.eval_shape(call, q, window, recent, entries, floats, sink)
    two = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype), entries)
    with pytest.raises(ValueError, match="rows must have 3 rows, got 2"):
        jax.eval_shape(call, q, window, recent, two, count, sink)
    with pytest.raises(ValueError, match="in groups of 96"):
        jax.eval_shape(functools.partial(call, group=96), q, window, recent, entries, count, sink)
