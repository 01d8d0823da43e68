"""Quantised products: the definition against the model's dequantisation and a plain sum, the TPU
kernel against the definition. The Triton kernel runs in its interpreter where triton is installed.
"""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lsa_jax import quant
from pallas_kernels import casebook, dispatch
from pallas_kernels.quant_matmul import (
    cases,
    expert_matmul,
    grouped_quant_matmul,
    mosaic_tpu,
    quant_matmul,
    reference,
    triton_gpu,
)
from pallas_kernels.quant_matmul.cases import CASES

ON_TPU = [c for c in CASES if dispatch.MOSAIC_TPU not in c.declined]


def defined(case: casebook.Case, args: tuple[Any, ...]) -> Any:
    return jax.jit(lambda *a: case.run(a, dispatch.XLA))(*args)


def dense(w: Any, scale: Any) -> np.ndarray:
    """The stored weight in float64, by tables."""
    power = np.exp2(np.asarray(scale, np.float64) - 127)
    if w.dtype == jnp.uint8:
        table = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        codes = np.stack([np.asarray(w) & 15, np.asarray(w) >> 4], axis=-1)
        return table[codes.reshape(*w.shape[:-1], -1)] * np.repeat(power, 32, axis=-1)
    grid = np.repeat(np.repeat(power, 128, axis=-1), 128, axis=-2)
    return np.asarray(w).astype(np.float64) * grid[..., : w.shape[-2], : w.shape[-1]]


@pytest.mark.parametrize("fp4", [False, True])
def test_dequantising_is_exact_in_bfloat16_and_the_models_own(fp4: bool) -> None:
    w, scale = cases.weights(jax.random.key(0), (2,), 130, 288, fp4)
    want = dense(w, scale)
    got = jax.jit(lambda w, s: reference.dequantise(w, s, jnp.bfloat16))(w, scale)
    np.testing.assert_array_equal(np.asarray(got, np.float64), want)
    model = jax.jit(lambda w, s: quant.dequantise(w, s, 288, jnp.float32))(w, scale)
    np.testing.assert_array_equal(np.asarray(model, np.float64), want)


@pytest.mark.parametrize("case", [CASES[4], CASES[5]], ids=str)
def test_the_definition_is_the_product_with_the_dequantised_weight(case: casebook.Case) -> None:
    x, w, scale = args = case.arguments(jax.random.key(1))
    want = np.asarray(x, np.float64) @ dense(w, scale).T
    np.testing.assert_allclose(defined(case, args), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    "case", [pytest.param(CASES[7], marks=pytest.mark.slow), CASES[8]], ids=str
)
def test_each_pair_is_multiplied_by_its_own_expert(case: casebook.Case) -> None:
    x, experts, w, scale = args = case.arguments(jax.random.key(2))
    rows = np.repeat(np.asarray(x, np.float64), len(experts) // len(x), axis=0)
    real = (np.asarray(experts) >= 0) & (np.asarray(experts) < len(w))
    matrices = dense(w, scale)[np.where(real, experts, 0)]
    want = np.einsum("sk,snk->sn", rows, matrices) * real[:, None]
    np.testing.assert_allclose(defined(case, args), want, atol=2e-5 * np.abs(want).max())


@pytest.mark.slow
def test_pairs_in_blocks_give_the_numbers_of_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    args = CASES[8].arguments(jax.random.key(3))
    whole = reference.expert_matmul(*args)
    monkeypatch.setattr(reference, "PAIR_BYTES", 4 * 192 * 256 * 50)  # 120 pairs: 50, 50, 20
    np.testing.assert_allclose(reference.expert_matmul(*args), whole, rtol=1e-5, atol=1e-3)


def test_groups_are_rows_in_order_and_what_is_left_over_is_zero() -> None:
    x, _, w, scale = CASES[9].arguments(jax.random.key(4))
    sizes = jnp.array([0, 70, 3, 0, 20])
    experts = jnp.array([1] * 70 + [2] * 3 + [4] * 20 + [5] * 7)
    want = jax.jit(lambda *a: expert_matmul(*a, backend="xla"))(x, experts, w, scale)
    got = jax.jit(lambda *a: grouped_quant_matmul(*a, backend="xla"))(x, w, scale, sizes)
    np.testing.assert_array_equal(got, want)
    assert not np.any(got[93:]) and np.any(got[92])


@pytest.mark.parametrize("case", ON_TPU[1:], ids=str)
def test_tpu_kernel_equals_the_definition(case: casebook.Case) -> None:
    args = case.arguments(jax.random.key(5))
    out, params = jnp.dtype("float32"), pltpu.InterpretParams()
    got = mosaic_tpu.quant_matmul(*args, out, block_n=128, block_k=256, interpret=params)
    result = casebook.compare(case.tolerance, got, defined(case, args))
    assert result.ok, result.why


def test_kernels_say_what_they_do_not_take() -> None:
    x, w = jnp.zeros((5, 1024), jnp.bfloat16), jnp.zeros((128, 512), jnp.uint8)
    scale = jnp.zeros((128, 32), jnp.uint8)
    with pytest.raises(dispatch.Unsupported, match="fp4"):
        mosaic_tpu.quant_matmul(x, w, scale, jnp.dtype("float32"))
    with pytest.raises(dispatch.Unsupported, match="x must be bfloat16"):
        triton_gpu.quant_matmul(x.astype("float32"), w, scale, jnp.dtype("float32"))
    with pytest.raises(dispatch.Unsupported, match="K must be a multiple of 128"):
        triton_gpu.quant_matmul(x[:, :96], w[:, :48], scale[:, :3], jnp.dtype("float32"))


@pytest.mark.parametrize("programs, steps", [(1, 32), (16, 32), (64, 8), (512, 32), (1, 1), (3, 7)])
def test_split_sums_are_whole_steps_and_fill_the_device(programs: int, steps: int) -> None:
    splits = triton_gpu.split_count(programs, steps)
    assert steps % splits == 0
    fuller = [s for s in (2, 4, 8, 16) if s > splits and steps % s == 0 and steps // s >= 2]
    assert splits * programs >= triton_gpu.PROGRAMS or not fuller
    assert splits == 1 or splits // 2 * programs < triton_gpu.PROGRAMS


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_triton_kernels_equal_the_definition_when_interpreted() -> None:
    script = Path(__file__).with_name("triton_interpreted.py")
    ran = subprocess.run([sys.executable, script, "quant_matmul"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]


@pytest.mark.parametrize("k, fp4", [(4096, True), (384, True), (1024, False)])
@pytest.mark.parametrize("rows", [1, 6, 192, 1536, 4096])
def test_sizes_divide_the_sums_and_are_powers_of_two(rows: int, k: int, fp4: bool) -> None:
    stored = "uint8" if fp4 else "float8_e4m3fn"
    w: Any = jax.ShapeDtypeStruct((256, 2048, k // 2 if fp4 else k), stored)
    for experts, least in ((True, rows), (False, min(rows, 256))):
        sizes = triton_gpu.tuned(least, w, k, experts)
        assert k % sizes.block_k == 0 and 128 % sizes.block_n == 0
        assert all(s == triton_gpu.power(s) for s in (sizes.block_m, sizes.block_n, sizes.block_k))


def test_arguments_that_do_not_fit_are_named() -> None:
    x, w = jnp.zeros((1, 256), jnp.bfloat16), jnp.zeros((256, 256), jnp.float8_e4m3fn)
    scale = jnp.zeros((2, 2), jnp.uint8)
    with pytest.raises(ValueError, match=r"scale must be uint8 \[2, 2\]"):
        quant_matmul(x, w, scale[:1])
    with pytest.raises(ValueError, match=r"w must be \[256, 128\] for 128 columns"):
        quant_matmul(x[:, :128], w, scale)
    with pytest.raises(ValueError, match="w must be float8_e4m3fn or uint8"):
        quant_matmul(x, w.astype("float32"), scale)
    with pytest.raises(ValueError, match="experts must be a multiple of 2 long, got 3"):
        expert_matmul(jnp.concatenate([x, x]), jnp.zeros(3, jnp.int32), w[None], scale[None])
