"""The golden models in JAX, and the two programs that the parity tests run them with.

Compiling dominates these tests, so a model is built once per process and every test of it uses one
static shape: rows of a batch have their own lengths, chunks are padded.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.cache.state import DecodeState
from lsa_jax.checkpoint.synthesis import stored_leaf
from lsa_jax.config import CacheConfig, ComputeConfig, ModelConfig
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.parameters import Kind, parameter_table
from tests.golden.cases import CASES, WEIGHT_SEED
from tests.golden.loader import Case, load_case

FLOAT32 = ComputeConfig(dtype="float32")
CACHE = CacheConfig(kv_format="float32", page_entries=4)  # small pages, so that prompts cross them

# Two float32 implementations of the forward pass that add in different orders: each errs by a few
# 1e-6 on logits of O(1), and the prompts keep every discrete choice clear of a tie (spec 12.2, 17).
LOGITS_ERROR = 2e-5
# One implementation of it along two paths (chunked, padded, gathered...): half of that at most.
PATH_ERROR = 1e-5


@functools.cache
def model_of(name: str, compute: ComputeConfig = FLOAT32, **changes: int) -> DeepSeekV4:
    """The model of a golden case; `changes` replace config fields that no weight depends on."""
    case = load_case(name)
    leaves = {path: jnp.asarray(value) for path, value in case.weights.items()}
    return DeepSeekV4(dataclasses.replace(case.cfg, **changes), compute, leaves)


def close(got: Any, want: Any, atol: float) -> None:
    """Equal within an absolute tolerance: the tensors here are of O(1)."""
    assert np.shape(got) == np.shape(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def flat_values(planes: codec.Planes | None) -> np.ndarray:
    """Unquantised entries or index keys [B, N, dims] of a layer's state."""
    assert isinstance(planes, codec.DensePlanes)
    values = np.asarray(planes.values)
    return values.reshape(len(values), -1, values.shape[-1])


def stored_leaves(cfg: ModelConfig, experts: Kind = "expert") -> dict[str, jax.Array]:
    """The golden weights as a released checkpoint stores them: fp8 linears with their scales, and
    experts in fp4 or (kind `linear`) in fp8 of the same distribution but other values."""
    leaves = {}
    for path, spec in parameter_table(cfg).items():
        kind = experts if spec.kind == "expert" else spec.kind
        spec = dataclasses.replace(spec, kind=kind)
        leaf = stored_leaf(path, spec, seed=WEIGHT_SEED, num_experts=cfg.n_routed_experts)
        weight = jnp.asarray(leaf["weight"])
        leaves[path] = weight.view(jnp.float8_e4m3fn) if kind == "linear" else weight
        if "scale" in leaf:
            leaves[path.removesuffix("weight") + "scale"] = jnp.asarray(leaf["scale"])
    return leaves


def _extend(
    model: DeepSeekV4, ids: jax.Array, state: DecodeState, count: jax.Array
) -> tuple[jax.Array, jax.Array, DecodeState]:
    """Appends ids[b, :count[b]] in one go: logits, streams, new state."""
    streams, state = model(ids, state, count)
    return model.logits(streams), streams, state


def _feed(
    model: DeepSeekV4, ids: jax.Array, state: DecodeState, count: jax.Array
) -> tuple[jax.Array, DecodeState]:
    """Appends ids[b, :count[b]] a token at a time, as decoding does: logits, new state."""

    def step(state: DecodeState, inputs: tuple[jax.Array, jax.Array]) -> tuple:
        token, live = inputs
        streams, state = model(token[:, None], state, live.astype(jnp.int32))
        return state, model.logits(streams)[:, 0]

    live = jnp.arange(ids.shape[1])[:, None] < count
    state, logits = jax.lax.scan(step, state, (ids.T, live))
    return logits.swapaxes(0, 1), state


# The machine-code optimiser left out: half the compile time, for tests that run little. What XLA
# does to the arithmetic is the same. At every split, `tiny` and `true_ratios` run with it too.
UNOPTIMISED = {"xla_backend_optimization_level": 0}

optimised_extend, optimised_feed = jax.jit(_extend), jax.jit(_feed)
extend = jax.jit(_extend, compiler_options=UNOPTIMISED)
feed = jax.jit(_feed, compiler_options=UNOPTIMISED)

mtp_logits = jax.jit(lambda model, *args: model.mtp_logits(*args), compiler_options=UNOPTIMISED)


def fresh_extend() -> Callable[..., Any]:
    """`extend` compiled anew: for tests that change a module constant."""
    return jax.jit(lambda *args: _extend(*args), compiler_options=UNOPTIMISED)


def empty(model: DeepSeekV4, batch: int, capacity: int, cache: CacheConfig = CACHE) -> DecodeState:
    return model.empty_state(cache, batch=batch, capacity=capacity)


def rest_of(ids: np.ndarray, split: np.ndarray) -> np.ndarray:
    """ids[b, split[b]:], padded on the right to ids' own shape."""
    at = np.minimum(np.arange(ids.shape[1]) + split[:, None], ids.shape[1] - 1)
    return np.take_along_axis(ids, at, axis=1)


@dataclasses.dataclass(frozen=True)
class SplitRun:
    """Rows of one prompt set, row b prefilled with split[b] tokens and decoded from there on.

    `logits` [R, S, V] come from the prefill before the split and from decode steps after it.
    """

    split: np.ndarray
    logits: np.ndarray
    wanted: np.ndarray
    streams: np.ndarray  # of the last row, which is all prefill


def run_splits(
    case: Case,
    model: DeepSeekV4,
    split: np.ndarray,
    cache: CacheConfig = CACHE,
    *,
    optimised: bool = False,
) -> SplitRun:
    """Prefill and decode of the case's prompts (repeated over the rows) at each split."""
    prefill, decode = (optimised_extend, optimised_feed) if optimised else (extend, feed)
    rows, length = len(split), case.ids.shape[1]
    pick = np.arange(rows - 1, -1, -1) % len(case.ids)  # the last row is prompt 0
    ids = case.ids[pick]
    before, streams, state = prefill(model, ids, empty(model, rows, length, cache), split)
    after, _ = decode(model, rest_of(ids, split), state, length - split)
    logits = np.array(before)
    for b, s in enumerate(split):
        logits[b, s:] = after[b, : length - s]
    return SplitRun(split, logits, case.outputs["logits"][pick], np.asarray(streams[-1:]))


def slow_but(*fast: str, having: Sequence[str] = tuple(CASES)) -> list[Any]:
    """Golden cases for `parametrize`, those not named marked slow."""
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in having]
