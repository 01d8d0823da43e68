"""Manifold-constrained hyper-connections (mHC): mixing the residual streams (spec 2.2-2.4)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lsa_jax.config import ComputeConfig, ModelConfig
from lsa_jax.nn.layers import Leaves, matmul
from pallas_kernels import dispatch
from pallas_kernels.hc_mix import IMPLEMENTATIONS, hc_mix


class Mixing(NamedTuple):
    """Coefficients of one site, float32."""

    pre: Float[Array, "B T n"]  # streams -> sublayer input
    post: Float[Array, "B T n"]  # sublayer output -> streams
    comb: Float[Array, "B T n n"]  # streams -> streams, applied transposed


def _bfloat16_parts(x: Float[Array, "k d"]) -> Float[Array, "3 k d"]:
    """Three bfloat16 arrays whose sum is x to float32 accuracy. `reduce_precision` rounds in a way
    that no compiler may optimise into the identity."""
    parts = []
    for _ in range(3):
        part = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        x = x - part
    return jnp.stack(parts)


def _project(
    streams: Float[Array, "B T n D"], fn: Array
) -> tuple[Float[Array, "B T k"], Float[Array, "B T"]]:
    """Flattened streams times fn^T, and the sum of their squares, in float32.

    bfloat16 streams meet fn as three bfloat16 parts: the same float32 sum of exact products, but on
    matrix units and reading the streams at half the width.
    """
    flat = streams.reshape(*streams.shape[:2], -1)
    if flat.dtype == jnp.bfloat16:
        parts = _bfloat16_parts(fn).reshape(-1, fn.shape[1])
        z = matmul(flat, parts, jnp.float32).reshape(*flat.shape[:2], 3, -1).sum(axis=2)
    else:
        z = matmul(flat, fn, jnp.float32)
    return z, jnp.sum(jnp.square(flat.astype(jnp.float32)), axis=-1)


class HyperConnection(nnx.Module):
    """One mHC site around a sublayer."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig):
        self.cfg, self.backend = cfg, compute.kernel_backend
        self.fn, self.base = leaves.param("fn"), leaves.param("base")
        self.scale = leaves.param("scale")

    def coefficients(self, streams: Float[Array, "B T n D"]) -> Mixing:
        """Mixing weights from the current streams (2.2)."""
        n = self.cfg.hc_mult
        z, squares = _project(streams, self.fn[...])
        mixed = hc_mix(
            z.reshape(-1, z.shape[-1]),
            squares.reshape(-1),
            self.scale[...],
            self.base[...],
            streams=n,
            iterations=self.cfg.hc_sinkhorn_iters,
            eps=self.cfg.hc_eps,
            width=self.fn.shape[1],
            norm_eps=self.cfg.rms_norm_eps,
            backend=dispatch.of_model(IMPLEMENTATIONS, self.backend),
        ).reshape(z.shape)
        comb = mixed[..., 2 * n :].reshape(*z.shape[:-1], n, n)
        return Mixing(mixed[..., :n], mixed[..., n : 2 * n], comb)

    @staticmethod
    def collapse(streams: Float[Array, "B T n D"], pre: Array) -> Float[Array, "B T D"]:
        """Weighted sum of the streams: the sublayer's input before its norm (2.3)."""
        mixed = jnp.sum(pre[..., None] * streams.astype(jnp.float32), axis=-2)
        return mixed.astype(streams.dtype)

    @staticmethod
    def expand(streams: Float[Array, "B T n D"], out: Array, mixing: Mixing) -> Array:
        """post (x) out + comb^T streams, float32 with one cast: comb's FIRST axis is summed.

        The barrier makes compilers write the cast streams, not the float32 sum twice their size.
        """
        old = streams.astype(jnp.float32)
        carried = jnp.sum(mixing.comb[..., None] * old[..., :, None, :], axis=-3)
        new = mixing.post[..., None] * out.astype(jnp.float32)[..., None, :] + carried
        return jax.lax.optimization_barrier(new.astype(streams.dtype))


class HyperHead(nnx.Module):
    """Final collapse of the streams; no Sinkhorn, no normalisation of the weights (2.4)."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig):
        self.cfg = cfg
        self.fn, self.base = leaves.param("fn"), leaves.param("base")
        self.scale = leaves.param("scale")

    def __call__(self, streams: Float[Array, "B T n D"]) -> Float[Array, "B T D"]:
        """The weighted sum of the streams, in their dtype."""
        z, squares = _project(streams, self.fn[...])
        mean = squares[..., None] / self.fn.shape[1]
        normed = z * jax.lax.rsqrt(mean + self.cfg.rms_norm_eps)
        pre = jax.nn.sigmoid(normed * self.scale[...] + self.base[...]) + self.cfg.hc_eps
        return HyperConnection.collapse(streams, pre)
