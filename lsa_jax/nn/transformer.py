"""DeepSeek-V4 from token ids to logits; reads top to bottom (spec appendix B)."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lsa_jax.cache.resident import Resident
from lsa_jax.cache.state import DecodeState, LayerState, init_state
from lsa_jax.config import CacheConfig, ComputeConfig, LayerType, MlpType, ModelConfig
from lsa_jax.nn.attention import Attention
from lsa_jax.nn.hyper_connections import HyperConnection, HyperHead
from lsa_jax.nn.layers import Leaf, Leaves, Linear, RMSNorm, take_rows
from lsa_jax.nn.moe import Moe
from lsa_jax.parameters import Table, parameter_table


class Block(nnx.Module):
    """Attention site, then MoE site, each inside its own hyper-connection (2.3)."""

    def __init__(
        self,
        leaves: Leaves,
        cfg: ModelConfig,
        compute: ComputeConfig,
        layer_type: LayerType,
        mlp_type: MlpType,
    ):
        self.hc_attn = HyperConnection(leaves.sub("hc_attn"), cfg, compute)
        self.attn_norm = RMSNorm(leaves.sub("attn_norm"), cfg.rms_norm_eps)
        self.attn = Attention(leaves.sub("attn"), cfg, compute, layer_type)
        self.hc_ffn = HyperConnection(leaves.sub("hc_ffn"), cfg, compute)
        self.ffn_norm = RMSNorm(leaves.sub("ffn_norm"), cfg.rms_norm_eps)
        self.ffn = Moe(leaves.sub("ffn"), cfg, compute, mlp_type)

    def attend(
        self,
        streams: Float[Array, "B T n D"],
        state: LayerState,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        resident: Resident | None = None,
    ) -> tuple[Float[Array, "B T n D"], LayerState, Float[Array, "B T D"]]:
        """The attention site. Also returns its input, which the memory indexer reads."""
        with jax.named_scope("attention"):
            mixing = self.hc_attn.coefficients(streams)
            x = self.attn_norm(self.hc_attn.collapse(streams, mixing.pre))
            out, state = self.attn(x, state, start, count, resident)
            return self.hc_attn.expand(streams, out, mixing), state, x

    def mix(self, streams: Float[Array, "B T n D"], ids: Int[Array, "B T"]) -> Array:
        """The MoE site."""
        with jax.named_scope("moe"):
            mixing = self.hc_ffn.coefficients(streams)
            x = self.ffn_norm(self.hc_ffn.collapse(streams, mixing.pre))
            return self.hc_ffn.expand(streams, self.ffn(x, ids), mixing)

    def __call__(
        self,
        streams: Float[Array, "B T n D"],
        ids: Int[Array, "B T"],
        state: LayerState,
        start: Int[Array, " B"],
        count: Int[Array, " B"],
    ) -> tuple[Float[Array, "B T n D"], LayerState]:
        """Updates the residual streams and this layer's cache."""
        streams, state, _ = self.attend(streams, state, start, count)
        return self.mix(streams, ids), state


class Mtp(Block):
    """Multi-token prediction module: a block that predicts token i+2 from the streams of token i
    and the id of token i+1 (7.1)."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig):
        super().__init__(leaves, cfg, compute, "sliding", "score")
        self.enorm = RMSNorm(leaves.sub("enorm"), cfg.rms_norm_eps)
        self.hnorm = RMSNorm(leaves.sub("hnorm"), cfg.rms_norm_eps)
        self.e_proj = Linear(leaves.sub("e_proj"), compute)
        self.h_proj = Linear(leaves.sub("h_proj"), compute)
        self.hc_head = HyperHead(leaves.sub("hc_head"), cfg)
        self.norm = RMSNorm(leaves.sub("norm"), cfg.rms_norm_eps)

    def join(
        self, embedded: Float[Array, "B T D"], streams: Float[Array, "B T n D"]
    ) -> Float[Array, "B T n D"]:
        """The block's input streams: the next token's embedding added to each normed stream."""
        token = self.e_proj(self.enorm(embedded))[:, :, None]
        return token + self.h_proj(self.hnorm(streams))


def _scales_of(leaves: Mapping[str, Leaf], table: Table) -> set[str]:
    """Paths of the scales that must lie beside quantised weights, and beside no other."""
    paths = (p for p in table if p.endswith(".weight") and p in leaves)
    quantised = (p for p in paths if leaves[p].dtype in (jnp.float8_e4m3fn, jnp.uint8))
    return {p.removesuffix("weight") + "scale" for p in quantised}


class DeepSeekV4(nnx.Module):
    """The backbone.

    `leaves` maps every path of `parameter_table(cfg)` (and `.scale` beside each quantised weight)
    to an array, or to a `jax.ShapeDtypeStruct` to plan a model without weights. A leaf that is
    missing or unknown raises ValueError with all such paths.
    """

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, leaves: Mapping[str, Leaf]):
        table = parameter_table(cfg)
        wanted = table.keys() | _scales_of(leaves, table)
        missing, unknown = sorted(wanted - leaves.keys()), sorted(leaves.keys() - wanted)
        if missing or unknown:
            raise ValueError(f"leaves must match the model: missing {missing}, unknown {unknown}")
        root = Leaves(leaves, table)
        kinds = zip(cfg.layer_types, cfg.mlp_types, strict=True)
        self.cfg, self.compute = cfg, compute
        self.embed = Linear(root.sub("embed"), compute)
        self.layers = nnx.List(
            [Block(root.sub(f"layers.{i}"), cfg, compute, *kind) for i, kind in enumerate(kinds)]
        )
        self.hc_head = HyperHead(root.sub("hc_head"), cfg)
        self.norm = RMSNorm(root.sub("norm"), cfg.rms_norm_eps)
        self.head = Linear(root.sub("head"), compute)
        self.mtp = nnx.List(
            [Mtp(sub, cfg, compute) for sub in root.subs("mtp", cfg.num_nextn_predict_layers)]
        )

    @property
    def dtype(self) -> jnp.dtype:
        """Activation dtype."""
        return jnp.dtype(self.compute.dtype)

    def embedding(self, ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings, unscaled (2.1)."""
        return take_rows(self.embed.weight[...], ids).astype(self.dtype)

    def streams(self, ids: Int[Array, "B T"]) -> Float[Array, "B T n D"]:
        """The first layer's residual streams: one embedding, n times (2.1)."""
        x = self.embedding(ids)
        return jnp.broadcast_to(x[:, :, None], (*ids.shape, self.cfg.hc_mult, x.shape[-1]))

    def __call__(
        self, ids: Int[Array, "B T"], state: DecodeState, count: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T n D"], DecodeState]:
        """Appends ids[b, :count[b]] to row b; returns the last layer's streams and the new state.

        Works from any offset and for any T, so it is prefill, chunked prefill and decode. Streams
        of padding tokens are meaningless and leave no trace in the state.
        """
        streams = self.streams(ids)
        layers = []
        for i, (block, layer) in enumerate(zip(self.layers, state.layers, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                streams, layer = block(streams, ids, layer, state.lengths, count)
            layers.append(layer)
        return streams, DecodeState(tuple(layers), state.lengths + count)

    def logits(self, streams: Float[Array, "B T n D"]) -> Float[Array, "B T V"]:
        """Final collapse, norm and LM head; float32 (2.4, 8)."""
        return self.head(self.norm(self.hc_head(streams)), jnp.float32)

    def mtp_logits(
        self, streams: Float[Array, "B T n D"], next_ids: Int[Array, "B T"], depth: int = 0
    ) -> tuple[Float[Array, "B T V"], Float[Array, "B T n D"]]:
        """Logits for the token after `next_ids`, and the MTP streams, over a whole sequence (7.1).

        `streams` are the backbone's at positions i, `next_ids` the tokens at i + 1.
        """
        module = self.mtp[depth]
        batch, tokens = next_ids.shape
        window = jnp.zeros((batch, self.cfg.sliding_window, self.cfg.head_dim), self.dtype)
        state = LayerState(window, None, None, None, None)
        zeros = jnp.zeros((batch,), jnp.int32)
        joined = module.join(self.embedding(next_ids), streams)
        out, _ = module(joined, next_ids, state, zeros, zeros + tokens)
        return self.head(module.norm(module.hc_head(out)), jnp.float32), out

    def empty_state(self, cache: CacheConfig, *, batch: int, capacity: int) -> DecodeState:
        """An empty decode state for this model."""
        return init_state(self.cfg, cache, batch=batch, capacity=capacity, dtype=self.dtype)
