"""`index_score`: the definition against a plain formula, kernels against it, its gradient."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import casebook, dispatch
from pallas_kernels.index_score import (
    gradient,
    index_score,
    mosaic_gpu,
    mosaic_gpu_decode,
    mosaic_tpu,
    page_score,
    reference,
)
from pallas_kernels.index_score.cases import CASES, E4M3, case

KEY = jax.random.key(0)
NORMALS = tuple(np.random.default_rng(1).standard_normal(s) for s in ((1, 2, 4, 16), (1, 2, 4)))
HOPPER = [c for c in CASES if "mosaic_gpu" not in c.declined]
TPU = [c for c in CASES if "mosaic_tpu" not in c.declined]
PAGED = next(c for c in CASES if c.shape["paged"])
GPU_SIZES: dict[str, Any] = {"groups": 1, "stages": 2, "splits": 1, "queries": 16}


@functools.cache
def arguments_of(name: str) -> dict[str, jax.Array]:
    """A case's arguments, made once."""
    (arguments,) = next(c for c in CASES if str(c) == name).arguments(KEY)
    return arguments


@functools.cache
def defined(name: str) -> jax.Array:
    """The definition's result of a case."""
    return jax.jit(reference.index_score)(*positional(arguments_of(name)))


def positional(arguments: dict[str, jax.Array]) -> tuple[Any, ...]:
    """What an implementation gets: lengths for every query, None for what is not there."""
    names = ("q", "w", "keys", "scale", "lengths", "table")
    return tuple(arguments.get(name) for name in names)


def in_float64(arguments: dict[str, jax.Array]) -> np.ndarray:
    """The formula with every per-head product in memory."""
    x = {n: np.asarray(a.astype(jnp.float32), np.float64) for n, a in arguments.items()}
    keys, scale = x["keys"], x.get("scale", np.ones(x["keys"].shape[:2]))
    exists = np.ones((x["q"].shape[0], keys.shape[1]), bool)
    if "table" in x:
        table = x["table"].astype(int)
        exists = np.repeat(table >= 0, keys.shape[1], axis=1)
        keys, scale = (
            np.stack([np.concatenate(p[np.abs(r)]) for r in table]) for p in (keys, scale)
        )
    dots = np.einsum("bthk,bnk->bthn", x["q"], keys)
    scores = np.einsum("bthn,bth->btn", np.maximum(dots, 0), x["w"]) * scale[:, None]
    seen = exists[:, None] & (np.arange(keys.shape[1]) < x["lengths"][..., None])
    return np.where(seen, scores, -np.inf).astype(np.float32)


def check(one: casebook.Case, got: Any, want: Any) -> None:
    found = casebook.compare(one.tolerance, got, want)
    assert found.ok, found.why


SLOW = pytest.mark.slow  # compiling is what takes long, so fast runs have few cases
FEW = [CASES[1], CASES[9]]
OTHERS = [pytest.param(c, marks=SLOW) for c in CASES if c not in FEW]


@pytest.mark.parametrize("one", [*FEW, *OTHERS], ids=str)
def test_the_definition_is_the_formula_whole_and_in_blocks(one: casebook.Case) -> None:
    arguments = arguments_of(str(one))
    want = in_float64(arguments)
    check(one, defined(str(one)), want)
    heads = one.shape["batch"] * one.shape["tokens"] * one.shape["heads"]
    blocked = functools.partial(reference.index_score, block_bytes=4 * heads * 70)
    check(one, jax.jit(blocked)(*positional(arguments)), want)


def test_lengths_may_be_left_out_or_be_given_for_each_row() -> None:
    arguments, _ = training_inputs(False)
    lengths = arguments.pop("lengths")[:, 0]
    whole = jnp.full((2, 3), 24)
    row = jnp.broadcast_to(lengths[:, None], (2, 3))
    score = jax.jit(lambda n, x: (index_score(**x), index_score(**x, lengths=n)))
    for got, n in zip(score(lengths, arguments), (whole, row), strict=True):
        np.testing.assert_allclose(
            got, in_float64(arguments | {"lengths": n}), rtol=1e-4, atol=1e-6
        )


def test_every_code_of_a_key_is_its_number() -> None:
    bits = jnp.arange(256).astype(jnp.uint8)
    keys = jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)
    q = jnp.array([1.0, -1.0], jnp.bfloat16).reshape(1, 1, 2, 1)
    score = jax.jit(functools.partial(index_score, backend="xla"))
    got = score(q, jnp.array([[[1.0, -1.0]]]), keys[None, :, None])
    np.testing.assert_array_equal(got[0, 0], keys.astype(jnp.float32))


HOPPER_FEW, TPU_FEW = [CASES[1]], [CASES[1]]
HOPPER_OTHERS = [pytest.param(c, marks=SLOW) for c in HOPPER if c not in HOPPER_FEW]
TPU_OTHERS = [pytest.param(c, marks=SLOW) for c in TPU if c not in TPU_FEW]


@pytest.mark.parametrize("one", [*HOPPER_FEW, *HOPPER_OTHERS], ids=str)
def test_hopper_kernels_match_the_definition_when_interpreted(one: casebook.Case) -> None:
    arguments = positional(arguments_of(str(one)))
    got = mosaic_gpu.index_score(*arguments, **GPU_SIZES, interpret=True)
    check(one, got, defined(str(one)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "sizes"),
    [
        (CASES[0], {"groups": 3, "stages": 1, "splits": 2}),
        (CASES[5], {"groups": 2, "key_tiles": 2, "queries": 4}),
    ],
)
def test_hopper_kernels_give_the_same_scores_however_the_work_is_split(
    one: casebook.Case, sizes: dict[str, Any]
) -> None:
    arguments = positional(arguments_of(str(one)))
    got = mosaic_gpu.index_score(*arguments, **sizes, interpret=True)
    check(one, got, defined(str(one)))


@pytest.mark.parametrize("one", [*TPU_FEW, *TPU_OTHERS], ids=str)
def test_tpu_kernel_matches_the_definition_when_interpreted(one: casebook.Case) -> None:
    arguments = positional(arguments_of(str(one)))
    got = mosaic_tpu.index_score(*arguments, block=128, pages=2, interpret=True)
    check(one, got, defined(str(one)))


@pytest.mark.parametrize(
    ("sizes", "why"),
    [
        ({"query": "float32", "keys": "float32"}, "bfloat16 or e4m3"),
        ({"query": E4M3, "keys": "bfloat16"}, "keys no wider"),
        ({"heads": 16}, "64 or 128 heads"),
        ({"dims": 64}, "of 128 dims"),
    ],
)
def test_hopper_kernels_decline_what_they_do_not_take(sizes: dict[str, Any], why: str) -> None:
    (arguments,) = case(1, 1, 64, **sizes).abstract()
    with pytest.raises(dispatch.Unsupported, match=why):
        jax.eval_shape(mosaic_gpu.index_score, *positional(arguments))


@pytest.mark.parametrize("batch", [1, 7, 8, 32, 64, 100, 128, 256])
def test_decode_blocks_fill_the_processors(batch: int) -> None:
    blocks = batch * mosaic_gpu_decode.splits_for(batch, 4096, 3)
    waves = -(-blocks // mosaic_gpu_decode.PROCESSORS)
    assert blocks / (waves * mosaic_gpu_decode.PROCESSORS) >= 0.9
    assert mosaic_gpu_decode.splits_for(batch, 2, 3) == 1  # two tiles are one block's work


@pytest.mark.parametrize(("page", "block_bytes"), [(32, None), (192, None), (64, 4 * 3 * 64 * 70)])
def test_page_scores_count_and_top_each_pages_scores(page: int, block_bytes: int | None) -> None:
    arguments, whole = arguments_of(str(PAGED)), np.asarray(defined(str(PAGED)))
    middle = np.sort(whole[np.isfinite(whole)])[100:102]
    sizes = {"threshold": float(middle.mean()), "page": page}  # no score is near the threshold
    scores = whole.reshape(3, 1, -1, page)
    if block_bytes is None:
        counts, top = jax.jit(functools.partial(page_score, **sizes))(**arguments)
    else:
        blocked = functools.partial(reference.page_score, **sizes, block_bytes=block_bytes)
        counts, top = jax.jit(blocked)(*positional(arguments))
    np.testing.assert_array_equal(counts, (scores > sizes["threshold"]).sum(-1))
    np.testing.assert_allclose(top, scores.max(-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"w": np.zeros((3, 1, 4), "float32")}, "w must be float32"),
        ({"lengths": np.zeros(2, "int32")}, "lengths must be int32"),
        ({"scale": np.zeros((3, 192), "float32")}, "scale must be float32"),
        ({"table": np.zeros((2, 3), "int32")}, "table must be int32"),
        ({"keys": np.zeros((3, 64, 64), "float32")}, "keys must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], why: str) -> None:
    (arguments,) = PAGED.abstract()
    with pytest.raises(ValueError, match=why):
        jax.eval_shape(index_score, **arguments | changes)


BACKWARD = jax.jit(gradient.backward)


def naive_loss(arguments: dict[str, Any], g: jax.Array) -> jax.Array:
    """Differentiated by JAX: every product in memory, masked entries left out."""
    keys, scale = arguments["keys"], arguments["scale"]
    batch, dim = arguments["q"].shape[0], keys.shape[-1]
    exists = True
    if "table" in arguments:
        at = jnp.maximum(arguments["table"], 0)
        exists = jnp.repeat(arguments["table"] >= 0, keys.shape[1], axis=1)[:, None]
        keys, scale = keys[at].reshape(batch, -1, dim), scale[at].reshape(batch, -1)
    dots = jnp.einsum("bthk,bnk->bthn", arguments["q"], keys, precision="highest")
    scores = jnp.einsum("bthn,bth->btn", jax.nn.relu(dots), arguments["w"]) * scale[:, None]
    seen = exists & (jnp.arange(keys.shape[1]) < arguments["lengths"][..., None])
    return jnp.sum(jnp.where(seen, scores, 0) * g)


def training_inputs(paged: bool) -> tuple[dict[str, jax.Array], jax.Array]:
    """Small float32 arguments without NaN, and a cotangent."""
    rng, lead = np.random.default_rng(0), (5, 4) if paged else (2, 24)
    arguments = {
        "q": rng.standard_normal((2, 3, 4, 8)),
        "w": rng.standard_normal((2, 3, 4)),
        "keys": rng.standard_normal((*lead, 8)),
        "scale": 0.5 + rng.random(lead),
        "lengths": rng.integers(0, 25, (2, 3)).astype(np.int32),
    }
    if paged:  # pages appear twice, once, never
        arguments["table"] = rng.integers(-1, 5, (2, 6)).astype(np.int32)
    g = rng.standard_normal((2, 3, 24))
    return {n: jnp.asarray(x) for n, x in arguments.items()}, jnp.asarray(g)


def split(arguments: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    names = ("q", "w", "keys", "scale")
    fixed = {n: x for n, x in arguments.items() if n not in names}
    return {n: arguments[n] for n in names}, fixed


@pytest.mark.parametrize("paged", [pytest.param(False, marks=SLOW), True])
def test_gradient_is_the_plain_formulas_in_any_blocks(paged: bool) -> None:
    arguments, g = training_inputs(paged)
    trained, fixed = split(arguments)

    def loss(trained: dict[str, jax.Array]) -> jax.Array:
        scores = index_score(**trained, **fixed)
        return jnp.sum(jnp.where(jnp.isfinite(scores), scores, 0) * g)

    got = jax.jit(jax.grad(loss))(trained)
    want = jax.jit(jax.grad(lambda t: naive_loss(t | fixed, g)))(trained)
    blocked = functools.partial(gradient.backward, block_bytes=4 * 24 * 7)
    parts = jax.jit(blocked)(gradient.Inputs(*positional(arguments)), g)
    for name, part in zip(trained, parts, strict=True):
        np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-5, err_msg=name)
        np.testing.assert_allclose(part, want[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_gradient_is_the_difference_quotient() -> None:
    arguments, g = training_inputs(False)
    parts = BACKWARD(gradient.Inputs(*positional(arguments)), g)
    for name, part in zip(("q", "w", "keys", "scale"), parts, strict=True):
        x = arguments[name]
        way = np.random.default_rng(1).standard_normal(x.shape)
        step = 1e-6  # few products of some hundred change sign within it; float64 keeps the digits
        ends = [
            in_float64_sum(arguments | {name: np.float64(x) + s * way}, g) for s in (step, -step)
        ]
        quotient = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.sum(np.float64(part) * way), quotient, rtol=1e-4)


def in_float64_sum(arguments: dict[str, Any], g: jax.Array) -> float:
    x = {n: np.asarray(a, np.float64) for n, a in arguments.items()}
    dots = np.einsum("bthk,bnk->bthn", x["q"], x["keys"])
    scores = np.einsum("bthn,bth->btn", np.maximum(dots, 0), x["w"]) * x["scale"][:, None]
    seen = np.arange(24) < x["lengths"][..., None]
    return float(np.sum(np.where(seen, scores, 0) * np.float64(g)))


def test_keys_that_no_query_sees_do_not_reach_the_gradient() -> None:
    arguments, g = training_inputs(False)
    arguments["lengths"] = jnp.full((2, 3), 9, jnp.int32)
    unseen = jnp.arange(24) >= 9
    bad = {
        "keys": jnp.where(unseen[None, :, None], jnp.nan, arguments["keys"]),
        "scale": jnp.where(unseen[None], jnp.nan, arguments["scale"]),
    }
    want = BACKWARD(gradient.Inputs(*positional(arguments)), g)
    got = BACKWARD(gradient.Inputs(*positional(arguments | bad)), g)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    assert not got[2][:, 9:].any() and not got[3][:, 9:].any()


def test_codes_get_no_gradient_and_bfloat16_queries_get_theirs() -> None:
    q, w = (jnp.asarray(x, jnp.bfloat16).astype(jnp.float32) for x in NORMALS)
    keys = jnp.asarray(np.random.default_rng(1).standard_normal((1, 40, 16)), E4M3)

    gradients = jax.jit(jax.grad(lambda *a: jnp.sum(index_score(*a)), argnums=(0, 1, 2)))
    dq, dw, dk = gradients(q.astype(jnp.bfloat16), w, keys)
    assert dk.dtype == keys.dtype and not np.asarray(dk, np.float32).any()
    x, y, k = (np.asarray(v.astype(jnp.float32), np.float64) for v in (q, w, keys))
    dots = np.einsum("bthk,bnk->bthn", x, k)
    np.testing.assert_allclose(dw, np.maximum(dots, 0).sum(-1), rtol=1e-4)
    # cotangents of the products are rounded to bfloat16, then those of q: 2^-9 of a term each
    want = np.einsum("bthn,bth,bnk->bthk", dots > 0, y, k)
    np.testing.assert_allclose(np.asarray(dq, np.float32), want, atol=2**-7 * np.abs(want).max())


def test_the_gradient_holds_no_product_of_all_heads_and_keys() -> None:
    (arguments,) = case(1, 4, 1 << 16, **{"keys": "bfloat16"}).abstract()
    inputs = gradient.Inputs(*positional(arguments))
    g = jax.ShapeDtypeStruct((1, 4, 1 << 16), jnp.float32)
    limit = 1 << 20
    backward = jax.jit(functools.partial(gradient.backward, block_bytes=limit))
    temp = backward.lower(inputs, g).compile().memory_analysis().temp_size_in_bytes
    whole = 4 * 4 * 64 * (1 << 16)
    total_of_keys = 4 * 128 * (1 << 16)
    assert temp < total_of_keys + 8 * limit < whole
