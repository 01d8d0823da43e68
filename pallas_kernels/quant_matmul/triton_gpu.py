"""GPU kernel through jax-triton: weights are read as stored and dequantised in registers.

One kernel for plain and for expert products, fp8 and fp4. Experts need no sorting pass: each pair's
program looks through the list of experts, and the first of an expert's pairs (and each sixteenth
after it) takes the others along, so an expert's weights are read once. Long sums are split over
programs until the GPU is full; XLA adds the parts.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.quant_matmul.reference import BLOCK

FP8_CAPABILITY = 8.9
MOST_ROWS = 256  # beyond, dequantising once for an ordinary matmul is faster
MOST_PAIRS = 4096
PROGRAMS = 256  # nearly two for each multiprocessor of an H100
TUNABLE = ("block_m", "block_n", "block_k", "splits", "warps", "stages")


def split_count(programs: int, steps: int) -> int:
    """Into how many parts to split sums of `steps` steps: a divisor, at least two steps a part."""
    fits = [s for s in (1, 2, 4, 8, 16) if steps % s == 0 and steps // s >= 2]
    return next((s for s in fits if s * programs >= PROGRAMS), fits[-1] if fits else 1)


def _supported(x: Array, w: Array, block_n: int, block_k: int) -> None:
    fp4, k = w.dtype == jnp.uint8, x.shape[1]
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"x must be bfloat16, got {x.dtype}")
    if k % block_k:
        raise Unsupported(f"K must be a multiple of {block_k}, got {k}")
    if BLOCK % block_n or (not fp4 and BLOCK % block_k):
        raise Unsupported(f"blocks must divide {BLOCK}, got {block_n} x {block_k}")
    capability = dispatch.target().capability
    if not fp4 and capability < FP8_CAPABILITY:
        raise Unsupported(f"fp8 weights need compute capability {FP8_CAPABILITY}")


def _run(
    x: Array, experts: Array | None, w: Array, scale: Array, *, block_m: int, block_n: int,
    block_k: int, splits: int | None, warps: int, stages: int,
) -> Float[Array, "S N"]:  # fmt: skip
    _supported(x, w, block_n, block_k)
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.quant_matmul import triton_kernel

    (rows, k), n = x.shape, w.shape[-2]
    pairs = rows if experts is None else experts.shape[0]
    columns, tiles = -(-n // block_n), pairs if experts is not None else -(-pairs // block_m)
    steps = k // block_k
    splits = splits or split_count(columns * tiles, steps)
    if steps % splits:
        raise Unsupported(f"splits must divide {steps} steps, got {splits}")
    parts = jax_triton.triton_call(
        x, scale if experts is None else experts.astype(jnp.int32), w, scale,
        kernel=triton_kernel.quant_matmul,
        out_shape=jax.ShapeDtypeStruct((splits, pairs, n), jnp.float32),
        grid=(columns, tiles, splits),
        num_warps=warps,
        num_stages=stages,
        name="quant_matmul",
        n=n, k=k, pairs=pairs, padded=-(-pairs // 64) * 64, share=pairs // rows,
        groups=1 if w.ndim == 2 else w.shape[0], fp4=w.dtype == jnp.uint8,
        ragged=experts is not None, block_m=block_m, block_n=block_n, block_k=block_k,
        steps=steps // splits,
    )  # fmt: skip
    return parts[0] if splits == 1 else jnp.sum(parts, axis=0)


@functools.partial(jax.jit, static_argnames=("out", *TUNABLE))
def quant_matmul(
    x: Float[Array, "M K"],
    w: Array,
    scale: Array,
    out: Any,
    *,
    block_m: int | None = None,
    block_n: int = 64,
    block_k: int = 128,
    splits: int | None = None,
    warps: int = 4,
    stages: int = 4,
) -> Float[Array, "M N"]:
    """See the package's `quant_matmul`. Jitted, so that all layers lower one kernel once."""
    rows = x.shape[0]
    if not 0 < rows <= MOST_ROWS:
        raise Unsupported(f"1 to {MOST_ROWS} rows are read for, got {rows}")
    tile = block_m or min(64, max(16, 1 << (rows - 1).bit_length()))
    y = _run(
        x, None, w, scale, block_m=tile, block_n=block_n, block_k=block_k, splits=splits,
        warps=warps, stages=stages,
    )  # fmt: skip
    return y.astype(out)


@functools.partial(jax.jit, static_argnames=TUNABLE)
def expert_matmul(
    x: Float[Array, "R K"],
    experts: Int[Array, " S"],
    w: Array,
    scale: Array,
    *,
    block_m: int = 16,
    block_n: int = 64,
    block_k: int = 128,
    splits: int | None = None,
    warps: int = 4,
    stages: int = 4,
) -> Float[Array, "S N"]:
    """See the package's `expert_matmul`. Jitted, so that all layers lower one kernel once."""
    if experts.shape[0] > MOST_PAIRS:
        raise Unsupported(f"at most {MOST_PAIRS} pairs, got {experts.shape[0]}")
    return _run(
        x, experts, w, scale, block_m=block_m, block_n=block_n, block_k=block_k, splits=splits,
        warps=warps, stages=stages,
    )  # fmt: skip
