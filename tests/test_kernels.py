"""Operations of `pallas_kernels`: every backend against its definition, and the dispatch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import casebook, dispatch
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul import mosaic_gpu as grouped_mosaic
from pallas_kernels.hc_mix import hc_mix
from pallas_kernels.hc_mix import mosaic_gpu as hc_mosaic

EPS, WIDTH, NORM_EPS = 1e-6, 48, 1e-3  # a norm's epsilon that shows
NORM = {"width": WIDTH, "norm_eps": NORM_EPS}
HOPPER = dispatch.Target("gpu", "NVIDIA H100 80GB HBM3", 9.0)


def hc_inputs(tokens: int, streams: int = 4) -> tuple[jax.Array, ...]:
    k = (2 + streams) * streams
    keys = jax.random.split(jax.random.key(tokens), 4)
    squares = jax.random.uniform(keys[3], (tokens,), minval=0.5, maxval=5.0)
    z = 2 * jax.random.normal(keys[0], (tokens, k)) * jnp.sqrt(squares / WIDTH)[:, None]
    scale = 0.7 + 0.2 * jax.random.normal(keys[1], (3,))
    return z, squares, scale, jax.random.normal(keys[2], (k,))


def hc_in_float64(inputs: tuple[jax.Array, ...], n: int, iterations: int) -> np.ndarray:
    """The spec's loop over the whole matrix (2.2), not the row and column scales we iterate."""
    z, squares, scale, base = (np.asarray(a, np.float64) for a in inputs)
    normed = z / np.sqrt(squares / WIDTH + NORM_EPS)[:, None]
    logits = normed * np.repeat(scale, [n, n, n * n]) + base
    sigmoid = 1 / (1 + np.exp(-logits[:, : 2 * n]))
    matrix = np.exp(logits[:, 2 * n :].reshape(-1, n, n))
    matrix = matrix / matrix.sum(-1, keepdims=True) + EPS
    matrix = matrix / (matrix.sum(-2, keepdims=True) + EPS)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdims=True) + EPS)
        matrix = matrix / (matrix.sum(-2, keepdims=True) + EPS)
    out = [sigmoid[:, :n] + EPS, 2 * sigmoid[:, n:], matrix.reshape(-1, n * n)]
    return np.concatenate(out, axis=-1)


# float32 rounding, carried through 2 * iterations divisions of values near 1
@pytest.mark.parametrize("streams", [1, 2, 4])
@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_hc_mix_is_the_specs_sinkhorn(streams: int, iterations: int) -> None:
    inputs = hc_inputs(5, streams)
    sizes = {"streams": streams, "iterations": iterations, "eps": EPS, **NORM}
    got = hc_mix(*inputs, **sizes, backend="xla")
    want = hc_in_float64(inputs, streams, iterations)
    np.testing.assert_allclose(got, want, atol=2e-6)


# A block each; a thread each, around a block, with a ragged tail.
@pytest.mark.parametrize("tokens", [1, 3, 127, 128, 130])
def test_hopper_hc_mix_matches_the_definition_when_interpreted(tokens: int) -> None:
    inputs, sizes = hc_inputs(tokens), {"streams": 4, "iterations": 3, "eps": EPS, **NORM}
    got = hc_mosaic.hc_mix(*inputs, **sizes, interpret=True)
    np.testing.assert_allclose(got, hc_mix(*inputs, **sizes, backend="xla"), atol=1e-6)


def test_hopper_hc_mix_declines_other_dtypes() -> None:
    z, squares, scale, base = hc_inputs(3)
    with pytest.raises(dispatch.Unsupported, match="float32, got bfloat16"):
        sizes = {"streams": 4, "iterations": 3, "eps": EPS, **NORM}
        hc_mosaic.hc_mix(z.astype(jnp.bfloat16), squares, scale, base, **sizes)


@pytest.mark.parametrize("sizes", [[3, 0, 7, 1], [0, 0, 11, 0], [5, 6, 0, 0]])
def test_grouped_matmul_gives_each_row_its_groups_matrix(sizes: list[int]) -> None:
    x = jax.random.normal(jax.random.key(0), (11, 24))
    w = jax.random.normal(jax.random.key(1), (4, 16, 24))
    got = grouped_matmul(x, w, jnp.asarray(sizes, jnp.int32), backend="xla")
    group = np.repeat(np.arange(4), sizes)
    want = np.einsum("mk,mnk->mn", np.asarray(x, np.float64), np.asarray(w, np.float64)[group])
    np.testing.assert_allclose(got, want, atol=2e-5)  # 24 float32 products of O(1)


@pytest.mark.parametrize(
    ("dtype", "n", "k", "why"),
    [
        ("float32", 128, 64, "bfloat16 or float16"),
        ("bfloat16", 100, 64, "N % 128"),
        ("bfloat16", 128, 96, "K % 64"),
    ],
)
def test_hopper_grouped_matmul_says_what_it_declines(dtype: str, n: int, k: int, why: str) -> None:
    x, w = jnp.zeros((8, k), dtype), jnp.zeros((2, n, k), dtype)
    with pytest.raises(dispatch.Unsupported, match=why):
        grouped_mosaic.grouped_matmul(x, w, jnp.array([4, 4], jnp.int32))


def decline(why: str):
    def implementation(*_args: object) -> None:
        raise dispatch.Unsupported(why)

    return implementation


def test_a_named_backend_never_falls_back(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: HOPPER)
    backends = {"xla": lambda: "definition", "mosaic_gpu": decline("too small")}
    with pytest.raises(dispatch.Unsupported, match="mosaic_gpu: too small"):
        dispatch.run("hc_mix", backends, "mosaic_gpu")


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(dispatch.Unsupported, match="got 'cuda'"):
        dispatch.run("hc_mix", {"xla": lambda: "definition"}, "cuda")


def test_a_backend_that_an_operation_has_not_is_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: HOPPER)
    with pytest.raises(dispatch.Unsupported, match=r"hc_mix has \('xla',\), not 'mosaic"):
        dispatch.run("hc_mix", {"xla": lambda: "definition"}, "mosaic_gpu")


def test_a_kernel_that_is_not_in_the_table_of_defaults_runs_only_by_name(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: HOPPER)
    backends = {"xla": lambda: "definition", "mosaic_gpu": lambda: "kernel"}
    assert dispatch.run("hc_mix", backends, None) == "kernel"
    monkeypatch.setattr(dispatch, "DEFAULTS", {"hc_mix": {"tpu": ("mosaic_gpu",)}})
    assert dispatch.run("hc_mix", backends, None) == "definition"
    assert dispatch.run("hc_mix", backends, "mosaic_gpu") == "kernel"


def test_the_table_of_defaults_names_every_operation_and_kernels_that_they_have() -> None:
    """Some folders have a second function, or a second kind of call."""
    second = {"compress_token", "expert_matmul", "page_scatter"}
    assert dispatch.DEFAULTS.keys() == {*casebook.operations(), *second}
    for op in casebook.operations():
        for kind, names in dispatch.DEFAULTS[op].items():
            assert kind in (dispatch.HOPPER, dispatch.GPU, dispatch.TPU)
            assert set(names) <= set(casebook.backends(op)) - {"xla"}


def test_a_models_backend_is_asked_for_only_where_an_operation_has_it() -> None:
    assert dispatch.of_model(("xla", "triton"), "triton") == "triton"
    assert dispatch.of_model(("xla", "triton"), "xla") == "xla"
    assert dispatch.of_model(("xla", "triton"), "mosaic_gpu") is None
    assert dispatch.of_model(("xla", "triton"), None) is None


def test_a_program_for_another_device_takes_that_devices_defaults() -> None:
    device = jax.sharding.AbstractDevice(device_kind="TPU v5", num_cores=1, platform="tpu")
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.sharding.AbstractMesh((1,), ("x",), axis_types=auto, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert dispatch.kind_of(dispatch.target()) == dispatch.TPU
        for op in dispatch.DEFAULTS:
            assert dispatch.default_order(op, dispatch.BACKENDS) == ("xla",)  # none measured there


def test_without_a_name_the_next_backend_takes_what_one_declines(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: HOPPER)
    backends = {"xla": lambda: "definition", "mosaic_gpu": decline("too small")}
    assert dispatch.run("hc_mix", backends, None) == "definition"


def test_a_bug_in_a_kernel_is_not_a_reason_to_fall_back(monkeypatch) -> None:
    monkeypatch.setattr(dispatch, "target", lambda: HOPPER)

    def broken() -> None:
        raise NotImplementedError("a primitive has no rule")

    with pytest.raises(NotImplementedError):
        dispatch.run("hc_mix", {"xla": lambda: "definition", "mosaic_gpu": broken}, None)


def test_a_backend_for_another_device_is_refused() -> None:
    sizes = {"streams": 4, "iterations": 3, "eps": EPS, **NORM}
    with pytest.raises(dispatch.Unsupported, match="needs a Hopper GPU, got cpu"):
        hc_mix(*hc_inputs(3), **sizes, backend="mosaic_gpu")


def test_a_cpu_runs_the_definitions() -> None:
    assert {dispatch.default_order(op, dispatch.BACKENDS) for op in dispatch.DEFAULTS} == {("xla",)}
