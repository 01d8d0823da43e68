"""Teaching a lightning indexer the attention it selects for.

At some queries of a CSA layer the attention over every visible entry is computed, and the index
scores, as logits over the same entries, are moved towards it by a KL divergence. The attention is
the target and gets no gradient from this, nor do the layer's input and its query latent: the loss
trains the indexer and its key compressor alone.

The target of a query is its attention over the entries, summed over heads and normalised; the query
counts by the mass it puts on entries at all, so that queries which read the window do not decide.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsa_jax.cache import codec
from lsa_jax.cache.state import LayerState, flat_entries, init_tail
from lsa_jax.nn import lightning_indexer as indexer
from lsa_jax.nn.attention import Attention
from lsa_jax.nn.site import visible_entries


class Lesson(NamedTuple):
    """Which queries teach the indexers, and how many entries they are to keep."""

    at: Int[Array, " Q"]  # positions
    top_k: int


class IndexLoss(NamedTuple):
    """Sums over a layer's taught queries; divide the first two by the last."""

    divergence: Float[Array, ""]  # KL, each query times its mass on entries
    captured: Float[Array, ""]  # mass on the entries that the indexer's top k hold
    mass: Float[Array, ""]  # mass on entries


def _window_scores(
    attn: Attention, q: Float[Array, "B Q H c"], kv: Float[Array, "B T c"], at: Int[Array, " Q"]
) -> Float[Array, "B Q H W"]:
    """Scores of the raw entries that a query's window holds; -inf before the sequence."""
    token = at[:, None] - jnp.arange(attn.cfg.sliding_window)
    keys = kv[:, jnp.maximum(token, 0)].astype(jnp.float32)
    dots = jnp.einsum("bqhc,bqwc->bqhw", q, keys) * attn.cfg.head_dim**-0.5
    return jnp.where((token >= 0)[:, None], dots, -jnp.inf)


def entry_attention(
    attn: Attention,
    x: Float[Array, "B T D"],
    entries: Float[Array, "B N c"],
    at: Int[Array, " Q"],
) -> Float[Array, "B Q N"]:
    """Attention on each entry at the positions `at`, mean over heads, as if all visible ones were
    attended; float32. With the window and the sink it sums to 1."""
    latent = attn.latent_query(x[:, at])
    positions = jnp.broadcast_to(at, (x.shape[0], len(at)))
    q = attn.queries(latent, positions).astype(jnp.float32)
    kv = attn.window_entries(x, jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2]))
    visible = visible_entries(positions, attn.cfg.csa_ratio, entries.shape[1])
    dots = jnp.einsum("bqhc,bnc->bqhn", q, entries.astype(jnp.float32)) * attn.cfg.head_dim**-0.5
    dots = jnp.where(visible[:, :, None], dots, -jnp.inf)
    sink = jnp.broadcast_to(attn.sink_logit[...].astype(jnp.float32)[:, None], (*q.shape[:3], 1))
    scores = jnp.concatenate([dots, _window_scores(attn, q, kv, at), sink], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.mean(weights[..., : entries.shape[1]], axis=2)


def index_logits(
    attn: Attention, x: Float[Array, "B T D"], count: int, at: Int[Array, " Q"]
) -> Float[Array, "B Q N"]:
    """Index scores of the first `count` entries at the positions `at`, float32."""
    assert attn.indexer is not None
    batch, tokens = x.shape[:2]
    positions = jnp.broadcast_to(at, (batch, len(at)))
    latent = jax.lax.stop_gradient(attn.latent_query(x[:, at]))
    queries, weights = attn.indexer.queries(latent, x[:, at], positions)
    zeros = jnp.zeros(batch, jnp.int32)
    tail = init_tail(batch, attn.cfg.index_head_dim, overlap=True)
    keys = attn.indexer.keys(x, zeros, zeros + tokens, tail)[0].values
    keys = jnp.pad(keys, ((0, 0), (0, max(0, count - keys.shape[1])), (0, 0)))[:, :count]
    planes = codec.DensePlanes(keys.astype(jnp.float32))
    queries = queries.astype(jnp.float32)
    return indexer.index_scores(queries, weights, planes, backend="xla")


def divergence(
    target: Float[Array, "*n N"], logits: Float[Array, "*n N"], visible: Array
) -> Float[Array, "*n"]:
    """KL(target / its sum || softmax(logits)) over visible entries; 0 where there is no mass."""
    total = jnp.sum(target, axis=-1, keepdims=True)
    share = target / jnp.maximum(total, 1e-20)
    fit = jax.nn.log_softmax(jnp.where(visible, logits, -1e30), axis=-1)
    known = jnp.where(share > 0, jnp.log(jnp.maximum(share, 1e-20)), 0)
    return jnp.sum(jnp.where(share > 0, share * (known - fit), 0), axis=-1)


def index_loss(
    attn: Attention, x: Float[Array, "B T D"], state: LayerState, lesson: Lesson
) -> IndexLoss:
    """Divergence at a lesson's queries of one layer; `state` is the layer's after the sequence."""
    assert state.entries is not None
    at = lesson.at
    x = jax.lax.stop_gradient(x)
    entries = codec.decode_entries(attn.cfg, flat_entries(state.entries), attn.dtype)
    target = jax.lax.stop_gradient(entry_attention(attn, x, entries, at))
    logits = index_logits(attn, x, entries.shape[1], at)
    positions = jnp.broadcast_to(at, target.shape[:2])
    visible = visible_entries(positions, attn.cfg.csa_ratio, entries.shape[1])
    mass = jnp.sum(target, axis=-1)
    kept = indexer.topk_mask(jax.lax.stop_gradient(logits), visible, lesson.top_k)
    return IndexLoss(
        jnp.sum(mass * divergence(target, logits, visible)),
        jnp.sum(jnp.where(kept, target, 0)),
        jnp.sum(mass),
    )
