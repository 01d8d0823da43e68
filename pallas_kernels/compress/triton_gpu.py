"""GPU kernel through jax-triton: one program per window reads its tokens once and writes planes.

Memory-bound, so plain coalesced loads do: a thread owns a few channels of all tokens of a window.
One more program a row leaves the tail. The rotation's cosines come from XLA: reducing large angles
in the kernel costs more than reading 256 bytes an entry.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.compress import reference
from pallas_kernels.compress.reference import Entries, Tail
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import LANES, Fp8Rows

FP8_CAPABILITY = 8.9
STEP = 8  # tokens whose gates and values are in flight at once
CHANNELS = 128  # per warp: four float32, 16 bytes, a thread


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _supported(value: Array, dim: int, rope: int, ratio: int, group: int, layout: str) -> None:
    if dim & (dim - 1) or ratio & (ratio - 1):
        raise Unsupported(f"dim and ratio must be powers of two, got {dim} and {ratio}")
    if value.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"value must be float32 or bfloat16, got {value.dtype}")
    if layout != "fp8":
        return
    if (dim - rope) % group or group & (group - 1):
        raise Unsupported(f"group must be a power of two that divides {dim - rope}, got {group}")
    if dispatch.target().capability < FP8_CAPABILITY:
        raise Unsupported(f"fp8 codes need compute capability {FP8_CAPABILITY}")


def constants(
    tokens: int, dim: int, rope: int, *, ratio: int, group: int, fp8: bool, step: int
) -> dict[str, int]:
    """The kernel's compile-time sizes."""
    nope, span = dim - rope, _power_of_two(min(ratio, tokens))
    row = reference.row_bytes(nope, group)
    spare = _power_of_two(max(row - nope - nope // group, 1))
    windows = reference.slots(tokens, ratio)
    return {
        "tokens": tokens, "windows": windows, "ratio": ratio, "dim": dim, "rope": rope,
        "group": group, "row": row, "spare": spare, "fp8": fp8, "span": span,
        "step": min(step, span),
    }  # fmt: skip


@functools.partial(
    jax.jit,
    static_argnames=("ratio", "eps", "layout", "group", "aligned", "step", "warps", "stages"),
)
def compress(
    value: Float[Array, "B T width"],
    gate: Float[Array, "B T width"],
    start: Int[Array, " B"],
    count: Int[Array, " B"],
    tail: Tail,
    norm: Float[Array, " dim"],
    freqs: Float[Array, " r"],
    ape: Float[Array, "m width"] | None,
    *,
    ratio: int,
    eps: float,
    layout: str,
    group: int,
    aligned: bool,
    step: int = STEP,
    warps: int | None = None,
    stages: int = 2,
) -> tuple[Entries, Tail]:
    """See the package's `compress`. Jitted, so that all layers lower one kernel once."""
    del aligned  # any start will do
    (batch, tokens, _), dim, rope = value.shape, norm.shape[0], 2 * freqs.shape[0]
    _supported(value, dim, rope, ratio, group, layout)
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.compress.triton_kernel import compress_windows

    fp8, windows = layout == "fp8", reference.slots(tokens, ratio)
    sizes = constants(tokens, dim, rope, ratio=ratio, group=group, fp8=fp8, step=step)
    start, count = start.astype(jnp.int32), count.astype(jnp.int32)
    first, done = start // ratio, (start + count) // ratio - start // ratio
    cos, sin = reference.angles(first, windows, ratio, freqs.astype(jnp.float32))
    struct, overlap = jax.ShapeDtypeStruct, tail.previous is not None
    lead, unused = (batch, windows), struct((1,), jnp.bfloat16)
    plane = struct((*lead, sizes["row"] // LANES, LANES), jnp.uint8)
    dense = struct((*lead, dim), jnp.float32 if fp8 else jnp.dtype(layout))
    before = tail.previous if tail.previous is not None else tail.current  # not read
    rows, ropes, current, previous = jax_triton.triton_call(
        value, gate, norm if ape is None else ape.astype(jnp.float32), start, count,
        tail.current, before, norm, cos, sin,
        kernel=compress_windows,
        out_shape=[
            plane if fp8 else dense,
            struct((*lead, rope), jnp.bfloat16) if fp8 else unused,
            struct(tail.current.shape, jnp.float32),
            struct(before.shape, jnp.float32) if overlap else unused,
        ],
        grid=(windows + 1, batch),
        num_warps=warps or max(1, min(8, dim // CHANNELS)),
        num_stages=stages,
        name="compress",
        eps=eps, overlap=overlap, has_ape=ape is not None, **sizes,
    )  # fmt: skip
    entries = Fp8Rows(rows, ropes) if fp8 else rows
    return Entries(entries, first, done), Tail(current, previous if overlap else None)
