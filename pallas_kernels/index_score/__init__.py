"""Index scoring: one score per key from many query heads, over contiguous or paged keys."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import dispatch
from pallas_kernels.index_score import gradient, mosaic_gpu, mosaic_tpu, reference

IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.index_score,
    dispatch.MOSAIC_GPU: mosaic_gpu.index_score,
    dispatch.MOSAIC_TPU: mosaic_tpu.index_score,
}
PAGE_IMPLEMENTATIONS: Mapping[str, Callable[..., Any]] = {
    dispatch.XLA: reference.page_score,
    dispatch.MOSAIC_GPU: functools.partial(reference.pages_of, mosaic_gpu.index_score),
    dispatch.MOSAIC_TPU: functools.partial(reference.pages_of, mosaic_tpu.index_score),
}
FLOATS = ("float32", "bfloat16", "float8_e4m3fn")


def _check(
    q: Array, w: Array, keys: Array, scale: Array | None, lengths: Any, table: Array | None
) -> None:
    """Raises ValueError where the arguments do not fit together."""
    if q.ndim != 4 or q.dtype.name not in FLOATS:
        raise ValueError(f"q must be {'/'.join(FLOATS)} [B, T, H, K], got {q.dtype} {q.shape}")
    batch, tokens, heads, dim = q.shape
    pages = ("pages",) if table is not None else (batch,)
    if keys.ndim != 3 or keys.shape[2] != dim or (table is None and keys.shape[0] != batch):
        raise ValueError(f"keys must be [{pages[0]}, *, {dim}] for q {q.shape}, got {keys.shape}")
    if keys.dtype.name not in FLOATS:
        raise ValueError(f"keys must be one of {FLOATS}, got {keys.dtype}")
    wanted: dict[str, tuple[Any, str, tuple[tuple[int, ...], ...]]] = {
        "w": (w, "float32", ((batch, tokens, heads),)),
        "scale": (scale, "float32", (keys.shape[:2],)),
        "lengths": (lengths, "int32", ((batch,), (batch, tokens))),
    }
    if table is not None:
        wanted["table"] = (table, "int32", ((batch, table.shape[-1]),))
    for name, (x, dtype, shapes) in wanted.items():
        if x is not None and (x.dtype.name != dtype or x.shape not in shapes):
            shape = " or ".join(map(str, shapes))
            raise ValueError(f"{name} must be {dtype} {shape}, got {x.dtype} {x.shape}")


def _per_query(lengths: Array | None, q: Array) -> Array | None:
    if lengths is None or lengths.ndim == 2:
        return lengths
    return jnp.broadcast_to(lengths[:, None], q.shape[:2])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _score(inputs: gradient.Inputs, backend: str | None) -> Float[Array, "B T N"]:
    return dispatch.run("index_score", IMPLEMENTATIONS, backend, *inputs)


def _forward(inputs: gradient.Inputs, backend: str | None) -> tuple[Array, gradient.Inputs]:
    return _score(inputs, backend), inputs


def _backward(_: str | None, inputs: gradient.Inputs, cotangent: Array) -> tuple[gradient.Inputs]:
    return (gradient.Inputs(*gradient.backward(inputs, cotangent), lengths=None, table=None),)


_score.defvjp(_forward, _backward)


def index_score(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Float[Array, "*n K"],
    scale: Float[Array, "*n"] | None = None,
    *,
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None = None,
    table: Int[Array, "B pages"] | None = None,
    backend: str | None = None,
) -> Float[Array, "B T N"]:
    """score[b, t, n] = scale[b, n] * sum_h w[b, t, h] * relu(q[b, t, h] . keys[b, n]), float32.

    Keys are [B, N, K] with scales [B, N] (None: ones). With `table`, keys are a pool [S, P, K] with
    scales [S, P]: page `table[b, i]` holds entries i P .. (i + 1) P - 1 of row b, -1 is an absent
    page, and N = pages * P. `lengths`, per row or per query, counts the entries that a query sees.
    Entries that a query does not see, and those of absent pages, get -inf, whatever they hold.

    q and keys are float32, bfloat16 or e4m3 and are multiplied in float32 if q is float32, else in
    bfloat16, which holds e4m3 exactly; sums are float32. e4m3 queries have their scales in w. The
    Hopper kernel multiplies bfloat16 queries and e4m3 keys in float16: |q| must be below 65504, and
    |q| below 2^-14 loses bits. Scales are positive, as relu commutes only with positive factors.

    Differentiable in q, w, keys and scale with any backend; the reverse mode is plain XLA, holds no
    [T, H, N] array, and gives one-byte arrays, which are codes, zeros. ValueError: arguments do not
    fit together. Unsupported: the named backend, or none, takes these shapes or dtypes.
    """
    _check(q, w, keys, scale, lengths, table)
    inputs = gradient.Inputs(q, w, keys, scale, _per_query(lengths, q), table)
    return _score(inputs, backend)


def page_score(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Float[Array, "*n K"],
    scale: Float[Array, "*n"] | None = None,
    *,
    threshold: float,
    page: int,
    lengths: Int[Array, "B"] | Int[Array, "B T"] | None = None,
    table: Int[Array, "B pages"] | None = None,
    backend: str | None = None,
) -> tuple[Int[Array, "B T pages"], Float[Array, "B T pages"]]:
    """Of every page of `page` entries: how many scores are above a threshold, and the highest.

    The same scores as `index_score`'s; "xla" writes none of them out, kernels write them (4 bytes
    for keys of 128 or more) and one pass sums them up. -inf is the highest of a page that a query
    does not see. `page` must divide N, and a pool's P or be its multiple. Not differentiable.
    Errors are as there.
    """
    _check(q, w, keys, scale, lengths, table)
    count = reference.Keys(keys, scale, table).count
    unit = 1 if table is None else keys.shape[1]
    if page < 1 or count % page or (page % unit and unit % page):
        raise ValueError(f"page must divide {count} entries in pages of {unit}, got {page}")
    if not math.isfinite(threshold):
        raise ValueError(f"threshold must be finite, got {threshold}")
    inputs = gradient.Inputs(q, w, keys, scale, _per_query(lengths, q), table)
    sizes = {"threshold": threshold, "page": page}
    return dispatch.run("index_score", PAGE_IMPLEMENTATIONS, backend, *inputs, **sizes)
