"""TPU kernel: one DMA per picked row, a chunk of rows ahead of the products.

A row can be fetched alone where it is whole tiles of 128 lanes and 512 bytes or more, as bfloat16
[*, *, c / 128, 128] is. Other layouts make XLA copy the whole pool first, and are declined: so are
fp8 rows, whose rotary dims lie 128 bytes apart. They would save no bandwidth: a fetch of their own
for the rotary dims is 512 bytes too, and 1,024 are a bfloat16 row.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import split_softmax_tpu as tpu
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import LANES, Fp8Rows, Rows
from pallas_kernels.sparse_decode.reference import pool_index

CHUNK = 128  # rows
UNROLL = 8  # copies started per turn of the loop


@functools.partial(jax.jit, static_argnames=("scale", "group", "own", "chunk", "interpret"))
def sparse_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    index: Int[Array, "B k"],
    valid: Bool[Array, "B k"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    own: bool,
    chunk: int = CHUNK,
    interpret: Any = False,
) -> Float[Array, "B H c"]:
    """See the package's `sparse_decode`. Jitted, so that all layers lower one kernel once."""
    tpu.require(q, window, rows, group)
    (batch, heads, dims), slots = q.shape, window.shape[1]
    if isinstance(rows, Fp8Rows) or rows.shape[2:] != (dims // LANES, LANES):
        raise Unsupported(f"rows must be bfloat16 [*, *, {dims // LANES}, {LANES}]")
    chunk = math.gcd(chunk, index.shape[1])
    if not index.shape[1] or chunk % UNROLL:
        raise Unsupported(f"needs picks by {UNROLL}, got {index.shape[1]}")
    pool = rows.reshape(-1, *rows.shape[2:])
    picks = jnp.where(valid, pool_index(rows, index, own=own), -1)[:, None]  # [B, 1, k]
    nothing = jnp.zeros((1, *pool.shape[1:]), pool.dtype)  # a row for what is not valid

    def row_of(*shape: int, **kwargs: Any) -> pl.BlockSpec:
        return pl.BlockSpec((None, *shape), lambda b, *_: (b, 0, 0), **kwargs)

    kernel = pl.pallas_call(
        functools.partial(_body, scale=scale, chunk=chunk),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[
                row_of(1, index.shape[1], memory_space=pltpu.SMEM),
                row_of(1, index.shape[1]),
                row_of(heads, dims),
                row_of(slots, dims),
                pl.BlockSpec((heads, LANES), lambda *_: (0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=row_of(heads, dims),
            scratch_shapes=[
                pltpu.VMEM((2, chunk, *pool.shape[1:]), pool.dtype),
                pltpu.SemaphoreType.DMA((2,)),
                *tpu.scratch(heads, dims),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), disable_bounds_checks=True
        ),
        interpret=interpret,
        name="sparse_decode",
    )
    lanes = jnp.broadcast_to(sink.astype(jnp.float32)[:, None], (heads, LANES))
    return kernel(window_count, picks, picks, q, window, lanes, pool, nothing)


def _body(window_count: Any, *refs: Any, scale: float, chunk: int) -> None:
    """Refs: picks [1, k] as scalars and as a vector, q, window, sink, pool and a row of zeros in
    HBM; out; two chunks of rows, their semaphores, sums."""
    scalars, picks, q, window, sink, pool, nothing = refs[:-7]
    out, rows, arrived = refs[-7:-4]
    sums, chunks = tpu.Sums(*refs[-4:]), picks.shape[1] // chunk

    def fetch(c: Array | int, slot: Array | int) -> None:
        def several(i: Array, _: None) -> None:
            for j in range(UNROLL):
                one(i * UNROLL + j)

        def one(i: Array) -> None:
            entry, to = scalars[0, c * chunk + i], rows.at[slot, i]

            @pl.when(entry >= 0)
            def _() -> None:
                pltpu.make_async_copy(pool.at[entry], to, arrived.at[slot]).start()

            @pl.when(entry < 0)
            def _() -> None:
                pltpu.make_async_copy(nothing.at[0], to, arrived.at[slot]).start()

        jax.lax.fori_loop(0, chunk // UNROLL, several, None)

    fetch(0, 0)
    tpu.clear(sums)
    recent = window_count[pl.program_id(0)]
    slot = jax.lax.broadcasted_iota(jnp.int32, (1, window.shape[0]), 1)
    tpu.fold(sums, q[...], tpu.finite(window[...], recent), slot < recent, scale)

    def step(c: Array, _: None) -> None:
        slot = jax.lax.rem(c, 2)
        pl.when(c + 1 < chunks)(lambda: fetch(c + 1, 1 - slot))
        # One wait for the bytes of the whole chunk.
        pltpu.make_async_copy(rows.at[slot], rows.at[slot], arrived.at[slot]).wait()
        at = pl.ds(pl.multiple_of(c * chunk, chunk), chunk)
        tpu.fold(sums, q[...], rows[slot].reshape(chunk, -1), picks[:, at] >= 0, scale)

    jax.lax.fori_loop(0, chunks, step, None)
    out[...] = tpu.finish(sums, sink[...], out.dtype, rope=False)
