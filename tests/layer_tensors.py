"""Our version of every intermediate of one block of the tiny model, from HuggingFace's inputs.

One compiled function per kind of block computes them all. Names on HF's side are explained in
`tests/golden/README.md`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from lsa_jax import quant
from lsa_jax.cache.codec import DensePlanes
from lsa_jax.cache.state import LayerState
from lsa_jax.config import ComputeConfig
from lsa_jax.nn import lightning_indexer, rope
from lsa_jax.nn.attend_blocks import KeySet, sink_attention
from lsa_jax.nn.attention import Attention
from lsa_jax.nn.hyper_connections import Mixing
from lsa_jax.nn.site import visible_entries
from lsa_jax.nn.transformer import Block
from tests.golden.loader import load_case
from tests.parity_models import FLOAT32, UNOPTIMISED, empty, model_of

TOKENS = 53
LAYERS = range(6)
CSA, HCA = (2, 4), (3, 5)
COMPRESSED = (2, 3, 4, 5)

CASE = load_case("tiny")
WANT = CASE.outputs

Tensors = dict[str, jax.Array]


def streams_into(layer: int) -> np.ndarray:
    """HF's input streams of a layer [1, S, n, D]; one past the last layer gives its output."""
    if layer:
        return WANT[f"layers.{layer - 1}"]
    return np.repeat(WANT["embed_tokens"][:, :, None], CASE.cfg.hc_mult, axis=2)


def hf_inputs(layer: int) -> Tensors:
    """What HF gave to each part of a layer, or got from the part before it."""
    at = f"layers.{layer}"
    names = {
        "x": "input_layernorm",
        "latent": "self_attn.q_a_norm",
        "attn_out": "self_attn.0",
        "post": "attn_hc.0",
        "comb": "attn_hc.1",
        "attn_collapsed": "attn_hc.2",
        "ffn_collapsed": "ffn_hc.2",
        "y": "post_attention_layernorm",
    }
    inputs = {ours: WANT[f"{at}.{theirs}"] for ours, theirs in names.items()}
    inputs |= {"streams": streams_into(layer), "ids": CASE.ids[:1, :TOKENS]}
    if layer in COMPRESSED:
        inputs["entries"] = WANT[f"{at}.self_attn.compressor.0"][0]
    return jax.tree.map(jnp.asarray, inputs)


def layer_state(attn: Attention) -> LayerState:
    """An empty state of a layer of this kind."""
    state = empty(model_of("tiny", attn.compute), 1, TOKENS)
    return state.layers[CASE.cfg.layer_types.index(attn.layer_type)]


def selected(attn: Attention, given: Tensors, positions: jax.Array) -> Tensors:
    """Entries, index scores and the attended set of a compressed layer."""
    assert attn.compressor is not None
    state, zero, count = layer_state(attn), jnp.zeros(1, jnp.int32), jnp.full(1, TOKENS)
    freqs = np.asarray(attn.freqs, np.float32)

    def unrotated(entries: jax.Array, ratio: int) -> jax.Array:
        at = jnp.arange(entries.shape[1])[None] * ratio
        return rope.rotate(entries, at, freqs, inverse=True)

    assert state.tail is not None
    new, _ = attn.compressor(given["x"], zero, count, state.tail)
    ratio = attn.compressor.ratio
    n = TOKENS // ratio
    entries = new.values[:, :n]
    out = {"entries": entries, "entries before rope": unrotated(entries, ratio)}
    mask = visible_entries(positions, ratio, n)
    if attn.indexer is not None:
        assert state.index_tail is not None
        keys = attn.indexer.keys(given["x"], zero, count, state.index_tail)[0].values[:, :n]
        query = attn.indexer.queries(given["latent"], given["x"], positions)
        scores = lightning_indexer.index_scores(*query, DensePlanes(keys))
        top = lightning_indexer.topk_indices(scores, mask, attn.cfg.index_topk)
        mask = lightning_indexer.topk_mask(scores, mask, attn.cfg.index_topk)
        # The Hadamard matrix is its own inverse; HF does not rotate index keys.
        out["index keys before rope"] = unrotated(quant.hadamard(keys), ratio)
        out |= {"index scores": scores, "top indices": top[0], "top valid": top[1]}
    return out | {"attended": mask}


def attention_probabilities(
    attn: Attention, q: jax.Array, raw: KeySet, entries: KeySet | None
) -> jax.Array:
    """Softmax weights [B, T, H, N]: values are the keys, so keys with a unit vector appended return
    the weights beside the output. Queries are zero there, which leaves the scores alone."""
    sets = [raw] if entries is None else [raw, entries]
    total, parts, at = sum(s.keys.shape[2] for s in sets), [], 0
    for keys, mask in sets:
        unit = jnp.eye(total, dtype=keys.dtype)[at : at + keys.shape[2]][None, None]
        parts.append(KeySet(jnp.concatenate([keys, unit], axis=-1), mask))
        at += keys.shape[2]
    wide = jnp.pad(q, [(0, 0)] * 3 + [(0, total)])
    out = sink_attention(wide, parts, attn.sink_logit[...], attn.cfg.head_dim**-0.5)
    return out[..., -total:]


def attention_tensors(attn: Attention, given: Tensors) -> Tensors:
    x, latent = given["x"], given["latent"]
    positions = jnp.arange(TOKENS)[None]
    at_zero = jnp.zeros_like(positions)  # rotation by position 0 changes nothing
    age = positions[:, :, None] - positions[:, None]
    q, kv = attn.queries(latent, positions), attn.window_entries(x, positions)
    raw, entries = KeySet(kv[:, None], (age >= 0) & (age < attn.cfg.sliding_window)), None
    out = {
        "latent query": attn.latent_query(x),
        "queries before rope": attn.queries(latent, at_zero),
        "window before rope": attn.window_entries(x, at_zero),
    }
    if attn.compressor is not None:
        out |= selected(attn, given, positions)
        entries = KeySet(given["entries"][:, None], out["attended"])
    out["probabilities"] = attention_probabilities(attn, q, raw, entries)
    zero = jnp.zeros(1, jnp.int32)
    out["attention"] = attn(x, layer_state(attn), zero, zero + TOKENS)[0]
    return out


@functools.partial(jax.jit, compiler_options=UNOPTIMISED)
def layer_tensors(block: Block, given: Tensors) -> Tensors:
    """Our version of every tensor of one block."""
    streams, zero = given["streams"], jnp.zeros(1, jnp.int32)
    mixing = block.hc_attn.coefficients(streams)
    out = {f"attn {name}": value for name, value in mixing._asdict().items()}
    out["attn collapsed"] = block.hc_attn.collapse(streams, mixing.pre)
    out["attn norm"] = block.attn_norm(given["attn_collapsed"])
    out |= attention_tensors(block.attn, given)
    # HF does not return the streams between the sites: its output and coefficients give them.
    theirs = Mixing(mixing.pre, given["post"], given["comb"])
    between = block.hc_attn.expand(streams, given["attn_out"], theirs)
    mixing = block.hc_ffn.coefficients(between)
    out |= {f"ffn {name}": value for name, value in mixing._asdict().items()}
    out["ffn collapsed"] = block.hc_ffn.collapse(between, mixing.pre)
    out["ffn norm"] = block.ffn_norm(given["ffn_collapsed"])
    y, ids = given["y"][0], given["ids"][0]
    routing = block.ffn.gate(y, ids)
    out |= {"router logits": block.ffn.gate.logits(y), "chosen experts": routing.experts}
    weights = jnp.zeros((TOKENS, block.ffn.experts.cfg.n_routed_experts))
    out["routing weights"] = weights.at[jnp.arange(TOKENS)[:, None], routing.experts].set(
        routing.weights
    )
    out["experts, in rounds"] = block.ffn.experts.rounds(y, routing)
    out["experts, gathered"] = block.ffn.experts.gathered(y, routing)
    out["shared expert"] = block.ffn.shared_experts(given["y"])
    out["moe"] = block.ffn(given["y"], given["ids"])
    out["streams"] = block(streams, given["ids"], layer_state(block.attn), zero, zero + TOKENS)[0]
    return out


@functools.cache
def tensors_of(layer: int, compute: ComputeConfig = FLOAT32) -> Tensors:
    """Every tensor of one layer; activations that HF gave are cast to the activation dtype."""
    given = hf_inputs(layer)
    kept = ("post", "comb", "ids")  # float32 at any activation dtype, and integers
    given = {k: v if k in kept else v.astype(compute.dtype) for k, v in given.items()}
    return layer_tensors(model_of("tiny", compute).layers[layer], given)
