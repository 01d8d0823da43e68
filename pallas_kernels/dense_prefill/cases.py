"""Cases of `dense_prefill`: what tests check, what is compiled ahead of time, what is timed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.casebook import Case, Tolerance, Work, fp8_rows, poisoned
from pallas_kernels.dense_prefill import dense_prefill
from pallas_kernels.rows import Rows

GROUP = 64
TOLERANCE = Tolerance(
    "weights and results are rounded to bfloat16: two correct results are one step apart, 2^-7",
    relative=2**-7,
)
EXACT_ENOUGH = Tolerance("float32 sums of up to some thousand keys in another order", relative=1e-5)


def starts(start: int | tuple[int, ...], batch: int) -> tuple[int, ...]:
    """Each sequence's first position: a chunk that is given alike for all, or one each."""
    return (start,) * batch if isinstance(start, int) else start


def chunk(
    key: Array,
    *,
    batch: int,
    tokens: int,
    start: int | tuple[int, ...],
    entries: int,
    ratio: int,
    heads: int,
    dims: int,
    window: int,
    fp8: bool,
    dtype: str,
) -> tuple[Any, ...]:
    """q, past, kv, start, rows, sink; NaN in all that no query sees."""
    keys, at = jax.random.split(key, 5), jnp.asarray(starts(start, batch), jnp.int32)
    q = jax.random.normal(keys[0], (batch, tokens, heads, dims), dtype)
    raw = jax.random.normal(keys[1], (batch, window + tokens, dims), dtype)
    before = jnp.arange(window) < window - at[:, None]
    past = poisoned(raw[:, :window], before)
    sink = jax.random.normal(keys[3], (heads,), jnp.float32)
    if not entries:
        return q, past, raw[:, window:], at, None, sink
    rows: Rows = jax.random.normal(keys[2], (batch, entries, dims), dtype)
    if fp8:
        rows = fp8_rows(keys[2], (batch, entries), nope=dims - GROUP, rope=GROUP)
    unseen = jnp.arange(entries) >= ((at + tokens) // ratio)[:, None]
    return q, past, raw[:, window:], at, poisoned(rows, unseen), sink


def entry_bytes(dims: int, fp8: bool, dtype: str) -> int:
    """Bytes of a stored entry."""
    return dims + 2 * GROUP if fp8 else dims * jnp.dtype(dtype).itemsize


def floor(
    *,
    batch: int,
    tokens: int,
    start: int | tuple[int, ...],
    entries: int,
    ratio: int,
    heads: int,
    dims: int,
    window: int,
    fp8: bool,
    dtype: str,
) -> Work:
    """Both products over the keys that each query sees; each input and output once."""
    position = np.asarray(starts(start, batch))[:, None] + np.arange(tokens)
    seen = np.minimum(position + 1, window) + np.minimum((position + 1) // ratio, entries)
    size = jnp.dtype(dtype).itemsize
    moved = size * batch * dims * (2 * tokens * heads + tokens + window)
    stored = int(np.minimum((position[:, -1] + 1) // ratio, entries).sum())
    moved += entry_bytes(dims, fp8, dtype) * stored
    return Work(bytes=moved, flops=4 * heads * dims * int(seen.sum()))


def case(
    batch: int,
    tokens: int,
    start: int | tuple[int, ...],
    entries: int,
    ratio: int = 128,
    *,
    heads: int = 64,
    dims: int = 512,
    window: int = 128,
    fp8: bool = False,
    dtype: str = "bfloat16",
) -> Case:
    """A chunk of `tokens` queries that begins at position `start`."""
    shape = {"batch": batch, "tokens": tokens, "start": start, "entries": entries, "ratio": ratio}
    shape |= {"heads": heads, "dims": dims, "window": window, "fp8": fp8, "dtype": dtype}
    static = {"ratio": ratio, "scale": dims**-0.5, "group": GROUP}
    kernels = ("mosaic_gpu", "mosaic_tpu", "triton")
    declined = kernels if dtype != "bfloat16" else ("mosaic_gpu",) if heads % 64 else ()
    tolerance = TOLERANCE if dtype == "bfloat16" else EXACT_ENOUGH
    return Case(
        op="dense_prefill",
        call=dense_prefill,
        make=chunk,
        floor=floor,
        shape=shape,
        tolerance=tolerance,
        static=static,
        declined=declined,
    )


SMALL: dict[str, Any] = {"dims": 128, "heads": 64}
CASES = (
    case(2, 3, (0, 301), 130, 2, **SMALL).named("ragged, starts differ"),
    case(2, 3, (9, 255), 70, 4, window=20, fp8=True, **SMALL).named("fp8, window of no tile"),
    case(1, 9, 120, 64, 4, window=64, **SMALL).named("whole tiles"),
    case(1, 2, 0, 5, 4, **SMALL).named("no entry is visible yet"),
    case(1, 5, 3, 0, **SMALL).named("sliding layer"),
    case(1, 17, 1000, 600, 2, heads=16, dims=128).named("16 heads, more than is stored"),
    case(1, 5, 40, 12, 4, dtype="float32", **SMALL).named("float32"),
)
BENCH = (
    case(1, 8192, 57344, 512).named("64K", aot=True),
    case(1, 8192, 57344, 512, fp8=True).named("64K fp8", aot=True),
    case(1, 8192, 253952, 2048).named("256K"),
    case(1, 8192, 1040384, 8192, fp8=True).named("1M fp8", aot=True),
    case(8, 1024, 64512, 512, fp8=True).named("64K fp8"),
    case(1, 8192, 57344, 0).named("sliding", aot=True),
    case(1, 65536, 0, 512).named("64K at once"),
)
