"""Decode states whose attention is planted: which entries matter, how much, and to which layer.

There is no text behind them: index keys, entries and windows are chosen so that index scores and
attention logits come out as wanted, whatever the model's projections are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from lsa_jax.cache.codec import DensePlanes
from lsa_jax.config import CacheConfig, ComputeConfig
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.nn.attention import Attention
from lsa_jax.nn.transformer import DeepSeekV4
from tests import small_model

CONFIG = dataclasses.replace(
    small_model.CONFIG,
    layer_types=("csa", "csa", "csa", "csa"),
    mlp_types=("hash", "score", "score", "score"),
    index_topk=16,
    max_position_embeddings=2048,
)
CACHE = CacheConfig(kv_format="float32", page_entries=4)
PAGES = 48  # complete ones; a page in formation follows
FRESH = 2  # entries in it
TARGETS = (1, 3)


@functools.cache
def model() -> DeepSeekV4:
    return DeepSeekV4(CONFIG, ComputeConfig(dtype="float32"), small_model.leaves("f32", CONFIG))


def plan() -> Level2:
    return Level2(CONFIG, CACHE, targets=TARGETS, lookahead=8, path="mask")


@dataclasses.dataclass(frozen=True)
class Requests:
    """B planted requests.

    `relevance` [L, B, N] are index scores, `logits` [L, B, H, N] attention logits of entries,
    `window` [L, B, H, W] those of the window, all of which come out of the state as they are here;
    `likely` [B, N] is what level 1 says of the entries.
    """

    relevance: np.ndarray
    logits: np.ndarray
    window: np.ndarray
    likely: np.ndarray

    def joined(self, other: "Requests") -> "Requests":
        """These requests, then the others."""
        pairs = [(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)]
        return Requests(*(np.concatenate(p, axis=int(p[0].ndim > 2)) for p in pairs))


def requests(
    rng: np.random.Generator,
    relevant: np.ndarray,
    *,
    strength: np.ndarray,
    local: float = 1.0,
    sharpness: float = 1.0,
    agreement: float = 0.8,
    misjudged: float = 0.05,
) -> Requests:
    """Requests of which `relevant[b]` pages matter, by `strength[b]` in units of attention logits.

    A layer shares a relevant page with the others with probability `agreement`, else it has one of
    its own. Attention logits are index scores up to noise, which is what indexers are trained for,
    or `sharpness` times these. The window's are about `local`. Level 1 sees what layers share, but
    for the share of pages that it misjudges.
    """
    batch, layers, heads = len(relevant), len(CONFIG.layer_types), CONFIG.num_attention_heads
    size = CACHE.page_entries
    entries = PAGES * size + FRESH
    relevance = np.abs(rng.normal(0, 0.5, (layers, batch, entries)))
    likely = rng.uniform(0, 0.3, (batch, entries))
    for b, count in enumerate(relevant):
        pages = rng.permutation(PAGES)
        shared, rest = pages[:count], pages[count:]
        judged = np.where(rng.random(count) < misjudged, rng.choice(PAGES, count), shared)
        hit = judged * size + rng.integers(0, size, count)
        likely[b, hit] = rng.uniform(0.7, 1, count)
        for layer in range(layers):
            own = np.where(rng.random(count) < agreement, shared, rng.choice(rest, count))
            at = own * size + rng.integers(0, size, count)
            relevance[layer, b, at] = strength[b] + rng.normal(0, 0.3, count)
    relevance = np.maximum(relevance, 0)
    logits = sharpness * relevance[:, :, None] + rng.normal(0, 0.5, (layers, batch, heads, entries))
    window = rng.normal(local, 1, (layers, batch, heads, CONFIG.sliding_window))
    return Requests(relevance, logits, window, likely)


def planted(want: Requests, rng: np.random.Generator) -> LsaState:
    """A state in which the requests come out as wanted."""
    batch, entries = want.likely.shape
    lengths = jnp.full((batch,), entries * CONFIG.csa_ratio, jnp.int32)
    capacity = (PAGES + 2) * CACHE.page_entries * CONFIG.csa_ratio
    state = plan().start(batch=batch, capacity=capacity, dtype=jnp.dtype("float32"))
    layers, inputs = [], []
    for i, layer in enumerate(state.layers):
        x, keys, values, window = _fitted(model().layers[i].attn, want, i, lengths, rng)
        inputs.append(x)
        layers.append(
            dataclasses.replace(
                layer,
                index_keys=_paged(keys, layer.index_keys),
                entries=_paged(values, layer.entries),
                window=jnp.asarray(window, jnp.float32),
            )
        )
    hidden = jnp.asarray(np.stack(inputs)[list(TARGETS)])[:, :, None]
    base = jnp.full_like(lengths, PAGES * CACHE.page_entries)
    return LsaState(tuple(layers), lengths, base, hidden, state.reads, state.streak, None)


@jax.jit
def _queries(attn: Attention, x: jax.Array, lengths: jax.Array):
    at, latent = (lengths - 1)[:, None], attn.latent_query(x[:, None])
    q, w = attn.indexer.queries(latent, x[:, None], at)
    return attn.queries(latent, at)[:, 0], q[:, 0], w[:, 0]


def _fitted(
    attn: Attention, want: Requests, i: int, lengths: jax.Array, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    """A layer's attention inputs [B, D], index keys [B, N, K], entries [B, N, c] and window.

    Keys lie along one direction, so that the score grows with their length: a head's query that all
    heads together like, for the best of four inputs. Entries are a least-squares solution, exact
    because there are fewer heads than dims.
    """
    batch = len(lengths)
    x = rng.normal(size=(4 * batch, CONFIG.hidden_size)).astype(np.float32)
    four = _queries(attn, jnp.asarray(x), jnp.tile(lengths, 4))
    q, index_q, w = (np.asarray(a, np.float64) for a in four)
    dots = np.maximum(np.einsum("bhk,bdk->bhd", index_q, index_q), 0)
    scores = np.einsum("bh,bhd->bd", w, dots)
    best = scores.max(1).reshape(4, batch).argmax(0) * batch + np.arange(batch)
    head = scores[best].argmax(1)
    unit, along = scores[best, head], index_q[best, head]
    assert (unit > 0.1).all()
    keys = want.relevance[i][..., None] * (along / unit[:, None])[:, None]
    solve = np.linalg.pinv(q[best]) * CONFIG.head_dim**0.5  # [B, c, H]
    values = np.einsum("bch,bhn->bnc", solve, want.logits[i])
    return x[best], keys, values, np.einsum("bch,bhn->bnc", solve, want.window[i])


def _paged(values: np.ndarray, like: DensePlanes | None) -> DensePlanes:
    assert isinstance(like, DensePlanes)
    flat = np.zeros((like.values.shape[0], *like.values.shape[1:]), np.float32)
    flat = flat.reshape(flat.shape[0], -1, flat.shape[-1])
    flat[:, : values.shape[1]] = values
    return DensePlanes(jnp.asarray(flat.reshape(like.values.shape)))


def with_lengths(state: LsaState, lengths: jax.Array, base: jax.Array) -> LsaState:
    return dataclasses.replace(state, lengths=lengths, base=base)


def true_mass(want: Requests, readable: np.ndarray) -> np.ndarray:
    """Share of full attention [B], mean of heads and of all CSA layers, on entries that are not
    readable: window, native top-k and sink logit, in float64."""
    out = []
    for i in range(len(want.relevance)):
        picks = np.zeros(want.likely.shape, bool)
        best = np.argsort(-want.relevance[i], axis=1, kind="stable")[:, : CONFIG.index_topk]
        np.put_along_axis(picks, best, True, axis=1)
        weights = np.where(picks[:, None], np.exp(want.logits[i]), 0)
        sink = np.exp(np.asarray(model().layers[i].attn.sink_logit[...], np.float64))
        total = weights.sum(2) + np.exp(want.window[i]).sum(2) + sink
        lost = np.where(readable[:, None], 0, weights).sum(2)
        out.append((lost / total).mean(1))
    return np.mean(out, axis=0)
