"""TPU kernel for prefill: blocks of whole windows stream through VMEM, each token read once.

It makes float32 entries; XLA encodes them (a sixteenth of the bytes read) and reduces the window
that the chunk leaves unfinished. The first halves of a block's last window wait in scratch memory
for the next block, so blocks of a row run in order.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.compress import reference
from pallas_kernels.compress.reference import Entries, Tail
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.rows import LANES

SUBLANES = 8
BLOCK_TOKENS = 512


def _supported(
    value: Array, dim: int, rope: int, ratio: int, aligned: bool, interpret: Any
) -> None:
    if not aligned:
        raise Unsupported("chunks that start within a window: whole windows only")
    if value.shape[1] < ratio:
        raise Unsupported(f"no whole window in {value.shape[1]} tokens")
    if ratio % SUBLANES and SUBLANES % ratio:
        raise Unsupported(f"ratio must divide or be a multiple of {SUBLANES}, got {ratio}")
    if value.dtype not in (jnp.float32, jnp.bfloat16):
        raise Unsupported(f"value must be float32 or bfloat16, got {value.dtype}")
    if (dim % LANES and not interpret) or rope > LANES:
        raise Unsupported(f"needs whole {LANES}-lane entries and rope dims in the last, got {dim}")


def _fold(
    value: Any, gate: Any, ape: Any, entries: int, ratio: int, columns: slice
) -> tuple[Array, Array, Array]:
    """Softmax statistics [entries, dim] of whole windows, for some channels."""
    if ratio % SUBLANES == 0:  # a window is whole tiles
        shape = (entries, ratio, columns.stop - columns.start)
        g = gate[:, columns].astype(jnp.float32).reshape(shape) + ape[:, columns]
        top = jnp.max(g, axis=1)
        weight = jnp.exp(g - top[:, None])
        v = value[:, columns].astype(jnp.float32).reshape(shape)
        return top, jnp.sum(weight, axis=1), jnp.sum(weight * v, axis=1)
    lanes, parts = value.shape[-1], []
    places = [pl.ds(k, entries, stride=ratio) for k in range(ratio)]
    for c in range(columns.start // lanes, columns.stop // lanes):
        bias = [ape[k, c * lanes : (c + 1) * lanes] for k in range(ratio)]
        gates = [gate[c, at, :] + bias[k] for k, at in enumerate(places)]
        top = functools.reduce(jnp.maximum, gates)
        weights = [jnp.exp(g - top) for g in gates]
        acc = [w * value[c, at, :] for w, at in zip(weights, places, strict=True)]
        parts.append((top, sum(weights[1:], weights[0]), sum(acc[1:], acc[0])))
    top, total, acc = (jnp.concatenate(part, axis=1) for part in zip(*parts, strict=True))
    return top, total, acc


def _turn(x: Array, cos: Array, sin: Array) -> Array:
    """Adjacent pairs of the last lanes: x cos + (its partner) * (signed sin)."""
    width = cos.shape[-1]
    end = x[:, x.shape[1] - width :]
    odd = jax.lax.broadcasted_iota(jnp.int32, end.shape, 1) % 2 == 1
    partner = jnp.where(odd, pltpu.roll(end, 1, 1), pltpu.roll(end, width - 1, 1))
    turned = end * cos + partner * sin
    if width == x.shape[1]:
        return turned
    return jnp.concatenate([x[:, : x.shape[1] - width], turned], axis=1)


def _kernel(
    done, value, gate, ape, previous, norm, cos, sin, out, carry, *wide, ratio: int, eps: float
):
    """One block of windows of one row. `carry` [3, dim] is the window before's first half."""
    b, i, (entries, dim) = pl.program_id(0), pl.program_id(1), out.shape
    width = value.shape[1]
    if wide:  # rows a stride apart can be read from float32 columns of one lane tile only
        lanes = wide[0].shape[-1]
        for source, target in zip((value, gate), wide, strict=True):
            for c in range(width // lanes):
                target[c] = source[:, c * lanes : (c + 1) * lanes].astype(jnp.float32)
        value, gate = wide
    top, total, acc = _fold(value, gate, ape, entries, ratio, slice(width - dim, width))
    if width != dim:

        @pl.when(i == 0)
        def _():
            carry[...] = previous[...]

        halves = _fold(value, gate, ape, entries, ratio, slice(0, dim))
        first = jax.lax.broadcasted_iota(jnp.int32, (entries, dim), 0) == 0
        kept = [jnp.where(first, carry[k][None], pltpu.roll(h, 1, 0)) for k, h in enumerate(halves)]
        for k, h in enumerate(halves):
            carry[pl.ds(k, 1), :] = h[entries - 1 :]
        both = jnp.maximum(top, kept[0])
        own, other = jnp.exp(top - both), jnp.exp(kept[0] - both)
        total, acc = total * own + kept[1] * other, acc * own + kept[2] * other
    pooled = acc / jnp.maximum(total, 1e-30)
    mean = jnp.mean(jnp.square(pooled), axis=1, keepdims=True)
    y = _turn(pooled * jax.lax.rsqrt(mean + eps) * norm[...], cos[...], sin[...])
    slot = i * entries + jax.lax.broadcasted_iota(jnp.int32, y.shape, 0)
    out[...] = jnp.where(slot < done[b], y, 0.0)


def _tables(first: Array, windows: int, ratio: int, freqs: Array, lanes: int) -> list[Array]:
    """Cosines and signed sines [B, windows, lanes]: 1 and 0 where nothing turns."""
    cos, sin = reference.angles(first, windows, ratio, freqs.astype(jnp.float32))
    pad = [(0, 0), (0, 0), (lanes - 2 * freqs.shape[0], 0)]
    signed = jnp.stack([-sin, sin], axis=-1).reshape(*sin.shape[:2], -1)
    return [jnp.pad(jnp.repeat(cos, 2, axis=-1), pad, constant_values=1.0), jnp.pad(signed, pad)]


def _entries(
    value: Array, gate: Array, ape: Array, previous: Array, norm: Array, tables: list[Array],
    done: Array, *, ratio: int, eps: float, block_tokens: int, interpret: Any,
) -> Float[Array, "B w dim"]:  # fmt: skip
    (batch, tokens, width), dim, lanes = value.shape, norm.shape[1], tables[0].shape[2]
    windows = tokens // ratio
    entries = max(SUBLANES, block_tokens // ratio)
    entries = min(entries, -(-windows // SUBLANES) * SUBLANES)

    def rows(n: int, k: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, n, k), lambda b, i, _: (b, i, 0))

    whole = [pl.BlockSpec(x.shape, lambda b, i, _: (0, 0)) for x in (ape, norm)]
    of_row = pl.BlockSpec((None, 3, dim), lambda b, i, _: (b, 0, 0))
    tiles = (width // lanes, entries * ratio, lanes)
    wide = [] if ratio % SUBLANES == 0 else [pltpu.VMEM(tiles, jnp.float32)] * 2
    return pl.pallas_call(
        functools.partial(_kernel, ratio=ratio, eps=eps),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, pl.cdiv(windows, entries)),
            in_specs=[
                rows(entries * ratio, width), rows(entries * ratio, width), whole[0], of_row,
                whole[1], rows(entries, lanes), rows(entries, lanes),
            ],
            out_specs=rows(entries, dim),
            scratch_shapes=[pltpu.VMEM((3, dim), jnp.float32), *wide],
        ),
        out_shape=jax.ShapeDtypeStruct((batch, windows, dim), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="compress",
        interpret=interpret,
    )(done, value, gate, ape, previous, norm, *tables)  # fmt: skip


def _next_tail(
    value: Array, gate: Array, start: Array, count: Array, tail: Tail, ape: Array | None, ratio: int
) -> Tail:
    """From the tokens of the unfinished window and the one before; starts are whole windows."""
    done = count // ratio
    batch, tokens, _ = value.shape
    token = (done[:, None] - 1) * ratio + jnp.arange(2 * ratio)
    at = jnp.clip(token, 0, tokens - 1)[..., None]
    seen = ((token >= 0) & (token < count[:, None]))[..., None]
    v, g = (jnp.take_along_axis(x, at, axis=1).astype(jnp.float32) for x in (value, gate))
    if ape is not None:
        g = g + jnp.concatenate([ape, ape])
    v, g = jnp.where(seen, v, 0.0), jnp.where(seen, g, reference.EMPTY)
    shape = (batch, 2, ratio, -1)
    before, current = jnp.moveaxis(reference.statistics(v.reshape(shape), g.reshape(shape)), 1, 0)
    started = (done == 0)[:, None, None]
    current = jnp.where(started, reference.merge(tail.current, current), current)
    if tail.previous is None:
        return Tail(current, None)
    dim = tail.previous.shape[-1]
    return Tail(current, jnp.where(started, tail.previous, before[..., :dim]))


@functools.partial(
    jax.jit,
    static_argnames=("ratio", "eps", "layout", "group", "aligned", "block_tokens", "interpret"),
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
    block_tokens: int = BLOCK_TOKENS,
    interpret: Any = False,
) -> tuple[Entries, Tail]:
    """See the package's `compress`."""
    (_, tokens, width), dim, rope = value.shape, norm.shape[0], 2 * freqs.shape[0]
    _supported(value, dim, rope, ratio, aligned, interpret)
    first, done = start // ratio, count // ratio
    previous = tail.previous if tail.previous is not None else tail.current  # not read
    bias = jnp.zeros((ratio, width)) if ape is None else ape.astype(jnp.float32)
    values = _entries(
        value, gate, bias, previous, norm.astype(jnp.float32)[None],
        _tables(first, tokens // ratio, ratio, freqs, min(dim, LANES)), done.astype(jnp.int32),
        ratio=ratio, eps=eps, block_tokens=block_tokens, interpret=interpret,
    )  # fmt: skip
    spare = reference.slots(tokens, ratio) - values.shape[1]
    values = jnp.pad(values, ((0, 0), (0, spare), (0, 0)))
    rows = reference.encode(values, layout, rope, group)
    return Entries(rows, first, done), _next_tail(value, gate, start, count, tail, ape, ratio)
