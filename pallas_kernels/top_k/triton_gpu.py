"""GPU kernel through jax-triton: each launch keeps the k best of every chunk of a row.

A program is bound by the latency of its some 20 to 30 counts over a chunk, not by bytes, so rows
are split over programs until a chunk is left: one launch up to `block` columns, two up to
`block * block / k`. Columns of candidates stay in order, so that ties keep theirs.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dispatch import Unsupported

BLOCK = 8192  # columns of a program
MAX_GRID = 65535  # of a grid's second dimension


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def launches(columns: int, k: int, block: int) -> list[tuple[int, int, int]]:
    """Width, chunk size and chunks of each launch; the last has one chunk."""
    plan = []
    while True:
        size = min(block, _power_of_two(max(columns, 128)))
        chunks = -(-columns // size)
        plan.append((columns, size, chunks))
        if chunks == 1:
            return plan
        columns = chunks * k


def warps_of(size: int, per_thread: int) -> int:
    """Warps whose threads hold `per_thread` columns each, but four to 32 of them."""
    return min(32, max(4, size // (32 * per_thread)))


def top_k(
    scores: Float[Array, "R N"],
    visible: Int[Array, " R"] | Bool[Array, "R N"],
    k: int,
    *,
    limit: Int[Array, " R"] | None = None,
    block: int = BLOCK,
    per_thread: int = 32,
    bits: int = 1,
) -> tuple[Int[Array, "R k"], Bool[Array, "R k"]]:
    """See the package's `top_k`. Places are in order of column.

    `block` columns a program, a power of two, `per_thread` of them in a thread; `bits` of the k-th
    score are found at a time: 1 by counting, 4 or 8 by histograms.
    """
    rows, columns = scores.shape
    if k > block // 2:
        raise Unsupported(f"k must be at most {block // 2}, got {k}")
    if not rows or not columns:
        raise Unsupported(f"scores must have a row and a column, got {list(scores.shape)}")
    plan = launches(columns, k, block)
    if plan[0][2] > MAX_GRID:
        raise Unsupported(f"scores must have at most {MAX_GRID * block} columns, got {columns}")
    source, names, first = scores, visible, True
    for width, size, chunks in plan:
        fixed = {"width": width, "size": size, "chunks": chunks, "k": k, "bits": bits}
        warps = warps_of(size, per_thread)
        names, source = _launch(source, names, limit, first=first, warps=warps, **fixed)
        first = False
    return names, source


def _launch(
    source: Array, names: Array, limit: Array | None, *, first: bool, warps: int, **fixed: int
) -> tuple[Array, Array]:
    """Columns of the best candidates of every chunk, and their keys; which are valid, at last."""
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.top_k.triton_kernel import select

    rows, chunks, k = source.shape[0], fixed["chunks"], fixed["k"]
    shape = (rows, chunks * k)
    return jax_triton.triton_call(
        source,
        names,
        names if limit is None else limit,
        kernel=select,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.int32),
            jax.ShapeDtypeStruct(shape, jnp.bool_ if chunks == 1 else jnp.uint32),
        ],
        grid=(rows, chunks),
        num_warps=warps,
        name="top_k",
        places=_power_of_two(k),
        first=first,
        masked=first and names.ndim == 2,
        limited=limit is not None,
        **fixed,
    )
