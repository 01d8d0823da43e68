"""Cases of `index_score`: what tests check, what is compiled ahead of time, what is timed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.casebook import Case, Tolerance, Work, poisoned
from pallas_kernels.index_score import index_score

E4M3 = "float8_e4m3fn"
PAGE = 64
CODE_SCALE = 2.0**-8  # of keys and queries of e4m3 codes, whose largest value is 448
# Of the largest score. Products of two bfloat16 numbers, or of e4m3 codes in float16, are exact.
SUMS = Tolerance("float32 sums of 128 products and 128 heads in another order", relative=2**-16)
FP8 = Tolerance("Hopper adds up products of two e4m3 codes in about 14 bits", relative=2**-10)


def visible(batch: int, tokens: int, entries: int, rows: str) -> np.ndarray:
    """Lengths [B, T]: full; ragged, of which the first is 0 and the second whole; or causal, the
    end of a prompt whose four tokens make an entry."""
    if rows == "causal":
        at = 4 * entries - tokens + np.arange(tokens)
        return np.broadcast_to((at + 1) // 4, (batch, tokens)).astype(np.int32)
    if rows == "ragged":
        some = np.arange(batch * tokens) * 7919 % (entries + 1)
        some[1:2] = entries
        return some.reshape(batch, tokens).astype(np.int32)
    return np.full((batch, tokens), entries, np.int32)


def codes(key: Array, shape: tuple[int, ...]) -> Array:
    """e4m3 with every finite code equally likely."""
    bits = jax.random.bits(key, shape, jnp.uint8)
    bits = jnp.where(bits & 0x7F == 0x7F, jnp.uint8(0), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float8_e4m3fn)


def numbers(key: Array, shape: tuple[int, ...], dtype: str) -> Array:
    """Normal numbers, or codes."""
    return codes(key, shape) if dtype == E4M3 else jax.random.normal(key, shape).astype(dtype)


def pooled(key: Array, values: Array, spare: int) -> tuple[Array, Array]:
    """[B, N, ...] -> pages of a pool in random places, and where they are; NaN in `spare` more."""
    pages = values.reshape(-1, PAGE, *values.shape[2:])
    at = jax.random.permutation(key, pages.shape[0] + spare)[: pages.shape[0]]
    pool = jnp.zeros((pages.shape[0] + spare, *pages.shape[1:]), values.dtype)
    pool = poisoned(pool, jnp.ones(pool.shape[:2], bool)).at[at].set(pages)
    return pool, at.reshape(values.shape[0], -1).astype(jnp.int32)


def make(
    key: Array,
    *,
    batch: int,
    tokens: int,
    heads: int,
    dims: int,
    entries: int,
    query: str,
    keys: str,
    rows: str,
    paged: bool,
) -> tuple[dict[str, Array]]:
    """Arguments by name. Keys that no query sees, and their scales, are NaN; a third of a small
    pool's pages are absent."""
    random = jax.random.split(key, 5)
    lengths = visible(batch, tokens, entries, rows)
    values = numbers(random[1], (batch, entries, dims), keys)
    scale = CODE_SCALE * (0.5 + jax.random.uniform(random[2], (batch, entries)))
    padding = jnp.arange(entries) >= lengths.max(axis=1)[:, None]
    if rows != "full":
        values, scale = poisoned(values, padding), poisoned(scale, padding)
    out = {
        "q": numbers(random[0], (batch, tokens, heads, dims), query),
        "w": jax.random.normal(random[3], (batch, tokens, heads)) * (heads * dims) ** -0.5,
        "lengths": jnp.asarray(lengths),
    }
    if query == E4M3:
        out["w"] *= CODE_SCALE
    if paged:
        values, table = pooled(random[4], values, 3)
        scale, _ = pooled(random[4], scale, 3)
        absent = jnp.arange(table.shape[1]) % 3 == 1
        out["table"] = jnp.where(absent, -1, table) if rows == "ragged" else table
    return (out | {"keys": values} | ({"scale": scale} if keys == E4M3 else {}),)


def floor(
    *,
    batch: int,
    tokens: int,
    heads: int,
    dims: int,
    entries: int,
    query: str,
    keys: str,
    rows: str,
    paged: bool,
) -> Work:
    """Each visible key once, each query's product with the keys that it sees, all scores."""
    lengths = visible(batch, tokens, entries, rows).astype(np.int64)
    key_bytes = dims * jnp.dtype(keys).itemsize + (4 if keys == E4M3 else 0)
    moved = key_bytes * int(lengths.max(axis=1).sum()) + 4 * batch * tokens * entries
    moved += batch * tokens * heads * (dims * jnp.dtype(query).itemsize + 4)
    moved += 4 * batch * (entries // PAGE) if paged else 0
    return Work(bytes=moved, flops=2 * heads * dims * int(lengths.sum()))


def call(arguments: dict[str, Array], *, backend: str | None) -> Array:
    """`index_score` of arguments by name."""
    return index_score(**arguments, backend=backend)


def case(
    batch: int,
    tokens: int,
    entries: int,
    *,
    heads: int = 64,
    dims: int = 128,
    query: str = "bfloat16",
    keys: str = E4M3,
    rows: str = "full",
    paged: bool = False,
) -> Case:
    """Scores of `entries` keys for `tokens` queries of each of `batch` rows."""
    shape = {"batch": batch, "tokens": tokens, "heads": heads, "dims": dims, "entries": entries}
    shape |= {"query": query, "keys": keys, "rows": rows, "paged": paged}
    hopper = query != "float32" and heads in (64, 128) and dims == 128
    tpu = heads % 8 == 0 and dims == 128
    declined = (() if hopper else ("mosaic_gpu",)) + (() if tpu else ("mosaic_tpu",))
    return Case(
        op="index_score",
        call=call,
        make=make,
        floor=floor,
        shape=shape,
        tolerance=FP8 if query == E4M3 else SUMS,
        declined=declined,
    )


BFLOAT16: dict[str, Any] = {"keys": "bfloat16"}
CASES = (
    case(3, 1, 200, rows="ragged").named("no whole tile, an empty row, NaN behind"),
    case(3, 1, 192, rows="ragged", paged=True).named("pages, some absent"),
    case(2, 1, 130, heads=128, query=E4M3, rows="ragged").named("e4m3 queries"),
    case(1, 1, 64, **BFLOAT16).named("one tile"),
    case(1, 1, 1, **BFLOAT16).named("one entry"),
    case(2, 5, 300, rows="ragged").named("queries see different keys"),
    case(2, 9, 256, rows="ragged", paged=True, **BFLOAT16).named("queries, pages, some absent"),
    case(1, 70, 40, rows="causal", heads=128, query=E4M3).named("causal, e4m3 queries"),
    case(2, 3, 70, query="float32", keys="float32", rows="ragged").named("float32"),
    case(2, 3, 70, heads=4, dims=32, rows="ragged", **BFLOAT16).named("few heads, short keys"),
)
M1, K256, K64 = 1 << 18, 1 << 16, 1 << 14  # entries of contexts: four tokens make one
MEMORY: dict[str, Any] = {"heads": 128}
BENCH = (
    case(1, 1, M1, **MEMORY).named("memory indexer 1M", aot=True),
    case(8, 1, M1, **MEMORY).named("memory indexer 1M"),
    case(1, 1, M1, query=E4M3, **MEMORY).named("memory indexer 1M", aot=True),
    case(8, 1, M1, query=E4M3, **MEMORY).named("memory indexer 1M"),
    case(1, 1, M1).named("1M", aot=True),
    case(8, 1, M1).named("1M"),
    case(32, 1, M1).named("1M"),
    case(64, 1, K256).named("256K"),
    case(128, 1, K64).named("64K"),
    case(256, 1, K64).named("64K"),
    case(8, 1, K256, **BFLOAT16).named("256K", aot=True),
    case(32, 1, K64, paged=True).named("64K", aot=True),
    case(8, 1, K256, paged=True, **BFLOAT16).named("256K", aot=True, zero_copy=True),
    case(1, 2048, K64, rows="causal").named("prefill 64K", aot=True),
    case(1, 2048, K64, rows="causal", **BFLOAT16).named("prefill 64K", aot=True),
    case(1, 2048, K64, rows="causal", query=E4M3).named("prefill 64K", aot=True),
    case(1, 2048, K256, rows="causal").named("prefill 256K"),
    case(1, 2048, M1, rows="causal").named("prefill 1M"),
)
