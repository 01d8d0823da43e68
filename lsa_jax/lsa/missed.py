"""What level 2 cannot read: counts, and an estimate of the attention mass that goes missing.

The target layers have all of their index keys on the device, so their own top-k over the full
history is known at every boundary: what they would take and cannot read is a *miss* (spec W10).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from lsa_jax.cache import codec
from lsa_jax.cache.resident import Resident
from lsa_jax.cache.state import LayerState
from lsa_jax.lsa.level2 import Level2, LsaState, native_scores
from lsa_jax.lsa.pool_map import Table
from lsa_jax.nn.attention import Attention
from lsa_jax.nn.lightning_indexer import index_scores, topk_indices, topk_mask
from lsa_jax.nn.transformer import DeepSeekV4


class Misses(NamedTuple):
    """Per row: entries that the target layers would take and cannot read, summed over the layers,
    and the estimated share of attention that they would get, in [0, 1]."""

    entries: Int[Array | np.ndarray, " B"]
    mass: Float[Array | np.ndarray, " B"]


def missed(
    plan: Level2,
    model: DeepSeekV4,
    state: LsaState,
    records: UInt8[Array, "S r 128"],
    table: Table,
) -> Misses:
    """Misses at the rows' last tokens, had these been fed with this table (spec W10, W11).

    A layer's index scores are trained to be logarithms of its attention, up to a constant. So, in
    weights exp(score), M is what the native top-k would take and cannot read, N the rest of that
    top-k, and R what level 2 takes instead of both. Level 2's own attention is known: per head, its
    odds o of these R against the window and the sink logit, which so weigh R / o. With everything
    readable, the missed entries would get the share

        M / (M + N + R / o)

    of the attention. Its mean over heads and target layers is the estimate; where nothing can be
    read that M could be measured against, all is counted as missed. The share M / (M + N), which
    needs no attention, would call it a miss when a row that reads its window has a flat top-k.
    """
    readable = plan.readable(state, table)
    exists = jnp.arange(readable.shape[1]) < (state.lengths // plan.cfg.csa_ratio)[:, None]
    entries, mass = jnp.zeros_like(state.lengths), jnp.zeros(state.lengths.shape, jnp.float32)
    for n, ordinal in enumerate(plan.targets):
        attn, layer = model.layers[plan.csa[ordinal]].attn, state.layers[plan.csa[ordinal]]
        at = jnp.maximum(state.lengths - 1, 0)
        scores = native_scores(attn, state.last_hidden(n), at, layer)
        picks = topk_mask(scores, exists, plan.cfg.index_topk)
        taken = topk_mask(scores, exists & readable, plan.cfg.index_topk)
        absent = picks & ~readable
        resident = plan.resident(ordinal, state, records, table)
        odds = _log_odds(attn, state.last_hidden(n)[:, None], at[:, None], layer, resident)
        lost, kept = _log_sum(scores, absent)[:, None], _log_sum(scores, picks & readable)[:, None]
        rest = jnp.logaddexp(kept, _log_sum(scores, taken)[:, None] - odds)
        part = jnp.mean(jax.nn.sigmoid(lost - rest), axis=1)
        part = jnp.where(jnp.any(taken, axis=1), part, 1)
        mass += jnp.where(jnp.any(absent, axis=1), part, 0) / len(plan.targets)
        entries += jnp.sum(absent, axis=1, dtype=jnp.int32)
    return Misses(entries, mass)


def native_share(plan: Level2, model: DeepSeekV4, state: LsaState) -> Float[Array, "B P"]:
    """Each page's share of the target layers' native top-k, softmax over its scores, their mean."""
    pages = plan.pages_of(state)
    exists = jnp.arange(pages * plan.cache.page_entries)
    exists = exists < (state.lengths // plan.cfg.csa_ratio)[:, None]
    total = jnp.zeros((exists.shape[0], pages), jnp.float32)
    for n, ordinal in enumerate(plan.targets):
        attn, layer = model.layers[plan.csa[ordinal]].attn, state.layers[plan.csa[ordinal]]
        at = jnp.maximum(state.lengths - 1, 0)
        scores = native_scores(attn, state.last_hidden(n), at, layer)
        picks = topk_mask(scores, exists, plan.cfg.index_topk)
        weight = jnp.where(picks, jnp.exp(scores - _log_sum(scores, picks)[:, None]), 0)
        total += jnp.sum(weight.reshape(weight.shape[0], pages, -1), axis=2) / len(plan.targets)
    return total


def _log_sum(scores: Float[Array, "B N"], which: Bool[Array, "B N"]) -> Float[Array, " B"]:
    return jax.nn.logsumexp(jnp.where(which, scores, -jnp.inf), axis=1)


def _log_odds(
    attn: Attention,
    x: Float[Array, "B 1 D"],
    positions: Int[Array, "B 1"],
    layer: LayerState,
    resident: Resident,
) -> Float[Array, "B H"]:
    """Logarithm of level 2's attention to compressed entries over that to all else, per head."""
    assert attn.indexer is not None
    latent = attn.latent_query(x)
    query = attn.indexer.queries(latent, x, positions)
    scores = index_scores(*query, resident.keys(layer), backend=attn.backend)
    visible = resident.visible(positions, attn.cfg.csa_ratio)
    index, valid = topk_indices(scores, visible, attn.cfg.index_topk, backend=attn.backend)
    entries = codec.decode_entries(attn.cfg, resident.entries(layer, index), jnp.float32)[:, 0]
    window = layer.window.astype(jnp.float32)
    q = attn.queries(latent, positions)[:, 0].astype(jnp.float32)

    def total(keys: Float[Array, "B N c"], mask: Bool[Array, "B N"]) -> Float[Array, "B H"]:
        dots = jnp.einsum("bhc,bnc->bhn", q, keys) * attn.cfg.head_dim**-0.5
        return jax.nn.logsumexp(jnp.where(mask[:, None], dots, -jnp.inf), axis=2)

    inside = total(entries, valid[:, 0])
    ring = total(window, jnp.arange(window.shape[1]) <= positions)
    return inside - jnp.logaddexp(ring, attn.sink_logit[...].astype(jnp.float32))
