"""GPU kernel through jax-triton: the kernel of `sparse_prefill`, on all entries that are visible.

Planes of fp8 codes are decoded once per chunk by XLA: T * H query rows read each entry.
"""

from jaxtyping import Array, Float, Int

from pallas_kernels.dense_prefill import keys
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Rows, decode
from pallas_kernels.sparse_prefill.triton_gpu import launch, refusal


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
    key_tile: int = 64,
    warps: int = 8,
    stages: int = 2,
) -> Float[Array, "B T H c"]:
    """See the package's `dense_prefill`."""
    why = refusal(q, rows, group)
    if why:
        raise Unsupported(why)
    if rows is not None and keys.count(rows):
        rows = decode(rows, q.shape[-1], group, q.dtype)
    else:
        rows = None
    sizes = {"key_tile": key_tile, "warps": warps, "stages": stages}
    return launch(
        *(q, past, kv, start, rows, None, sink),
        **{"name": "dense_prefill", "ratio": ratio, "scale": scale, "group": group, **sizes},
    )
