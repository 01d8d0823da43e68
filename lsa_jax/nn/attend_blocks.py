"""A prefill chunk's attention in XLA, in blocks of queries (spec 3.1, 4.4, 5.1).

Made for reverse mode, and for small models: `attend.chunk` says why it is not an operation of
`pallas_kernels`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.cache import codec
from lsa_jax.cache.resident import take_entries
from lsa_jax.cache.state import LayerState, flat_entries
from lsa_jax.nn import lightning_indexer as indexer
from lsa_jax.nn.layers import precision
from lsa_jax.nn.site import IndexQueries, Site, visible_entries
from pallas_kernels.index_score.reference import CHUNK_BLOCK_BYTES

WINDOW_BLOCK = 128  # consecutive queries of a prefill chunk that share one stretch of window keys
BLOCK_BYTES = 1 << 30  # scores and gathered entries that a prefill chunk holds at once
DENSE_LIMIT = 8  # capacity / top-k up to which masking beats gathering in prefill
PICKED = "picked"  # what reverse mode had better keep of a chunk: which entries its queries pick


class KeySet(NamedTuple):
    """Keys that T queries attend to. `keys` is [B, G, N, c]: G equal groups of consecutive queries
    have keys of their own, so G = 1 shares them and G = T gives each query its own."""

    keys: Float[Array, "B G N c"]
    mask: Bool[Array, "B T N"]


def _grouped_einsum(spec: str, q: Array, keys: Array) -> Array:
    """An einsum over queries [B, T, H, x] regrouped to [B, G, T/G, H, x], summed in float32."""
    batch, tokens, heads, _ = q.shape
    groups = keys.shape[1]
    q = q.reshape(batch, groups, tokens // groups, heads, -1)
    exact = {"precision": precision(q.dtype), "preferred_element_type": jnp.float32}
    return jnp.einsum(spec, q, keys, **exact).reshape(batch, tokens, heads, -1)


def sink_attention(
    q: Float[Array, "B T H c"], sets: list[KeySet], sink_logit: Float[Array, " H"], scale: float
) -> Float[Array, "B T H c"]:
    """Softmax attention over the union of the sets, with one extra logit per head whose value is
    zero (3.1). Values are the keys. Scores and sums are float32."""
    scores = []
    for keys, mask in sets:
        dots = _grouped_einsum("bgthc,bgnc->bgthn", q, keys) * scale
        scores.append(jnp.where(mask[:, :, None], dots, -jnp.inf))
    sink = sink_logit.astype(jnp.float32)[:, None]
    top = sink
    for s in scores:
        top = jnp.maximum(top, jnp.max(s, axis=-1, keepdims=True))
    weights = [jnp.exp(s - top) for s in scores]
    total = jnp.exp(sink - top) + sum(jnp.sum(w, axis=-1, keepdims=True) for w in weights)
    out = sum(
        _grouped_einsum("bgthn,bgnc->bgthc", w.astype(q.dtype), keys)
        for w, (keys, _) in zip(weights, sets, strict=True)
    )
    return (out / total).astype(q.dtype)


def _masks(site: Site, capacity: int) -> bool:
    """Whether entries that a query does not pick are masked; otherwise the picked are gathered."""
    return capacity <= DENSE_LIMIT * site.cfg.index_topk


def _compressed_keys(
    site: Site,
    state: LayerState,
    index_q: IndexQueries | None,
    positions: Int[Array, "B T"],
    dtype: Any,
) -> list[KeySet]:
    """What these queries may attend to besides the window, gathered where that reads less."""
    if state.entries is None:
        return []
    flat = flat_entries(state.entries)
    n = codec.capacity(state.entries)
    visible = visible_entries(positions, site.cfg.ratio(site.layer_type), n)
    if index_q is None:
        return [KeySet(codec.decode_entries(site.cfg, flat, dtype)[:, None], visible)]
    assert state.index_keys is not None
    keys, k = flat_entries(state.index_keys), site.cfg.index_topk
    backend = site.compute.picking_backend
    index_q, keys = jax.lax.stop_gradient((index_q, keys))
    scores = indexer.index_scores(*index_q, keys, backend=backend)
    if _masks(site, n):
        mask = checkpoint_name(indexer.topk_mask(scores, visible, k), PICKED)
        return [KeySet(codec.decode_entries(site.cfg, flat, dtype)[:, None], mask)]
    seen = site.seen(state, positions)
    found = indexer.topk_indices(scores, seen, k, backend=backend)
    index, valid = checkpoint_name(found, PICKED)
    picked = take_entries(flat, index)
    return [KeySet(codec.decode_entries(site.cfg, picked, dtype), valid)]


def attend(
    site: Site,
    q: Float[Array, "B T H c"],
    kv: Float[Array, "B T c"],
    index_q: IndexQueries | None,
    state: LayerState,
    positions: Int[Array, "B T"],
) -> Float[Array, "B T H c"]:
    """A prefill chunk, as many queries at a time as BLOCK_BYTES allows: memory grows with the
    chunk, not its square. `state` has the chunk's entries, but as a window what came before it."""
    tokens = q.shape[1]
    step = min(WINDOW_BLOCK, tokens)
    most = max(1, BLOCK_BYTES // (q.shape[0] * step * _bytes_per_query(site, state, q.dtype)))
    groups = min(most, -(-tokens // step))
    blocks = -(-tokens // (groups * step))
    total = blocks * groups * step

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, total - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(x.shape[0], blocks, -1, *x.shape[2:]).swapaxes(0, 1)

    past = ordered_ring(state.window, positions[:, 0]).astype(kv.dtype)
    window = window_keys(past, kv, positions[:, 0], total, step)

    def one(block: tuple[Array, ...]) -> Array:
        q, positions, keys, mask, *rest = block
        some_q = (rest[0], rest[1]) if rest else None
        picked = _compressed_keys(site, state, some_q, positions, q.dtype)
        sets = [KeySet(keys, mask), *picked]
        return sink_attention(q, sets, site.sink, site.options["scale"])

    keys = window.keys.reshape(q.shape[0], blocks, groups, *window.keys.shape[2:])
    steps = (split(q), split(positions), keys.swapaxes(0, 1), split(window.mask))
    steps += tuple(map(split, index_q or ()))
    if blocks == 1:
        return one(jax.tree.map(lambda x: x[0], steps))[:, :tokens]
    o = jax.lax.map(one, steps)
    return o.swapaxes(0, 1).reshape(q.shape[0], total, *q.shape[2:])[:, :tokens]


def _bytes_per_query(site: Site, state: LayerState, dtype: jnp.dtype) -> int:
    """Scores, and entries where they are gathered, that one query needs while it attends."""
    cfg, keys = site.cfg, 2 * WINDOW_BLOCK + site.cfg.sliding_window
    if state.entries is None:
        return 4 * cfg.num_attention_heads * keys
    n = codec.capacity(state.entries)
    if not site.selects(state):
        return 4 * cfg.num_attention_heads * (n + keys)
    index = min(4 * cfg.index_n_heads * n, CHUNK_BLOCK_BYTES)
    if _masks(site, n):
        return max(index, 4 * cfg.num_attention_heads * (n + keys))
    gathered = cfg.index_topk * cfg.head_dim * dtype.itemsize
    return max(gathered + 4 * cfg.num_attention_heads * (cfg.index_topk + keys), 16 * n)


def window_keys(
    past: Float[Array, "B W c"], kv: Array, start: Int[Array, " B"], total: int, step: int
) -> KeySet:
    """Window keys of `total` queries from position `start`, in groups of `step` queries that
    share the W entries before them and their own."""
    window = past.shape[1]
    band = jnp.concatenate([past, kv], axis=1)
    groups, after = total // step, -(-window // step)
    band = jnp.pad(band, ((0, 0), (0, (groups + after) * step - band.shape[1]), (0, 0)))
    index = jnp.arange(0, total, step)[:, None] + jnp.arange(window + step)
    age = window + jnp.arange(step)[:, None] - jnp.arange(window + step)
    exists = start[:, None, None] - window + index >= 0
    mask = (age >= 0) & (age < window) & exists[:, :, None]
    parts = band.reshape(past.shape[0], groups + after, step, -1)
    keys = jnp.concatenate([parts[:, i : i + groups] for i in range(after + 1)], axis=2)
    return KeySet(keys[:, :, : window + step], mask.reshape(past.shape[0], total, -1))


def ordered_ring(ring: Float[Array, "B W c"], start: Int[Array, " B"]) -> Array:
    """The ring in order of position: start - W .. start - 1."""
    window = ring.shape[1]
    slot = (start[:, None] + jnp.arange(window)) % window
    return jnp.take_along_axis(ring, slot[..., None], axis=1)
