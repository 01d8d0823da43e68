"""A memory indexer that starts out as the backbone's own lightning indexers (LSA spec 5.3).

Widening keeps every logit. From rank r0 to r, with heads H0 to H:

    W_a   old rows, then zeros            the mean square of the latent becomes r0/r of what it was,
    g     old * sqrt(r0/r), then ones     so the norm divides by less, and its gain by as much more
    W_b   old heads, old rank: copied; everything else random
    W_w   old rows * sqrt(H/H0), then 0   1/sqrt(H) shrinks

Random columns of W_b multiply zeros and random heads have weight zero, yet gradients reach W_a and
W_w through them. The norm's epsilon must shrink with the mean square, so the result has its own.
"""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from lsa_jax.config import ComputeConfig, ModelConfig
from lsa_jax.config_checks import refusal
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, IndexerConfig, leaf_name
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.nn.layers import Leaves, Linear
from lsa_jax.parameters import parameter_table


def widen(
    cfg: IndexerConfig, model: ModelConfig, leaves: Mapping[str, Array], key: Array
) -> MemoryIndexer:
    """A float32 indexer of `cfg`'s shape whose logits are those of the target layers' indexers.

    Args:
      cfg: the shape wanted: at least the model's index heads and query rank.
      model: the backbone's configuration.
      leaves: the backbone's leaves by path, dense or quantised; only target layers' are read.
      key: for the weights that do not matter yet.

    The result's configuration is `cfg` with `norm_eps` set to the model's times r0 / r. Raises
    ConfigError where `cfg` does not fit the model or would have to shrink it.
    """
    cfg.check_model(model)
    for name, least in (("n_heads", model.index_n_heads), ("q_lora_rank", model.q_lora_rank)):
        if getattr(cfg, name) < least:
            raise refusal(f"indexer.{name}", getattr(cfg, name), f">= the model's {least}")
    eps = model.rms_norm_eps * model.q_lora_rank / cfg.q_lora_rank
    wide = dataclasses.replace(cfg, norm_eps=eps)
    root = Leaves(leaves, parameter_table(model))
    out: dict[str, Array] = {}
    keys = jax.random.split(key, len(cfg.target_layers))
    layers = zip(cfg.target_layers, cfg.transformer_layers(model), keys, strict=True)
    for ordinal, layer, layer_key in layers:
        widened = _widen_layer(wide, model, root.sub(f"layers.{layer}.attn"), layer_key)
        out |= {leaf_name(ordinal, name): leaf for name, leaf in widened.items()}
    if cfg.ensemble == "learned":
        out[ENSEMBLE_LEAF] = jnp.zeros(len(cfg.target_layers))
    return MemoryIndexer(wide, out)


def _widen_layer(
    cfg: IndexerConfig, model: ModelConfig, attn: Leaves, key: Array
) -> dict[str, Array]:
    """One retriever's leaves, by their names within the layer, from one attention module's."""

    def dense(view: Leaves) -> Array:
        return Linear(view, ComputeConfig(dtype="float32")).dense(jnp.float32)

    gain = attn.sub("q_norm").param("weight")[...].astype(jnp.float32)
    rank, more = model.q_lora_rank, cfg.q_lora_rank - model.q_lora_rank
    extra_heads = cfg.n_heads - model.index_n_heads
    old_rows = model.index_n_heads * model.index_head_dim
    shape = (cfg.n_heads * cfg.head_dim, cfg.q_lora_rank)
    wq_b = jax.random.normal(key, shape) * cfg.q_lora_rank**-0.5
    proj = dense(attn.sub("indexer.weights_proj")) * math.sqrt(cfg.n_heads / model.index_n_heads)
    return {
        "wq_a.weight": jnp.pad(dense(attn.sub("wq_a")), ((0, more), (0, 0))),
        "q_norm_weight": jnp.concatenate(
            [gain * math.sqrt(rank / cfg.q_lora_rank), jnp.ones(more)]
        ),
        "wq_b.weight": wq_b.at[:old_rows, :rank].set(dense(attn.sub("indexer.wq_b"))),
        "weights_proj.weight": jnp.pad(proj, ((0, extra_heads), (0, 0))),
    }
