"""GPU kernel through jax-triton: weights are read as stored and dequantised in registers.

One kernel for plain and for expert products, fp8 and fp4. Experts need no sorting pass: each pair's
program looks through the list of experts, and the first of an expert's pairs (and each eighth or
sixteenth after it) takes the others along, so an expert's weights are read once. Long sums are
split over programs until the GPU is full; XLA adds the parts.
"""

import dataclasses
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
LOOKED_AT = 32  # pairs at once that each warp looks at for its program's own: few registers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Sizes that change the kernel's speed and, but for rounding, not its result."""

    block_m: int  # rows of a program
    block_n: int  # outputs
    block_k: int  # inputs at a time
    warps: int
    stages: int  # of inputs in shared memory
    splits: int | None = None  # programs that share a sum; default: until the GPU is full
    apart: bool = False  # for fp4, XLA sorts x by its inputs' places in a word of codes beforehand


def power(least: int) -> int:
    """The power of two that is not below."""
    return 1 << max(0, least - 1).bit_length()


def split_count(programs: int, steps: int) -> int:
    """Into how many parts to split sums of `steps` steps: a divisor, at least two steps a part."""
    fits = [s for s in (1, 2, 4, 8, 16) if steps % s == 0 and steps // s >= 2]
    return next((s for s in fits if s * programs >= PROGRAMS), fits[-1] if fits else 1)


def tuned(rows: int, w: Array, k: int, experts: bool) -> Tuning:
    """Sizes for so many rows or pairs."""
    n, groups = w.shape[-2], 1 if w.ndim == 2 else w.shape[0]
    if w.dtype != jnp.uint8:
        tile = 16 if experts else min(64, max(16, power(rows)))
        return Tuning(block_m=tile, block_n=64, block_k=128, warps=4, stages=4)
    # Eight rows are the fewest that a product has, and most experts have one or two pairs: up to
    # that many on average a second reading, from the cache, is rare. With more rows two warps:
    # with four Triton takes the larger instruction, and waits for each.
    tile = 8 if rows <= 8 * groups else 16 if experts else min(32, power(rows))
    few = -(-n // 64) * (rows if experts else -(-rows // tile)) < PROGRAMS
    return Tuning(
        block_m=tile,
        block_n=32 if few or tile > 8 else 64,
        block_k=128 if k % 256 or tile > 16 else 256,
        warps=2 if few or tile > 8 else 4,
        stages=5 if few else 3,
        apart=not few,  # saves registers, so more programs run at once; costs a kernel
    )


def _supported(x: Array, w: Array, tuning: Tuning) -> None:
    fp4, k = w.dtype == jnp.uint8, x.shape[1]
    if x.dtype != jnp.bfloat16:
        raise Unsupported(f"x must be bfloat16, got {x.dtype}")
    if k % tuning.block_k:
        raise Unsupported(f"K must be a multiple of {tuning.block_k}, got {k}")
    if BLOCK % tuning.block_n or (not fp4 and BLOCK % tuning.block_k):
        got = f"{tuning.block_n} x {tuning.block_k}"
        raise Unsupported(f"blocks must divide {BLOCK}, got {got}")
    if not fp4 and dispatch.target().capability < FP8_CAPABILITY:
        raise Unsupported(f"fp8 weights need compute capability {FP8_CAPABILITY}")


def _run(
    x: Array, experts: Array | None, w: Array, scale: Array, tuning: Tuning
) -> Float[Array, "S N"]:
    _supported(x, w, tuning)
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.quant_matmul import triton_kernel

    (rows, k), n, fp4 = x.shape, w.shape[-2], w.dtype == jnp.uint8
    apart, pairs = fp4 and tuning.apart, rows if experts is None else experts.shape[0]
    columns = -(-n // tuning.block_n)
    tiles = pairs if experts is not None else -(-pairs // tuning.block_m)
    steps = k // tuning.block_k
    splits = tuning.splits or split_count(columns * tiles, steps)
    if steps % splits:
        raise Unsupported(f"splits must divide {steps} steps, got {splits}")
    if apart:
        x = x.reshape(rows, k // 4, 4).transpose(2, 0, 1)
    parts = jax_triton.triton_call(
        x, scale if experts is None else experts.astype(jnp.int32), w, scale,
        kernel=triton_kernel.quant_matmul,
        out_shape=jax.ShapeDtypeStruct((splits, pairs, n), jnp.float32),
        grid=(columns, tiles, splits),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        name="quant_matmul",
        n=n, k=k, pairs=pairs, share=pairs // rows,
        part=min(LOOKED_AT * tuning.warps, power(max(16, pairs))),
        groups=1 if w.ndim == 2 else w.shape[0], fp4=fp4, apart=apart,
        ragged=experts is not None, block_m=tuning.block_m, block_n=tuning.block_n,
        block_k=tuning.block_k, steps=steps // splits,
    )  # fmt: skip
    return parts[0] if splits == 1 else jnp.sum(parts, axis=0)


@functools.partial(jax.jit, static_argnames=("out", "tuning"))
def quant_matmul(
    x: Float[Array, "M K"], w: Array, scale: Array, out: Any, *, tuning: Tuning | None = None
) -> Float[Array, "M N"]:
    """See the package's `quant_matmul`. Jitted, so that all layers lower one kernel once."""
    rows, k = x.shape
    if not 0 < rows <= MOST_ROWS:
        raise Unsupported(f"1 to {MOST_ROWS} rows are read for, got {rows}")
    return _run(x, None, w, scale, tuning or tuned(rows, w, k, False)).astype(out)


@functools.partial(jax.jit, static_argnames="tuning")
def expert_matmul(
    x: Float[Array, "R K"],
    experts: Int[Array, " S"],
    w: Array,
    scale: Array,
    *,
    tuning: Tuning | None = None,
) -> Float[Array, "S N"]:
    """See the package's `expert_matmul`. Jitted, so that all layers lower one kernel once."""
    pairs, k = experts.shape[0], x.shape[1]
    if pairs > MOST_PAIRS:
        raise Unsupported(f"at most {MOST_PAIRS} pairs, got {pairs}")
    return _run(x, experts, w, scale, tuning or tuned(pairs, w, k, True))
