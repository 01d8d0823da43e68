"""Where the model has two ways to compute one thing, both give the same: attention over masked or
gathered entries, in one block or many; blocked index scores; two kinds of top-k; two expert paths.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lsa_jax import quant
from lsa_jax.cache import codec
from lsa_jax.config import ConfigError
from lsa_jax.nn import attend_blocks, moe
from lsa_jax.nn.layers import Leaves
from lsa_jax.nn.lightning_indexer import index_scores, topk_indices, topk_mask
from lsa_jax.nn.moe import Experts, Routing
from lsa_jax.nn.site import visible_entries
from lsa_jax.parameters import parameter_table
from pallas_kernels import dispatch
from tests.golden.loader import load_case
from tests.parity_models import (
    FLOAT32,
    LOGITS_ERROR,
    PATH_ERROR,
    close,
    empty,
    extend,
    flat_values,
    fresh_extend,
    model_of,
    rest_of,
    stored_leaves,
)

SMALL = load_case("minimal")  # 3 rows of 37 tokens, top-k 2
LENGTH = SMALL.ids.shape[1]
SPLIT = np.array([1, 12, 30], np.int32)


# Attention ------------------------------------------------------------------------------------


def prefilled_twice(extend: Callable) -> list[np.ndarray]:
    """Logits of two prefill chunks: from nothing, then from another offset in each row."""
    model = model_of("minimal")
    first, _, state = extend(model, SMALL.ids, empty(model, 3, LENGTH), SPLIT)
    second, _, _ = extend(model, rest_of(SMALL.ids, SPLIT), state, LENGTH - SPLIT)
    pairs = zip(first, second, SPLIT, strict=True)
    return [np.concatenate([a[:n], b[: LENGTH - n]]) for a, b, n in pairs]


@pytest.mark.parametrize(
    ("dense_limit", "window_block", "block_bytes"),
    [(0, 8, 1), (0, 128, 1 << 30), (10**6, 8, 40_000), (10**6, 5, 1 << 30)],
    ids=["gathered, 8 at a time", "gathered at once", "masked, 16 at a time", "masked in bands"],
)
def test_prefill_masks_or_gathers_entries_in_blocks_of_any_size(
    monkeypatch: pytest.MonkeyPatch, dense_limit: int, window_block: int, block_bytes: int
):
    monkeypatch.setattr(attend_blocks, "DENSE_LIMIT", dense_limit)
    monkeypatch.setattr(attend_blocks, "WINDOW_BLOCK", window_block)
    monkeypatch.setattr(attend_blocks, "BLOCK_BYTES", block_bytes)
    want = SMALL.outputs["logits"]
    for got, expected in zip(prefilled_twice(fresh_extend()), want, strict=True):
        close(got, expected, LOGITS_ERROR)


def test_a_backend_named_for_picking_runs_or_raises(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(attend_blocks, "DENSE_LIMIT", 0)
    picking = dataclasses.replace(FLOAT32, backend="xla", picking="triton")
    model = model_of("minimal", compute=picking)
    with pytest.raises(dispatch.Unsupported, match="triton needs"):
        fresh_extend()(model, SMALL.ids, empty(model, 3, LENGTH), np.full(3, LENGTH, np.int32))
    with pytest.raises(ConfigError, match="picking must be one of"):
        dataclasses.replace(FLOAT32, picking="cuda")


@pytest.mark.slow
def test_a_top_k_of_every_entry_equals_attention_without_an_indexer():
    logits = []
    for topk in (LENGTH // SMALL.cfg.csa_ratio, 12):  # 9 entries, in 3 pages of 4
        model = model_of("minimal", index_topk=topk)
        state = empty(model, 3, LENGTH)
        logits.append(extend(model, SMALL.ids, state, np.full(3, LENGTH, np.int32))[0])
        entries = flat_values(state.layers[0].entries).shape[1]
        assert (entries > topk) == (topk == 9)
    close(logits[0], logits[1], PATH_ERROR)


@pytest.mark.parametrize("ratio", [1, 4, 128])
def test_an_entry_is_visible_from_its_last_token_on(ratio: int):
    positions = jnp.arange(4 * ratio)[None]
    visible = np.asarray(visible_entries(positions, ratio, 6)[0])
    for j in range(6):
        last_token = (j + 1) * ratio - 1
        np.testing.assert_array_equal(visible[:, j], np.arange(4 * ratio) >= last_token)


# Index scores and top-k -----------------------------------------------------------------------


@pytest.mark.parametrize("kv_format", ["float32", "fp8"])
def test_index_scores_are_head_weighted_sums_over_stored_keys(kv_format):
    rng = np.random.default_rng(0)
    q, w, keys = (
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in ((2, 3, 4, 16), (2, 3, 4), (2, 45, 16))
    )
    planes = codec.encode_keys(kv_format, keys)
    scores = index_scores(q, w, planes)
    decoded, scale = codec.decode_keys(planes, jnp.float32)
    factor = 1.0 if scale is None else np.asarray(scale)[:, None]
    dots = np.maximum(np.einsum("bthk,bnk->bthn", q, decoded), 0)
    want = np.einsum("bthn,bth->btn", dots, w) * factor
    close(scores, want, PATH_ERROR)
    seen = jnp.asarray([[0, 3, 45], [44, 45, 1]], jnp.int32)
    hidden = np.arange(45) >= np.asarray(seen)[..., None]
    close(index_scores(q, w, planes, seen), np.where(hidden, -np.inf, want), PATH_ERROR)


def top_k_set(scores: np.ndarray, visible: np.ndarray, k: int) -> np.ndarray:
    """The definition: highest scores first, lowest index first among equals, visible ones only."""
    chosen = np.zeros(scores.shape, bool)
    for b, (row, seen) in enumerate(zip(scores, visible, strict=True)):
        order = sorted(np.flatnonzero(seen), key=lambda j: (-row[j], j))
        chosen[b, order[:k]] = True
    return chosen


@functools.partial(jax.jit, static_argnums=2)
def both_ways(scores: jax.Array, visible: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The set as a mask, and the set of indices turned into one."""
    index, valid = topk_indices(scores, visible, k)
    rows = jnp.arange(len(scores))[:, None]
    as_mask = jnp.zeros(scores.shape, bool).at[rows, index].max(valid)
    return topk_mask(scores, visible, k), as_mask


def check_top_k(scores: np.ndarray, visible: np.ndarray, k: int) -> None:
    want = top_k_set(scores, visible, k)
    for got in both_ways(scores, visible, k):
        np.testing.assert_array_equal(got, want)


SHAPE = (4, 37)
few_values = st.sampled_from([-3.5, -1.0, -0.0, 0.0, 1e-30, 2.0, 2.0000002])
any_values = st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    scores=hnp.arrays(np.float32, SHAPE, elements=few_values)
    | hnp.arrays(np.float32, SHAPE, elements=any_values),
    visible=hnp.arrays(bool, SHAPE),
    k=st.sampled_from([1, 2, 7, 36, 37, 50]),
)
def test_both_top_k_choose_the_defined_set(scores: np.ndarray, visible: np.ndarray, k: int):
    check_top_k(scores, visible, k)


def test_equal_scores_are_taken_from_the_lowest_index_up():
    scores, visible = np.zeros(SHAPE, np.float32), np.ones(SHAPE, bool)
    visible[1, :5], visible[2, 3:] = False, False
    check_top_k(scores, visible, 7)


def test_a_negative_zero_ties_with_zero():
    scores = np.zeros(SHAPE, np.float32)
    scores[:, ::2] = -0.0  # relu(0) times a negative head weight
    check_top_k(scores, np.ones(SHAPE, bool), 7)


# Experts --------------------------------------------------------------------------------------

TOKENS = 300
TINY = load_case("tiny")


@functools.cache
def experts_stored_as(kind: str) -> Experts:
    """Routed experts of one tiny layer: dense float32, or as stored in fp4 or fp8."""
    at = "layers.1.ffn.experts."
    if kind == "float32":
        leaves = {path: jnp.asarray(value) for path, value in TINY.weights.items()}
    else:
        leaves = stored_leaves(TINY.cfg, "expert" if kind == "fp4" else "linear")
    return Experts(Leaves(leaves, parameter_table(TINY.cfg), at), TINY.cfg, FLOAT32)


def routing_of(kind: str) -> Routing:
    """Experts of each token, and weights that tell every pair apart."""
    rng, n = np.random.default_rng(1), TINY.cfg.n_routed_experts
    experts = {
        "random": np.stack([rng.permutation(n)[:3] for _ in range(TOKENS)]),
        "all on one expert": np.full((TOKENS, 1), 5),
        "all on two experts": np.tile([7, 0], (TOKENS, 1)),
        "one token elsewhere": np.where(np.arange(TOKENS) == 17, 0, 3)[:, None],
    }[kind]
    weights = rng.uniform(0.1, 1.0, experts.shape)
    return Routing(jnp.asarray(experts, jnp.int32), jnp.asarray(weights, jnp.float32))


def defined_sum(experts: Experts, x: np.ndarray, routing: Routing) -> np.ndarray:
    """sum_e weight_e * W2 (silu(min(W1 x, L)) * clip(W3 x, -L, L)) in float64, pair by pair."""
    limit, out = TINY.cfg.swiglu_limit, np.zeros(x.shape)
    w1, w2, w3 = (
        np.asarray(quant.dequantise(*w.leaves(), w.shape[-1], jnp.float32), np.float64)
        for w in (experts.w1, experts.w2, experts.w3)
    )
    for t, (chosen, weights) in enumerate(zip(*map(np.asarray, routing), strict=True)):
        for e, weight in zip(chosen, weights, strict=True):
            gate = np.minimum(w1[e] @ x[t], limit)
            hidden = gate / (1 + np.exp(-gate)) * np.clip(w3[e] @ x[t], -limit, limit)
            out[t] += weight * (w2[e] @ hidden)
    return out


@pytest.mark.parametrize("stored", ["float32", "fp8", "fp4"])
@pytest.mark.parametrize(
    "spread", ["random", "all on one expert", "all on two experts", "one token elsewhere"]
)
def test_experts_gathered_and_in_rounds_give_the_defined_sums(spread: str, stored: str):
    experts, routing = experts_stored_as(stored), routing_of(spread)
    x = np.random.default_rng(2).normal(size=(TOKENS, TINY.cfg.hidden_size)).astype(np.float32)
    want = defined_sum(experts, x.astype(np.float64), routing)
    assert np.abs(want).max() > 0.03
    close(experts.gathered(jnp.asarray(x), routing), want, PATH_ERROR)
    close(experts.rounds(jnp.asarray(x), routing), want, PATH_ERROR)


@pytest.mark.parametrize("stored", ["float32", "fp4"])
def test_many_rounds_and_few_experts_at_a_time_drop_no_token(
    monkeypatch: pytest.MonkeyPatch, stored: str
):
    experts, x = experts_stored_as(stored), jnp.ones((TOKENS, TINY.cfg.hidden_size))
    x = x * jnp.linspace(-1, 1, TOKENS)[:, None]
    one_matrix = TINY.cfg.moe_intermediate_size * TINY.cfg.hidden_size * 4
    monkeypatch.setattr(moe, "CAPACITY_FACTOR", 0.01)  # 64 tokens an expert and round
    monkeypatch.setattr(moe, "DEQUANTISE_BYTES", 3 * one_matrix)  # a single expert
    for spread in ("random", "all on one expert"):
        routing = routing_of(spread)
        assert np.bincount(np.ravel(routing.experts)).max() > 64
        close(experts.rounds(x, routing), experts.gathered(x, routing), PATH_ERROR)


@pytest.mark.parametrize("stored", ["float32", "fp4"])
def test_experts_gathered_a_few_pairs_at_a_time_give_the_same_sums(
    monkeypatch: pytest.MonkeyPatch, stored: str
):
    experts, routing = experts_stored_as(stored), routing_of("random")
    x = jax.random.normal(jax.random.key(5), (TOKENS, TINY.cfg.hidden_size))
    whole = experts.gathered(x, routing)
    _, n_out, n_in = experts.w1.shape
    monkeypatch.setattr(moe, "GATHER_BYTES", 28 * n_out * n_in)  # seven pairs: a ragged last block
    close(experts.gathered(x, routing), whole, PATH_ERROR)
