"""Cases of `page_recall`: whole page records of all layers from host memory into a pool."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.casebook import EXACT, Case, Work
from pallas_kernels.page_recall import page_recall

RECORD = 7908  # rows of 128 bytes: a page of 21 CSA layers in fp8, keys included
TILED = 7936  # the same in whole tiles of 32 rows, as a TPU's host memory has them


def make_given(
    key: Array, *, rows: int, counts: tuple[int, ...], src: tuple[int, ...], dst: tuple[int, ...]
) -> tuple[Any, ...]:
    """Seven slots, a segment of each count, and the given copies."""
    keys = jax.random.split(key, len(counts) + 1)
    sizes = (7, *counts)
    pool, *segments = (
        jax.random.bits(k, (n, rows, 128), jnp.uint8) for k, n in zip(keys, sizes, strict=True)
    )
    return pool, tuple(segments), jnp.array(src, jnp.int32), jnp.array(dst, jnp.int32)


def floor_given(*, rows: int, src: tuple[int, ...], **_: Any) -> Work:
    """Every record read and written."""
    return Work(bytes=2 * 128 * rows * len(src))


def make(
    key: Array, *, pages: int, stored: int, segments: int, rows: int = RECORD
) -> tuple[Any, ...]:
    """`pages` random records of `stored` in so many segments, into as many random slots."""
    keys = jax.random.split(key, segments + 3)
    each = stored // segments
    stores = tuple(jax.random.bits(k, (each, rows, 128), jnp.uint8) for k in keys[3 : segments + 3])
    pool = jnp.zeros((pages + 16, rows, 128), jnp.uint8)
    src = jax.random.permutation(keys[1], each * segments)[:pages].astype(jnp.int32)
    return pool, stores, src, jax.random.permutation(keys[2], pages).astype(jnp.int32)


def floor(*, pages: int, rows: int = RECORD, **_: Any) -> Work:
    """Every record crosses the bus once."""
    moved = 128 * rows * pages
    return Work(bytes=moved, host_bytes=moved)


def given(name: str, *counts: int, src: tuple[int, ...], dst: tuple[int, ...]) -> Case:
    """A small case."""
    return Case(
        op="page_recall",
        name=name,
        call=page_recall,
        make=make_given,
        floor=floor_given,
        shape={"rows": 3, "counts": counts, "src": src, "dst": dst},
        tolerance=EXACT,
        declined=(dispatch.MOSAIC_TPU,),
        host=(1,),
    )


def recall(pages: int, stored: int, segments: int, rows: int = RECORD, aot: bool = False) -> Case:
    """A recall from pinned host memory."""
    return Case(
        op="page_recall",
        call=page_recall,
        make=make,
        floor=floor,
        shape={"pages": pages, "stored": stored, "segments": segments, "rows": rows},
        tolerance=EXACT,
        declined=(dispatch.MOSAIC_TPU,) if rows % 32 else (),
        aot=aot,
        zero_copy=True,
        shared=(0, 1),
        in_place=(0,),
        host=(1,),
    )


CASES = (
    given(
        "rows on both sides of a segment's end", 3, 3, 2, src=(2, 3, 5, 6, 7), dst=(0, 1, 2, 3, 4)
    ),
    given("padding between entries", 4, src=(-1, 3, -1, 1), dst=(2, 5, 0, 4)),
    given("a row or a slot that does not exist", 2, 2, src=(4, 1, 0, 3), dst=(1, 7, -2, 5)),
    given("one host row in two slots", 4, src=(2, 2), dst=(0, 6)),
)
BENCH = (
    recall(384, 2048, 2, aot=True),
    recall(58, 2048, 2),
    recall(96, 1024, 1),
    recall(384, 2048, 2, TILED, aot=True),
)
