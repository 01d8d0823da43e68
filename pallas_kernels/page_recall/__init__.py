"""Recall: copy whole page records from host memory into slots of a device pool, in place."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Int, UInt8

from pallas_kernels import dispatch
from pallas_kernels.page_recall import mosaic_tpu, reference, triton_gpu

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.page_recall,
    dispatch.MOSAIC_TPU: mosaic_tpu.page_recall,
    dispatch.TRITON: triton_gpu.page_recall,
}


def reads_host_memory(device: Any) -> bool:
    """Whether a kernel reads `pinned_host` arrays in place there; else stage them on the device."""
    return dispatch.refusal(dispatch.TRITON, dispatch.target_of(device)) is None


def _check(pool: Array, segments: tuple[Array, ...], src: Array, dst: Array) -> None:
    record = pool.shape[1:]
    if not segments:
        raise ValueError("segments must name at least one array, got none")
    for name, x in (("pool", pool), *((f"segments[{i}]", s) for i, s in enumerate(segments))):
        if x.dtype != "uint8" or x.ndim != 3 or x.shape[1:] != record or record[-1] != 128:
            wanted = f"uint8 [*, {record[0]}, 128]"
            raise ValueError(f"{name} must be {wanted}, got {x.dtype} {list(x.shape)}")
    for name, x in (("src", src), ("dst", dst)):
        if x.dtype != "int32" or x.shape != src.shape[:1]:
            wanted = f"int32 [{src.shape[0]}]"
            raise ValueError(f"{name} must be {wanted}, got {x.dtype} {list(x.shape)}")


@functools.partial(jax.jit, static_argnames=("backend",), donate_argnames=("pool",))
def page_recall(
    pool: UInt8[Array, "S R 128"],
    segments: tuple[UInt8[Array, "n R 128"], ...],
    src: Int[Array, " M"],
    dst: Int[Array, " M"],
    *,
    backend: str | None = None,
) -> UInt8[Array, "S R 128"]:
    """The pool with record `src[i]` copied over slot `dst[i]`, for every i whose src is not -1.

    Host row ids count through the segments in order: segment 0 has the first n_0 of them. Slots
    must be distinct; an entry that names a row or a slot that does not exist copies nothing. The
    kernels read segments in `pinned_host` memory in place; "xla" needs them on the device. The pool
    is donated. A named backend runs or raises Unsupported.
    """
    _check(pool, segments, src, dst)
    return dispatch.run("page_recall", IMPLEMENTATIONS, backend, pool, segments, src, dst)
