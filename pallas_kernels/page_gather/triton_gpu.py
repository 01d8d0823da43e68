"""GPU kernels through jax-triton: a program copies one chunk of one record."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, UInt8

CHUNK_BYTES = 16384  # with four warps: eight 16-byte loads in flight in each thread
WARPS = 4


def _sizes(pool: Array, entries: int, chunk_bytes: int, warps: int) -> dict[str, Any]:
    """Launch parameters; the kernels count in words of four bytes."""
    record = pool.shape[1] * pool.shape[2] // 4
    chunk = min(chunk_bytes // 4, 1 << (record - 1).bit_length())
    shape = {"count": pool.shape[0], "record": record, "chunk": chunk}
    return shape | {"grid": (-(-record // chunk) * entries,), "num_warps": warps}


def page_gather(
    pool: UInt8[Array, "S R 128"],
    slots: Int[Array, " M"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    warps: int = WARPS,
) -> UInt8[Array, "M R 128"]:
    """See the package's `page_gather`. `chunk_bytes` is a power of two."""
    out = jax.ShapeDtypeStruct((*slots.shape, *pool.shape[1:]), pool.dtype)
    if not out.size or not pool.size:
        return jnp.zeros(out.shape, out.dtype)
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.page_gather.triton_kernel import gather

    sizes = _sizes(pool, slots.shape[0], chunk_bytes, warps)
    return jax_triton.triton_call(
        slots, pool, kernel=gather, out_shape=out, name="page_gather", **sizes
    )


def page_scatter(
    pool: UInt8[Array, "S R 128"],
    records: UInt8[Array, "M R 128"],
    slots: Int[Array, " M"],
    *,
    chunk_bytes: int = CHUNK_BYTES,
    warps: int = WARPS,
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_scatter`. `chunk_bytes` is a power of two."""
    if not records.size or not pool.size:
        return pool
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.page_gather.triton_kernel import scatter

    return jax_triton.triton_call(
        slots,
        records,
        pool,
        kernel=scatter,
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={2: 0},
        name="page_scatter",
        **_sizes(pool, slots.shape[0], chunk_bytes, warps),
    )
