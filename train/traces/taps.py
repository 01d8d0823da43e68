"""Greedy decoding with full attention that also records what a memory indexer is trained on.

    engine = TappedEngine(model, cache, TapConfig(targets=(10, 12, 20), top_k=512))
    logits, state = engine.prefill(engine.start(batch=1, capacity=4096), [prompt_ids])
    burst, taps, state = engine.record(state, token, steps=64)

The loop is that of `Engine.decode`, and a step that of the model. What is tapped is computed beside
a layer, from its input and its state after the step, by the layer's own methods; the compiler
merges what the layer computes itself. A layer without taps is thus left as it is.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.cache import codec
from lsa_jax.cache.resident import take_entries
from lsa_jax.cache.state import DecodeState, LayerState, flat_entries
from lsa_jax.config import CacheConfig, ConfigError, ModelConfig
from lsa_jax.config_checks import number, refusal
from lsa_jax.engine import Burst, Engine, empty_burst, run_burst
from lsa_jax.lsa.targets import check_targets, csa_layers
from lsa_jax.nn.attention import Attention
from lsa_jax.nn.layers import precision
from lsa_jax.nn.lightning_indexer import index_scores, topk_indices
from lsa_jax.nn.site import visible_entries
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Greedy

GOLDEN_STEPS = 3  # first steps of a burst whose native logits are kept whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class TapConfig:
    """What is tapped: the target layers (CSA ordinals), and of how many entries each CSA layer's
    highest logits are kept, at least (`index_topk` are anyway)."""

    targets: tuple[int, ...]
    top_k: int

    def __post_init__(self) -> None:
        if number("taps.top_k", self.top_k, int) < 1:
            raise refusal("taps.top_k", self.top_k, ">= 1")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Taps:
    """What S steps of one row saw, at L target layers and C CSA layers; N entries have room.

    Per CSA layer, the k = min(max(top_k, index_topk), N) highest native logits, descending and of
    equal ones the lowest entry first, are -inf where fewer entries existed. The layer attended the
    first m = min(index_topk, N) of them. Only as many steps as the burst took are filled.
    """

    hidden: Float[Array, "S L D"]  # the layer's attention input
    logits: Float[Array, "S C k"]  # float32
    entries: Int[Array, "S C k"]  # whose logits
    mass: Float[Array, "S C m"]  # attention probability, window and sink counted; mean over heads
    golden: Float[Array, "G L N"]  # all native logits of the first G steps


class _LayerTap(NamedTuple):
    hidden: Float[Array, " D"]
    scores: Float[Array, " N"]
    logits: Float[Array, " k"]
    entries: Int[Array, " k"]
    mass: Float[Array, " m"]


def entry_mass(
    attn: Attention,
    latent: Float[Array, "1 1 r"],
    position: Int[Array, "1 1"],
    layer: LayerState,
    index: Int[Array, "1 1 m"],
    valid: Bool[Array, "1 1 m"],
) -> Float[Array, " m"]:
    """Attention on entries that a CSA layer attends in a decode step: softmax over these, the
    window, and the sink logit; mean over heads, float32. `layer` is the state after the step."""
    assert layer.entries is not None
    q = attn.queries(latent, position)[0, 0]
    picked = take_entries(flat_entries(layer.entries), index)
    entries = codec.decode_entries(attn.cfg, picked, attn.dtype)[0, 0]
    window = layer.window[0].astype(attn.dtype)
    there = jnp.arange(len(window)) <= position[0]

    def scores(keys: Float[Array, "n c"], exists: Bool[Array, " n"]) -> Float[Array, "H n"]:
        dots = jnp.einsum(
            "hc,nc->hn",
            q,
            keys,
            precision=precision(q.dtype),
            preferred_element_type=jnp.float32,
        )
        return jnp.where(exists, dots * attn.cfg.head_dim**-0.5, -jnp.inf)

    sink = attn.sink_logit[...].astype(jnp.float32)[:, None]
    rest = jnp.concatenate([scores(window, there), sink], axis=1)
    both = jnp.concatenate([scores(entries, valid[0, 0]), rest], axis=1)
    return jnp.mean(jax.nn.softmax(both, axis=1)[:, : len(entries)], axis=0)


def tap_layer(
    attn: Attention,
    x: Float[Array, "1 1 D"],
    position: Int[Array, "1 1"],
    layer: LayerState,
    top_k: int,
) -> _LayerTap:
    """What a CSA layer's indexer and attention make of its input; `layer` is the state after it."""
    assert attn.indexer is not None and layer.index_keys is not None
    latent = attn.latent_query(x)
    query = attn.indexer.queries(latent, x, position)
    scores = index_scores(*query, flat_entries(layer.index_keys), backend=attn.backend)
    visible = visible_entries(position, attn.cfg.csa_ratio, scores.shape[-1])
    attended = min(attn.cfg.index_topk, scores.shape[-1])
    index, valid = topk_indices(scores, visible, max(top_k, attended), backend="xla")
    logits = jnp.where(valid, jnp.take_along_axis(scores, index, axis=-1), -jnp.inf)
    some = index[..., :attended], valid[..., :attended]
    mass = entry_mass(attn, latent, position, layer, *some)
    return _LayerTap(x[0, 0], scores[0, 0], logits[0, 0], index[0, 0], mass)


def tapped_step(
    model: DeepSeekV4,
    top_k: int,
    state: DecodeState,
    token: Int[Array, " 1"],
    live: Bool[Array, " 1"],
) -> tuple[Float[Array, "1 1 n D"], DecodeState, list[_LayerTap]]:
    """`model(token[:, None], state, live)`, and what every CSA layer saw."""
    ids, count = token[:, None], live.astype(jnp.int32)
    streams, layers, taps = model.streams(ids), [], []
    for i, (block, layer) in enumerate(zip(model.layers, state.layers, strict=True)):
        with jax.named_scope(f"layer_{i}"):
            streams, layer, x = block.attend(streams, layer, state.lengths, count)
            streams = block.mix(streams, ids)
        layers.append(layer)
        if block.attn.indexer is not None:
            with jax.named_scope(f"taps_{i}"):
                taps.append(tap_layer(block.attn, x, state.lengths[:, None], layer, top_k))
    return streams, DecodeState(tuple(layers), state.lengths + count), taps


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Recording:
    """A decode state and what was tapped on the way to it."""

    state: DecodeState
    taps: Taps
    step: Int[Array, ""]

    @property
    def lengths(self) -> Int[Array, " 1"]:
        """Tokens of the row."""
        return self.state.lengths


def _empty_taps(
    cfg: ModelConfig, config: TapConfig, state: DecodeState, steps: int, dtype: jnp.dtype
) -> Taps:
    csa, targets = csa_layers(cfg), len(config.targets)
    keys = state.layers[csa[0]].index_keys
    assert keys is not None
    n = codec.capacity(keys)
    shape = steps, len(csa), min(n, max(config.top_k, cfg.index_topk))
    return Taps(
        hidden=jnp.zeros((steps, targets, cfg.hidden_size), dtype),
        logits=jnp.zeros(shape, jnp.float32),
        entries=jnp.zeros(shape, jnp.int32),
        mass=jnp.zeros((*shape[:2], min(n, cfg.index_topk)), jnp.float32),
        golden=jnp.zeros((GOLDEN_STEPS, targets, n), jnp.float32),
    )


def _noted(taps: Taps, config: TapConfig, step: Int[Array, ""], seen: list[_LayerTap]) -> Taps:
    """Taps with those of one step."""
    targets = [seen[ordinal] for ordinal in config.targets]
    scores = jnp.stack([tap.scores for tap in targets])
    return Taps(
        hidden=taps.hidden.at[step].set(jnp.stack([tap.hidden for tap in targets])),
        logits=taps.logits.at[step].set(jnp.stack([tap.logits for tap in seen])),
        entries=taps.entries.at[step].set(jnp.stack([tap.entries for tap in seen])),
        mass=taps.mass.at[step].set(jnp.stack([tap.mass for tap in seen])),
        golden=taps.golden.at[step].set(scores, mode="drop"),  # later steps are out of range
    )


class TappedEngine(Engine):
    """An engine that can also record. States have one row."""

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheConfig,
        taps: TapConfig,
        *,
        prefill_chunk: int = 1024,
        max_burst: int = 64,
        mesh: Mesh | None = None,
    ):
        super().__init__(model, cache, prefill_chunk=prefill_chunk, max_burst=max_burst, mesh=mesh)
        if max_burst < GOLDEN_STEPS:
            raise ConfigError(f"max_burst must be >= {GOLDEN_STEPS}, got {max_burst}")
        check_targets(model.cfg, taps.targets)
        self.taps = taps

    def record(
        self,
        state: DecodeState,
        token: Int[Array, " 1"],
        *,
        steps: int,
        forced: Sequence[int] = (),
        stop: Sequence[int] = (),
    ) -> tuple[Burst, Taps, DecodeState]:
        """Feeds `token`, draws the likeliest next, and so on, as `decode` does with `Greedy`.

        Step i's taps are of the token that it feeds, at position state.lengths + i. Where `forced`
        is not empty, forced[i] stands for the token that step i draws.
        """
        if state.lengths.shape != (1,):
            raise ConfigError(f"state must have one row, got {state.lengths.shape[0]}")
        if not 1 <= steps <= self.max_burst:
            raise ConfigError(f"steps must be in 1..max_burst={self.max_burst}, got {steps}")
        if len(forced) not in (0, steps):
            raise ConfigError(f"forced must have {steps} tokens or none, got {len(forced)}")
        self._check_room(state, np.array([steps]))
        given = np.full(self.max_burst, -1, np.int32)
        given[: len(forced)] = forced
        args = self._rows(token), jnp.asarray(given), jnp.int32(steps), self.taps, tuple(stop)
        (burst, taps), state = self._run("record", state, *args)
        return burst, taps, state

    def _record(self, config: TapConfig, stop: tuple[int, ...]) -> Callable[..., Any]:
        def program(
            weights: list[Array], state: DecodeState, token: Array, forced: Array, n: Array
        ) -> tuple[tuple[Burst, Taps], DecodeState]:
            model = jax.tree.unflatten(self._treedef, weights)

            def forward(
                at: _Recording, token: Array, live: Array
            ) -> tuple[Float[Array, "1 V"], _Recording]:
                streams, state, seen = tapped_step(model, config.top_k, at.state, token, live)
                drawn = model.logits(streams)[:, 0]
                given = forced[at.step]
                drawn = jnp.where(given < 0, drawn, jax.nn.one_hot(given, drawn.shape[-1]))
                return drawn, _Recording(state, _noted(at.taps, config, at.step, seen), at.step + 1)

            taps = _empty_taps(self.cfg, config, state, self.max_burst, model.dtype)
            burst = empty_burst(jnp.zeros((1,), bool), self.max_burst, None)
            begun = _Recording(state, taps, jnp.int32(0))
            key = jax.random.key(0)  # greedy decoding draws nothing
            burst, ended = run_burst(
                forward, begun, burst, token, key, n, sampler=Greedy(), stop=stop
            )
            return (burst, ended.taps), ended.state

        return program
