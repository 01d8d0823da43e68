"""Where scores come from: one function per arm, all judged and accounted for in the same way.

Scores are of entries ([B, N], probabilities) or of pages ([B, P], any finite numbers, for the
policy "top"). Columns of what does not exist yet are dropped by the selection.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.cache import codec
from lsa_jax.lsa.boundary import target_keys
from lsa_jax.lsa.config import Arm, LsaConfig
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.nn.lightning_indexer import topk_mask
from lsa_jax.nn.site import visible_entries
from lsa_jax.nn.transformer import DeepSeekV4

OBSERVING: tuple[Arm, ...] = ("snapkv", "lagged")  # arms that count what a prompt's end looked at


def policy_of(lsa: LsaConfig) -> PolicyConfig:
    """The policy that an arm's scores go through: untrained arms fill what they are allowed."""
    if lsa.arm == "lsa":
        return lsa.policy
    return dataclasses.replace(lsa.policy, policy="top", cap=0, sticky=False, recall_gate=None)


def by_page(lsa: LsaConfig) -> bool:
    """Whether an arm scores pages rather than entries."""
    return lsa.arm != "lsa"


def scores(
    lsa: LsaConfig,
    plan: Level2,
    model: DeepSeekV4,
    indexer: MemoryIndexer | None,
    state: LsaState,
    seen: Float[Array, "B N"] | None,
) -> Float[Array, "B n"]:
    """Scores at the rows' last tokens.

    `seen` are the votes of the prompt's last tokens ("snapkv" only), `state.votes` those of the
    cycle that ended ("lagged"; after a prompt, of its last tokens) or of the next one ("oracle").
    """
    keys = target_keys(plan, state)
    pages = plan.pages_of(state)
    if lsa.arm == "lsa":
        assert indexer is not None
        at, backend = state.lengths - 1, model.compute.kernel_backend
        entries = state.lengths // plan.cfg.csa_ratio
        return indexer.ensemble(indexer.recent(state.hidden, at, keys, entries, backend=backend))
    if lsa.arm == "recency":
        newest = jnp.arange(pages, dtype=jnp.float32)
        return jnp.broadcast_to(newest, (state.lengths.shape[0], pages))
    if lsa.arm == "random":
        draw = _draws(lsa.seed, pages)
        return jnp.broadcast_to(draw, (state.lengths.shape[0], pages))
    if lsa.arm == "quest":
        return _quest(plan, model, state, keys)
    votes = seen if lsa.arm == "snapkv" else state.votes
    assert votes is not None
    return jnp.sum(votes.reshape(votes.shape[0], pages, -1), axis=-1)


def _draws(seed: int, pages: int) -> Float[Array, "{pages}"]:
    """A number for each page that depends on the seed and the page alone: growing changes none."""
    key = jax.random.key(seed)
    keys = jax.vmap(lambda page: jax.random.fold_in(key, page))(jnp.arange(pages))
    return jax.vmap(jax.random.uniform)(keys)


def _quest(
    plan: Level2, model: DeepSeekV4, state: LsaState, keys: list[codec.Planes]
) -> Float[Array, "B P"]:
    """An upper bound of the index score of any entry of a page, from the extrema of its keys, for
    the target layers' own queries; layers are averaged in units of their spread over pages."""
    at, total = state.lengths - 1, jnp.float32(0)
    entries = state.lengths // plan.cfg.csa_ratio
    exists = jnp.arange(jax.tree.leaves(keys[0])[0].shape[1]) < entries[:, None]
    for n, ordinal in enumerate(plan.targets):
        attn = model.layers[plan.csa[ordinal]].attn
        assert attn.indexer is not None
        x = state.last_hidden(n)[:, None]
        q, w = attn.indexer.queries(attn.latent_query(x), x, at[:, None])
        values, scale = codec.decode_keys(keys[n], jnp.float32)
        values = values if scale is None else values * scale[..., None]
        low, high, any_entry = _extrema(values, exists, plan.cache.page_entries)
        bound = _bound(q[:, 0].astype(jnp.float32), w[:, 0], low, high)
        total += _standard(bound, any_entry)
    return total


def _extrema(
    values: Float[Array, "B N K"], exists: Bool[Array, "B N"], per_page: int
) -> tuple[Array, Array, Bool[Array, "B P"]]:
    batch, n, dim = values.shape
    pages = values.reshape(batch, n // per_page, per_page, dim)
    there = exists.reshape(batch, n // per_page, per_page, 1)
    low = jnp.min(jnp.where(there, pages, jnp.inf), axis=2)
    high = jnp.max(jnp.where(there, pages, -jnp.inf), axis=2)
    some = jnp.any(there, axis=(2, 3))
    return jnp.where(some[..., None], low, 0), jnp.where(some[..., None], high, 0), some


def _bound(
    q: Float[Array, "B H K"], w: Float[Array, "B H"], low: Array, high: Array
) -> Float[Array, "B P"]:
    """max over keys in the box [low, high] of sum_h w_h relu(q_h . k), bounded head by head: the
    largest product where the weight is positive, the smallest where it is negative."""
    up, down = jax.nn.relu(q), jnp.minimum(q, 0)

    def dots(a: Array, b: Array) -> Array:
        both = jnp.einsum("bhk,bpk->bhp", up, a) + jnp.einsum("bhk,bpk->bhp", down, b)
        return jax.nn.relu(both)

    w = w[..., None]
    return jnp.sum(jnp.where(w > 0, w * dots(high, low), w * dots(low, high)), axis=1)


def _standard(x: Float[Array, "B P"], where: Bool[Array, "B P"]) -> Float[Array, "B P"]:
    count = jnp.maximum(jnp.sum(where, axis=1, keepdims=True), 1)
    mean = jnp.sum(jnp.where(where, x, 0), axis=1, keepdims=True) / count
    spread = jnp.sum(jnp.where(where, (x - mean) ** 2, 0), axis=1, keepdims=True) / count
    return jnp.where(where, (x - mean) * jax.lax.rsqrt(spread + 1e-12), 0)


def prompt_votes(
    plan: Level2,
    scores: Float[Array, "B T N"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B N"]:
    """How many of these queries have each entry in their native top-k (SnapKV's observation)."""
    visible = visible_entries(positions, plan.cfg.csa_ratio, scores.shape[-1])
    picks = topk_mask(scores, visible, plan.cfg.index_topk)
    return jnp.sum(picks, axis=1, dtype=jnp.float32)
