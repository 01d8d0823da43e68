"""Cases of `hc_mix`: the hyper-connection site of a model with four streams."""

from typing import Any

import jax
from jaxtyping import Array

from pallas_kernels.casebook import Case, Tolerance, Work
from pallas_kernels.hc_mix import hc_mix

STREAMS, EPS, WIDTH = 4, 1e-6, 16384
TOLERANCE = Tolerance(
    "float32 exponentials and divisions by sums near 1, carried through 20 iterations",
    absolute=5e-6,
)


def make(key: Array, *, tokens: int, spread: float = 2.0) -> tuple[Any, ...]:
    """Projections of `spread` in all, three scales near 0.7, and biases of about 1."""
    k = (2 + STREAMS) * STREAMS
    keys = jax.random.split(key, 4)
    rms = jax.random.uniform(keys[3], (tokens,), minval=0.25, maxval=4.0)
    z = spread * jax.random.normal(keys[0], (tokens, k)) * rms[:, None]
    return (
        z,
        WIDTH * rms**2,
        0.7 + 0.2 * jax.random.normal(keys[1], (3,)),
        jax.random.normal(keys[2], (k,)),
    )


def floor(*, tokens: int, **_: Any) -> Work:
    """Projections in, weights out; some 40 passes over a 4 x 4 matrix are 1,300 operations."""
    k = (2 + STREAMS) * STREAMS
    return Work(bytes=4 * tokens * (2 * k + 1))


def case(iterations: int = 20, **shape: Any) -> Case:
    """One site."""
    static = {"streams": STREAMS, "iterations": iterations, "eps": EPS}
    static |= {"width": WIDTH, "norm_eps": EPS}
    return Case(
        op="hc_mix",
        call=hc_mix,
        make=make,
        floor=floor,
        shape=shape,
        static=static,
        tolerance=TOLERANCE,
    )


CASES = (
    case(tokens=1),
    case(tokens=64).named("a block each"),
    case(tokens=127),
    case(tokens=130).named("ragged tail"),
    case(iterations=1, tokens=5).named("one iteration"),
    case(tokens=65, spread=30.0).named("saturated logits"),
)
BENCH = tuple(case(tokens=n).named("", aot=n in (32, 8192)) for n in (1, 32, 256, 8192))
