"""Hopper kernel: one thread owns one token and keeps its whole matrix in registers, or of few
tokens a block each.

XLA runs the Sinkhorn loop as some forty tiny kernels per site; here it is one.
"""

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Unsupported

TOKENS = 128  # one warpgroup, one token a thread
FEW = 64  # tokens that have a block each
SIZES = ("streams", "iterations", "eps", "width", "norm_eps", "interpret")


def _total(values: list[Array]) -> Array:
    return functools.reduce(operator.add, values)


def _sinkhorn(logits: list[list[Array]], iterations: int, eps: float) -> list[Array]:
    """Same scheme as the definition: iterate the row and column scales of the softmax."""
    n = len(logits)
    soft = []
    for row in logits:
        top = functools.reduce(jnp.maximum, row)
        exps = [jnp.exp(x - top) for x in row]
        total = _total(exps)
        soft.append([x / total + eps for x in exps])

    def columns(row: list[Array], col: list[Array]) -> list[Array]:
        sums = [_total([soft[j][k] * row[j] for j in range(n)]) for k in range(n)]
        return [c / (c * s + eps) for c, s in zip(col, sums, strict=True)]

    def step(_: Array, scales: tuple[list[Array], list[Array]]) -> tuple[list[Array], list[Array]]:
        row, col = scales
        sums = [_total([soft[j][k] * col[k] for k in range(n)]) for j in range(n)]
        row = [r / (r * s + eps) for r, s in zip(row, sums, strict=True)]
        return row, columns(row, col)

    ones = [jnp.ones_like(soft[0][0])] * n
    row, col = ones, columns(ones, ones)
    if iterations > 1:  # the first step is apart: constants have another layout than a loop carries
        first = step(jnp.int32(0), (row, col))
        row, col = jax.lax.fori_loop(1, iterations - 1, step, first)
    return [row[j] * soft[j][k] * col[k] for j in range(n) for k in range(n)]


@functools.partial(jax.jit, static_argnames=SIZES)
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
    interpret: bool = False,
) -> Float[Array, "N k"]:
    """See the package's `hc_mix`. Jitted, so that a model's many sites lower one kernel once."""
    tokens = z.shape[0]
    if z.dtype != jnp.float32:
        raise Unsupported(f"z must be float32, got {z.dtype}")

    def mix(z: list[Array], squares: Array, scale: Any, base: Any) -> list[Array]:
        n, factor = streams, jax.lax.rsqrt(squares * (1 / width) + norm_eps)
        site = [0] * n + [1] * n + [2] * (n * n)
        logits = [x * factor * scale[site[i]] + base[i] for i, x in enumerate(z)]
        sigmoids = [1 / (1 + jnp.exp(-x)) for x in logits[: 2 * n]]
        pre, post = [s + eps for s in sigmoids[:n]], [2 * s for s in sigmoids[n:]]
        grid = [logits[n * (2 + j) : n * (3 + j)] for j in range(n)]
        return [*pre, *post, *_sinkhorn(grid, iterations, eps)]

    if tokens <= FEW:
        return _apart(mix, z, squares, scale, base, interpret)
    pad = -tokens % TOKENS
    padded = jnp.pad(z, ((0, pad), (0, 0))).T
    out = _together(mix, padded, jnp.pad(squares, (0, pad)), scale, base, interpret)
    return out.T[:tokens]


def _apart(mix: Any, z: Array, squares: Array, scale: Array, base: Array, interpret: bool) -> Array:
    """[N, k] -> [N, k]: a block for each token, whose threads all compute the same. Arrays are
    taken as they are: to transpose and pad them would be another kernel's work."""

    def body(z_ref, squares_ref, scale_ref, base_ref, out_ref):
        token = jax.lax.axis_index("token")
        values = [z_ref[token, i] for i in range(z.shape[1])]
        for i, value in enumerate(mix(values, squares_ref[token], scale_ref, base_ref)):
            out_ref[token, i] = value

    return _kernel(body, z.shape, {"token": z.shape[0]}, interpret)(z, squares, scale, base)


def _together(
    mix: Any, z: Array, squares: Array, scale: Array, base: Array, interpret: bool
) -> Array:
    """[k, N] -> [k, N], N a multiple of `TOKENS`: a thread for each token."""

    def body(z_ref, squares_ref, scale_ref, base_ref, out_ref):
        at = pl.ds(jax.lax.axis_index("block") * TOKENS, TOKENS)
        values = [z_ref[i, at] for i in range(z.shape[0])]
        for i, value in enumerate(mix(values, squares_ref[at], scale_ref, base_ref)):
            out_ref[i, at] = value

    blocks = z.shape[1] // TOKENS
    return _kernel(body, z.shape, {"block": blocks}, interpret)(z, squares, scale, base)


def _kernel(body: Any, shape: tuple[int, ...], grid: dict[str, int], interpret: bool) -> Any:
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        compiler_params=plgpu.CompilerParams(
            # The other semantics infer layouts: seconds of Python in every program that is lowered.
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            unsafe_no_auto_barriers=True,  # nothing that is written is read: no store need wait
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="hc_mix",
    )
