"""The definition in plain XLA (DeepSeek-V4 spec 2.2)."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hc_mix import gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def normalise(soft: Float[Array, "*b n n"], iterations: int, eps: float) -> Float[Array, "*b n n"]:
    """Alternating normalisation of columns (axis -2) and rows that begins and ends on columns.

    Every normalisation scales rows or columns, so the result is r_j * soft_jk * c_k: only the two
    vectors of scales are iterated, half the work and half the kernels of iterating the matrix.
    """

    def rescale(scale: Array, sums: Array) -> Array:
        return scale / (scale * sums + eps)

    def step(_: int, scales: tuple[Array, Array]) -> tuple[Array, Array]:
        row, col = scales
        row = rescale(row, jnp.sum(soft * col[..., None, :], axis=-1))
        return row, rescale(col, jnp.sum(soft * row[..., :, None], axis=-2))

    ones = jnp.ones_like(soft[..., 0])
    scales = (ones, rescale(ones, jnp.sum(soft, axis=-2)))
    row, col = jax.lax.fori_loop(0, iterations - 1, step, scales)
    return row[..., :, None] * soft * col[..., None, :]


normalise.defvjp(gradient.forward, gradient.backward)


def sinkhorn(logits: Float[Array, "*b n n"], iterations: int, eps: float) -> Float[Array, "*b n n"]:
    """Row softmax, then alternating normalisation that ends on columns (axis -2)."""
    return normalise(jax.nn.softmax(logits, axis=-1) + eps, iterations, eps)


def hc_mix(
    z: Float[Array, "N k"],
    squares: Float[Array, " N"],
    scale: Float[Array, "3"],
    base: Float[Array, " k"],
    *,
    streams: int,
    iterations: int,
    eps: float,
    width: int,
    norm_eps: float,
) -> Float[Array, "N k"]:
    """See the package's `hc_mix`."""
    n = streams
    widths = (n, n, n * n)
    scales = jnp.concatenate([jnp.full(w, scale[i]) for i, w in enumerate(widths)])
    factor = jax.lax.rsqrt(squares * (1 / width) + norm_eps)
    logits = z * factor[:, None] * scales + base
    pre = jax.nn.sigmoid(logits[:, :n]) + eps
    post = 2 * jax.nn.sigmoid(logits[:, n : 2 * n])
    comb = sinkhorn(logits[:, 2 * n :].reshape(-1, n, n), iterations, eps)
    return jnp.concatenate([pre, post, comb.reshape(-1, n * n)], axis=-1)
