"""Cases of `page_gather` and `page_scatter`: pages of all layers, and pages of one."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.casebook import EXACT, Case, Work
from pallas_kernels.page_gather import page_gather, page_scatter

ALL_LAYERS = 7908  # rows of 128 bytes: a page of 21 CSA layers in fp8, keys included
TILED = 7936  # the same in whole tiles of 32 rows
ONE_LAYER = 320  # a page of one layer's entries: 64 of 640 bytes


def make_given(key: Array, *, rows: int, slots: tuple[int, ...], scatters: bool) -> tuple[Any, ...]:
    """A pool of seven records, and the given slots."""
    keys, at = jax.random.split(key), jnp.array(slots, jnp.int32)
    pool = jax.random.bits(keys[0], (7, rows, 128), jnp.uint8)
    records = jax.random.bits(keys[1], (len(slots), rows, 128), jnp.uint8)
    return (pool, records, at) if scatters else (pool, at)


def make(key: Array, *, rows: int, pages: int, moved: int, scatters: bool) -> tuple[Any, ...]:
    """`moved` random slots of a pool of `pages`."""
    keys = jax.random.split(key, 3)
    at = jax.random.permutation(keys[0], pages)[:moved].astype(jnp.int32)
    pool = jax.random.bits(keys[1], (pages, rows, 128), jnp.uint8)
    if not scatters:
        return pool, at
    return pool, jax.random.bits(keys[2], (moved, rows, 128), jnp.uint8), at


def floor_given(*, rows: int, slots: tuple[int, ...], **_: Any) -> Work:
    """Every record read and written."""
    return floor(rows=rows, moved=len(slots))


def floor(*, rows: int, moved: int, **_: Any) -> Work:
    """Every record read and written."""
    return Work(bytes=2 * 128 * rows * moved)


def given(name: str, rows: int, slots: tuple[int, ...], scatters: bool) -> Case:
    """A small case."""
    op = "page_scatter" if scatters else "page_gather"
    return Case(
        op="page_gather",
        name=f"{op}, {name}",
        call=page_scatter if scatters else page_gather,
        make=make_given,
        floor=floor_given,
        shape={"rows": rows, "slots": slots, "scatters": scatters},
        tolerance=EXACT,
        kernel=op,
        declined=(dispatch.MOSAIC_TPU,) if rows != 4 and rows % 8 else (),
    )


def moves(rows: int, pages: int, moved: int, scatters: bool, aot: bool = False) -> Case:
    """A true shape."""
    op = "page_scatter" if scatters else "page_gather"
    return Case(
        op="page_gather",
        name=op,
        call=page_scatter if scatters else page_gather,
        make=make,
        floor=floor,
        shape={"rows": rows, "pages": pages, "moved": moved, "scatters": scatters},
        tolerance=EXACT,
        kernel=op,
        declined=(dispatch.MOSAIC_TPU,) if rows != 4 and rows % 8 else (),
        aot=aot,
        zero_copy=True,
        shared=(0,),
        in_place=(0,) if scatters else (),
    )


CASES = tuple(
    given(name, rows, slots, scatters)
    for scatters in (False, True)
    for name, rows, slots in (
        ("some pages", 8, (6, 1, 3)),
        ("padding, and slots that do not exist", 8, (-1, 5, 7, 0, -3)),
        ("records that tiles and chunks do not divide", 37, (2, 4, 0)),
        ("a record of one row", 1, (2, -1, 6)),
    )
)
# The pool of 2304 whole pages exceeds 2^31 bytes.
BENCH = (
    moves(ALL_LAYERS, 2304, 384, False, aot=True),
    moves(ALL_LAYERS, 2304, 384, True, aot=True),
    moves(ONE_LAYER, 16_384, 8192, False, aot=True),
    moves(ONE_LAYER, 16_384, 8192, True, aot=True),
    moves(TILED, 2304, 384, False, aot=True),
    moves(TILED, 2304, 384, True, aot=True),
    moves(ALL_LAYERS, 2304, 58, False),
    moves(ONE_LAYER, 16_384, 384, False),
)
