"""Prefill attention over the window and the compressed entries that each query selected."""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dense_prefill import keys
from pallas_kernels.rows import Rows
from pallas_kernels.sparse_prefill import mosaic_tpu, reference, triton_gpu

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.sparse_prefill,
    dispatch.MOSAIC_TPU: mosaic_tpu.sparse_prefill,
    dispatch.TRITON: triton_gpu.sparse_prefill,
}


def sparse_prefill(
    q: Float[Array, "B T H c"],
    past: Float[Array, "B W c"],
    kv: Float[Array, "B T c"],
    start: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B T k"],
    valid: Bool[Array, "B T k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    backend: str | None = None,
) -> Float[Array, "B T H c"]:
    """Attention of T new tokens per sequence -> [B, T, H, c] in q's dtype (V4 spec 3 and 5.1).

    As `dense_prefill`, but of the N stored entries query t attends to index[b, t, i] where
    valid[b, t, i], which must name distinct entries of 0 .. N - 1; causality is the selection's
    duty. Other indices may be anything and are not read. Memory is linear in T and N.
    Raises ValueError for shapes that do not fit; a named backend runs or raises Unsupported.
    """
    keys.check(q, past, kv, start, rows, sink)
    if index.ndim != 3 or index.shape[:2] != q.shape[:2] or index.dtype != jnp.int32:
        wanted = f"int32 [{q.shape[0]}, {q.shape[1]}, k]"
        raise ValueError(f"index must be {wanted}, got {index.dtype} {list(index.shape)}")
    if valid.shape != index.shape or valid.dtype != jnp.bool_:
        wanted = f"bool {list(index.shape)}"
        raise ValueError(f"valid must be {wanted}, got {valid.dtype} {list(valid.shape)}")
    if 0 in (index.shape[-1], keys.count(rows)):
        raise ValueError("rows and index must not be empty; see dense_prefill for the window alone")
    args, how = (q, past, kv, start, rows, index, valid, sink), {"scale": scale, "group": group}
    return dispatch.run("sparse_prefill", IMPLEMENTATIONS, backend, *args, **how)
