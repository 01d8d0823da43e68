"""The Sinkhorn normalisation's reverse mode, for training.

The forward pass keeps every iteration's row and column scales, from which each iteration's adjoint
is a few products. Tokens are the last axis and the iterations unrolled, so that XLA makes about one
kernel of each; differentiating the definition's loop makes some ten of each, twenty times. The
barriers keep XLA from weighing fusions across iterations, which took most of its time to compile.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _tokens_last(x: Float[Array, "*b n n"]) -> Float[Array, "n n N"]:
    n = x.shape[-1]
    return jnp.moveaxis(x.reshape(-1, n, n), 0, -1)


def _rescale(scale: Array, sums: Array, eps: float) -> Array:
    return scale / (scale * sums + eps)


def forward(
    soft: Float[Array, "*b n n"], iterations: int, eps: float
) -> tuple[Float[Array, "*b n n"], tuple[Array, list[Array], list[Array]]]:
    """The normalised matrix, and what `backward` needs: the scales before and after each step.

    A column step comes first and last: there are `iterations + 1` column scales, the first of them
    ones, and `iterations` row scales.
    """
    matrix = _tokens_last(soft)
    ones = jnp.ones_like(matrix[0])
    rows, cols = [ones], [ones, _rescale(ones, jnp.sum(matrix, axis=0), eps)]
    for _ in range(iterations - 1):
        row = _rescale(rows[-1], jnp.sum(matrix * cols[-1], axis=1), eps)
        col = _rescale(cols[-1], jnp.sum(matrix * row[:, None], axis=0), eps)
        row, col = jax.lax.optimization_barrier((row, col))
        rows.append(row)
        cols.append(col)
    out = rows[-1][:, None] * matrix * cols[-1]
    return jnp.moveaxis(out, -1, 0).reshape(soft.shape), (matrix, rows, cols)


def backward(
    iterations: int,
    eps: float,
    kept: tuple[Array, list[Array], list[Array]],
    cotangent: Float[Array, "*b n n"],
) -> tuple[Float[Array, "*b n n"]]:
    """The cotangent of `soft`.

    With new = old / (old * sums + eps): d new / d sums = -new^2, d new / d old = eps (new / old)^2.
    """
    matrix, rows, cols = kept
    out = _tokens_last(cotangent)
    row = jnp.sum(out * matrix * cols[-1], axis=1)
    col = jnp.sum(out * matrix * rows[-1][:, None], axis=0)
    row_sums, col_sums = [], []  # cotangents of the sums that a step divided by, last step first
    for i in range(iterations - 1, 0, -1):
        col_sum = -jnp.square(cols[i + 1]) * col
        row = row + jnp.sum(matrix * col_sum, axis=1)
        row_sum = -jnp.square(rows[i]) * row
        col = eps * jnp.square(cols[i + 1] / cols[i]) * col
        col = col + jnp.sum(matrix * row_sum[:, None], axis=0)
        row = eps * jnp.square(rows[i] / rows[i - 1]) * row
        row, col, row_sum, col_sum = jax.lax.optimization_barrier((row, col, row_sum, col_sum))
        row_sums.append(row_sum)
        col_sums.append(col_sum)
    col_sums.append(-jnp.square(cols[1]) * col)
    total = rows[-1][:, None] * out * cols[-1]
    total += jnp.sum(jnp.stack(rows[::-1])[:, :, None] * jnp.stack(col_sums)[:, None], axis=0)
    if row_sums:  # the row step i read the columns that the column step before it left
        read = jnp.stack(cols[iterations - 1 : 0 : -1])
        total += jnp.sum(jnp.stack(row_sums)[:, :, None] * read[:, None], axis=0)
    return (jnp.moveaxis(total, -1, 0).reshape(cotangent.shape),)
