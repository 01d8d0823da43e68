"""TPU kernel for fp8 weights and few rows: weight blocks stream through VMEM as stored.

Each 128 x 128 block is widened to bfloat16 and multiplied; its scale, read from SMEM, multiplies
the small product.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.quant_matmul.reference import BLOCK
from pallas_kernels.rows import e8m0

MOST_ROWS = 256
ROW_TILE = 16  # bfloat16 sublanes


def _kernel(scale, x, w, out, acc, *, blocks_k: int):
    """x [M, block_k], w [block_n, block_k], out and acc [M, block_n]; scale [N/128 * K/128]."""
    i, j = pl.program_id(0), pl.program_id(1)
    wide, deep = w.shape[0] // BLOCK, w.shape[1] // BLOCK

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)

    for a in range(wide):
        columns = slice(a * BLOCK, (a + 1) * BLOCK)
        total = acc[:, columns]
        for b in range(deep):
            inputs = slice(b * BLOCK, (b + 1) * BLOCK)
            part = jax.lax.dot_general(
                x[:, inputs],
                w[columns, inputs].astype(x.dtype),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
            )
            total += part * scale[(i * wide + a) * blocks_k + j * deep + b]
        acc[:, columns] = total

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        out[...] = acc[...].astype(out.dtype)


def _block(size: int, most: int) -> int:
    """The largest multiple of 128 up to `most` that divides `size`."""
    return next(b for b in range(most, 0, -BLOCK) if size % b == 0)


@functools.partial(jax.jit, static_argnames=("out", "block_n", "block_k", "interpret"))
def quant_matmul(
    x: Float[Array, "M K"],
    w: Array,
    scale: Array,
    out: Any,
    *,
    block_n: int = 512,
    block_k: int = 1024,
    interpret: Any = False,
) -> Float[Array, "M N"]:
    """See the package's `quant_matmul`. Jitted, so that all layers lower one kernel once."""
    (rows, k), n = x.shape, w.shape[0]
    if w.dtype != jnp.float8_e4m3fn:
        raise Unsupported("packed fp4: TPUs have no cheap way to spread nibbles over lanes")
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"x must be bfloat16, got {x.dtype}")
    if n % BLOCK or k % BLOCK:
        raise Unsupported(f"N and K must be multiples of {BLOCK}, got {n} and {k}")
    if not 0 < rows <= MOST_ROWS:
        raise Unsupported(f"1 to {MOST_ROWS} rows are read for, got {rows}")
    block_n, block_k = _block(n, block_n), _block(k, block_k)
    padded = jnp.pad(x, ((0, -rows % ROW_TILE), (0, 0)))
    y = pl.pallas_call(
        functools.partial(_kernel, blocks_k=k // BLOCK),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(n // block_n, k // block_k),
            in_specs=[
                pl.BlockSpec((padded.shape[0], block_k), lambda i, j, _: (0, j)),
                pl.BlockSpec((block_n, block_k), lambda i, j, _: (i, j)),
            ],
            out_specs=pl.BlockSpec((padded.shape[0], block_n), lambda i, j, _: (0, i)),
            scratch_shapes=[pltpu.VMEM((padded.shape[0], block_n), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((padded.shape[0], n), out),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="quant_matmul",
        interpret=interpret,
    )(e8m0(scale).reshape(-1), padded, w)
    return y[:rows]
