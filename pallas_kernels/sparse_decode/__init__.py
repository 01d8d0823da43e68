"""Decode attention over a window and picked entries: one query token per row of the batch."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch, split_softmax
from pallas_kernels.rows import Rows
from pallas_kernels.sparse_decode import mosaic_gpu, mosaic_tpu, reference, triton_gpu

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.sparse_decode,
    dispatch.MOSAIC_GPU: mosaic_gpu.sparse_decode,
    dispatch.TRITON: triton_gpu.sparse_decode,
    dispatch.MOSAIC_TPU: mosaic_tpu.sparse_decode,
}


def _in_turn(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """A kernel that wants an index, for entries that are picked already."""

    def run(q: Array, window: Array, count: Array, rows: Rows, _: None, *args: Array, **how: Any):
        index = jnp.arange(split_softmax.lead(rows)[1], dtype=jnp.int32)
        index = jnp.broadcast_to(index, split_softmax.lead(rows))
        return kernel(q, window, count, rows, index, *args, **how)

    return run


_IN_TURN = {
    name: run if name == dispatch.XLA else _in_turn(run) for name, run in IMPLEMENTATIONS.items()
}


def _check(rows: Rows, index: Array | None, valid: Array, batch: int, own: bool) -> None:
    if own and split_softmax.lead(rows)[0] != batch:
        raise ValueError(
            f"rows must have {batch} rows of their own, got {split_softmax.lead(rows)[0]}"
        )
    if index is None:
        if not own:
            raise ValueError("index may be left out only where rows are own")
        shape = split_softmax.lead(rows)
    else:
        shape = index.shape
        if index.dtype != "int32" or index.ndim != 2 or shape[0] != batch:
            wanted = f"int32 [{batch}, k]"
            raise ValueError(f"index must be {wanted}, got {index.dtype} {list(shape)}")
    if valid.dtype != "bool" or valid.shape != shape:
        wanted = f"bool {list(shape)}"
        raise ValueError(f"valid must be {wanted}, got {valid.dtype} {list(valid.shape)}")


def sparse_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B k"] | None,
    valid: Bool[Array, "B k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int = 64,
    own: bool = False,
    backend: str | None = None,
) -> Float[Array, "B H c"]:
    """Softmax attention of each row's heads over its window and the entries that it picked.

    Keys are values and shared by all heads. Row b sees `window[b, :window_count[b]]` (a ring: the
    order does not matter) and the entries `index[b, i]` where `valid[b, i]`; a repeated index
    counts each time. `rows` are a pool [S, P, ...] that all rows pick from, entry slot * P +
    offset, or, with `own`, entries [B, N, ...] of which row b picks in its own; these may be picked
    already: without an index they are all of N in turn. Arrays may be [*, *, c] or
    [*, *, c / 128, 128]; fp8 planes have `group` dims to a scale. One `sink` logit per head, not
    scaled, has value zero: with nothing to see the output is zero. Scores and sums are float32; the
    output has q's dtype. Entries that are not valid, and what their index names, may be anything. A
    named backend runs or raises Unsupported; ValueError for shapes and dtypes that do not agree.
    """
    split_softmax.check(q, window, window_count, sink, {})
    split_softmax.check_rows(rows, q.shape[-1], group)
    _check(rows, index, valid, q.shape[0], own)
    backends = IMPLEMENTATIONS if index is not None else _IN_TURN
    args = (q, window, window_count, rows, index, valid, sink)
    options = {"scale": scale, "group": group, "own": own}
    return dispatch.run("sparse_decode", backends, backend, *args, **options)
