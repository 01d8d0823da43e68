"""Cases of `grouped_matmul`: routed experts of DeepSeek-V4-Flash (256 of them, 6 a token)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels.casebook import Case, Tolerance, Work
from pallas_kernels.grouped_matmul import grouped_matmul

EXPERTS, TOP, HIDDEN, INTERMEDIATE = 256, 6, 4096, 2048
BF16 = Tolerance(
    "both round a float32 sum to bfloat16, to neighbours where it lies between; sums differ in "
    "order, which shows in results near zero",
    each=2**-7,
    relative=1e-4,
)
F32 = Tolerance("float32 sums in another order", relative=1e-6)
KERNEL = "body"  # JAX's own: named after a function inside of its ragged_dot, and nothing else


def make_given(
    key: Array, *, sizes: tuple[int, ...], n: int, k: int, dtype: str = "bfloat16"
) -> tuple[Any, ...]:
    """Groups of the given sizes."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (sum(sizes), k)).astype(dtype)
    w = jax.random.normal(keys[1], (len(sizes), n, k)).astype(dtype)
    return x, w, jnp.array(sizes, jnp.int32)


def floor_given(*, sizes: tuple[int, ...], n: int, k: int, dtype: str = "bfloat16") -> Work:
    """Rows in and out, and the matrices that have rows."""
    rows, used = sum(sizes), sum(size > 0 for size in sizes)
    moved = rows * (n + k) + used * n * k
    return Work(bytes=moved * jnp.dtype(dtype).itemsize, flops=2 * rows * n * k)


def make(key: Array, *, tokens: int, n: int, k: int) -> tuple[Any, ...]:
    """Every token's experts drawn evenly."""
    keys, rows = jax.random.split(key, 3), tokens * TOP
    x = jax.random.normal(keys[0], (rows, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (EXPERTS, n, k), jnp.bfloat16)
    drawn = jax.random.randint(keys[2], (rows,), 0, EXPERTS)
    return x, w, jnp.bincount(drawn, length=EXPERTS).astype(jnp.int32)


def floor(*, tokens: int, n: int, k: int) -> Work:
    """Rows in and out, and the matrices that so many draws are expected to touch."""
    rows = tokens * TOP
    used = EXPERTS * (1 - (1 - 1 / EXPERTS) ** rows)
    return Work(bytes=int(2 * (rows * (n + k) + used * n * k)), flops=2 * rows * n * k)


def given(declined: tuple[str, ...] = (), tolerance: Tolerance = BF16, **shape: Any) -> Case:
    """A small case."""
    return Case(
        op="grouped_matmul",
        call=grouped_matmul,
        make=make_given,
        floor=floor_given,
        shape=shape,
        tolerance=tolerance,
        kernel=KERNEL,
        declined=declined,
    )


def experts(tokens: int, n: int, k: int, aot: bool = False) -> Case:
    """A projection of a layer's experts."""
    return Case(
        op="grouped_matmul",
        call=grouped_matmul,
        make=make,
        floor=floor,
        shape={"tokens": tokens, "n": n, "k": k},
        tolerance=BF16,
        kernel=KERNEL,
        aot=aot,
        shared=(1,),
    )


CASES = (
    given(sizes=(100, 0, 33, 167), n=256, k=128),
    given(sizes=(0, 0, 5, 0), n=128, k=64).named("one group has all rows"),
    given(sizes=(0, 128, 128, 1), n=128, k=192).named("first empty, whole blocks"),
    given(("mosaic_gpu",), F32, sizes=(3, 0, 8), n=16, k=24, dtype="float32"),
)
BENCH = (
    experts(8192, INTERMEDIATE, HIDDEN, aot=True),
    experts(32, INTERMEDIATE, HIDDEN, aot=True),
    experts(1, INTERMEDIATE, HIDDEN),
    experts(256, HIDDEN, INTERMEDIATE),
)
