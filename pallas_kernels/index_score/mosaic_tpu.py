"""TPU kernel: blocks of keys stream past the heads of a few queries.

Pages of a pool are blocks of their own, found by the prefetched table: a step takes several, each
through its own window, so that the pipeline fetches them where they lie. A step whose keys no query
sees costs no fetch: its windows stay where they were.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from pallas_kernels.dispatch import Unsupported

LANES = 128
BLOCK = 1024  # keys a step
PAGES = 16  # windows a step for paged keys
QUERIES = 8  # queries a step: the sublanes of its block of scores


def _ends(lengths: Int[Array, "B T"], queries: int) -> Int[Array, "B steps"]:
    """Per step of `queries` queries, the number of keys that any of them sees."""
    padded = jnp.pad(lengths, ((0, 0), (0, -lengths.shape[1] % queries)))
    return jnp.max(padded.reshape(lengths.shape[0], -1, queries), axis=-1)


def _step(b: Any, i: Any, j: Any, ends: Any, block: int) -> Any:
    """Step j of the keys, or the last that a query of this step sees."""
    return jnp.minimum(j, lax.div(jnp.maximum(ends[b, i] - 1, 0), block))


def _body(
    windows: int,
    block: int,
    tokens: int,
    paged: bool,
    scaled: bool,
    ends: Any,  # [B, steps], [B * T] and [B, pages] in SMEM
    lengths: Any,
    table: Any,
    q: Any,  # [queries, H, K]
    w: Any,  # [queries, H]
    *refs: Any,  # `windows` of keys [n, K]; scales [1, block] if any; scores [queries, block]
) -> None:
    b, i, j = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    start = j * block
    keys, scale, out = refs[:windows], refs[windows], refs[-1]
    queries, page = q.shape[0], block // windows

    @pl.when(start >= ends[b, i])
    def _unseen() -> None:
        out[...] = jnp.full(out.shape, -jnp.inf, jnp.float32)

    @pl.when(start < ends[b, i])
    def _score() -> None:
        exact = q.dtype == jnp.float32
        dtype = jnp.float32 if exact else jnp.bfloat16
        values = jnp.concatenate([key[...].astype(dtype) for key in keys], axis=0)
        column = lax.broadcasted_iota(jnp.int32, (1, block), 1)
        if paged:
            pages = table.shape[1]
            for n in range(windows):  # an absent page's keys count for no query
                at = jnp.minimum(j * windows + n, pages - 1)
                here = (column >= n * page) & (column < (n + 1) * page)
                column = jnp.where(here & (table[b, at] < 0), jnp.int32(2**30), column)
        for t in range(queries):
            dots = lax.dot_general(
                q[t].astype(dtype),
                values,
                (((1,), (1,)), ((), ())),
                precision=lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT,
                preferred_element_type=jnp.float32,
            )
            weights = w[t : t + 1, :].T  # [H, 1]
            score = jnp.sum(jnp.maximum(dots, 0.0) * weights, axis=0, keepdims=True)
            score = score * scale[...] if scaled else score
            at = b * tokens + jnp.minimum(i * queries + t, tokens - 1)
            out[t : t + 1, :] = jnp.where(column < lengths[at] - start, score, -jnp.inf)


def _key_windows(
    keys: Array, paged: bool, block: int, windows: int
) -> list[tuple[tuple[Any, ...], Callable[..., tuple[Any, ...]]]]:
    """Shape and index map of every window of keys."""
    if not paged:

        def at(b: Any, i: Any, j: Any, ends: Any, _lengths: Any, _table: Any) -> tuple[Any, ...]:
            return b, _step(b, i, j, ends, block), 0

        return [((None, block, keys.shape[2]), at)]

    def page_at(n: int, b: Any, i: Any, j: Any, ends: Any, _: Any, table: Any) -> tuple[Any, ...]:
        entry = _step(b, i, j, ends, block) * windows + n
        return jnp.maximum(table[b, jnp.minimum(entry, table.shape[1] - 1)], 0), 0, 0

    shape = (None, *keys.shape[1:])
    return [(shape, functools.partial(page_at, n)) for n in range(windows)]


def _check(q: Array, keys: Array, table: Array | None) -> None:
    if q.shape[3] != LANES or q.shape[2] % 8:
        raise Unsupported(f"needs {LANES} dims and a multiple of 8 heads, got {q.shape[2:]}")
    if 0 in q.shape or 0 in keys.shape or (table is not None and 0 in table.shape):
        raise Unsupported(f"needs at least one of everything, got q {q.shape}, keys {keys.shape}")
    rows = {1: 32, 2: 16, 4: 8}[keys.dtype.itemsize]
    if table is not None and keys.shape[1] % rows:
        raise Unsupported(f"needs pages of a multiple of {rows} entries, got {keys.shape[1]}")


class _Plan(NamedTuple):
    """A step's keys, in how many windows they come, and its queries."""

    block: int
    windows: int
    queries: int


def _plan(
    q: Array, keys: Array, table: Array | None, block: int, pages: int, queries: int
) -> _Plan:
    """Whole lanes of scores a step, or all that there are."""
    queries = min(queries, q.shape[1])
    if table is None:
        return _Plan(min(block, -(-keys.shape[1] // LANES) * LANES), 1, queries)
    page, windows = keys.shape[1], min(pages, table.shape[1])
    windows += -windows * page % LANES // page
    return _Plan(windows * page, windows, queries)


def _inputs(
    plan: _Plan, q: Array, w: Array, keys: Array, scale: Array | None, paged: bool
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """What the pipeline fetches for each step, and where it finds it."""
    (_, _, heads, dim), (block, windows, queries) = q.shape, plan
    specs = [
        pl.BlockSpec((None, queries, heads, dim), lambda b, i, j, *_: (b, i, 0, 0)),
        pl.BlockSpec((None, queries, heads), lambda b, i, j, *_: (b, i, 0)),
    ]
    specs += [pl.BlockSpec(*window) for window in _key_windows(keys, paged, block, windows)]
    operands = [q, w, *[keys] * windows]
    if scale is not None:

        def scale_at(b: Any, i: Any, j: Any, ends: Any, *_: Any) -> tuple[Any, ...]:
            return b, 0, _step(b, i, j, ends, block)

        operands.append(scale[:, None])
        specs.append(pl.BlockSpec((None, 1, block), scale_at))
    return operands, specs


@functools.partial(jax.jit, static_argnames=("block", "pages", "queries", "interpret"))
def index_score(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    keys: Float[Array, "*n K"],
    scale: Float[Array, "*n"] | None,
    lengths: Int[Array, "B T"] | None,
    table: Int[Array, "B pages"] | None,
    *,
    block: int = BLOCK,
    pages: int = PAGES,
    queries: int = QUERIES,
    interpret: Any = False,
) -> Float[Array, "B T N"]:
    """See the package's `index_score`. A pool's scales are gathered first: a row of them is less
    than a transfer can take. `block` keys or `pages` pages, and `queries` queries, a step."""
    _check(q, keys, table)
    (batch, tokens, _, _), paged = q.shape, table is not None
    plan = _plan(q, keys, table, block, pages, queries)
    count = keys.shape[1]
    if table is not None:
        count *= table.shape[1]
        scale = None if scale is None else scale[jnp.maximum(table, 0)].reshape(batch, count)
    lengths = jnp.full((batch, tokens), count, jnp.int32) if lengths is None else lengths
    lengths = jnp.minimum(lengths, count)
    table = jnp.zeros((1, 1), jnp.int32) if table is None else table
    operands, in_specs = _inputs(plan, q, w, keys, scale, paged)
    out_spec = pl.BlockSpec((None, plan.queries, plan.block), lambda b, i, j, *_: (b, i, j))
    steps = (batch, -(-tokens // plan.queries), -(-count // plan.block))
    return pl.pallas_call(
        functools.partial(_body, plan.windows, plan.block, tokens, paged, scale is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3, grid=steps, in_specs=in_specs, out_specs=out_spec
        ),
        out_shape=jax.ShapeDtypeStruct((batch, tokens, count), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="index_score",
        interpret=interpret,
    )(_ends(lengths, plan.queries), lengths.reshape(-1), table, *operands)
