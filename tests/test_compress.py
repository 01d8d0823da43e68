"""Compression: the definition against the model's compressor, kernels against the definition.

The Triton kernel needs a GPU; its sizes are checked here.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lsa_jax.cache import codec
from lsa_jax.cache.state import Tail as StateTail
from lsa_jax.config import ComputeConfig
from lsa_jax.nn.compressor import Compressor
from lsa_jax.nn.layers import Leaves
from lsa_jax.parameters import ParamSpec
from pallas_kernels import casebook, dispatch
from pallas_kernels.compress import Tail, cases, compress, mosaic_tpu, reference, triton_gpu
from pallas_kernels.compress.cases import CASES

ON_TPU = [c for c in CASES if dispatch.MOSAIC_TPU not in c.declined]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the model's compressor and codec read of a config."""

    head_dim: int = 128
    qk_rope_head_dim: int = 64
    kv_quant_group: int = 64
    rms_norm_eps: float = cases.EPS

    @property
    def nope_head_dim(self) -> int:
        return self.head_dim - self.qk_rope_head_dim


def model_compressor(norm: Any, freqs: Any, ape: Any) -> Compressor:
    """One whose projections pass a token's value and gate through."""
    width, eye = ape.shape[1], np.eye(2 * ape.shape[1], dtype=np.float32)
    leaves = {
        "ape": ape,
        "norm.weight": norm,
        "wkv.weight": eye[:width],
        "wgate.weight": eye[width:],
    }
    leaves = {name: jnp.asarray(x) for name, x in leaves.items()}
    table = {n: ParamSpec(x.shape, "matrix", (None,) * x.ndim) for n, x in leaves.items()}
    cfg: Any = Sizes(head_dim=norm.shape[0])
    return Compressor(Leaves(leaves, table), cfg, ComputeConfig(dtype="float32"), np.asarray(freqs))


def defined(case: casebook.Case, args: tuple[Any, ...]) -> Any:
    return jax.jit(lambda *a: case.run(a, dispatch.XLA))(*args)


def arguments(seed: int = 0, **shape: Any) -> tuple[Any, ...]:
    args = jax.jit(functools.partial(cases.make, **shape))(jax.random.key(seed))
    return jnp.nan_to_num(args[0]), jnp.nan_to_num(args[1]), *args[2:]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "shape",
    [
        (3, 13, 4),
        (4, 1, 4),
        pytest.param((2, 140, 128), marks=SLOW),
        pytest.param((3, 1, 128), marks=SLOW),
    ],
)
def test_the_definition_gives_the_numbers_of_the_models_compressor(shape) -> None:
    batch, tokens, ratio = shape
    args = arguments(batch=batch, tokens=tokens, dim=128, ratio=ratio)
    value, gate, start, count, tail, norm, freqs, ape = args
    x = jnp.concatenate([value, gate], axis=-1)
    model = model_compressor(norm, freqs, ape)
    new, kept = jax.jit(model)(x, start, count, StateTail(tail.current, tail.previous))
    static = {"ratio": ratio, "eps": cases.EPS, "backend": "xla"}
    got, left = jax.jit(lambda *a: compress(*a, layout="float32", **static))(*args)
    np.testing.assert_array_equal(got.first, new.first)
    np.testing.assert_array_equal(got.count, new.count)
    np.testing.assert_array_equal(left.current, kept.current)
    if tail.previous is not None:
        np.testing.assert_array_equal(left.previous, kept.previous)
    for b, n in enumerate(got.count):
        np.testing.assert_array_equal(got.rows[b, :n], new.values[b, :n])
        assert not np.any(got.rows[b, n:])


def test_planes_are_those_that_the_cache_stores() -> None:
    x = np.random.default_rng(1).standard_normal((50, 512), np.float32)
    x *= np.exp2(np.arange(50, dtype=np.float32) - 25)[:, None]
    x[7] = 0
    cfg: Any = Sizes(head_dim=512)
    want = jax.jit(lambda x: codec.encode_entries(cfg, "fp8", x))(x)
    got = jax.jit(lambda x: reference.encode(x, "fp8", 64, 64))(x)
    np.testing.assert_array_equal(got.nope, want.nope)
    np.testing.assert_array_equal(got.rope, want.rope)


@SLOW
def test_chunks_of_any_length_leave_what_one_chunk_leaves() -> None:
    args = arguments(batch=2, tokens=21, dim=128, ratio=4, full=True)
    value, gate, start, _, tail, *rest = args
    static: dict[str, Any] = {"ratio": 4, "eps": cases.EPS, "layout": "float32", "backend": "xla"}
    run = jax.jit(functools.partial(compress, **static))
    whole, last = run(*args)
    at, parts = 0, [[] for _ in start]
    for size in (1, 9, 1, 9, 1):
        chunk = value[:, at : at + size], gate[:, at : at + size]
        new, tail = run(*chunk, start + at, jnp.full(2, size), tail, *rest)
        for b, n in enumerate(new.count):
            parts[b].append(new.rows[b, :n])
        at += size
    for b, n in enumerate(whole.count):  # sums in another order
        np.testing.assert_allclose(jnp.concatenate(parts[b]), whole.rows[b, :n], atol=3e-6)
    np.testing.assert_allclose(tail.current, last.current, atol=3e-6)
    np.testing.assert_allclose(tail.previous, last.previous, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_nothing_beyond_a_rows_tokens_is_read(case) -> None:
    result = defined(case, case.arguments(jax.random.key(2)))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(result))


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_TPU[:1], ids=str)
def test_tpu_kernel_equals_the_definition(case) -> None:
    args = case.arguments(jax.random.key(3))
    static = {"group": 64, **case.static}
    params = pltpu.InterpretParams()
    got = mosaic_tpu.compress(*args, **static, block_tokens=32, interpret=params)
    want = defined(case, args)
    result = casebook.compare(case.tolerance, case.view(args, got), case.view(args, want))
    assert result.ok, result.why


@pytest.mark.slow
@pytest.mark.parametrize("case", ON_TPU[1:], ids=str)
def test_tpu_kernel_equals_the_definition_at_other_windows(case) -> None:
    test_tpu_kernel_equals_the_definition(case)


def test_tpu_kernel_declines_chunks_that_start_within_a_window() -> None:
    call = functools.partial(mosaic_tpu.compress, group=64, **CASES[0].static)
    with pytest.raises(dispatch.Unsupported, match="whole windows"):
        jax.eval_shape(call, *CASES[0].abstract())


@pytest.mark.parametrize("tokens, ratio", [(1, 4), (1, 128), (3, 128), (5, 4), (300, 128)])
def test_triton_sizes_cover_windows_and_rows(tokens: int, ratio: int) -> None:
    sizes = triton_gpu.constants(tokens, 512, 64, ratio=ratio, group=64, fp8=True, step=8)
    assert sizes["span"] >= min(tokens, ratio) and sizes["span"] % sizes["step"] == 0
    assert 448 + 7 + sizes["spare"] >= sizes["row"] == 512
    for name in ("span", "step", "spare"):
        assert sizes[name] & (sizes[name] - 1) == 0


def test_arguments_that_do_not_fit_are_named() -> None:
    args = list(CASES[0].abstract())
    static: dict[str, Any] = {"ratio": 4, "eps": cases.EPS}
    with pytest.raises(ValueError, match="layout must be one of"):
        compress(*args, layout="int8", **static)
    with pytest.raises(ValueError, match=r"ape must be \[8, 256\], got \[4, 256\]"):
        compress(*args, ratio=8, eps=cases.EPS)
    args[4] = Tail(args[4].current, None)
    with pytest.raises(ValueError, match="value must be 1 x 128 wide, got 256"):
        compress(*args, **static)
