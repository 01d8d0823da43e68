"""Window | CSA | HCA attention: one forward, three kinds (spec 3 and 4).

Every query attends to the raw entries of its window and to compressed entries: none on sliding
layers, all visible ones on HCA layers, the lightning indexer's top-k on CSA layers. Keys and values
are the same vectors, shared by all heads.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lsa_jax import quant
from lsa_jax.cache import codec
from lsa_jax.cache.resident import Resident, take_entries
from lsa_jax.cache.state import LayerState, flat_entries, write_pages
from lsa_jax.config import ComputeConfig, LayerType, ModelConfig
from lsa_jax.nn import lightning_indexer as indexer
from lsa_jax.nn import rope
from lsa_jax.nn.compressor import Compressor
from lsa_jax.nn.layers import Leaves, Linear, RMSNorm, precision, rms_normalise

WINDOW_BLOCK = 128  # consecutive queries of a prefill chunk that share one stretch of window keys
BLOCK_BYTES = 1 << 30  # scores and gathered entries that a prefill chunk holds at once
DENSE_LIMIT = 8  # capacity / top-k up to which masking beats gathering in prefill


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


def visible_entries(positions: Int[Array, "B T"], ratio: int, count: int) -> Bool[Array, "B T N"]:
    """Entry j is visible to position p once its last token is: j < (p + 1) // ratio (4.4)."""
    return jnp.arange(count) < ((positions + 1) // ratio)[..., None]


class Attention(nnx.Module):
    """One attention sublayer; `layer_type` decides which compressed entries exist."""

    def __init__(
        self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig, layer_type: LayerType
    ):
        self.cfg, self.compute = cfg, compute
        self.layer_type: LayerType = layer_type
        freqs = rope.frequencies(cfg, layer_type)
        self.freqs = tuple(map(float, freqs))
        self.sink_logit = leaves.param("sink_logit")
        self.wq_a = Linear(leaves.sub("wq_a"), compute)
        self.q_norm = RMSNorm(leaves.sub("q_norm"), cfg.rms_norm_eps)
        self.wq_b = Linear(leaves.sub("wq_b"), compute)
        self.wkv = Linear(leaves.sub("wkv"), compute)
        self.kv_norm = RMSNorm(leaves.sub("kv_norm"), cfg.rms_norm_eps)
        self.wo_a = Linear(leaves.sub("wo_a"), compute, quantise_input=False)
        self.wo_b = Linear(leaves.sub("wo_b"), compute)
        compressed = layer_type != "sliding"
        self.compressor = (
            Compressor(leaves.sub("compressor"), cfg, compute, freqs) if compressed else None
        )
        self.indexer = (
            indexer.LightningIndexer(leaves.sub("indexer"), cfg, compute, freqs)
            if layer_type == "csa"
            else None
        )

    def _rotate(self, x: Array, positions: Array, *, inverse: bool = False) -> Array:
        return rope.rotate(x, positions, np.asarray(self.freqs, np.float32), inverse=inverse)

    def _simulate_kv(self, kv: Float[Array, "*n c"]) -> Float[Array, "*n c"]:
        """The released model's fp8 rounding of the dims without rotary position (5.4)."""
        if not self.compute.simulate_kv:
            return kv
        nope = self.cfg.nope_head_dim
        rounded = quant.fp8_round(kv[..., :nope], self.cfg.kv_quant_group)
        return jnp.concatenate([rounded, kv[..., nope:]], axis=-1)

    def latent_query(self, x: Float[Array, "B T D"]) -> Float[Array, "B T r"]:
        """The low-rank query, shared with the lightning indexer."""
        return self.q_norm(self.wq_a(x))

    def queries(
        self, latent: Float[Array, "B T r"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T H c"]:
        """Per-head unit-RMS queries, rotated; the norm has no weight and precedes RoPE."""
        q = self.wq_b(latent)
        q = q.reshape(*q.shape[:2], self.cfg.num_attention_heads, self.cfg.head_dim)
        q = rms_normalise(q, self.cfg.rms_norm_eps).astype(q.dtype)
        return self._rotate(q, positions)

    def window_entries(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T c"]:
        """Raw entries, as attended and as kept in the window ring."""
        return self._simulate_kv(self._rotate(self.kv_norm(self.wkv(x)), positions))

    def output(
        self, o: Float[Array, "B T H c"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        """Inverse RoPE at the query's position, then the grouped low-rank projection."""
        cfg = self.cfg
        o = self._rotate(o, positions, inverse=True)
        o = o.reshape(*o.shape[:2], cfg.o_groups, -1)
        wo_a = self.wo_a.dense(o.dtype).reshape(cfg.o_groups, cfg.o_lora_rank, -1)
        u = jnp.einsum(
            "btgi,goi->btgo",
            o,
            wo_a,
            precision=precision(o.dtype),
            preferred_element_type=jnp.float32,
        )
        return self.wo_b(u.astype(o.dtype).reshape(*o.shape[:2], -1))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: LayerState,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        resident: Resident | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerState]:
        """Tokens x[b, :count[b]] follow the start[b] tokens already in `state`.

        `resident` confines a decode step of a CSA layer to part of its history, and says where
        that is; other layers and prefill take none.
        """
        positions = start[:, None] + jnp.arange(x.shape[1])
        latent = self.latent_query(x)
        q = self.queries(latent, positions)
        kv = self.window_entries(x, positions)
        state = self._compress(x, state, start, count, resident)
        index_q = None
        if resident is not None or self._selects(state):
            assert self.indexer is not None
            index_q = self.indexer.queries(latent, x, positions)
        if x.shape[1] == 1:
            state = dataclasses.replace(state, window=self._push(state.window, kv, start, count))
            window = self._ring_keys(state.window, positions)
            if resident is not None:
                assert index_q is not None
                sets = [window, self._resident_keys(state, index_q, positions, resident)]
            else:
                sets = [window, *self._compressed_keys(state, index_q, positions)]
            o = self._attend(q, sets)
        else:
            assert resident is None
            o = self._attend_blocks(q, kv, index_q, state, positions)
            state = dataclasses.replace(state, window=self._push(state.window, kv, start, count))
        return self.output(o, positions), state

    def _attend(self, q: Array, sets: list[KeySet]) -> Array:
        return sink_attention(q, sets, self.sink_logit[...], self.cfg.head_dim**-0.5)

    def _compress(
        self,
        x: Array,
        state: LayerState,
        start: Array,
        count: Array,
        resident: Resident | None,
    ) -> LayerState:
        """Writes the entries and index keys that this chunk completes."""
        if self.compressor is None:
            return state
        assert state.entries is not None and state.tail is not None
        kv_format = codec.format_of(state.entries)
        new, tail = self.compressor(x, start, count, state.tail)
        values = codec.encode_entries(self.cfg, kv_format, self._simulate_kv(new.values))
        base = 0 if resident is None else resident.base
        entries = write_pages(state.entries, values, new.first - base, new.count)
        state = dataclasses.replace(state, entries=entries, tail=tail)
        if self.indexer is None:
            return state
        assert state.index_keys is not None and state.index_tail is not None
        new, tail = self.indexer.keys(x, start, count, state.index_tail)
        base = 0 if resident is None else resident.key_base
        values = codec.encode_keys(kv_format, new.values)
        keys = write_pages(state.index_keys, values, new.first - base, new.count)
        return dataclasses.replace(state, index_keys=keys, index_tail=tail)

    def _selects(self, state: LayerState) -> bool:
        """Whether the top-k can leave anything out at this capacity."""
        if self.indexer is None:
            return False
        assert state.entries is not None
        return codec.capacity(state.entries) > self.cfg.index_topk

    def _push(self, ring: Array, kv: Array, start: Array, count: Array) -> Array:
        """Writes the chunk's last W tokens into their slots p mod W."""
        window = ring.shape[1]
        token = jnp.arange(kv.shape[1])
        keep = (token < count[:, None]) & (token >= count[:, None] - window)
        slot = jnp.where(keep, (start[:, None] + token) % window, window)
        rows = jnp.arange(ring.shape[0])[:, None]
        return ring.at[rows, slot].set(kv.astype(ring.dtype), mode="drop")

    def _ring_keys(self, ring: Array, positions: Int[Array, "B 1"]) -> KeySet:
        """The ring right after position p was pushed: all slots once it is full."""
        window = ring.shape[1]
        return KeySet(ring.astype(self.dtype)[:, None], jnp.arange(window) <= positions[..., None])

    @property
    def dtype(self) -> jnp.dtype:
        """Activation dtype."""
        return jnp.dtype(self.compute.dtype)

    def _compressed_keys(
        self, state: LayerState, index_q: tuple[Array, Array] | None, positions: Array
    ) -> list[KeySet]:
        """What these queries may attend to besides the window, gathered where that reads less."""
        if state.entries is None:
            return []
        flat = flat_entries(state.entries)
        n = codec.capacity(state.entries)
        visible = visible_entries(positions, self.cfg.ratio(self.layer_type), n)
        if index_q is None:
            return [KeySet(codec.decode_entries(self.cfg, flat, self.dtype)[:, None], visible)]
        assert state.index_keys is not None
        scores = indexer.index_scores(*index_q, flat_entries(state.index_keys))
        k = self.cfg.index_topk
        if positions.shape[1] > 1 and n <= DENSE_LIMIT * k:
            mask = indexer.topk_mask(scores, visible, k)
            return [KeySet(codec.decode_entries(self.cfg, flat, self.dtype)[:, None], mask)]
        index, valid = indexer.topk_indices(scores, visible, k)
        picked = take_entries(flat, index)
        return [KeySet(codec.decode_entries(self.cfg, picked, self.dtype), valid)]

    def _resident_keys(
        self, state: LayerState, index_q: tuple[Array, Array], positions: Array, resident: Resident
    ) -> KeySet:
        """The top-k of what is resident: level 2 of LSA."""
        visible = resident.visible(positions, self.cfg.ratio(self.layer_type))
        scores = indexer.index_scores(*index_q, resident.keys(state))
        index, valid = indexer.topk_indices(scores, visible, self.cfg.index_topk)
        resident.picked.append((index, valid))
        picked = resident.entries(state, index)
        return KeySet(codec.decode_entries(self.cfg, picked, self.dtype), valid)

    def _attend_blocks(
        self,
        q: Array,
        kv: Array,
        index_q: tuple[Array, Array] | None,
        state: LayerState,
        positions: Int[Array, "B T"],
    ) -> Float[Array, "B T H c"]:
        """A prefill chunk, as many queries at a time as BLOCK_BYTES allows: memory grows with the
        chunk, not its square. `state` has the chunk's entries, but its window what came before."""
        tokens = q.shape[1]
        step = min(WINDOW_BLOCK, tokens)
        most = max(1, BLOCK_BYTES // (q.shape[0] * step * self._bytes_per_query(state)))
        groups = min(most, -(-tokens // step))
        blocks = -(-tokens // (groups * step))
        total = blocks * groups * step

        def split(x: Array) -> Array:
            x = jnp.pad(x, [(0, 0), (0, total - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
            return x.reshape(x.shape[0], blocks, -1, *x.shape[2:]).swapaxes(0, 1)

        past = self._ordered_ring(state.window, positions[:, 0]).astype(kv.dtype)
        window = self._window_keys(past, kv, positions[:, 0], total, step)

        def attend(block: tuple[Array, ...]) -> Array:
            q, positions, keys, mask, *rest = block
            picked = self._compressed_keys(state, (rest[0], rest[1]) if rest else None, positions)
            return self._attend(q, [KeySet(keys, mask), *picked])

        keys = window.keys.reshape(q.shape[0], blocks, groups, *window.keys.shape[2:])
        steps = (split(q), split(positions), keys.swapaxes(0, 1), split(window.mask))
        steps += tuple(map(split, index_q or ()))
        if blocks == 1:
            return attend(jax.tree.map(lambda x: x[0], steps))[:, :tokens]
        o = jax.lax.map(attend, steps)
        return o.swapaxes(0, 1).reshape(q.shape[0], total, *q.shape[2:])[:, :tokens]

    def _bytes_per_query(self, state: LayerState) -> int:
        """Scores, and entries where they are gathered, that one query needs while it attends."""
        cfg, keys = self.cfg, 2 * WINDOW_BLOCK + self.cfg.sliding_window
        if state.entries is None:
            return 4 * cfg.num_attention_heads * keys
        n = codec.capacity(state.entries)
        if not self._selects(state):
            return 4 * cfg.num_attention_heads * (n + keys)
        index = min(4 * cfg.index_n_heads * n, indexer.SCORE_BLOCK_BYTES)
        if n <= DENSE_LIMIT * cfg.index_topk:
            return max(index, 4 * cfg.num_attention_heads * (n + keys))
        gathered = cfg.index_topk * cfg.head_dim * self.dtype.itemsize
        return max(gathered + 4 * cfg.num_attention_heads * (cfg.index_topk + keys), 16 * n)

    @staticmethod
    def _window_keys(
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

    @staticmethod
    def _ordered_ring(ring: Float[Array, "B W c"], start: Int[Array, " B"]) -> Array:
        """The ring in order of position: start - W .. start - 1."""
        window = ring.shape[1]
        slot = (start[:, None] + jnp.arange(window)) % window
        return jnp.take_along_axis(ring, slot[..., None], axis=1)
