"""Token-to-entry compression: a softmax over a window's tokens, norm, rotation, planes."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.compress import mosaic_tpu, reference, triton_gpu
from pallas_kernels.compress.reference import LAYOUTS, Entries, Tail

__all__ = ["LAYOUTS", "Entries", "Tail", "compress"]

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.compress,
    dispatch.TRITON: triton_gpu.compress,
    dispatch.MOSAIC_TPU: mosaic_tpu.compress,
}


def _check(
    value: Array, gate: Array, tail: Tail, norm: Array, freqs: Array, ape: Array | None, ratio: int
) -> None:
    (batch, _, width), dim = value.shape, norm.shape[0]
    overlap = tail.previous is not None
    wanted: dict[str, tuple[Array, tuple[int, ...]]] = {
        "gate": (gate, value.shape),
        "tail.current": (tail.current, (batch, 3, width)),
    }
    if tail.previous is not None:
        wanted["tail.previous"] = (tail.previous, (batch, 3, dim))
    if ape is not None:
        wanted["ape"] = (ape, (ratio, width))
    for name, (x, shape) in wanted.items():
        if x.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(x.shape)}")
    if width != dim * (2 if overlap else 1):
        raise ValueError(f"value must be {2 if overlap else 1} x {dim} wide, got {width}")
    if 2 * freqs.shape[0] > dim:
        raise ValueError(f"freqs must have at most {dim // 2} elements, got {freqs.shape[0]}")


def compress(
    value: Float[Array, "B T width"],
    gate: Float[Array, "B T width"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    tail: Tail,
    norm: Float[Array, " dim"],
    freqs: Float[Array, " r"],
    ape: Float[Array, "m width"] | None = None,
    *,
    ratio: int,
    eps: float,
    layout: str = "fp8",
    group: int = 64,
    aligned: bool = False,
    backend: str | None = None,
) -> tuple[Entries, Tail]:
    """The entries that a chunk of tokens completes, and the statistics of those it does not.

    Row b's tokens are [b, :count[b]], from position start[b]; what lies beyond may be anything.
    Prefill passes many tokens, decode one. Window j is tokens ratio * j .. ratio * j + ratio - 1.
    Its entry is, in every channel, the average of the tokens' values under a softmax of their gates
    (plus `ape[position % ratio]` where given; float32 inside), RMS-normed with gain `norm`, and its
    last 2 r channels rotated, in adjacent pairs, by freqs * (ratio * j) (DeepSeek-V4 spec 4).

    Windows overlap where `tail.previous` is given: width is 2 dim, a token's second half belongs to
    its own window's entry and its first half to the next one's.

    The result has an entry slot for every window that a chunk of T tokens may touch,
    (T + ratio - 2) // ratio + 1; row b owns the first count[b] of them, from entry first[b], and
    the others are entries of zeros. `layout` is "float32", "bfloat16" or "fp8" (`rows.Fp8Rows`,
    with one scale per `group` dims). `aligned` promises that every start is a multiple of ratio.
    A named backend runs or raises Unsupported. Without one, chunks and single tokens have defaults
    of their own.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    _check(value, gate, tail, norm, freqs, ape, ratio)
    static = {"ratio": ratio, "eps": eps, "layout": layout, "group": group, "aligned": aligned}
    args = (value, gate, start, count, tail, norm, freqs, ape)
    op = "compress" if value.shape[1] > 1 else "compress_token"
    return dispatch.run(op, IMPLEMENTATIONS, backend, *args, **static)
