"""Matrix products of consecutive row groups, each with its own matrix: the experts of an MoE."""

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.grouped_matmul import mosaic_gpu, reference

IMPLEMENTATIONS = {
    dispatch.XLA: reference.grouped_matmul,
    dispatch.MOSAIC_GPU: mosaic_gpu.grouped_matmul,
}


def grouped_matmul(
    x: Float[Array, "M K"],
    w: Float[Array, "G N K"],
    group_sizes: Int[Array, " G"],
    *,
    backend: str | None = None,
) -> Float[Array, "M N"]:
    """Rows of group g (the next group_sizes[g] rows of x) times w[g]^T, accumulated in float32.

    `group_sizes` must sum to M. The result has x's dtype.
    """
    return dispatch.run("grouped_matmul", IMPLEMENTATIONS, backend, x, w, group_sizes)
