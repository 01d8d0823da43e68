"""Cases of `top_k`: true shapes are a batch's index scores in decode, a chunk's in prefill."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.casebook import EXACT, Case, Work
from pallas_kernels.top_k import top_k

FEW = (1.0, 0.0, -0.0, -1.0, float("inf"), -float("inf"), float("nan"), 2.0)


def visibility(key: Array, rows: int, columns: int, masked: bool) -> Array:
    """Ragged: the first row sees everything, the last of several nothing."""
    keys = jax.random.split(key)
    counts = jax.random.randint(keys[0], (rows,), 0, columns + 1, jnp.int32).at[0].set(columns)
    counts = counts.at[-1].set(0) if rows > 1 else counts
    if not masked:
        return counts
    some = jax.random.bernoulli(keys[1], 0.7, (rows, columns))
    return some & (jnp.arange(columns) < counts[:, None])


def make_ragged(
    key: Array, *, rows: int, columns: int, masked: bool = False, ties: bool = False
) -> tuple[Any, ...]:
    """Scores, few distinct ones with `ties`; NaN where invisible."""
    keys = jax.random.split(key)
    visible = visibility(keys[0], rows, columns, masked)
    scores = jax.random.normal(keys[1], (rows, columns))
    if ties:
        scores = jax.random.choice(keys[1], jnp.array(FEW, jnp.float32), (rows, columns))
    seen = visible if masked else jnp.arange(columns) < visible[:, None]
    return jnp.where(seen, scores, jnp.nan), visible


def make(key: Array, *, rows: int, columns: int) -> tuple[Any, ...]:
    """Scores of rows that see every column."""
    visible = jnp.full(rows, columns, jnp.int32)
    return jax.random.normal(key, (rows, columns)), visible


def floor(*, rows: int, columns: int, **_: Any) -> Work:
    """Every score read once."""
    return Work(bytes=4 * rows * columns)


def as_sets(args: tuple[Any, ...], result: Any) -> Any:
    """Columns of filled places in order, the others beyond the last; and which are filled."""
    index, valid = result
    return jnp.sort(jnp.where(valid, index, args[0].shape[1]), axis=1), valid


def case(k: int, **shape: Any) -> Case:
    """Selection of `k` at a shape; ragged and poisoned where the shape says how."""
    ragged = {"masked", "ties"} & shape.keys()
    return Case(
        op="top_k",
        call=top_k,
        make=make_ragged if ragged else make,
        floor=floor,
        shape=shape,
        static={"k": k},
        tolerance=EXACT,
        view=as_sets,
        name=f"k={k}",
    )


def timed(k: int, rows: int, columns: int, aot: bool = False) -> Case:
    """A true shape."""
    return case(k, rows=rows, columns=columns).named(f"k={k}", aot=aot)


CASES = (
    case(16, rows=4, columns=300, ties=False),
    case(16, rows=3, columns=300, ties=True, masked=True),
    case(512, rows=3, columns=130, masked=True),  # fewer columns than places
    case(512, rows=2, columns=20_001, ties=True),  # several launches, groups of tiles
    case(1024, rows=1, columns=33_000, ties=True),
    case(1, rows=9, columns=7, ties=True),
)
BENCH = (
    timed(512, 32, 24_576, aot=True),
    timed(512, 1, 262_144, aot=True),
    timed(512, 1, 24_576),
    timed(512, 8, 262_144),
    timed(512, 32, 262_144),
    timed(512, 128, 24_576),
    timed(512, 256, 6_144),
    timed(512, 1, 65_536),
    timed(512, 32, 65_536),
    timed(512, 2048, 16_384, aot=True),  # a chunk of a prompt's tokens at 64K
    timed(1024, 32, 65_536, aot=True),
)
