"""Which backend runs an operation: a named one runs or raises, no name means the best that can.

The best is what `DEFAULTS` says: kernels that were measured on that kind of device.
"""

import importlib.util
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax

XLA, MOSAIC_GPU, MOSAIC_TPU, TRITON = "xla", "mosaic_gpu", "mosaic_tpu", "triton"
BACKENDS = (XLA, MOSAIC_GPU, MOSAIC_TPU, TRITON)
HOPPER_NAMES = ("H100", "H200", "H800", "H20", "GH200")
HOPPER, GPU, TPU = "hopper", "gpu", "tpu"  # kinds of device; GPU: of another capability >= 8.0

# What runs without a name, best first; after these, and everywhere else, the definition. A kernel
# is listed for a kind of device once it was found right there, faster than the definition at the
# shapes of V4 (docs/kernels.md has the times), and in a whole model right and about as fast or
# faster (docs/performance.md). The others run only when they are named: quant_matmul and the decode
# kernels of jax-triton, of which XLA launches no call in a CUDA graph. Listed without all of that:
# chunks of index_score, whose times are missing; page_recall on other GPUs.
DEFAULTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "compress": {HOPPER: (TRITON,)},
    "compress_token": {},  # not timed yet
    "dense_decode": {HOPPER: (MOSAIC_GPU,)},
    "dense_prefill": {HOPPER: (MOSAIC_GPU, TRITON)},
    "expert_matmul": {},
    "grouped_matmul": {HOPPER: (MOSAIC_GPU,)},
    "hc_mix": {HOPPER: (MOSAIC_GPU,)},
    "index_score": {HOPPER: (MOSAIC_GPU,)},
    "page_gather": {HOPPER: (TRITON, MOSAIC_GPU)},
    "page_recall": {HOPPER: (TRITON,), GPU: (TRITON,)},
    "page_scatter": {HOPPER: (TRITON, MOSAIC_GPU)},
    "quant_matmul": {},
    "sparse_decode": {HOPPER: (MOSAIC_GPU,)},
    "sparse_prefill": {HOPPER: (TRITON,)},
    "top_k": {HOPPER: (TRITON,)},
}


class Unsupported(Exception):
    """A backend declines a call; the message says why. Real bugs in a kernel are other errors."""


class Target(NamedTuple):
    """The device that a program is traced for."""

    platform: str  # "cpu", "gpu", "tpu"
    kind: str  # as the vendor names it
    capability: float  # CUDA compute capability; 0 elsewhere


def target() -> Target:
    """This process's device, or the abstract one of the mesh in use when compiling for another."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        hopper = any(name in abstract.device_kind for name in HOPPER_NAMES)
        return Target(abstract.platform, abstract.device_kind, 9.0 if hopper else 0.0)
    return target_of(jax.devices()[0])


def target_of(device: Any) -> Target:
    """What a device of this process is."""
    capability = float(getattr(device, "compute_capability", 0)) if device.platform == "gpu" else 0
    return Target(device.platform, device.device_kind, capability)


def refusal(backend: str, at: Target | None = None) -> str | None:
    """Why a device, by default the target, cannot run a backend's kernels; None where it can."""
    if backend not in BACKENDS:
        return f"backend must be one of {BACKENDS}, got {backend!r}"
    at = at or target()
    if backend == MOSAIC_GPU and at.capability != 9.0:
        return f"{MOSAIC_GPU} needs a Hopper GPU, got {at.kind}"
    if backend == MOSAIC_TPU and at.platform != "tpu":
        return f"{MOSAIC_TPU} needs a TPU, got {at.kind}"
    if backend == TRITON and at.capability < 8.0:
        return f"{TRITON} needs a GPU of compute capability 8.0 or more, got {at.kind}"
    if backend == TRITON and importlib.util.find_spec("jax_triton") is None:
        return f"{TRITON} needs the package jax-triton"
    return None


def require(backend: str) -> None:
    """Raises Unsupported unless the target can run the named backend."""
    why = refusal(backend)
    if why:
        raise Unsupported(why)


def kind_of(at: Target) -> str | None:
    """The kind of device that `DEFAULTS` knows a target as; None: it has definitions only."""
    if at.platform == "tpu":
        return TPU
    if at.capability == 9.0:
        return HOPPER
    return GPU if at.capability >= 8.0 else None


def default_order(op: str, available: Collection[str]) -> tuple[str, ...]:
    """Those of `available` that run without a name on the target, best first.

    Kernels are per device: under a mesh of several devices the definition runs, which the compiler
    can partition.
    """
    defaults, kind = DEFAULTS[op], kind_of(target())
    single = jax.sharding.get_abstract_mesh().size in (0, 1)
    best = (*(defaults.get(kind, ()) if single and kind else ()), XLA)
    return tuple(name for name in best if name in available and refusal(name) is None)


def of_model(available: Collection[str], backend: str | None) -> str | None:
    """What a backend that is named for a whole model means for one operation.

    The operation runs it, or raises, where it has it at all; where it has not, the operation takes
    its default, as it does where none is named.
    """
    return backend if backend in available else None


def run(
    op: str,
    implementations: Mapping[str, Callable[..., Any]],
    backend: str | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the named backend, or the first of `default_order` that takes the call."""
    if backend is not None:
        require(backend)
        if backend not in implementations:
            raise Unsupported(f"{op} has {tuple(implementations)}, not {backend!r}")
    order = (backend,) if backend else default_order(op, implementations)
    reasons = []
    for name in order:
        try:
            return implementations[name](*args, **kwargs)
        except Unsupported as why:
            reasons.append(f"{name}: {why}")
    raise Unsupported(f"no backend took the call of {op}; " + "; ".join(reasons))
