"""Token-to-entry compression: CSA (overlapping windows) and HCA, prefill and decode in one code.

An entry is a per-channel softmax average over its tokens (spec 4). Softmax statistics are
associative, so a chunk of any length is reduced window by window and the first window is merged
with the statistics that earlier chunks left in the tail: one-shot, chunked and token-by-token
prefill are the same computation.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsa_jax.cache.state import EMPTY_GATE, Tail
from lsa_jax.config import ComputeConfig, ModelConfig
from lsa_jax.nn import rope
from lsa_jax.nn.layers import Leaves, Linear, RMSNorm, take_rows


class NewEntries(NamedTuple):
    """Entries that a chunk completed: row b owns the first count[b], at indices first[b] + i."""

    values: Float[Array, "B E dim"]  # normed, roped, float32
    first: Int[Array, " B"]
    count: Int[Array, " B"]


def _merge(a: Array, b: Array) -> Array:
    """Softmax statistics [..., 3, width] of two disjoint token sets -> of their union."""
    top = jnp.maximum(a[..., 0, :], b[..., 0, :])
    wa, wb = jnp.exp(a[..., 0, :] - top), jnp.exp(b[..., 0, :] - top)
    total = a[..., 1, :] * wa + b[..., 1, :] * wb
    return jnp.stack([top, total, a[..., 2, :] * wa + b[..., 2, :] * wb], axis=-2)


def _reduce(value: Float[Array, "B w m k"], gate: Float[Array, "B w m k"]) -> Array:
    """Statistics [B, w, 3, k] over the tokens of each window; EMPTY_GATE tokens do not count."""
    top = jnp.max(gate, axis=2)
    weight = jnp.where(gate > EMPTY_GATE / 2, jnp.exp(gate - top[:, :, None]), 0.0)
    return jnp.stack([top, weight.sum(axis=2), (weight * value).sum(axis=2)], axis=2)


def _slices(x: Float[Array, "B S k"], start: Int[Array, " B"], size: int) -> Float[Array, "B s k"]:
    take = jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size, axis=0))
    return take(x, start)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _align(x: Float[Array, "B T k"], offset: Int[Array, " B"], ratio: int, fill: float) -> Array:
    """Places token t of a chunk at slot offset + t of whole windows -> [B, windows, ratio, k].

    The gradient takes the slots back by slices too; XLA would add them up one by one.
    """
    tokens = x.shape[1]
    windows = (tokens + ratio - 2) // ratio + 1
    total = windows * ratio
    padded = jnp.pad(x, ((0, 0), (ratio - 1, total - tokens), (0, 0)), constant_values=fill)
    return _slices(padded, ratio - 1 - offset, total).reshape(x.shape[0], windows, ratio, -1)


def _align_forward(
    x: Array, offset: Array, ratio: int, fill: float
) -> tuple[Array, tuple[Array, Array]]:
    return _align(x, offset, ratio, fill), (x, offset)


def _align_backward(
    ratio: int, fill: float, kept: tuple[Array, Array], cotangent: Array
) -> tuple[Array, None]:
    x, offset = kept
    slots = cotangent.reshape(x.shape[0], -1, x.shape[2])
    return _slices(slots, offset, x.shape[1]), None


_align.defvjp(_align_forward, _align_backward)


class Compressor(nnx.Module):
    """Turns normed sublayer inputs into compressed entries (or index keys) of width `dim`."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig, freqs: np.ndarray):
        self.ratio = leaves.spec("ape").shape[0]
        self.dim = leaves.spec("norm.weight").shape[0]
        self.overlap = leaves.spec("ape").shape[1] == 2 * self.dim
        self.freqs = tuple(map(float, freqs))
        self.ape = leaves.param("ape")
        self.wkv = Linear(leaves.sub("wkv"), compute)
        self.wgate = Linear(leaves.sub("wgate"), compute)
        self.norm = RMSNorm(leaves.sub("norm"), cfg.rms_norm_eps)

    def __call__(
        self, x: Float[Array, "B T D"], start: Int[Array, " B"], count: Int[Array, " B"], tail: Tail
    ) -> tuple[NewEntries, Tail]:
        """Row b's tokens are x[b, :count[b]], from position start[b]; returns what they finish."""
        stats = self._window_statistics(x, start, count, tail)
        before, after = start // self.ratio, (start + count) // self.ratio
        entries, history = stats, None
        if self.overlap:
            first_half, second_half = stats[..., : self.dim], stats[..., self.dim :]
            assert tail.previous is not None
            history = jnp.concatenate([tail.previous[:, None], first_half], axis=1)
            entries = _merge(history[:, :-1], second_half)
        pooled = entries[:, :, 2] / jnp.maximum(entries[:, :, 1], 1e-30)  # unfinished ones: unused
        index = before[:, None] + jnp.arange(stats.shape[1])
        freqs = np.asarray(self.freqs, np.float32)
        values = rope.rotate(self.norm(pooled), index * self.ratio, freqs)
        new = NewEntries(values, before, after - before)
        return new, self._next_tail(stats, history, after - before)

    def _window_statistics(
        self, x: Array, start: Array, count: Array, tail: Tail
    ) -> Float[Array, "B w 3 width"]:
        """Statistics of every window the chunk touches; the first includes the tail."""
        tokens = jnp.arange(x.shape[1])
        slot = (start[:, None] + tokens) % self.ratio
        value = self.wkv(x, jnp.float32)
        gate = self.wgate(x, jnp.float32) + take_rows(self.ape[...], slot)
        gate = jnp.where((tokens < count[:, None])[..., None], gate, EMPTY_GATE)
        if x.shape[1] == 1:  # a single token needs no alignment
            stats = _reduce(value[:, :, None], gate[:, :, None])
        else:
            offset = start % self.ratio
            aligned = _align(gate, offset, self.ratio, EMPTY_GATE)
            stats = _reduce(_align(value, offset, self.ratio, 0.0), aligned)
        return stats.at[:, 0].set(_merge(tail.current, stats[:, 0]))

    def _next_tail(self, stats: Array, history: Array | None, finished: Int[Array, " B"]) -> Tail:
        """Statistics of the window the next token falls into."""
        empty = jnp.zeros_like(stats[:, :1]).at[:, :, 0].set(EMPTY_GATE)
        windows = jnp.concatenate([stats, empty], axis=1)
        rows = jnp.arange(stats.shape[0])
        previous = None if history is None else history[rows, finished]
        return Tail(windows[rows, finished], previous)
