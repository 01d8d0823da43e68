"""Partial interleaved RoPE with YaRN: every rotation of the model, in one place (spec 3.2)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsa_jax.config import LayerType, ModelConfig, YarnConfig


def yarn_ramp(dim: int, base: float, yarn: YarnConfig) -> np.ndarray:
    """0 where a frequency is kept, 1 where it is divided by the factor."""

    def turns(rotations: float) -> float:
        span = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(span) / (2 * math.log(base))

    low = max(math.floor(turns(yarn.beta_fast)), 0)
    high = min(math.ceil(turns(yarn.beta_slow)), dim - 1)
    width = (high - low) or 0.001
    return np.clip((np.arange(dim // 2) - low) / width, 0, 1)


def frequencies(cfg: ModelConfig, layer_type: LayerType) -> np.ndarray:
    """Angle per position of each channel pair, float32 [rope_dim / 2].

    One table per layer serves queries, window, output, compressed entries and index keys:
    sliding layers use the plain base, compressed layers their own base with YaRN.
    """
    dim = cfg.qk_rope_head_dim
    base = cfg.rope_theta if layer_type == "sliding" else cfg.compress_rope_theta
    freqs = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if layer_type != "sliding" and cfg.yarn is not None:
        ramp = yarn_ramp(dim, base, cfg.yarn)
        freqs = freqs * (1 - ramp) + freqs / cfg.yarn.factor * ramp
    return freqs.astype(np.float32)


def rotate(
    x: Float[Array, "*b d"],
    positions: Int[Array, "..."],
    freqs: np.ndarray,
    *,
    inverse: bool = False,
) -> Float[Array, "*b d"]:
    """Rotates the last 2 * len(freqs) channels of x, adjacent pairs, in float32; dtype is kept.

    `positions` has x's leading axes, or fewer: missing trailing ones (heads) are broadcast.
    """
    angle = positions[..., None].astype(jnp.float32) * freqs
    angle = angle.reshape(*positions.shape, *(1,) * (x.ndim - 1 - positions.ndim), len(freqs))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    sin = -sin if inverse else sin
    split = x.shape[-1] - 2 * len(freqs)
    pairs = x[..., split:].astype(jnp.float32).reshape(*x.shape[:-1], len(freqs), 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    tail = turned.reshape(*x.shape[:-1], 2 * len(freqs)).astype(x.dtype)
    return jnp.concatenate([x[..., :split], tail], axis=-1)
