"""Prefill attention over the window and all visible entries: definition, kernels, refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from pallas_kernels import casebook, dispatch
from pallas_kernels.dense_prefill import cases, dense_prefill, mosaic_gpu, mosaic_tpu, reference
from tests.prefill_attention import arguments, check, every_name, given, in_float64

FAST = "fp8, window of no tile"
STATIC = {"scale": 128**-0.5, "group": 64}


def definition(case: casebook.Case, args: Any, **blocks: int) -> jax.Array:
    return jax.jit(lambda *args: reference.dense_prefill(*args, **case.static, **blocks))(*args)


def want(case: casebook.Case, args: Any) -> np.ndarray:
    """Every entry whose last token a query has seen counts (4.4)."""
    *most, sink = args
    start, ratio = most[3], case.static["ratio"]
    how = {"scale": case.static["scale"], "group": case.static["group"]}

    def seen(b: int, t: int, entries: np.ndarray) -> np.ndarray:
        return entries[: (int(start[b]) + t + 1) // ratio]

    return in_float64(*most, sink, seen, **how)


@pytest.mark.parametrize("name", every_name("dense_prefill", FAST))
def test_definition_is_the_specs_sum_over_visible_keys_alone(name: str) -> None:
    case, args = given("dense_prefill", name)
    check(case, definition(case, args), want(case, args))


# One query a block, one block; blocks that end inside the chunk and the history.
@pytest.mark.parametrize(
    ("query_block", "key_block"),
    [
        (4, 7),
        pytest.param(1, 16, marks=pytest.mark.slow),
        pytest.param(9, 64, marks=pytest.mark.slow),
    ],
)
def test_blocks_do_not_change_the_definition(query_block: int, key_block: int) -> None:
    case = cases.case(2, 9, (0, 70), 30, 2, window=20, heads=2, dims=128, dtype="float32")
    args = arguments(case, 2)
    got = definition(case, args, query_block=query_block, key_block=key_block)
    check(case, got, want(case, args))


@pytest.mark.slow
def test_two_chunks_equal_one() -> None:
    case = cases.case(1, 12, 5, 8, 2, window=6, heads=2, dims=64, dtype="float32")
    q, past, kv, start, entries, sink = args = arguments(case, 3)
    whole = definition(case, args)
    band = jnp.concatenate([past, kv], axis=1)[:, 7 : 7 + 6]
    got = definition(case, (q[:, 7:], band, kv[:, 7:], start + 7, entries, sink))
    np.testing.assert_allclose(got, whole[:, 7:], rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.slow
def test_definition_can_be_differentiated() -> None:
    case = cases.case(1, 6, 20, 12, 2, window=4, heads=2, dims=64, dtype="float32")
    q, past, kv, start, entries, sink = arguments(case, 4)

    def loss(sink: jax.Array, kv: jax.Array) -> jax.Array:
        args = (q, past, kv, start, jnp.nan_to_num(entries), sink)
        return jnp.mean(jnp.square(definition(case, args, query_block=4, key_block=5)))

    check_grads(loss, (sink, kv), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_an_entry_that_is_seen_and_broken_is_not_hidden() -> None:
    case = cases.case(1, 4, 7, 4, 2, window=4, heads=16, dims=128)
    q, past, kv, start, entries, sink = arguments(case, 5)
    args = (q, past, kv, start, entries.at[0, 0, 3].set(jnp.nan), sink)
    assert np.isnan(np.asarray(definition(case, args), np.float32)).all()
    got = mosaic_tpu.dense_prefill(*args, **case.static, interpret=True)
    assert (np.abs(np.asarray(got, np.float32)) > 1e20).any(-1).any()


def supported(backend: str) -> tuple[casebook.Case, ...]:
    return tuple(case for case in cases.CASES if backend not in case.declined)


def test_tpu_kernel_matches_the_definition_when_interpreted() -> None:
    case, args = given("dense_prefill", FAST)
    check(case, mosaic_tpu.dense_prefill(*args, **case.static, interpret=True), want(case, args))


def test_hopper_kernel_matches_the_definition_when_interpreted() -> None:
    case = cases.case(1, 2, 66, 70, 1, window=20, fp8=True, heads=64, dims=128)
    args = arguments(case, 7)
    check(case, mosaic_gpu.dense_prefill(*args, **case.static, interpret=True), want(case, args))


@pytest.mark.slow
@pytest.mark.parametrize("case", supported("mosaic_gpu"), ids=str)
def test_hopper_kernel_matches_the_definition(case: casebook.Case) -> None:
    args = arguments(case, 8)
    check(case, mosaic_gpu.dense_prefill(*args, **case.static, interpret=True), want(case, args))


@pytest.mark.slow
@pytest.mark.parametrize("case", supported("mosaic_tpu")[:3], ids=str)
def test_tpu_kernel_waits_for_its_copies(case: casebook.Case) -> None:
    args = arguments(case, 9)
    mode = pltpu.InterpretParams()  # memory that nothing wrote is NaN
    check(case, mosaic_tpu.dense_prefill(*args, **case.static, interpret=mode), want(case, args))


def test_kernels_decline_what_they_do_not_take() -> None:
    for case in (cases.CASES[-1], cases.CASES[-2]):
        args = case.abstract()
        kernels = {"mosaic_gpu": mosaic_gpu, "mosaic_tpu": mosaic_tpu}
        for name in kernels.keys() & set(case.declined):
            with pytest.raises(dispatch.Unsupported, match=r"must be .*, got"):
                call = functools.partial(kernels[name].dense_prefill, **case.static)
                jax.eval_shape(call, *args)


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    case = cases.CASES[0]
    args = case.abstract()

    def call(at: int, wrong: jax.ShapeDtypeStruct) -> None:
        given = (*args[:at], wrong, *args[at + 1 :])
        jax.eval_shape(lambda *a: case.run(a, "xla"), *given)

    for at, name in ((1, "past"), (2, "kv"), (5, "sink")):
        shape = (*args[at].shape[:-1], args[at].shape[-1] - 1)
        with pytest.raises(ValueError, match=f"{name} must be"):
            call(at, jax.ShapeDtypeStruct(shape, args[at].dtype))
    with pytest.raises(ValueError, match="start must be int32, got float32"):
        call(3, jax.ShapeDtypeStruct((2,), jnp.float32))
    with pytest.raises(ValueError, match="rows must be"):
        call(4, jax.ShapeDtypeStruct((1, 130, 128), jnp.bfloat16))
    with pytest.raises(ValueError, match="ratio must be at least 1, got 0"):
        jax.eval_shape(lambda *a: dense_prefill(*a, ratio=0, **STATIC), *args)
