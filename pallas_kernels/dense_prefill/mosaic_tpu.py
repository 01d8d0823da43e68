"""TPU kernel: programs of a few queries, pipelined over blocks of the window and of entries.

Blocks of entries that no query of a program sees are neither copied nor computed: their step names
the last block that is seen, which is there already. Entries are decoded once per chunk by XLA.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_prefill import keys
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Rows

LANES = 128
ROWS = 512  # (query, head) pairs of a program
KEYS = 512  # entries of a step
BAND = 128  # raw entries of a step


def refusal(q: Array, size: int) -> str | None:
    """Why the kernel does not take these arguments."""
    heads, dims = q.shape[2:]
    if q.dtype != jnp.bfloat16:
        return f"q must be bfloat16, got {q.dtype}"
    if dims % LANES:
        return f"head_dim must be a multiple of {LANES}, got {dims}"
    if heads % 16:
        return f"heads must be a multiple of 16, got {heads}"
    return None if size and BAND % size == 0 else f"{size} queries a program must divide {BAND}"


def _absorb(q: Array, part: Array, mask: Bool[Array, "r n"], scale: float, sums: Any) -> None:
    """Adds keys [n, c] to the softmax in progress of query rows [r, c]."""
    top, total, values = sums
    contract = (((1,), (1,)), ((), ()))
    logits = jax.lax.dot_general(q, part, contract, preferred_element_type=jnp.float32) * scale
    logits = jnp.where(mask, logits, -jnp.inf)
    new = jnp.maximum(top[...], jnp.max(logits, axis=1, keepdims=True))
    before, weights = jnp.exp(top[...] - new), jnp.exp(logits - new)
    total[...] = total[...] * before + jnp.sum(weights, axis=1, keepdims=True)
    added = jnp.dot(weights.astype(part.dtype), part, preferred_element_type=jnp.float32)
    values[...] = values[...] * before + added
    top[...] = new


def _kernel(sizes: dict[str, int], scale: float, *refs: Any) -> None:
    """Grid (sequence, block of queries, step over the band's blocks and then the entries')."""
    start, q, sink, band, stored, out, *sums = refs
    b, i, step = (pl.program_id(axis) for axis in range(3))
    near, size, window = sizes["near"], sizes["size"], sizes["window"]
    first = i * size

    @pl.when(step == 0)
    def _begin() -> None:
        top, total, values = sums
        top[...] = sink[...]
        total[...] = jnp.ones_like(total)
        values[...] = jnp.zeros_like(values)

    def mesh(width: int) -> tuple[Array, Array]:  # query and key of a score, within their blocks
        shape = (size * sizes["heads"], width)
        query = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // sizes["heads"]
        return query, jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    @pl.when(step < near)
    def _window() -> None:
        query, key = mesh(BAND)
        row = (first // BAND + step) * BAND + key
        age = first + query + window - row
        seen = (age >= 0) & (age < window) & (row >= window - start[b])
        _absorb(q[...], band[...], seen, scale, sums)

    at = (step - near) * KEYS
    limit = jnp.minimum((start[b] + first + size) // sizes["ratio"], sizes["entries"])

    @pl.when((step >= near) & (at < limit))
    def _entries() -> None:
        query, key = mesh(KEYS)
        seen = jnp.minimum((start[b] + first + query + 1) // sizes["ratio"], sizes["entries"])
        _absorb(q[...], stored[...], at + key < seen, scale, sums)

    @pl.when(step == pl.num_programs(2) - 1)
    def _end() -> None:
        out[...] = (sums[2][...] / sums[1][...]).astype(out.dtype)


def _grid(sizes: dict[str, int], batch: int, blocks: int, dims: int) -> Any:
    size, rows = sizes["size"], sizes["size"] * sizes["heads"]

    def band(b: Array, i: Array, step: Array, start: Any) -> tuple[Any, ...]:
        return b, i * size // BAND + jnp.minimum(step, sizes["near"] - 1), 0

    def stored(b: Array, i: Array, step: Array, start: Any) -> tuple[Any, ...]:
        limit = jnp.minimum((start[b] + (i + 1) * size) // sizes["ratio"], sizes["entries"])
        last = jnp.maximum((limit + KEYS - 1) // KEYS - 1, 0)
        return b, jnp.clip(step - sizes["near"], 0, last), 0

    queries = pl.BlockSpec((None, rows, dims), lambda b, i, step, start: (b, i, 0))
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(batch, blocks, sizes["near"] + -(-sizes["entries"] // KEYS)),
        in_specs=[
            queries,
            pl.BlockSpec((rows, 1), lambda b, i, step, start: (0, 0)),
            pl.BlockSpec((None, BAND, dims), band),
            pl.BlockSpec((None, KEYS, dims), stored),
        ],
        out_specs=queries,
        scratch_shapes=[
            pltpu.VMEM((rows, 1), jnp.float32),
            pltpu.VMEM((rows, 1), jnp.float32),
            pltpu.VMEM((rows, dims), jnp.float32),
        ],
    )


@functools.partial(
    jax.jit, static_argnames=("ratio", "scale", "group", "size", "interpret"), inline=True
)
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
    size: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B T H c"]:
    """See the package's `dense_prefill`. `size` is queries of a program."""
    batch, tokens, heads, dims = q.shape
    size = size or max(1, ROWS // heads)
    why = refusal(q, size)
    if why:
        raise Unsupported(why)
    window, entries, blocks = past.shape[1], keys.count(rows), -(-tokens // size)
    near = 1 + -(-window // BAND)  # blocks that the windows of `size` queries lie in
    after = (blocks * size // BAND + near) * BAND + BAND - window - tokens
    band = keys.loud(keys.existing(keys.band(past, kv, after, q.dtype), start, window))
    stored = jnp.zeros((batch, KEYS, dims), q.dtype)
    if rows is not None and entries:
        stored = keys.plain(rows, dims, group, q.dtype, KEYS)
    sizes = {"near": near, "size": size, "window": window, "entries": entries, "heads": heads}
    padded = jnp.pad(q, ((0, 0), (0, blocks * size - tokens), (0, 0), (0, 0)))
    flat = padded.reshape(batch, -1, dims)
    out = pl.pallas_call(
        functools.partial(_kernel, sizes | {"ratio": ratio}, scale),
        grid_spec=_grid(sizes | {"ratio": ratio}, batch, blocks, dims),
        out_shape=jax.ShapeDtypeStruct(flat.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="dense_prefill",
    )(start, flat, jnp.tile(sink.astype(jnp.float32), size)[:, None], band, stored)
    return out.reshape(padded.shape)[:, :tokens]
