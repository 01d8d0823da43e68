"""GPU kernel through jax-triton: streams the visible entries with asynchronous copies."""

import jax
from jaxtyping import Array, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels import split_softmax_gpu as gpu
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Rows


def default_tuning(batch: int, heads: int, entries: int) -> gpu.Tuning:
    """Splits of at least 128 entries each, were all of them visible."""
    return gpu.Tuning(splits=soft.default_splits(batch, heads, max(1, entries // 128)), stages=4)


def dense_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    count: Int[Array, " B"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    tuning: gpu.Tuning | None = None,
) -> Float[Array, "B H c"]:
    """See the package's `dense_decode`."""
    gpu.require(q, rows, group)
    if not jax.tree.leaves(rows)[0].size:
        raise Unsupported("there must be entries")
    tuning = tuning or default_tuning(q.shape[0], q.shape[1], soft.lead(rows)[1])
    options = {"scale": scale, "own": True, "tuning": tuning, "name": "dense_decode"}
    return gpu.attend(q, window, window_count, rows, count, sink, **options)
