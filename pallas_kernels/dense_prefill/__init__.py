"""Prefill attention over the window and every visible compressed entry, sharing keys."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.dense_prefill import keys, mosaic_gpu, mosaic_tpu, reference, triton_gpu
from pallas_kernels.rows import Rows

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.dense_prefill,
    dispatch.MOSAIC_GPU: mosaic_gpu.dense_prefill,
    dispatch.MOSAIC_TPU: mosaic_tpu.dense_prefill,
    dispatch.TRITON: triton_gpu.dense_prefill,
}


def dense_prefill(
    q: Float[Array, "B T H c"],
    past: Float[Array, "B W c"],
    kv: Float[Array, "B T c"],
    start: Int[Array, " B"],
    rows: Rows | None,
    sink: Float[Array, " H"],
    *,
    ratio: int,
    scale: float,
    group: int,
    backend: str | None = None,
) -> Float[Array, "B T H c"]:
    """Attention of T new tokens per sequence -> [B, T, H, c] in q's dtype (V4 spec 3 and 4.4).

    Query t of sequence b is at position p = start[b] + t. It attends, with logits scale * (q . k),
    to the raw entries of positions p - W + 1 .. p that exist, and to compressed entries
    j < (p + 1) // ratio of the N stored; entries are keys and values at once, shared by all heads.
    One more logit per head, `sink` (finite), has a value of zero. Logits and sums are float32.

    `past` holds raw entries of positions start - W .. start - 1 in that order (whatever it has
    before position 0 is not read), `kv` the chunk's own. `rows` [B, N, ...] are vectors or fp8
    planes in groups of `group` dims, the chunk's entries included; None: there are none. What
    entries that no query sees hold does not matter. Kernels want bfloat16; memory is linear in T
    and N. Raises ValueError for shapes that do not fit; a named backend runs or raises Unsupported.
    """
    keys.check(q, past, kv, start, rows, sink)
    if ratio < 1:
        raise ValueError(f"ratio must be at least 1, got {ratio}")
    args, how = (q, past, kv, start, rows, sink), {"ratio": ratio, "scale": scale, "group": group}
    return dispatch.run("dense_prefill", IMPLEMENTATIONS, backend, *args, **how)
