"""Prefill attention over the window and selected entries: definition, kernel, refusals."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.test_util import check_grads

from pallas_kernels import casebook, dispatch, rows
from pallas_kernels.dense_prefill import dense_prefill
from pallas_kernels.sparse_prefill import cases, mosaic_tpu, reference, sparse_prefill, triton_gpu

FAST = "fp8"


def arguments(case: casebook.Case, seed: int) -> tuple[Any, ...]:
    """Random arguments from a generator that takes the compiler little time."""
    return case.arguments(jax.random.key(seed, impl="unsafe_rbg"))


@functools.cache
def given(name: str) -> tuple[casebook.Case, tuple[Any, ...]]:
    """The case of that name and arguments for it, made once."""
    case = next(case for case in cases.CASES if case.name == name)
    return case, arguments(case, 1)


def definition(case: casebook.Case, args: Any) -> jax.Array:
    return jax.jit(lambda *args: reference.sparse_prefill(*args, **case.static))(*args)


def in_float64(q, past, kv, start, entries, index, valid, sink, *, scale, group) -> np.ndarray:
    """The spec's sum, one query at a time, over nothing but the keys it selected (3.1, 5.1)."""
    dims, window = q.shape[-1], past.shape[1]
    decode = jax.jit(lambda x: rows.decode(x, dims, group, jnp.float32))
    stored = np.asarray(decode(entries), np.float64)
    band = np.concatenate([np.asarray(x, np.float64) for x in (past, kv)], axis=1)
    q64, sink64, out = np.asarray(q, np.float64), np.asarray(sink, np.float64), np.zeros(q.shape)
    index, valid = np.asarray(index), np.asarray(valid)
    for b, t in np.ndindex(*q.shape[:2]):
        exists = max(0, window - 1 - int(start[b]) - t)
        near = band[b, t + 1 + exists : t + 1 + window]
        keys = np.concatenate([near, stored[b, index[b, t, valid[b, t]]]])
        weights = np.exp(q64[b, t] @ keys.T * scale)
        out[b, t] = weights @ keys / (weights.sum(-1) + np.exp(sink64))[:, None]
    return out


def check(case: casebook.Case, got: Any, args: Any) -> None:
    want = in_float64(*args, **case.static).astype(got.dtype)
    result = casebook.compare(case.tolerance, got, want)
    assert result.ok, f"{case}: {result.why}"


def every_name(*fast: str) -> list[Any]:
    others = [c.name for c in cases.CASES if c.name not in fast]
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


@pytest.mark.parametrize("name", every_name(FAST))
def test_definition_is_the_specs_sum_over_selected_keys_alone(name: str) -> None:
    case, args = given(name)
    check(case, definition(case, args), args)


@pytest.mark.slow
def test_blocks_do_not_change_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    case = cases.case(2, 7, (0, 70), 30, selected=9, heads=2, dims=128, dtype="float32")
    args = arguments(case, 2)
    monkeypatch.setattr(reference, "GATHERED", 2 * 9 * 3)  # three queries a block: a ragged last
    check(case, definition(case, args), args)


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
    case, args = given(FAST)
    check(case, mosaic_tpu.sparse_prefill(*args, **case.static, unroll=1, interpret=True), args)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in cases.CASES if not c.declined][:3], ids=str)
def test_tpu_kernel_waits_for_its_copies(case: casebook.Case) -> None:
    args = arguments(case, 6)
    mode = pltpu.InterpretParams()  # memory that nothing wrote is NaN
    check(case, mosaic_tpu.sparse_prefill(*args, **case.static, unroll=1, interpret=mode), args)


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
