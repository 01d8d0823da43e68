"""Hopper kernel: one thread owns one token and keeps its whole matrix in registers.

XLA runs the Sinkhorn loop as some forty tiny kernels per site; here it is one.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Unsupported

TOKENS = 128  # one warpgroup, one token a thread


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


@functools.partial(jax.jit, static_argnames=("streams", "iterations", "eps", "interpret"))
def hc_mix(
    z: Float[Array, "N k"],
    scale: Float[Array, "3"],
    base: Float[Array, " k"],
    *,
    streams: int,
    iterations: int,
    eps: float,
    interpret: bool = False,
) -> Float[Array, "N k"]:
    """See the package's `hc_mix`. Jitted, so that a model's many sites lower one kernel once."""
    n, (tokens, k) = streams, z.shape
    if z.dtype != jnp.float32:
        raise Unsupported(f"z must be float32, got {z.dtype}")
    blocks = -(-tokens // TOKENS)

    def body(z_ref, scale_ref, base_ref, out_ref):  # [k, N], [3], [k] -> [k, N], all in GMEM
        at = pl.ds(jax.lax.axis_index("block") * TOKENS, TOKENS)
        site = [0] * n + [1] * n + [2] * (n * n)
        logits = [z_ref[i, at] * scale_ref[site[i]] + base_ref[i] for i in range(k)]
        sigmoids = [1 / (1 + jnp.exp(-x)) for x in logits[: 2 * n]]
        pre, post = [s + eps for s in sigmoids[:n]], [2 * s for s in sigmoids[n:]]
        grid = [logits[n * (2 + j) : n * (3 + j)] for j in range(n)]
        for i, value in enumerate([*pre, *post, *_sinkhorn(grid, iterations, eps)]):
            out_ref[i, at] = value

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((k, blocks * TOKENS), jnp.float32),
        grid=(blocks,),
        grid_names=("block",),
        # The other semantics infer layouts: seconds of Python in every program that is lowered.
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if interpret else False,
        kernel_name="hc_mix",
    )
    padded = jnp.pad(z, ((0, blocks * TOKENS - tokens), (0, 0))).T
    return kernel(padded, scale, base).T[:tokens]
