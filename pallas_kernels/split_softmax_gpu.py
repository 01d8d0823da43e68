"""Decode attention through jax-triton: parts of a row's keys, then their combination.

One program alone takes its keys one block after the other, each block's fetch, products and softmax
in turn: small batches share a row's keys among `splits` programs, and a second kernel joins their
parts. Triton turns the fetch of rows into 16-byte asynchronous copies.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Fp8Rows, Rows

FP8_SIZES = (512, 64, 64)  # dims, rotary dims and group that the fp8 kernel is written for
TILE = 16  # heads of the smallest matrix product
COMBINED = 16  # splits times heads whose 512 dims one program of `combine` reads at once, about


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Sizes that change a kernel's speed and, but for rounding, not its result."""

    splits: int  # programs that share one row's keys
    block: int = 32  # keys at a time
    stages: int = 3  # blocks in flight, the one in use included
    warps: int = 8
    through: Any = jnp.bfloat16  # dtype of the matrix products with fp8 rows: see `_codes`
    parts: Any = jnp.float32  # dtype of the sums between the two kernels


def require(q: Array, rows: Rows, group: int) -> None:
    """Raises Unsupported for what the Triton kernels do not take."""
    dims = q.shape[2]
    if q.dtype != jnp.bfloat16:
        raise Unsupported(f"q must be bfloat16, got {q.dtype}")
    if isinstance(rows, Fp8Rows):
        sizes = (dims, rows.rope.shape[-1], group)
        if sizes != FP8_SIZES:
            raise Unsupported(f"fp8 rows must have (dims, rope, group) {FP8_SIZES}, got {sizes}")
    elif rows.dtype != jnp.bfloat16:
        raise Unsupported(f"rows must be bfloat16 or fp8, got {rows.dtype}")
    elif dims.bit_count() != 1 or not 16 <= dims <= 512:
        raise Unsupported(f"dims must be a power of two from 16 to 512, got {dims}")


def attend(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    picked: tuple[Int[Array, "B k"], Bool[Array, "B k"]] | Int[Array, " B"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    own: bool,
    tuning: Tuning,
    name: str,
) -> Float[Array, "B H c"]:
    """Picked entries (indices into the flattened rows, or own rows, and which count), or counts."""
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels import split_softmax_triton as kernels

    given = q.shape
    q, sink = soft.pad_heads(q, sink, TILE)
    (batch, heads, dims), splits = q.shape, tuning.splits
    index, valid = picked if isinstance(picked, tuple) else (window_count, picked)
    tile = math.gcd(heads, soft.HEADS)
    sizes: dict[str, Any] = {
        "picks": index.shape[1] if isinstance(picked, tuple) else 0,
        **{"heads": heads, "slots": window.shape[1], "per_row": soft.lead(rows)[1], "own": own},
        **{"scale": scale, "splits": splits, "tile": tile},
        **{"block": tuning.block, "stages": tuning.stages},
    }
    if isinstance(rows, Fp8Rows):
        import triton.language as tl  # pyright: ignore[reportMissingImports]

        kernel, planes = kernels.fp8_parts, tuple(rows)
        sizes["kind"] = tl.float16 if tuning.through == jnp.float16 else tl.bfloat16
    else:
        kernel, planes = kernels.plain_parts, (rows,)
        sizes["dims"] = dims
    dtype = tuning.parts if splits > 1 else q.dtype
    sums, stats = jax_triton.triton_call(
        *(q, window, window_count, *planes, index, valid, sink),
        kernel=kernel,
        out_shape=(
            jax.ShapeDtypeStruct((batch, splits, heads, dims), dtype),
            jax.ShapeDtypeStruct((batch, splits, 2, heads), jnp.float32),
        ),
        grid=(batch, splits, heads // tile),
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        name=name,
        **sizes,
    )
    out = sums[:, 0] if splits == 1 else _combine(sums, stats, sink, q.dtype, name)
    return out[:, : given[1]]


def _combine(sums: Array, stats: Array, sink: Array, dtype: Any, name: str) -> Array:
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels import split_softmax_triton as kernels

    batch, splits, heads, dims = sums.shape
    padded = 1 << (splits - 1).bit_length()
    tile = math.gcd(heads, max(1, COMBINED // padded))
    width = math.gcd(dims, max(32, COMBINED * 512 // (padded * tile)))
    return jax_triton.triton_call(
        *(sums, stats, sink),
        kernel=kernels.combine,
        out_shape=jax.ShapeDtypeStruct((batch, heads, dims), dtype),
        grid=(batch, heads // tile, dims // width),
        num_warps=4,
        name=f"{name}_combine",
        **{"heads": heads, "dims": dims, "splits": splits, "padded": padded},
        **{"tile": tile, "width": width},
    )
