"""GPU kernel through jax-triton: gathers picked entries with asynchronous copies, row by row."""

import jax
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels import split_softmax_gpu as gpu
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Rows


def default_tuning(batch: int, heads: int, slots: int, picks: int) -> gpu.Tuning:
    """Blocks of 32 keys, which divide evenly over few splits."""
    blocks = -(-slots // 32) + -(-picks // 32)
    return gpu.Tuning(splits=soft.default_splits(batch, heads, blocks), block=32, stages=4)


def sparse_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B k"],
    valid: Bool[Array, "B k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    own: bool,
    tuning: gpu.Tuning | None = None,
) -> Float[Array, "B H c"]:
    """See the package's `sparse_decode`."""
    gpu.require(q, rows, group)
    if not index.shape[1] or not jax.tree.leaves(rows)[0].size:
        raise Unsupported("there must be entries to pick from")
    (batch, heads, _), slots, picks = q.shape, window.shape[1], index.shape[1]
    tuning = tuning or default_tuning(batch, heads, slots, picks)
    picked, options = (index, valid), {"scale": scale, "own": own, "tuning": tuning}
    return gpu.attend(q, window, window_count, rows, picked, sink, name="sparse_decode", **options)
