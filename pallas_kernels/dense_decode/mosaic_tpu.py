"""TPU kernel: blocks of contiguous entries through the pipeline, none fetched beyond a count."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels import split_softmax as soft
from pallas_kernels import split_softmax_tpu as tpu
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import LANES, Fp8Rows, Rows

BLOCK = 512  # entries
LEAST = 64  # entries of a block: a page


@functools.partial(jax.jit, static_argnames=("scale", "group", "block", "interpret"))
def dense_decode(
    q: Float[Array, "B H c"],
    window: Float[Array, "B W c"],
    window_count: Int[Array, " B"],
    rows: Rows,
    count: Int[Array, " B"],
    sink: Float[Array, " H"],
    *,
    scale: float,
    group: int,
    block: int = BLOCK,
    interpret: Any = False,
) -> Float[Array, "B H c"]:
    """See the package's `dense_decode`. Jitted, so that all layers lower one kernel once."""
    tpu.require(q, window, rows, group)
    (batch, heads, dims), slots = q.shape, window.shape[1]
    entries = soft.lead(rows)[1]
    block = math.gcd(block, entries)
    if not entries or block % LEAST:
        raise Unsupported(f"needs entries by {LEAST}, got {entries}")

    def at(row: Array, i: Array, _: Any, seen: Any) -> Array:
        """Past a row's last block its index stays, so that nothing is fetched."""
        return jnp.clip(i, 0, jnp.maximum((seen[row] + block - 1) // block - 1, 0))

    def entries_of(x: Array) -> pl.BlockSpec:
        rest = x.shape[2:]
        zeros = (0,) * len(rest)
        return pl.BlockSpec((None, block, *rest), lambda b, i, *n: (b, at(b, i, *n), *zeros))

    decoded = (block, dims) if isinstance(rows, Fp8Rows) else (16, LANES)  # else not used
    planes, specs = [rows], [entries_of(jax.tree.leaves(rows)[0])]
    if isinstance(rows, Fp8Rows):
        # XLA lays [B, N, 64] out with N last, lest half of the lanes be empty: this moves nothing.
        planes, rope = [rows.nope, rows.rope.swapaxes(1, 2)], rows.rope.shape[-1]
        specs.append(pl.BlockSpec((None, rope, block), lambda b, i, *n: (b, 0, at(b, i, *n))))
    whole = pl.BlockSpec((None, heads, dims), lambda b, *_: (b, 0, 0))
    recent = pl.BlockSpec((None, slots, dims), lambda b, *_: (b, 0, 0))
    logits = pl.BlockSpec((heads, LANES), lambda *_: (0, 0))
    kernel = pl.pallas_call(
        functools.partial(_body, scale=scale, group=group, block=block),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, entries // block),
            in_specs=[whole, recent, logits, *specs],
            out_specs=whole,
            scratch_shapes=[*tpu.scratch(heads, dims), pltpu.VMEM(decoded, jnp.bfloat16)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        interpret=interpret,
        name="dense_decode",
    )
    lanes = jnp.broadcast_to(sink.astype(jnp.float32)[:, None], (heads, LANES))
    return kernel(window_count, jnp.minimum(count, entries), q, window, lanes, *planes)


def _body(window_count: Any, count: Any, *refs: Any, scale: float, group: int, block: int) -> None:
    """Refs: q [H, c], window [W, c], sink [H, 128], entries [block, ...] and, apart, their rotary
    dims [64, block]; out [H, c]; scratch."""
    q, window, sink, entries, *rope = refs[:-6]
    out, sums, decoded = refs[-6], tpu.Sums(*refs[-5:-1]), refs[-1]
    row, i = pl.program_id(0), pl.program_id(1)

    @pl.when(i == 0)
    def _window() -> None:
        tpu.clear(sums)
        recent = window_count[row]
        slot = jax.lax.broadcasted_iota(jnp.int32, (1, window.shape[0]), 1)
        tpu.fold(sums, q[...], tpu.finite(window[...], recent), slot < recent, scale)

    limit = count[row] - i * block

    @pl.when(limit > 0)
    def _entries() -> None:
        if rope:
            tpu.decode(entries, decoded, group)
        keys = decoded[...] if rope else entries[...].reshape(block, -1)
        apart = tpu.finite(rope[0][...], limit, axis=1) if rope else None
        key = jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
        tpu.fold(sums, q[...], tpu.finite(keys, limit), key < limit, scale, apart)

    @pl.when(i == pl.num_programs(1) - 1)
    def _out() -> None:
        out[...] = tpu.finish(sums, sink[...], out.dtype, rope=bool(rope))
