"""Whole page records between pools in device memory: out of a pool by slot, and into one."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Int, UInt8

from pallas_kernels import dispatch
from pallas_kernels.page_gather import mosaic_gpu, mosaic_tpu, reference, triton_gpu

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.page_gather,
    dispatch.MOSAIC_GPU: mosaic_gpu.page_gather,
    dispatch.MOSAIC_TPU: mosaic_tpu.page_gather,
    dispatch.TRITON: triton_gpu.page_gather,
}
SCATTER: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.page_scatter,
    dispatch.MOSAIC_GPU: mosaic_gpu.page_scatter,
    dispatch.MOSAIC_TPU: mosaic_tpu.page_scatter,
    dispatch.TRITON: triton_gpu.page_scatter,
}


def _check(pool: Array, slots: Array, records: Array | None = None) -> None:
    if pool.dtype != "uint8" or pool.ndim != 3 or pool.shape[-1] != 128:
        wanted = "uint8 [S, R, 128]"
        raise ValueError(f"pool must be {wanted}, got {pool.dtype} {list(pool.shape)}")
    if slots.dtype != "int32" or slots.ndim != 1:
        raise ValueError(f"slots must be int32 [M], got {slots.dtype} {list(slots.shape)}")
    shape = (*slots.shape, *pool.shape[1:])
    if records is not None and (records.dtype != "uint8" or records.shape != shape):
        wanted = f"uint8 {list(shape)}"
        raise ValueError(f"records must be {wanted}, got {records.dtype} {list(records.shape)}")


def page_gather(
    pool: UInt8[Array, "S R 128"], slots: Int[Array, " M"], *, backend: str | None = None
) -> UInt8[Array, "M R 128"]:
    """Record `slots[i]` of the pool for every i; zeros where there is no such slot.

    A named backend runs or raises Unsupported.
    """
    _check(pool, slots)
    return dispatch.run("page_gather", IMPLEMENTATIONS, backend, pool, slots)


@functools.partial(jax.jit, static_argnames=("backend",), donate_argnames=("pool",))
def page_scatter(
    pool: UInt8[Array, "S R 128"],
    records: UInt8[Array, "M R 128"],
    slots: Int[Array, " M"],
    *,
    backend: str | None = None,
) -> UInt8[Array, "S R 128"]:
    """The pool with `records[i]` in slot `slots[i]` for every i that names a slot.

    Slots must be distinct. The pool is donated: everything else stays where it is. (`page_recall`
    copies from pool to pool without records in between.) A named backend runs or raises
    Unsupported.
    """
    _check(pool, slots, records)
    return dispatch.run("page_scatter", SCATTER, backend, pool, records, slots)
