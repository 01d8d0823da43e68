"""Matrix products with weights that stay quantised in memory: fp8 128 x 128 blocks, packed fp4.

For few rows, where the time is that of reading the weights: decode. With many rows the products
themselves take the time, and dequantising once for an ordinary (grouped) matmul is right.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.quant_matmul import mosaic_tpu, reference, triton_gpu
from pallas_kernels.quant_matmul.reference import BLOCK, FP4_GROUP, dequantise

__all__ = ["dequantise", "expert_matmul", "grouped_quant_matmul", "quant_matmul"]

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.quant_matmul,
    dispatch.TRITON: triton_gpu.quant_matmul,
    dispatch.MOSAIC_TPU: mosaic_tpu.quant_matmul,
}
EXPERT_IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.expert_matmul,
    dispatch.TRITON: triton_gpu.expert_matmul,
}


def _check(k: int, w: Array, scale: Array) -> None:
    n = w.shape[-2]
    if w.dtype == jnp.float8_e4m3fn:
        shape, grid = (n, k), (-(-n // BLOCK), -(-k // BLOCK))
    elif w.dtype == jnp.uint8:
        shape, grid = (n, k // 2), (n, k // FP4_GROUP)
        if k % FP4_GROUP:
            raise ValueError(f"x must have a multiple of {FP4_GROUP} columns for fp4, got {k}")
    else:
        raise ValueError(f"w must be float8_e4m3fn or uint8 (packed fp4), got {w.dtype}")
    lead = w.shape[:-2]
    if w.shape != (*lead, *shape):
        raise ValueError(f"w must be {[*lead, *shape]} for {k} columns of x, got {list(w.shape)}")
    if scale.dtype != jnp.uint8 or scale.shape != (*lead, *grid):
        wanted = f"uint8 {[*lead, *grid]}"
        raise ValueError(f"scale must be {wanted}, got {scale.dtype} {list(scale.shape)}")


def quant_matmul(
    x: Float[Array, "M K"],
    w: Array,
    scale: Array,
    *,
    out_dtype: Any = None,
    backend: str | None = None,
) -> Float[Array, "M N"]:
    """x times W^T, accumulated in float32, in `out_dtype` (default: x's dtype).

    W is float8_e4m3fn [N, K] with ue8m0 scales uint8 [ceil(N / 128), ceil(K / 128)]; or packed e2m1
    uint8 [N, K / 2], the even input in the low nibble, with scales uint8 [N, K / 32]. Dequantising
    is exact, in bfloat16 too. A named backend runs or raises Unsupported.
    """
    if w.ndim != 2:
        raise ValueError(f"w must have 2 axes, got {list(w.shape)}")
    _check(x.shape[1], w, scale)
    out = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    return dispatch.run("quant_matmul", IMPLEMENTATIONS, backend, x, w, scale, out)


def expert_matmul(
    x: Float[Array, "R K"],
    experts: Int[Array, " S"],
    w: Array,
    scale: Array,
    *,
    backend: str | None = None,
) -> Float[Array, "S N"]:
    """Pair s, in any order: x[s // (S / R)] times W[experts[s]]^T, in float32.

    W and scale are as for `quant_matmul` with an axis of experts in front. S is a multiple of R:
    either each token has S / R experts, or each pair has a row of its own. An expert outside
    0 .. G - 1 gives zeros. A named backend runs or raises Unsupported.
    """
    if w.ndim != 3:
        raise ValueError(f"w must have 3 axes, got {list(w.shape)}")
    if not x.shape[0] or experts.shape[0] % x.shape[0]:
        raise ValueError(f"experts must be a multiple of {x.shape[0]} long, got {experts.shape[0]}")
    _check(x.shape[1], w, scale)
    args = (x, experts, w, scale)
    return dispatch.run("expert_matmul", EXPERT_IMPLEMENTATIONS, backend, *args)


def grouped_quant_matmul(
    x: Float[Array, "M K"],
    w: Array,
    scale: Array,
    group_sizes: Int[Array, " G"],
    *,
    backend: str | None = None,
) -> Float[Array, "M N"]:
    """Rows sorted by group: the next group_sizes[g] rows of x times W[g]^T, in float32.

    Rows beyond the sum of `group_sizes` give zeros.
    """
    ends = jnp.cumsum(group_sizes)
    experts = jnp.searchsorted(ends, jnp.arange(x.shape[0]), side="right").astype(jnp.int32)
    return expert_matmul(x, experts, w, scale, backend=backend)
