"""Prefill attention over the window and selected entries: definition, kernel, refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from pallas_kernels import casebook, dispatch
from pallas_kernels.dense_prefill import dense_prefill
from pallas_kernels.sparse_prefill import cases, mosaic_tpu, reference, sparse_prefill, triton_gpu
from tests.prefill_attention import arguments, check, every_name, given, in_float64

FAST = "fp8"


def definition(case: casebook.Case, args: Any) -> jax.Array:
    return jax.jit(lambda *args: reference.sparse_prefill(*args, **case.static))(*args)


def want(case: casebook.Case, args: Any) -> np.ndarray:
    """The selected entries count (5.1)."""
    *most, index, valid, sink = args
    index, valid = np.asarray(index), np.asarray(valid)

    def seen(b: int, t: int, entries: np.ndarray) -> np.ndarray:
        return entries[index[b, t, valid[b, t]]]

    return in_float64(*most, sink, seen, **case.static)


@pytest.mark.parametrize("name", every_name("sparse_prefill", FAST))
def test_definition_is_the_specs_sum_over_selected_keys_alone(name: str) -> None:
    case, args = given("sparse_prefill", name)
    check(case, definition(case, args), want(case, args))


@pytest.mark.slow
def test_blocks_do_not_change_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.case(2, 7, (0, 70), 30, selected=9, heads=2, dims=128, dtype="float32")
    args = arguments(case, 2)
    monkeypatch.setattr(reference, "GATHERED", 2 * 9 * 3)  # three queries a block: a ragged last
    check(case, definition(case, args), want(case, args))


@pytest.mark.slow
def test_everything_visible_selected_is_dense_attention() -> None:
    case = cases.case(1, 5, 30, 10, selected=10, window=8, heads=2, dims=64, dtype="float32")
    q, past, kv, start, entries, _, _, sink = arguments(case, 3)
    index = jnp.broadcast_to(jnp.arange(10, dtype=jnp.int32)[::-1], (1, 5, 10))
    valid = index < ((start[:, None] + jnp.arange(5) + 1) // 4)[..., None]
    got = sparse_prefill(q, past, kv, start, entries, index, valid, sink, **case.static)
    want = dense_prefill(q, past, kv, start, entries, sink, ratio=4, **case.static)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)  # sums in another order


@pytest.mark.slow
def test_definition_can_be_differentiated() -> None:
    case = cases.case(1, 6, 20, 12, selected=4, window=4, heads=2, dims=64, dtype="float32")
    q, past, kv, start, entries, index, valid, sink = arguments(case, 4)
    entries = jnp.nan_to_num(entries)

    def loss(sink: jax.Array, kv: jax.Array, entries: jax.Array) -> jax.Array:
        args = (q, past, kv, start, entries, index, valid, sink)
        return jnp.mean(jnp.square(reference.sparse_prefill(*args, **case.static)))

    check_grads(loss, (sink, kv, entries), order=1, modes=["rev"], eps=1e-2, rtol=1e-2)


def test_tpu_kernel_matches_the_definition_when_interpreted() -> None:
    case, args = given("sparse_prefill", FAST)
    check(
        case,
        mosaic_tpu.sparse_prefill(*args, **case.static, unroll=1, interpret=True),
        want(case, args),
    )


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases.CASES if not c.declined][:3], ids=str)
def test_tpu_kernel_waits_for_its_copies(case: casebook.Case) -> None:
    args = arguments(case, 6)
    mode = pltpu.InterpretParams()  # memory that nothing wrote is NaN
    check(
        case,
        mosaic_tpu.sparse_prefill(*args, **case.static, unroll=1, interpret=mode),
        want(case, args),
    )


def test_kernels_decline_what_they_do_not_take() -> None:
    case = cases.CASES[-1]
    args = case.abstract()
    for kernel in (mosaic_tpu, triton_gpu):
        with pytest.raises(dispatch.Unsupported, match="q must be bfloat16, got float32"):
            jax.eval_shape(functools.partial(kernel.sparse_prefill, **case.static), *args)
    q = jax.ShapeDtypeStruct(args[0].shape, jnp.bfloat16)
    with pytest.raises(dispatch.Unsupported, match="rows must be bfloat16 or fp8 planes"):
        call = functools.partial(triton_gpu.sparse_prefill, **case.static)
        jax.eval_shape(call, q, *args[1:])


def test_arguments_that_do_not_fit_are_refused_by_name() -> None:
    case = cases.CASES[0]
    args = case.abstract()

    def call(index: tuple[int, ...], of: Any, valid: tuple[int, ...]) -> None:
        given = (jax.ShapeDtypeStruct(index, of), jax.ShapeDtypeStruct(valid, jnp.bool_))
        jax.eval_shape(lambda *a: case.run(a, "xla"), *args[:5], *given, args[7])

    shape = (2, 5, 40)
    with pytest.raises(ValueError, match=r"index must be int32 \[2, 5, k\], got float32"):
        call(shape, jnp.float32, shape)
    with pytest.raises(ValueError, match=r"valid must be bool \[2, 5, 40\]"):
        call(shape, jnp.int32, (2, 5, 3))
    with pytest.raises(ValueError, match="must not be empty"):
        call((2, 5, 0), jnp.int32, (2, 5, 0))
