"""Window | CSA | HCA attention: one forward, three kinds (spec 3 and 4).

Every query attends to the raw entries of its window and to compressed entries: none on sliding
layers, all visible ones on HCA layers, the lightning indexer's top-k on CSA layers. Keys and values
are the same vectors, shared by all heads. Here is what is in front of the attention itself and
behind it: projections, norms, rotation, and what the state keeps.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsa_jax import quant
from lsa_jax.cache import codec
from lsa_jax.cache.resident import Resident
from lsa_jax.cache.state import LayerState, write_pages
from lsa_jax.config import ComputeConfig, LayerType, ModelConfig
from lsa_jax.nn import attend, planes, rope
from lsa_jax.nn import lightning_indexer as indexer
from lsa_jax.nn.attend import Site
from lsa_jax.nn.compressor import Compressor
from lsa_jax.nn.layers import Leaves, Linear, RMSNorm, precision, rms_normalise


class Attention(nnx.Module):
    """One attention sublayer; `layer_type` decides which compressed entries exist."""

    def __init__(
        self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig, layer_type: LayerType
    ):
        self.cfg, self.compute, self.backend = cfg, compute, compute.kernel_backend
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
        if resident is not None or self._site.selects(state):
            assert self.indexer is not None
            index_q = self.indexer.queries(latent, x, positions)
        if x.shape[1] == 1:
            state = dataclasses.replace(state, window=self._push(state.window, kv, start, count))
            o = attend.token(self._site, q[:, 0], index_q, state, positions, resident)[:, None]
        else:
            assert resident is None
            o = attend.chunk(self._site, q, kv, index_q, state, positions)
            state = dataclasses.replace(state, window=self._push(state.window, kv, start, count))
        return self.output(o, positions), state

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
        if self.compute.simulate_kv:  # rounds what is then stored
            new, tail = self.compressor(x, start, count, state.tail)
            values = codec.encode_entries(self.cfg, kv_format, self._simulate_kv(new.values))
        else:
            new, tail = self.compressor.stored(x, start, count, state.tail, kv_format)
            values = planes.entries(new.rows)
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

    def _push(self, ring: Array, kv: Array, start: Array, count: Array) -> Array:
        """Writes the chunk's last W tokens into their slots p mod W."""
        window = ring.shape[1]
        token = jnp.arange(kv.shape[1])
        keep = (token < count[:, None]) & (token >= count[:, None] - window)
        slot = jnp.where(keep, (start[:, None] + token) % window, window)
        rows = jnp.arange(ring.shape[0])[:, None]
        return ring.at[rows, slot].set(kv.astype(ring.dtype), mode="drop")

    @property
    def _site(self) -> Site:
        sink = self.sink_logit[...].astype(jnp.float32)
        return Site(self.cfg, self.compute, self.layer_type, sink)

    @property
    def dtype(self) -> jnp.dtype:
        """Activation dtype."""
        return jnp.dtype(self.compute.dtype)
