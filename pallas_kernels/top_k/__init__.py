"""Selection: the k highest scores of each row, exactly; and the densest pages under a budget."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.top_k import mosaic_tpu, reference, triton_gpu

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.top_k,
    dispatch.TRITON: triton_gpu.top_k,
    dispatch.MOSAIC_TPU: mosaic_tpu.top_k,
}


def _check(scores: Array, visible: Array, k: int, limit: Array | None) -> None:
    if scores.ndim != 2 or scores.dtype != "float32":
        raise ValueError(f"scores must be float32 [R, N], got {scores.dtype} {list(scores.shape)}")
    rows = scores.shape[:1]
    if (visible.dtype, visible.shape) not in (("int32", rows), ("bool", scores.shape)):
        wanted = f"int32 {list(rows)} or bool {list(scores.shape)}"
        raise ValueError(f"visible must be {wanted}, got {visible.dtype} {list(visible.shape)}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if limit is not None and (limit.dtype != "int32" or limit.shape != rows):
        wanted = f"int32 {list(rows)}"
        raise ValueError(f"limit must be {wanted}, got {limit.dtype} {list(limit.shape)}")


def top_k(
    scores: Float[Array, "R N"],
    visible: Int[Array, " R"] | Bool[Array, "R N"],
    k: int,
    *,
    limit: Int[Array, " R"] | None = None,
    backend: str | None = None,
) -> tuple[Int[Array, "R k"], Bool[Array, "R k"]]:
    """Columns of each row's k highest visible scores (int32), and which of the k places are filled.

    `visible` marks columns, or counts the first ones of a row. Exact: equal scores go to the lower
    column, -0.0 ties with 0.0. Invisible scores have no influence, whatever they hold; neither have
    visible ones that are NaN or -inf, which are never selected. `limit` asks for fewer than k in
    some rows. Filled places come first; the others have column 0. The order among the filled ones
    is the backend's (the definition: by score; kernels: by column): compare sets. Subnormal scores
    may tie with 0.0, as the device compares floats. A named backend runs or raises Unsupported.
    """
    _check(scores, visible, k, limit)
    return dispatch.run("top_k", IMPLEMENTATIONS, backend, scores, visible, k, limit=limit)
