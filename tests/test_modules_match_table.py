"""The module tree holds exactly the parameters of the table, and takes them as they are stored."""

import dataclasses
import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsa_jax.checkpoint.synthesis import leaf_values
from lsa_jax.config import ModelConfig
from lsa_jax.config_io import load_config
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.parameters import parameter_table
from tests.golden.cases import CASES, WEIGHT_SEED
from tests.golden.loader import load_case
from tests.parity_models import (
    FLOAT32,
    LOGITS_ERROR,
    close,
    empty,
    extend,
    feed,
    model_of,
    rest_of,
    stored_leaves,
)

PRESETS = ("tiny", "bench", "v4_flash", "v4_pro")
# Presets, and golden models that no preset is.
CONFIGS = {name: load_config(name) for name in PRESETS} | {
    name: spec.cfg for name, spec in CASES.items()
}


def planned_leaves(cfg: ModelConfig) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.int32 if spec.kind == "table" else jnp.bfloat16)
        for path, spec in parameter_table(cfg).items()
    }


def parameters_of(model: DeepSeekV4) -> dict[str, nnx.Param]:
    """Dot-joined attribute path -> parameter, as the module tree has them."""
    found = nnx.iter_graph(model)
    return {".".join(map(str, at)): node for at, node in found if isinstance(node, nnx.Param)}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_module_tree_has_the_tables_paths_shapes_and_axes(name: str):
    cfg = CONFIGS[name]
    parameters = parameters_of(DeepSeekV4(cfg, FLOAT32, planned_leaves(cfg)))
    table = parameter_table(cfg)
    assert sorted(parameters) == sorted(table)
    for path, spec in table.items():
        assert parameters[path].get_value().shape == spec.shape, path
        assert parameters[path].axes == spec.axes, path


@pytest.mark.parametrize("name", PRESETS)
def test_planning_a_model_allocates_nothing(name: str):
    cfg = CONFIGS[name]
    model = DeepSeekV4(cfg, FLOAT32, planned_leaves(cfg))
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(model))


def test_a_flash_forward_can_be_planned_without_its_weights():
    cfg = load_config("v4_flash")
    model = DeepSeekV4(cfg, FLOAT32, planned_leaves(cfg))
    ids, count = jnp.zeros((1, 4), jnp.int32), jnp.full(1, 4)
    state = jax.eval_shape(functools.partial(empty, model, 1, 256))
    streams, after = jax.eval_shape(lambda m, s: m(ids, s, count), model, state)
    assert streams.shape == (1, 4, cfg.hc_mult, cfg.hidden_size)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )


def test_missing_and_unknown_leaves_are_listed_in_one_error():
    cfg = CASES["minimal"].cfg
    leaves = planned_leaves(cfg)
    del leaves["norm.weight"], leaves["layers.1.ffn.gate.bias"]
    leaves["layers.0.ffn.gate.bias"] = jax.ShapeDtypeStruct((4,), jnp.float32)  # a hash layer
    leaves["layers.9.attn.sink_logit"] = jax.ShapeDtypeStruct((2,), jnp.float32)
    with pytest.raises(ValueError) as caught:
        DeepSeekV4(cfg, FLOAT32, leaves)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert "missing ['layers.1.ffn.gate.bias', 'norm.weight']" in message
    assert "unknown ['layers.0.ffn.gate.bias', 'layers.9.attn.sink_logit']" in message


def test_scales_lie_beside_quantised_weights_and_no_other():
    leaves = stored_leaves(CASES["minimal"].cfg)
    del leaves["layers.0.attn.wq_a.scale"], leaves["mtp.0.ffn.experts.w2.scale"]
    leaves["layers.0.attn_norm.scale"] = jnp.zeros(1, jnp.uint8)
    leaves["layers.0.attn.wkv.weight"] = leaves["layers.0.attn.wkv.weight"].astype(jnp.float32)
    with pytest.raises(ValueError) as caught:
        DeepSeekV4(CASES["minimal"].cfg, FLOAT32, leaves)
    message = str(caught.value)
    assert "missing ['layers.0.attn.wq_a.scale', 'mtp.0.ffn.experts.w2.scale']" in message
    assert "unknown ['layers.0.attn.wkv.scale', 'layers.0.attn_norm.scale']" in message


# Leaves as a checkpoint stores them -----------------------------------------------------------

TOKENS = 37


def logits_of(model: DeepSeekV4, ids: np.ndarray) -> np.ndarray:
    """Prefill part of each row (experts in rounds), decode the rest (experts gathered)."""
    rows, length = ids.shape
    split = np.array([length // 2, length // 3], np.int32)
    before, _, state = extend(model, ids, empty(model, rows, length), split)
    after, _ = feed(model, rest_of(ids, split), state, length - split)
    logits = np.array(before)
    for b, s in enumerate(split):
        logits[b, s:] = after[b, : length - s]
    return logits


def dtypes_of(leaves: Mapping[str, jax.Array]) -> set[str]:
    return {str(leaf.dtype) for leaf in leaves.values()}


@pytest.mark.slow
def test_fp8_linears_and_fp4_experts_give_the_logits_of_their_values():
    case = load_case("plain_rope")  # of few layers the one whose linears have tiles, a ragged last
    leaves = stored_leaves(case.cfg)
    assert dtypes_of(leaves) == {"float8_e4m3fn", "uint8", "float32"}
    assert leaves["layers.0.attn.wq_b.scale"].shape[0] == 3
    model = DeepSeekV4(case.cfg, FLOAT32, leaves)
    scales = [path for path in parameters_of(model) if path.endswith(".scale")]
    assert sum(".experts." in path for path in scales) == 3 * 4  # with MTP
    # The golden weights are these leaves' exact values, so HuggingFace's logits are wanted.
    close(logits_of(model, case.ids[:, :TOKENS]), case.outputs["logits"][:, :TOKENS], LOGITS_ERROR)


@pytest.mark.slow
def test_fp8_experts_give_the_logits_of_their_values():
    case = load_case("minimal")
    cfg, ids = case.cfg, case.ids[:2]
    dense = {path: jnp.asarray(value) for path, value in case.weights.items()}
    for path, spec in parameter_table(cfg).items():
        if spec.kind == "expert":  # other values than in fp4, of the same distribution
            fp8 = dataclasses.replace(spec, kind="linear")
            dense[path] = jnp.asarray(leaf_values(path, fp8, seed=WEIGHT_SEED))
    model = DeepSeekV4(cfg, FLOAT32, stored_leaves(cfg, experts="linear"))
    close(logits_of(model, ids), logits_of(DeepSeekV4(cfg, FLOAT32, dense), ids), LOGITS_ERROR)


@pytest.mark.slow
def test_bfloat16_leaves_give_the_logits_of_their_values():
    case = load_case("minimal")
    leaves = {path: jnp.asarray(value) for path, value in case.weights.items()}
    for path, spec in parameter_table(case.cfg).items():
        if spec.kind not in ("f32", "table"):
            leaves[path] = leaves[path].astype(jnp.bfloat16)  # exact: see `leaf_values`
    assert dtypes_of(leaves) == {"bfloat16", "float32", "int32"}
    model = DeepSeekV4(case.cfg, FLOAT32, leaves)
    close(logits_of(model, case.ids[:2]), case.outputs["logits"][:2], LOGITS_ERROR)


def test_a_model_is_a_pytree_that_keeps_its_structure():
    model = model_of("minimal")
    leaves, structure = jax.tree.flatten(model)
    again = jax.tree.unflatten(structure, leaves)
    assert jax.tree.structure(again) == structure
    assert parameters_of(again).keys() == parameters_of(model).keys()
