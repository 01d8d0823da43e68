"""Decode attention over a window and all visible entries: one query token per row of the batch."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch, split_softmax
from pallas_kernels.dense_decode import mosaic_gpu, mosaic_tpu, reference, triton_gpu
from pallas_kernels.rows import Rows

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.dense_decode,
    dispatch.MOSAIC_GPU: mosaic_gpu.dense_decode,
    dispatch.TRITON: triton_gpu.dense_decode,
    dispatch.MOSAIC_TPU: mosaic_tpu.dense_decode,
}


def dense_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    count: Int[Array, " B"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int = 64,
    backend: str | None = None,
) -> Float[Array, "B H c"]:
    """Softmax attention of each row's heads over its window and its first `count[b]` entries.

    Keys are values and shared by all heads. `rows` are [B, N, ...] (arrays may be [B, N, c] or
    [B, N, c / 128, 128]; fp8 planes have `group` dims to a scale), counts at most N; the window is
    `window[b, :window_count[b]]`, a ring in any order. One `sink` logit per head, not scaled, has
    value zero: with nothing to see the output is zero. Scores and sums are float32; the output has
    q's dtype. What lies beyond the counts may be anything and costs no bandwidth, but for the rest
    of a block. A named backend runs or raises Unsupported; ValueError for shapes and dtypes that do
    not agree.
    """
    split_softmax.check(q, window, window_count, sink, {"count": count})
    split_softmax.check_rows(rows, q.shape[-1], group)
    if split_softmax.lead(rows)[0] != q.shape[0]:
        raise ValueError(f"rows must have {q.shape[0]} rows, got {split_softmax.lead(rows)[0]}")
    args, options = (q, window, window_count, rows, count, sink), {"scale": scale, "group": group}
    return dispatch.run("dense_decode", IMPLEMENTATIONS, backend, *args, **options)
