"""GPU kernel through jax-triton: asynchronous copies gather rows straight into wgmma tiles.

One program a query. Planes of fp8 codes are decoded tile by tile in the kernel, or, where a chunk
selects every entry several times over, once by XLA: 1 KB of temporary memory an entry. Plain
vectors are copied in front of the window's likewise, so that one pipelined loop reads both.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_prefill import keys
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import LANES, Fp8Rows, Rows, decode

HEAD_TILE = 64  # rows of a wgmma
KEY_TILE, KEY_TILE_FP8 = 64, 32  # with fp8 codes beside their values, 64 keys do not fit
MOST = 2**31 - 1  # elements of a sequence that 32-bit offsets reach
REUSE = 4  # selections per stored entry from which decoding it once pays


def refusal(q: Array, rows: Rows | None, group: int) -> str | None:
    """Why the kernel does not take these arguments."""
    heads, dims = q.shape[2:]
    if q.dtype != jnp.bfloat16:
        return f"q must be bfloat16, got {q.dtype}"
    if dims & (dims - 1) or not 16 <= dims <= 512:
        return f"head_dim must be a power of two, 16 to 512, got {dims}"
    if heads % 16 or heads & (heads - 1):
        return f"heads must be a power of two, 16 or more, got {heads}"
    if isinstance(rows, Fp8Rows):
        if rows.rope.shape[-1] != group or rows.nope.shape[-2] * LANES != dims:
            got = f"{rows.rope.shape[-1]} and {rows.nope.shape[-2] * LANES}"
            return f"fp8 planes must have {group} rotary dims and rows of {dims} bytes, got {got}"
    elif rows is not None and rows.dtype != jnp.bfloat16:
        return f"rows must be bfloat16 or fp8 planes, got {rows.dtype}"
    return None


def launch(
    q: Float[Array, "B T H c"],
    past: Float[Array, "B W c"],
    kv: Float[Array, "B T c"],
    start: Int[Array, " B"],
    rows: Rows | None,
    index: Int[Array, "B T k"] | None,
    sink: Float[Array, " H"],
    *,
    name: str,
    ratio: int,
    scale: float,
    group: int,
    key_tile: int,
    warps: int,
    stages: int,
) -> Float[Array, "B T H c"]:
    """Calls the kernel on selected entries (-1: none), or on all that are visible."""
    # Imported here: the modules need a GPU build of jaxlib, which other machines do without.
    import jax_triton  # pyright: ignore[reportMissingImports]

    from pallas_kernels.sparse_prefill.triton_kernel import prefill

    why = refusal(q, rows, group)
    if why:
        raise Unsupported(why)
    batch, tokens, heads, dims = q.shape
    raw, tile = keys.band(past, kv, 0, q.dtype), min(HEAD_TILE, heads)
    fp8 = isinstance(rows, Fp8Rows)
    if isinstance(rows, Fp8Rows):
        planes = (raw, rows.nope, rows.rope)
    else:
        stored = raw if rows is None else jnp.concatenate([rows, raw], axis=1)
        planes = (stored, stored, stored)  # the first and the last are not read
        if stored.shape[1] * dims > MOST:
            raise Unsupported(f"entries and the chunk must be at most {MOST // dims} together")
    sizes = {"tokens": tokens, "window": past.shape[1], "entries": keys.count(rows)}
    sizes |= {"heads": heads, "dims": dims, "group": group, "head_tile": tile, "ratio": ratio}
    return jax_triton.triton_call(
        *(q, *planes, start if index is None else index, start, sink.astype(jnp.float32)),
        kernel=prefill,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid=(tokens * (heads // tile), batch),
        num_warps=warps,
        num_stages=stages,
        name=name,
        scale=scale,
        chosen=0 if index is None else index.shape[-1],
        fp8=fp8,
        key_tile=key_tile,
        **sizes,
    )


def sparse_prefill(
    q: Float[Array, "B T H c"],
    past: Float[Array, "B W c"],
    kv: Float[Array, "B T c"],
    start: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B T k"],
    valid: Bool[Array, "B T k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    key_tile: int | None = None,
    warps: int = 8,
    stages: int = 3,
    predecode: bool | None = None,
) -> Float[Array, "B T H c"]:
    """See the package's `sparse_prefill`. `predecode` None: where it pays."""
    why = refusal(q, rows, group)
    if why:
        raise Unsupported(why)
    if predecode is None:
        predecode = q.shape[1] * index.shape[-1] >= REUSE * keys.count(rows)
    if predecode:
        rows = decode(rows, q.shape[-1], group, q.dtype)
    tile = key_tile or (KEY_TILE_FP8 if isinstance(rows, Fp8Rows) else KEY_TILE)
    sizes = {"key_tile": tile, "warps": warps, "stages": stages}
    return launch(
        *(q, past, kv, start, rows, jnp.where(valid, index, -1), sink),
        **{"name": "sparse_prefill", "ratio": 1, "scale": scale, "group": group, **sizes},
    )
