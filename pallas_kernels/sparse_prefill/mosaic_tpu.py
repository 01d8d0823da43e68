"""TPU kernel: XLA gathers a block of queries' entries, and the kernel attends to them.

A TensorCore that fetches rows one at a time reaches a small part of the memory's rate, so that the
gather is left to the compiler, 128 queries at a time: memory stays linear. The kernel reads what
was gathered once; its scores and weights never leave the core.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.dense_prefill import keys
from pallas_kernels.dense_prefill.mosaic_tpu import LANES, refusal
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import Rows, decode
from pallas_kernels.sparse_prefill.reference import query_block, take

QUERIES = 8  # of a program


def _kernel(scale: float, heads: int, unroll: int, *refs: Any) -> None:
    """Grid (sequence, group of queries): the group's windows are one stretch of raw entries."""
    q, sink, near, seen, picked, real, out = refs
    contract = (((1,), (1,)), ((), ()))

    def logits(queries: Array, part: Array, mask: Array) -> Array:
        dots = jax.lax.dot_general(queries, part, contract, preferred_element_type=jnp.float32)
        return jnp.where(mask > 0, dots * scale, -jnp.inf)

    def weighted(weights: Array, part: Array) -> Array:
        return jnp.dot(weights.astype(part.dtype), part, preferred_element_type=jnp.float32)

    def one(i: Array, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(i * heads, heads), heads)
        own = logits(q[rows], picked[i], real[pl.ds(i, 1)])
        raw = logits(q[rows], near[...], seen[pl.ds(i, 1)])
        top = jnp.maximum(jnp.max(own, axis=1, keepdims=True), sink[...])
        top = jnp.maximum(top, jnp.max(raw, axis=1, keepdims=True))
        own, raw = jnp.exp(own - top), jnp.exp(raw - top)
        total = jnp.sum(own, axis=1, keepdims=True) + jnp.sum(raw, axis=1, keepdims=True)
        result = weighted(own, picked[i]) + weighted(raw, near[...])
        out[rows] = (result / (total + jnp.exp(sink[...] - top))).astype(out.dtype)
        return carry

    jax.lax.fori_loop(0, QUERIES, one, None, unroll=unroll)


def _attend(
    q: Float[Array, "B t H c"],
    near: Float[Array, "B g n c"],
    seen: Bool[Array, "B t n"],
    picked: Float[Array, "B t k c"],
    real: Bool[Array, "B t k"],
    sink: Float[Array, " H"],
    scale: float,
    unroll: int,
    interpret: Any,
) -> Float[Array, "B t H c"]:
    batch, tokens, heads, dims = q.shape
    rows, n, k = QUERIES * heads, near.shape[2], picked.shape[2]

    def spec(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, i: (b, i, *(0,) * (len(shape) - 1)))

    flat = q.reshape(batch, tokens * heads, dims)
    out = pl.pallas_call(
        functools.partial(_kernel, scale, heads, unroll),
        grid=(batch, tokens // QUERIES),
        in_specs=[
            spec(rows, dims),
            pl.BlockSpec((heads, 1), lambda b, i: (0, 0)),
            pl.BlockSpec((None, None, n, dims), lambda b, i: (b, i, 0, 0)),
            spec(QUERIES, n),
            spec(QUERIES, k, dims),
            spec(QUERIES, k),
        ],
        out_specs=spec(rows, dims),
        out_shape=jax.ShapeDtypeStruct(flat.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel")),
        interpret=interpret,
        name="sparse_prefill",
    )(
        flat,
        sink.astype(jnp.float32)[:, None],
        near,
        seen.astype(jnp.int32),
        picked,
        real.astype(jnp.int32),
    )
    return out.reshape(q.shape)


@functools.partial(jax.jit, static_argnames=("scale", "group", "unroll", "interpret"), inline=True)
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
    unroll: int = QUERIES,
    interpret: Any = False,
) -> Float[Array, "B T H c"]:
    """See the package's `sparse_prefill`. Queries of a program are unrolled `unroll` at a time."""
    batch, tokens, _, dims = q.shape
    window = past.shape[1]
    why = refusal(q, QUERIES)
    if why:
        raise Unsupported(why)
    spare = ((0, 0), (0, 0), (0, -index.shape[-1] % LANES))
    index, valid = jnp.pad(index, spare), jnp.pad(valid, spare)
    size = query_block(batch, tokens, index.shape[-1])
    size += -size % QUERIES
    blocks, width = -(-tokens // size), window + QUERIES
    width += -width % LANES
    total = blocks * size
    raw = keys.band(past, kv, total + width - tokens - window, q.dtype)
    raw = keys.loud(keys.existing(raw, start, window))

    def attend(block: tuple[Array, ...]) -> Array:
        part, first, chosen, real = block
        at = first + jnp.arange(0, size, QUERIES)[:, None] + jnp.arange(width)
        near = raw[:, at]
        row, t = jnp.repeat(at, QUERIES, axis=0), first + jnp.arange(size)[:, None]
        age = t + window - row
        seen = (age >= 0) & (age < window) & (row >= window - start[:, None, None])
        picked = keys.loud(decode(take(rows, chosen, real), dims, group, q.dtype))
        return _attend(part, near, seen, picked, real, sink, scale, unroll, interpret)

    split, chosen, real = (keys.in_blocks(x, blocks, size) for x in (q, index, valid))
    firsts = jnp.arange(0, total, size)
    return keys.joined(jax.lax.map(attend, (split, firsts, chosen, real)), tokens)
