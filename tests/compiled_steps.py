"""A model's step compiled for a Hopper GPU that is not here: which kernels are in it.

    python -m tests.compiled_steps CONFIG BACKEND KV_FORMAT TOKENS

Prints them as a JSON list of [target, name]. Three layers, one of each kind, with CONFIG's sizes,
bfloat16 or, where KV_FORMAT is fp8, fp8 and fp4 weights. Run with `targets.environment`.
"""

import dataclasses
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.config import CacheConfig, ComputeConfig, ModelConfig
from lsa_jax.config_io import load_config
from lsa_jax.nn.transformer import DeepSeekV4
from pallas_kernels import targets

CAPACITY, BATCH = 8192, 2  # 2048 CSA entries: four times the top-k


def three_layers(name: str) -> ModelConfig:
    """A preset with one layer of each kind."""
    return dataclasses.replace(
        load_config(name),
        layer_types=("sliding", "csa", "hca"),
        mlp_types=("hash", "score", "score"),
        num_nextn_predict_layers=0,
        vocab_size=1024,
    )


def leaves(cfg: ModelConfig, quantised: bool) -> dict[str, Any]:
    """Shapes of a checkpoint's leaves."""
    shapes = {}
    for path, info in SyntheticModel(cfg, seed=0).leaves("keep" if quantised else "bf16").items():
        shapes[path] = jax.ShapeDtypeStruct(info.shape, jnp.dtype(info.dtype))
    return shapes


def program(name: str, backend: Any, kv_format: Any, tokens: int) -> targets.Program:
    """The compiled step."""
    cfg, cache = three_layers(name), CacheConfig(kv_format=kv_format)
    made = leaves(cfg, kv_format == "fp8")
    model = DeepSeekV4(cfg, ComputeConfig(backend=backend), made)
    graph, weights = nnx.split(model)

    def step(weights: Any, ids: jax.Array, state: Any, count: jax.Array) -> Any:
        return nnx.merge(graph, weights)(ids, state, count)

    state = jax.eval_shape(lambda: model.empty_state(cache, batch=BATCH, capacity=CAPACITY))
    ids = jax.ShapeDtypeStruct((BATCH, tokens), jnp.int32)
    count = jax.ShapeDtypeStruct((BATCH,), jnp.int32)
    return targets.compile_for(targets.CHIPS["h100"], step, (weights, ids, state, count), (2,))


if __name__ == "__main__":
    name, backend, kv_format, tokens = sys.argv[1:]
    print(json.dumps(program(name, backend, kv_format, int(tokens)).calls))
