"""Cases of `dense_decode`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import casebook, dispatch
from pallas_kernels import split_softmax_cases as shared
from pallas_kernels.casebook import Case, Work
from pallas_kernels.decode_hopper.steps import Tuning
from pallas_kernels.dense_decode import dense_decode

TOKENS = 128  # of one entry


def counts(batch: int, entries: int, ragged: bool) -> list[int]:
    """All entries of every row, or rows of evenly spread lengths."""
    return [entries * (b + 1) // batch if ragged else entries for b in range(batch)]


def make(key: Array, *, batch: int, entries: int, kv: str, ragged: bool) -> tuple[Any, ...]:
    """Rows that see all entries, or not."""
    keys = jax.random.split(key)
    q, window, sink = shared.queries(keys[0], batch)
    recent = jnp.full((batch,), shared.SLOTS, jnp.int32)
    count = jnp.asarray(counts(batch, entries, ragged), jnp.int32)
    return q, window, recent, shared.entries(keys[1], (batch, entries), kv), count, sink


def floor(*, batch: int, entries: int, kv: str, ragged: bool) -> Work:
    """Every visible entry read once."""
    seen = sum(counts(batch, entries, ragged))
    flops = 4 * shared.HEADS * shared.DIMS * (seen + batch * shared.SLOTS)
    return Work(bytes=shared.fixed_bytes(batch) + seen * shared.ROW_BYTES[kv], flops=flops)


def make_small(
    key: Array, *, entries: int, seen: tuple[int, ...], recent: tuple[int, ...], kv: str, heads: int
) -> tuple[Any, ...]:
    """NaN beyond the counts, in the window too."""
    keys, batch = jax.random.split(key), len(seen)
    q, window, sink = shared.queries(keys[0], batch, heads)
    window, window_count = shared.poisoned_window(window, recent)
    count = jnp.asarray(seen, jnp.int32)
    rows = shared.entries(keys[1], (batch, entries), kv)
    rows = casebook.poisoned(rows, jnp.arange(entries) >= count[:, None])
    return q, window, window_count, rows, count, sink


def floor_small(
    *, entries: int, seen: tuple[int, ...], recent: tuple[int, ...], kv: str, heads: int
) -> Work:
    """Every visible entry read once."""
    del entries
    flops = 4 * heads * shared.DIMS * (sum(seen) + sum(recent))
    fixed = shared.fixed_bytes(len(seen), heads)
    return Work(bytes=fixed + sum(seen) * shared.ROW_BYTES[kv], flops=flops)


def small(
    name: str,
    entries: int,
    seen: tuple[int, ...],
    recent: tuple[int, ...],
    kv: str = "bfloat16",
    declined: tuple[str, ...] = (),
    heads: int = shared.HEADS,
) -> Case:
    """A correctness case."""
    return Case(
        op="dense_decode",
        name=name,
        call=dense_decode,
        make=make_small,
        floor=floor_small,
        shape={"entries": entries, "seen": seen, "recent": recent, "kv": kv, "heads": heads},
        tolerance=shared.ROUNDING,
        static={"scale": shared.SCALE, "group": shared.GROUP},
        declined=declined,
    )


def true(batch: int, context: int, kv: str, ragged: bool = False, aot: bool = False) -> Case:
    """V4's sizes."""
    sizes = {"batch": batch, "entries": context // TOKENS, "kv": kv, "ragged": ragged}
    return Case(
        op="dense_decode",
        name=f"{context >> 10}K tokens",
        call=dense_decode,
        make=make,
        floor=floor,
        shape=sizes,
        tolerance=shared.ROUNDING,
        static={"scale": shared.SCALE, "group": shared.GROUP},
        aot=aot,
        zero_copy=True,
        shared=(3,) if batch * context >= 32 << 20 else (),
    )


NOT_PAGES = (dispatch.MOSAIC_GPU, dispatch.MOSAIC_TPU)
CASES = (
    small("all, some, one, none", 192, (192, 70, 1, 0), (128, 128, 3, 0)),
    small("all, some, one, none", 192, (192, 70, 1, 0), (128, 128, 3, 0), "fp8"),
    small("a window alone", 64, (0, 0), (128, 64)),
    small("8 heads", 192, (70,), (128,), heads=8),
    small("24 heads", 192, (70,), (128,), heads=24),
    small("32 heads", 192, (192, 70), (128, 3), "fp8", heads=32),
    small("more entries than counted blocks", 1088, (65, 1088), (0, 128)),
    small("entries that no block divides", 37, (37, 20), (128, 9), declined=NOT_PAGES),
    small("entries that no block divides", 37, (37, 20), (128, 9), "fp8", NOT_PAGES),
)
K64, K256, M1 = 1 << 16, 1 << 18, 1 << 20
BENCH = (
    true(32, M1, "bfloat16", aot=True),
    true(32, M1, "fp8", aot=True),
    true(8, M1, "bfloat16"),
    true(8, M1, "fp8"),
    true(128, M1, "bfloat16", aot=True),
    true(128, M1, "fp8", aot=True),
    true(32, M1, "bfloat16", ragged=True),
    true(32, M1, "fp8", ragged=True),
    *(true(batch, M1, kv) for batch in (1, 64, 256) for kv in ("bfloat16", "fp8")),
    *(true(batch, ctx, "fp8") for ctx in (K256, K64) for batch in (1, 8, 32, 64, 128, 256)),
    *(true(batch, ctx, "bfloat16") for ctx in (K256, K64) for batch in (8, 32, 128)),
)
# What a name says, and what it stands for.
_KINDS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("", {}),
    (" parts=bfloat16", {"parts": jnp.bfloat16}),
    (" scorer", {"scorer": True}),
    (" scorer parts=bfloat16", {"scorer": True, "parts": jnp.bfloat16}),
    (" scorer cluster", {"scorer": True, "cluster": True}),
)
TUNINGS = {
    f"{dispatch.MOSAIC_GPU} splits={splits}{name}": (
        dispatch.MOSAIC_GPU,
        Tuning(splits=splits, **fields),
    )
    for name, fields in _KINDS
    for splits in (1, 2, 3, 4, 8, 16)
    if splits <= 8 or "cluster" not in fields
}
