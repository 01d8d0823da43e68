"""Recall: copy whole page records from host memory into slots of a device pool, in place."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jaxtyping import Array, Int, UInt8

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.page_recall import reference, triton_gpu

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    "xla": reference.page_recall,
    "triton": triton_gpu.page_recall,
}


def default_order() -> tuple[str, ...]:
    """What an unnamed `impl` tries, best first. The kernel is per device: under a mesh of several
    devices the definition runs, which the compiler can partition."""
    single = jax.sharding.get_abstract_mesh().size in (0, 1)
    return ("triton", "xla") if jax.default_backend() == "gpu" and single else ("xla",)


def reads_host_memory(device: Any) -> bool:
    """Whether a kernel reads `pinned_host` arrays in place there; else stage them on the device."""
    return triton_gpu.refusal(device) is None


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


@functools.partial(jax.jit, static_argnames=("impl",), donate_argnames=("pool",))
def page_recall(
    pool: UInt8[Array, "S R 128"],
    segments: tuple[UInt8[Array, "n R 128"], ...],
    src: Int[Array, " M"],
    dst: Int[Array, " M"],
    *,
    impl: str | None = None,
) -> UInt8[Array, "S R 128"]:
    """The pool with record `src[i]` copied over slot `dst[i]`, for every i whose src is not -1.

    Host row ids count through the segments in order: segment 0 has the first n_0 of them. Slots
    must be distinct; an entry that names a row or a slot that does not exist copies nothing. The
    GPU kernel reads segments in `pinned_host` memory in place; "xla" needs them on the device. The
    pool is donated. A named `impl` runs or raises Unsupported.
    """
    _check(pool, segments, src, dst)
    reasons = []
    for name in (impl,) if impl else default_order():
        if name not in IMPLEMENTATIONS:
            raise Unsupported(f"impl must be one of {tuple(IMPLEMENTATIONS)}, got {name!r}")
        try:
            return IMPLEMENTATIONS[name](pool, segments, src, dst)
        except Unsupported as why:
            reasons.append(f"{name}: {why}")
    raise Unsupported("no implementation took the call; " + "; ".join(reasons))
