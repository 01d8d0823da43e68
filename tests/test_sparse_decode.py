"""Sparse decode attention: the definition against float64, kernels against the definition.

The GPU kernel runs on GPUs only: `python -m pallas_kernels.checks` compares it there.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import casebook, dispatch, rows, split_softmax, split_softmax_gpu
from pallas_kernels.casebook import Case
from pallas_kernels.sparse_decode import mosaic_tpu, sparse_decode, triton_gpu
from pallas_kernels.sparse_decode.cases import CASES, RECENT, small
from pallas_kernels.split_softmax_cases import SCALE

PLAIN = small("few", picks=8, heads=8)


Drawn = tuple[tuple[Any, ...], np.ndarray]


def drawn(case: Case) -> Drawn:
    """A case's arguments, and what they give in float64."""
    args = case.arguments(jax.random.key(0))
    return args, in_float64(args, case.static["scale"], case.static["own"]).astype(np.float32)


def in_float64(args: tuple[Any, ...], scale: float, own: bool) -> np.ndarray:
    q, window, window_count, entries, index, valid, sink = args
    if not isinstance(entries, rows.Fp8Rows):
        entries = entries.reshape(*entries.shape[:2], -1)
    values = np.asarray(rows.decode(entries, q.shape[-1], 64, jnp.float32), np.float64)
    out = np.zeros(q.shape)
    for b, count in enumerate(window_count):
        picked = np.asarray(index[b])[np.asarray(valid[b])]
        pool = values[b] if own else values.reshape(-1, q.shape[-1])
        keys = np.concatenate([np.asarray(window[b, :count], np.float64), pool[picked]])
        scores = np.asarray(q[b], np.float64) @ keys.T * scale
        scores = np.concatenate([scores, np.asarray(sink, np.float64)[:, None]], axis=1)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b] = (weights / weights.sum(axis=1, keepdims=True))[:, :-1] @ keys
    return out


def agree(case: Case, got: Any, want: Any) -> None:
    result = casebook.compare(case.tolerance, np.asarray(got, np.float32), want)
    assert result.ok, result.why


@pytest.fixture(scope="module")
def few() -> Drawn:
    """Drawn by NumPy: compiling JAX's random numbers takes longer than the tests."""
    rng, bf16 = np.random.default_rng(0), jnp.bfloat16
    shapes = {"q": (4, 8, 512), "window": (4, 128, 512), "pool": (5, 24, 4, 128), "sink": (8,)}
    drawn = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    drawn["window"][1, 5:] = drawn["window"][2] = np.nan
    q, window, pool = (jnp.asarray(drawn[name], bf16) for name in ("q", "window", "pool"))
    index, valid = rng.integers(0, 120, (4, 8), np.int32), rng.random((4, 8)) < 0.7
    valid[2:] = False
    ints = (jnp.asarray(x) for x in (np.array(RECENT, np.int32), index, valid, drawn["sink"]))
    count, index, valid, sink = ints
    args = (q, window, count, pool, index, valid, sink)
    return args, in_float64(args, SCALE, own=False).astype(np.float32)


def right_by_float64(case: Case, given: Drawn) -> None:
    args, want = given
    agree(case, jax.jit(lambda *a: case.run(a, "xla"))(*args), want)


def test_the_definition_is_softmax_with_a_sink_over_window_and_picks(few: Drawn) -> None:
    right_by_float64(PLAIN, few)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_is_right_in_every_case(case: Case) -> None:
    right_by_float64(case, drawn(case))


def interpreted_tpu_agrees(case: Case, given: Drawn, interpret: Any, **sizes: Any) -> None:
    args, want = given
    agree(case, mosaic_tpu.sparse_decode(*args, interpret=interpret, **sizes, **case.static), want)


def test_tpu_kernel_matches_the_definition_when_interpreted(few: Drawn) -> None:
    interpreted_tpu_agrees(PLAIN, few, True)


@pytest.mark.slow
@pytest.mark.timeout(120)  # a wrong semaphore count would hang
@pytest.mark.parametrize("name", ["a pool", "own rows", "128 heads"])
def test_tpu_kernel_waits_for_its_rows(name: str) -> None:
    case = next(c for c in CASES if c.name == name)
    # Memory that no copy has reached holds NaN; three chunks of rows take both buffers and wrap.
    interpreted_tpu_agrees(case, drawn(case), pltpu.InterpretParams(), chunk=16)


def test_what_is_picked_twice_counts_twice_and_an_empty_row_is_zero() -> None:
    rng = np.random.default_rng(2)
    q, pool = (rng.standard_normal(shape, np.float32) for shape in ((2, 8, 32), (3, 2, 32)))
    window = np.full((2, 4, 32), np.nan, np.float32)
    index = np.array([[4, 4, 1], [0, 0, 0]], np.int32)
    valid = np.array([[True, True, False], [False] * 3])
    none, sink = np.zeros(2, np.int32), np.full(8, 0.5, np.float32)
    attend = jax.jit(functools.partial(sparse_decode, scale=0.2))
    out = attend(q, window, none, pool, index, valid, sink)
    entry = pool[2, 0]
    weight = 2 * np.exp(q[0] @ entry * 0.2)
    share = weight / (weight + np.exp(0.5))
    np.testing.assert_allclose(out[0], share[:, None] * entry, rtol=2e-6)
    np.testing.assert_array_equal(out[1], np.zeros((8, 32)))


@jax.jit
def whole_and_combined(q: jax.Array, entries: jax.Array, sink: jax.Array) -> tuple[Any, Any]:
    valid = jnp.ones(entries.shape[:2], bool)
    whole = split_softmax.finish(split_softmax.part(q, entries, valid, 0.3), sink, q.dtype)
    bounds = ((0, 5), (5, 6), (6, 12))
    parts = [split_softmax.part(q, entries[:, a:b], valid[:, a:b], 0.3) for a, b in bounds]
    nothing = split_softmax.empty(*q.shape)
    parts.append(nothing._replace(values=jnp.full_like(nothing.values, jnp.nan)))
    stacked = jax.tree.map(lambda *x: jnp.stack(x, axis=1), *parts)
    return whole, split_softmax.combine(stacked, sink, q.dtype)


def test_parts_of_the_keys_combine_to_the_whole_whatever_an_empty_part_holds() -> None:
    rng = np.random.default_rng(4)
    shapes = (2, 4, 16), (2, 12, 16), (4,)
    whole, got = whole_and_combined(*(rng.standard_normal(s, np.float32) for s in shapes))
    np.testing.assert_allclose(got, whole, atol=2e-6)  # a few float32 roundings of O(1)


@pytest.mark.parametrize(
    ("batch", "heads", "splits"),
    [(1, 64, 20), (8, 64, 16), (32, 64, 4), (64, 128, 1), (512, 64, 1)],
)
def test_splits_fill_a_gpu_once(batch: int, heads: int, splits: int) -> None:
    tuning = triton_gpu.default_tuning(batch, heads, 128, 512)
    assert tuning.splits == splits


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": jnp.zeros((2, 64, 512))}, "q must be bfloat16"),
        ({"rows": jnp.zeros((4, 8, 512))}, "bfloat16 or fp8, got float32"),
        ({"group": 32, "rows": "fp8"}, r"\(512, 64, 64\), got \(512, 64, 32\)"),
    ],
)
def test_the_gpu_kernel_says_what_it_declines(change: dict[str, Any], why: str) -> None:
    call: dict[str, Any] = {"q": jnp.zeros((2, 64, 512), jnp.bfloat16), "group": 64}
    call |= {"rows": jnp.zeros((4, 8, 512), jnp.bfloat16), **change}
    if isinstance(call["rows"], str):
        call["rows"] = jax.eval_shape(lambda: casebook.fp8_rows(jax.random.key(0), (4, 8)))
    with pytest.raises(dispatch.Unsupported, match=why):
        split_softmax_gpu.require(**call)


@pytest.mark.parametrize("case", [c for c in CASES if c.declined], ids=str)
def test_the_tpu_kernel_declines_what_it_cannot_fetch_by_row(case: Case) -> None:
    args = case.abstract()
    with pytest.raises(dispatch.Unsupported, match=r"rows must be|picks by 8"):
        jax.eval_shape(lambda *a: mosaic_tpu.sparse_decode(*a, **case.static), *args)


def shaped(dtype: str, *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def test_arguments_that_do_not_agree_are_refused_by_name() -> None:
    args = list(PLAIN.abstract())
    call = functools.partial(sparse_decode, scale=1.0)
    wrong = {
        2: (shaped("int32", 1), r"window_count must be int32 \[4\], got int32 \[1\]"),
        3: (shaped("float32", 5, 24, 8), r"rows must be .*\[\*, \*, 512\] or \[\*, \*, 4, 128\]"),
        4: (shaped("float32", 4, 8), r"index must be int32 \[4, k\], got float32 \[4, 8\]"),
        5: (shaped("bool", 4, 7), r"valid must be bool \[4, 8\], got bool \[4, 7\]"),
    }
    for at, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(call, *[value if i == at else x for i, x in enumerate(args)])
    with pytest.raises(ValueError, match="4 rows of their own, got 5"):
        jax.eval_shape(functools.partial(call, own=True), *args)
