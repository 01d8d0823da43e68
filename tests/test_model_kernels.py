"""The model calls the kernels of `pallas_kernels`: they are in its compiled step, and they decode
the tokens that the definitions decode.
"""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.config import CacheConfig, ComputeConfig, ModelConfig
from lsa_jax.config_io import load_config
from lsa_jax.nn import attend, attend_blocks
from lsa_jax.nn.transformer import DeepSeekV4
from pallas_kernels import (
    dense_decode,
    dense_prefill,
    dispatch,
    hc_mix,
    index_score,
    targets,
    top_k,
)
from pallas_kernels.dense_decode import mosaic_gpu as dense_decode_gpu
from pallas_kernels.dense_decode import mosaic_tpu as dense_decode_tpu
from pallas_kernels.dense_prefill import mosaic_gpu as dense_prefill_gpu
from pallas_kernels.dense_prefill import mosaic_tpu as dense_prefill_tpu
from pallas_kernels.hc_mix import mosaic_gpu as hc_mix_gpu
from pallas_kernels.index_score import mosaic_gpu as index_score_gpu
from pallas_kernels.index_score import mosaic_tpu as index_score_tpu
from pallas_kernels.top_k import mosaic_tpu as top_k_tpu

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.usefixtures("compiled_quickly"),
]

ROOT = Path(__file__).parents[1]
MOSAIC, TRITON = "mosaic_gpu_v2", "triton_kernel_call"
# What a step of a sliding, a CSA and an HCA layer must have without being asked.
DECODE = {
    *((MOSAIC, "hc_mix"), (MOSAIC, "index_score_decode"), (TRITON, "top_k")),
    *((MOSAIC, "sparse_decode"), (MOSAIC, "dense_decode")),
}
PREFILL = {
    *((MOSAIC, "hc_mix"), (MOSAIC, "index_score_chunk"), (TRITON, "top_k"), (TRITON, "compress")),
    *((TRITON, "sparse_prefill"), (MOSAIC, "dense_prefill")),
    (MOSAIC, "body"),  # what JAX calls its grouped matmul, which 2 x 512 tokens' experts are for
}


def kernels(config: str, backend: str, kv_format: str, tokens: int) -> set[tuple[str, str]]:
    """Kernels in a step compiled for Hopper, by tests/compiled_steps.py."""
    if why := targets.missing(targets.CHIPS["h100"]):
        pytest.skip(why)
    if why := dispatch.refusal(dispatch.TRITON, dispatch.Target("gpu", "H100", 9.0)):
        pytest.skip(why)
    command = [sys.executable, "-m", "tests.compiled_steps", config, backend, kv_format]
    env = os.environ | targets.environment(targets.CHIPS["h100"])
    ran = subprocess.run(
        [*command, str(tokens)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {(target, name) for target, name in json.loads(ran.stdout.splitlines()[-1])}


@pytest.mark.parametrize("config", ["bench", "v4_flash"])
def test_a_decode_step_for_hopper_has_the_kernels_that_are_its_defaults(config: str) -> None:
    assert kernels(config, "auto", "bfloat16", 1) == DECODE


def test_a_decode_step_has_the_kernels_that_are_named() -> None:
    named = {"compress", "sparse_decode", "dense_decode", "top_k", "quant_matmul"}
    assert kernels("bench", "triton", "fp8", 1) >= {(TRITON, name) for name in named}
    assert (MOSAIC, "dense_decode") in kernels("v4_flash", "mosaic_gpu", "fp8", 1)
    assert kernels("bench", "xla", "fp8", 1) == set()


def test_a_prefill_chunk_for_hopper_has_the_kernels_that_are_its_defaults() -> None:
    assert kernels("v4_flash", "auto", "bfloat16", 512) == PREFILL


def test_a_backend_that_is_named_leaves_quantised_experts_to_the_definition() -> None:
    """Its grouped matmul is for dense ones: for these it has no kernel, and so declines nothing."""
    found = kernels("v4_flash", "mosaic_gpu", "fp8", 512)
    assert (MOSAIC, "dense_prefill") in found and (MOSAIC, "body") not in found


# Interpreted ----------------------------------------------------------------------------------

# `tiny`, with as much of V4's sizes as the kernels ask for.
CONFIG = dataclasses.replace(
    load_config("tiny"),
    layer_types=("sliding", "csa", "hca", "csa"),
    mlp_types=("hash", "score", "score", "score"),
    num_nextn_predict_layers=0,
    num_attention_heads=64,
    head_dim=128,
    qk_rope_head_dim=64,
    sliding_window=64,
    index_n_heads=64,
    index_head_dim=128,
    index_topk=16,
)
PROMPT, NEW, CAPACITY = 100, 6, 256  # 25 CSA entries and more: the top-k of 16 leaves some out
HOPPER: dict[Any, Callable[..., Any]] = {
    index_score: index_score_gpu.index_score,
    dense_decode: dense_decode_gpu.dense_decode,
    dense_prefill: dense_prefill_gpu.dense_prefill,
    hc_mix: hc_mix_gpu.hc_mix,
}
TPU: dict[Any, Callable[..., Any]] = {
    index_score: index_score_tpu.index_score,
    dense_decode: dense_decode_tpu.dense_decode,
    dense_prefill: dense_prefill_tpu.dense_prefill,
    top_k: top_k_tpu.top_k,
}


@functools.cache
def model() -> DeepSeekV4:
    source = SyntheticModel(CONFIG, seed=1)
    leaves = {
        path: jnp.asarray(source.read(path, 0, info.shape[0], weights="bf16"))
        for path, info in source.leaves("bf16").items()
    }
    return DeepSeekV4(CONFIG, ComputeConfig(dtype="bfloat16"), leaves)


def greedy(cfg: ModelConfig) -> tuple[list[int], np.ndarray]:
    """Tokens after a random prompt, and the logits that they were taken from."""

    def run(model: DeepSeekV4, ids: jax.Array, state: Any, count: jax.Array) -> Any:
        streams, state = model(ids, state, count)
        return model.logits(streams[:, -1:])[0, 0], state

    step = jax.jit(run)
    ids = jax.random.randint(jax.random.key(0), (1, PROMPT), 2, cfg.vocab_size)
    cache = CacheConfig(kv_format="bfloat16", page_entries=64)
    state = model().empty_state(cache, batch=1, capacity=CAPACITY)
    tokens, logits = [], []
    for _ in range(NEW):
        seen, state = step(model(), ids, state, jnp.array([ids.shape[1]], jnp.int32))
        logits.append(np.asarray(seen))
        tokens.append(int(logits[-1].argmax()))
        ids = jnp.array([[tokens[-1]]], jnp.int32)
    return tokens, np.stack(logits)


@functools.cache
def defined() -> tuple[list[int], np.ndarray]:
    return greedy(CONFIG)


def chunk_by_kernel(site: Any, q: Any, kv: Any, index_q: Any, state: Any, positions: Any) -> Any:
    """What `attend.chunk` does where a kernel serves; CSA layers have none here."""
    if index_q is not None:
        return XLA_CHUNK(site, q, kv, index_q, state, positions)
    return attend._dense(site, q, kv, index_q, state, positions, backend="xla")


XLA_CHUNK = attend_blocks.attend


@pytest.mark.parametrize("platform", [HOPPER, TPU], ids=["Hopper", "TPU"])
def test_interpreted_kernels_decode_the_tokens_of_the_definitions(platform, monkeypatch) -> None:
    want, want_logits = defined()
    ran = set()

    def interpreted(op: Any, kernel: Callable[..., Any]) -> Callable[..., Any]:
        definition = op.IMPLEMENTATIONS["xla"]

        def run(*args: Any, **how: Any) -> Any:
            if op is dense_decode and not args[3].shape[1]:  # a sliding layer: never a kernel's
                return definition(*args, **how)
            ran.add(op)
            return kernel(*args, **how, interpret=True)

        return run

    for op, kernel in platform.items():
        monkeypatch.setitem(op.IMPLEMENTATIONS, "xla", interpreted(op, kernel))
    monkeypatch.setattr(attend_blocks, "attend", chunk_by_kernel)
    got, logits = greedy(CONFIG)
    assert ran == platform.keys()
    assert got == want
    # Both round to bfloat16 at many places, in different orders: some ulps of logits of O(1).
    np.testing.assert_allclose(logits, want_logits, atol=0.1)
    assert np.abs(logits - want_logits).max() > 0  # or nothing else ran
