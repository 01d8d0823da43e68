"""Whole sequences through the backbone, differentiably: what pre-training runs.

The modules are the ones that serve; only how they are strung together differs. Layers whose kinds
repeat are scanned over stacked leaves, so that a program is compiled for one period of the pattern;
every scanned step is computed again in the backward pass; the routed experts all run
(`Experts.everywhere`). A sequence starts at position 0 with empty caches.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsa_jax.cache.state import LayerState, init_state
from lsa_jax.config import CacheConfig, ComputeConfig, ConfigError, ModelConfig
from lsa_jax.nn.attend_blocks import PICKED
from lsa_jax.nn.layers import Leaves
from lsa_jax.nn.moe import Moe
from lsa_jax.nn.transformer import Block, DeepSeekV4
from lsa_jax.parameters import Table, parameter_table
from train.pretraining import index_teacher

_kept = jax.checkpoint_policies.save_only_these_names(PICKED)


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Layers `first .. first + period * repeats - 1` are the same `period` kinds over and over."""

    first: int
    period: int
    repeats: int


def repeated_layers(kinds: Sequence[object]) -> Pattern:
    """The repetition that leaves the fewest layers to compile; the shortest period among equals."""
    best, count = Pattern(0, len(kinds), 1), len(kinds)
    for period in range(1, len(kinds) // 2 + 1):
        for first in range(len(kinds) - 2 * period + 1):
            unit, repeats = tuple(kinds[first : first + period]), 1
            while tuple(kinds[first + repeats * period :][:period]) == unit:
                repeats += 1
            compiled = len(kinds) - (repeats - 1) * period
            if repeats > 1 and compiled < count:
                best, count = Pattern(first, period, repeats), compiled
    return best


class Observed(NamedTuple):
    """What a layer's pass shows besides its output; stacked or listed by layer."""

    load: Float[Array, " E"]  # share of the (token, choice) pairs that each expert got
    balance: Float[Array, ""]  # E * sum(load * mean affinity): 1 where both are even
    index: index_teacher.IndexLoss | None  # CSA layers, where asked for


def _moe(moe: Moe, x: Float[Array, "B T D"], ids: Int[Array, "B T"]) -> tuple[Array, Array, Array]:
    """The layer's output, and the load and balance of its experts."""
    flat = x.reshape(-1, x.shape[-1])
    affinity = moe.gate.affinity(flat)
    experts = moe.gate.choose(jax.lax.stop_gradient(affinity), ids.reshape(-1))
    count = affinity.shape[1]
    chosen = jnp.any(experts[..., None] == jnp.arange(count), axis=1)
    picked = jnp.where(chosen, affinity, 0)
    weight = picked / jnp.sum(picked, axis=-1, keepdims=True) * moe.gate.cfg.routed_scaling_factor
    out = moe.experts.everywhere(flat, weight) + moe.shared_experts(flat)
    share = jnp.mean(affinity / jnp.sum(affinity, axis=-1, keepdims=True), axis=0)
    load = jnp.mean(chosen, axis=0, dtype=jnp.float32) / experts.shape[1]
    return out.astype(x.dtype).reshape(x.shape), load, count * jnp.sum(load * share)


def _block(
    block: Block,
    streams: Float[Array, "B T n D"],
    ids: Int[Array, "B T"],
    state: LayerState,
    lesson: index_teacher.Lesson | None,
) -> tuple[Float[Array, "B T n D"], Observed]:
    """One layer on whole sequences."""
    zeros = jnp.zeros(ids.shape[:1], jnp.int32)
    streams, state, x = block.attend(streams, state, zeros, zeros + ids.shape[1])
    index = None
    if lesson is not None and block.attn.indexer is not None:
        index = index_teacher.index_loss(block.attn, x, state, lesson)
    mixing = block.hc_ffn.coefficients(streams)
    x = block.ffn_norm(block.hc_ffn.collapse(streams, mixing.pre))
    out, load, balance = _moe(block.ffn, x, ids)
    return block.hc_ffn.expand(streams, out, mixing), Observed(load, balance, index)


def _empty(cfg: ModelConfig, compute: ComputeConfig, batch: int, tokens: int) -> list[LayerState]:
    cache = CacheConfig(kv_format=compute.dtype)
    state = init_state(cfg, cache, batch=batch, capacity=tokens, dtype=compute.dtype)
    return list(state.layers)


class _Layers:
    """The layers of a model, by number and stacked, from its leaves."""

    def __init__(self, cfg: ModelConfig, compute: ComputeConfig, leaves: Mapping[str, Array]):
        self.cfg, self.compute, self.leaves = cfg, compute, leaves
        self.table: Table = parameter_table(cfg)
        self.kinds = list(zip(cfg.layer_types, cfg.mlp_types, strict=True))

    def names(self, i: int) -> list[str]:
        """Leaf paths below layer i."""
        prefix = f"layers.{i}."
        return [path.removeprefix(prefix) for path in self.table if path.startswith(prefix)]

    def of(self, i: int) -> dict[str, Array]:
        """The leaves of layer i by their names below it."""
        return {name: self.leaves[f"layers.{i}.{name}"] for name in self.names(i)}

    def stacked(self, layers: range) -> dict[str, Array]:
        """The leaves of layers of one kind, stacked."""
        parts = [self.of(i) for i in layers]
        return jax.tree.map(lambda *xs: jnp.stack(xs), *parts)

    def run(
        self,
        i: int,
        leaves: Mapping[str, Array],
        streams: Array,
        ids: Array,
        state: LayerState,
        lesson: index_teacher.Lesson | None,
    ) -> tuple[Array, Observed]:
        """A layer of layer i's kind with these leaves."""
        full = {f"layers.{i}.{name}": leaf for name, leaf in leaves.items()}
        view = Leaves(full, self.table).sub(f"layers.{i}")
        return _block(
            Block(view, self.cfg, self.compute, *self.kinds[i]), streams, ids, state, lesson
        )


def forward(
    cfg: ModelConfig,
    compute: ComputeConfig,
    leaves: Mapping[str, Array],
    ids: Int[Array, "B T"],
    *,
    lesson: index_teacher.Lesson | None = None,
) -> tuple[Float[Array, "B T n D"], list[Observed]]:
    """The last layer's streams and what each layer showed, in the order of the layers.

    Args:
      cfg: the model. A CSA layer attends to all visible entries where `index_topk` is at least as
        many, which is how it is trained before its indexer is.
      compute: arithmetic; kernels that have no gradient are the caller's to leave out
        (`backend="xla"`).
      leaves: dense leaves by path, in the dtypes to compute with.
      ids: token ids.
      lesson: what teaches the lightning indexers; none: they are not taught.
    """
    if leaves.keys() - parameter_table(cfg).keys():
        raise ConfigError("leaves must be dense to be trained, got quantised ones")
    layers = _Layers(cfg, compute, leaves)
    pattern = repeated_layers(layers.kinds)
    states = _empty(cfg, compute, *ids.shape)
    model = DeepSeekV4(cfg, compute, leaves)
    streams = model.streams(ids)
    end = pattern.first + pattern.period * pattern.repeats

    def one(i: int, streams: Array) -> tuple[Array, Observed]:
        run = jax.checkpoint(
            lambda leaves, s: layers.run(i, leaves, s, ids, states[i], lesson), policy=_kept
        )
        return run(layers.of(i), streams)

    def period(streams: Array, parts: list[dict[str, Array]]) -> tuple[Array, list[Observed]]:
        seen = []
        for j, part in enumerate(parts):
            i = pattern.first + j
            run = jax.checkpoint(
                lambda leaves, s, i=i: layers.run(i, leaves, s, ids, states[i], lesson),
                prevent_cse=False,
                policy=_kept,
            )
            streams, observed = run(part, streams)
            seen.append(observed)
        return streams, seen

    observed: list[Observed] = []
    for i in range(pattern.first):
        streams, seen = one(i, streams)
        observed.append(seen)
    if pattern.repeats > 1:
        starts = range(pattern.first, pattern.first + pattern.period)
        stacks = [layers.stacked(range(i, end, pattern.period)) for i in starts]
        streams, scanned = jax.lax.scan(period, streams, stacks)
        for r in range(pattern.repeats):
            observed += [jax.tree.map(lambda x, r=r: x[r], one_of) for one_of in scanned]
    else:
        end = pattern.first
    for i in range(end, cfg.num_layers):
        streams, seen = one(i, streams)
        observed.append(seen)
    return streams, observed


def mtp_streams(
    model: DeepSeekV4,
    streams: Float[Array, "B T n D"],
    next_ids: Int[Array, "B T"],
    depth: int = 0,
) -> tuple[Float[Array, "B T n D"], Observed]:
    """Streams of an MTP module, differentiably (`DeepSeekV4.mtp_logits` is the same to serve)."""
    module = model.mtp[depth]
    cfg, batch = model.cfg, len(next_ids)
    window = jnp.zeros((batch, cfg.sliding_window, cfg.head_dim), model.dtype)
    state = LayerState(window, None, None, None, None)
    joined = module.join(model.embedding(next_ids), streams)
    return _block(module, joined, next_ids, state, None)
