"""Greedy decoding with full attention that also records what a memory indexer is trained on.

    engine = TappedEngine(model, cache, TapConfig(targets=(10, 12, 20), top_k=512))
    logits, state = engine.prefill(engine.start(batch=1, capacity=4096), [prompt_ids])
    burst, taps, state = engine.record(state, token, steps=64)
    taps, state = engine.replay(state, tokens)

The loop is that of `Engine.decode`, and a step that of the model; tokens that are known beforehand
go through it together, as in a prefill. What is tapped is computed beside a layer, from its input
and its states around it, by the layer's own methods; the compiler merges what the layer computes
itself. A layer without taps is thus left as it is.
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
    hidden: Float[Array, "T D"]
    scores: Float[Array, "T N"]
    logits: Float[Array, "T k"]
    entries: Int[Array, "T k"]
    mass: Float[Array, "T m"]


def entry_mass(
    attn: Attention,
    latent: Float[Array, "1 T r"],
    positions: Int[Array, "1 T"],
    before: LayerState,
    after: LayerState,
    index: Int[Array, "1 T m"],
    valid: Bool[Array, "1 T m"],
) -> Float[Array, "T m"]:
    """Attention on entries that a CSA layer attends, for T <= window tokens: softmax over these,
    the window, and the sink logit; mean over heads, float32. `before` and `after` are the states
    around these tokens, whose windows together have all that each of them attends to."""
    assert after.entries is not None
    q = attn.queries(latent, positions)[0]
    picked = take_entries(flat_entries(after.entries), index)
    entries = codec.decode_entries(attn.cfg, picked, attn.dtype)[0]
    window = jnp.concatenate([before.window[0], after.window[0]]).astype(attn.dtype)
    within = _in_window(positions[0], before.window.shape[1])

    def scores(spec: str, keys: Array, exists: Bool[Array, "T n"]) -> Float[Array, "T H n"]:
        exact = {"precision": precision(q.dtype), "preferred_element_type": jnp.float32}
        dots = jnp.einsum(spec, q, keys, **exact) * attn.cfg.head_dim**-0.5
        return jnp.where(exists[:, None], dots, -jnp.inf)

    sink = attn.sink_logit[...].astype(jnp.float32)[:, None]
    sink = jnp.broadcast_to(sink, (len(q), *sink.shape))
    rest = [scores("thc,nc->thn", window, within), sink]
    both = jnp.concatenate([scores("thc,tnc->thn", entries, valid[0]), *rest], axis=2)
    return jnp.mean(jax.nn.softmax(both, axis=2)[..., : entries.shape[1]], axis=1)


def _in_window(positions: Int[Array, " T"], size: int) -> Bool[Array, "T n"]:
    """What consecutive tokens see of the two rings around them: of the one before them what they
    have not left behind, of the one after them what lies between the first of them and each."""
    slots, first = jnp.arange(size), positions[0]
    old = first - 1 - (first - 1 - slots) % size
    new = first + (slots - first) % size
    old = (old >= 0) & (old > positions[:, None] - size)
    return jnp.concatenate([old, new <= positions[:, None]], axis=1)


def tap_layer(
    attn: Attention,
    x: Float[Array, "1 T D"],
    positions: Int[Array, "1 T"],
    before: LayerState,
    after: LayerState,
    top_k: int,
) -> _LayerTap:
    """What a CSA layer's indexer and attention make of its input, T <= window tokens; `before` and
    `after` are the layer's states around them."""
    assert attn.indexer is not None and after.index_keys is not None
    latent = attn.latent_query(x)
    query = attn.indexer.queries(latent, x, positions)
    scores = index_scores(*query, flat_entries(after.index_keys), backend=attn.backend)
    visible = visible_entries(positions, attn.cfg.csa_ratio, scores.shape[-1])
    attended = min(attn.cfg.index_topk, scores.shape[-1])
    index, valid = topk_indices(scores, visible, max(top_k, attended), backend="xla")
    logits = jnp.where(valid, jnp.take_along_axis(scores, index, axis=-1), -jnp.inf)
    some = index[..., :attended], valid[..., :attended]
    mass = entry_mass(attn, latent, positions, before, after, *some)
    return _LayerTap(x[0], scores[0], logits[0], index[0], mass)


def tapped(
    model: DeepSeekV4,
    top_k: int,
    state: DecodeState,
    ids: Int[Array, "1 T"],
    count: Int[Array, " 1"],
) -> tuple[Float[Array, "1 T n D"], DecodeState, list[_LayerTap]]:
    """`model(ids, state, count)`, and what every CSA layer saw; T is at most the window."""
    positions = state.lengths[:, None] + jnp.arange(ids.shape[1])
    streams, layers, taps = model.streams(ids), [], []
    for i, (block, before) in enumerate(zip(model.layers, state.layers, strict=True)):
        with jax.named_scope(f"layer_{i}"):
            streams, after, x = block.attend(streams, before, state.lengths, count)
            streams = block.mix(streams, ids)
        layers.append(after)
        if block.attn.indexer is not None:
            with jax.named_scope(f"taps_{i}"):
                taps.append(tap_layer(block.attn, x, positions, before, after, top_k))
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


def _stacked(config: TapConfig, seen: list[_LayerTap]) -> Taps:
    """Taps of the tokens that went through the model together."""
    targets = [seen[ordinal] for ordinal in config.targets]
    return Taps(
        hidden=jnp.stack([tap.hidden for tap in targets], axis=1),
        logits=jnp.stack([tap.logits for tap in seen], axis=1),
        entries=jnp.stack([tap.entries for tap in seen], axis=1),
        mass=jnp.stack([tap.mass for tap in seen], axis=1),
        golden=jnp.stack([tap.scores[:GOLDEN_STEPS] for tap in targets], axis=1),
    )


def _noted(taps: Taps, step: Int[Array, ""], one: Taps) -> Taps:
    """Taps with those of one step; of `golden`, steps that are out of range are dropped."""
    return jax.tree.map(lambda all_, x: all_.at[step].set(x[0], mode="drop"), taps, one)


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
        if self.replay_tokens < GOLDEN_STEPS:
            got = f"{max_burst} and {model.cfg.sliding_window}"
            raise ConfigError(f"max_burst and the window must be >= {GOLDEN_STEPS}, got {got}")
        check_targets(model.cfg, taps.targets)
        self.taps = taps

    def record(
        self,
        state: DecodeState,
        token: Int[Array, " 1"],
        *,
        steps: int,
        stop: Sequence[int] = (),
    ) -> tuple[Burst, Taps, DecodeState]:
        """Feeds `token`, draws the likeliest next, and so on, as `decode` does with `Greedy`.

        Step i's taps are of the token that it feeds, at position state.lengths + i.
        """
        if state.lengths.shape != (1,):
            raise ConfigError(f"state must have one row, got {state.lengths.shape[0]}")
        if not 1 <= steps <= self.max_burst:
            raise ConfigError(f"steps must be in 1..max_burst={self.max_burst}, got {steps}")
        self._check_room(state, np.array([steps]))
        args = self._rows(token), jnp.int32(steps), self.taps, tuple(stop)
        (burst, taps), state = self._run("record", state, *args)
        return burst, taps, state

    def replay(self, state: DecodeState, tokens: Sequence[int]) -> tuple[Taps, DecodeState]:
        """Feeds these tokens, at most `replay_tokens`, at once: what `record` would tap if it had
        drawn them. Taps have room for `replay_tokens`."""
        if state.lengths.shape != (1,):
            raise ConfigError(f"state must have one row, got {state.lengths.shape[0]}")
        if not 1 <= len(tokens) <= self.replay_tokens:
            wanted = f"1..replay_tokens={self.replay_tokens}"
            raise ConfigError(f"tokens must be {wanted}, got {len(tokens)}")
        count = np.array([len(tokens)], np.int32)
        self._check_room(state, count)
        ids = np.zeros((1, self.replay_tokens), np.int32)
        ids[0, : len(tokens)] = tokens
        return self._run("replay", state, jnp.asarray(ids), jnp.asarray(count), self.taps)

    @property
    def replay_tokens(self) -> int:
        """Tokens that `replay` takes at once: a window and a burst hold so many."""
        return min(self.max_burst, self.cfg.sliding_window)

    def _replay(self, config: TapConfig) -> Callable[..., Any]:
        def program(
            weights: list[Array], state: DecodeState, ids: Array, count: Array
        ) -> tuple[Taps, DecodeState]:
            model = jax.tree.unflatten(self._treedef, weights)
            _, state, seen = tapped(model, config.top_k, state, ids, count)
            return _stacked(config, seen), state

        return program

    def _record(self, config: TapConfig, stop: tuple[int, ...]) -> Callable[..., Any]:
        def program(
            weights: list[Array], state: DecodeState, token: Array, n: Array
        ) -> tuple[tuple[Burst, Taps], DecodeState]:
            model = jax.tree.unflatten(self._treedef, weights)

            def forward(
                at: _Recording, token: Array, live: Array
            ) -> tuple[Float[Array, "1 V"], _Recording]:
                count = live.astype(jnp.int32)
                streams, state, seen = tapped(model, config.top_k, at.state, token[:, None], count)
                drawn = model.logits(streams)[:, 0]
                taps = _noted(at.taps, at.step, _stacked(config, seen))
                return drawn, _Recording(state, taps, at.step + 1)

            taps = _empty_taps(self.cfg, config, state, self.max_burst, model.dtype)
            burst = empty_burst(jnp.zeros((1,), bool), self.max_burst, None)
            begun = _Recording(state, taps, jnp.int32(0))
            key = jax.random.key(0)  # greedy decoding draws nothing
            burst, ended = run_burst(
                forward, begun, burst, token, key, n, sampler=Greedy(), stop=stop
            )
            return (burst, ended.taps), ended.state

        return program
