"""Cases of `compress`: CSA (windows of 4 that overlap), HCA (of 128) and index keys (128 wide)."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.casebook import Case, Tolerance, Work
from pallas_kernels.compress import Entries, Tail, compress
from pallas_kernels.compress.reference import EMPTY, row_bytes
from pallas_kernels.rows import decode

ROPE, GROUP, EPS = 64, 64, 1e-6
F32 = Tolerance("float32 exponentials and sums, in another order", relative=1e-5)
BF16 = Tolerance("neighbouring bfloat16 values", each=2**-7, relative=1e-5)
FP8 = Tolerance("neighbouring e4m3 codes, where a value lies between", each=2**-3, relative=2e-4)
TOLERANCES = {"float32": F32, "bfloat16": BF16, "fp8": FP8}


def _carried(key: Array, batch: int, width: int, fresh: Array) -> Array:
    """Statistics of a few tokens, or of none where `fresh`."""
    top, weight, acc = jnp.moveaxis(jax.random.normal(key, (batch, 3, width)), 1, 0)
    stats = jnp.stack([2 * top, 1 + jnp.abs(weight), acc], axis=1)
    none = jnp.array([EMPTY, 0.0, 0.0])[:, None]
    return jnp.where(fresh[:, None, None], none, stats)


def make(
    key: Array, *, batch: int, tokens: int, dim: int, ratio: int, dtype: str = "float32",
    whole: bool = False, full: bool = False, far: bool = False, **_: Any,
) -> tuple[Any, ...]:  # fmt: skip
    """Rows that start anywhere (`whole`: at a window; `far`: past 10^6) and have any number of
    tokens (`full`: all), with NaN beyond; the first row starts at 0 and has all."""
    keys, overlap = jax.random.split(key, 9), ratio < 16
    width = dim * (2 if overlap else 1)
    begin = (1_000_000 // ratio) * ratio if far else 0
    start = begin + jax.random.randint(keys[0], (batch,), 0, 3 * ratio)
    start = start // ratio * ratio if whole else start
    start = start if far else start.at[0].set(0)
    count = jax.random.randint(keys[1], (batch,), 0, tokens + 1).at[0].set(tokens)
    count = jnp.full_like(count, tokens) if full else count
    beyond = (jnp.arange(tokens) >= count[:, None])[..., None]
    pair = (
        jax.random.normal(keys[2], (2, batch, tokens, width))
        * jnp.array([1.0, 3.0])[:, None, None, None]
    )
    value, gate = jnp.where(beyond, jnp.nan, pair).astype(dtype)
    current = _carried(keys[3], batch, width, start % ratio == 0)
    previous = _carried(keys[4], batch, dim, start < ratio) if overlap else None
    norm = 1 + 0.1 * jax.random.normal(keys[5], (dim,))
    freqs = 160000.0 ** (-jnp.arange(0, ROPE, 2) / ROPE)
    ape = jax.random.normal(keys[6], (ratio, width))
    return value, gate, start, count, Tail(current, previous), norm, freqs, ape


def floor(
    *, batch: int, tokens: int, dim: int, ratio: int, layout: str, dtype: str = "float32", **_: Any
) -> Work:
    """Values and gates in, the tail in and out, finished entries out."""
    overlap = ratio < 16
    width = dim * (2 if overlap else 1)
    tail = 4 * 3 * (width + (dim if overlap else 0))
    entry = row_bytes(dim - ROPE, GROUP) + 2 * ROPE
    if layout != "fp8":
        entry = dim * jnp.dtype(layout).itemsize
    inputs = 2 * tokens * width * jnp.dtype(dtype).itemsize
    return Work(bytes=int(batch * (inputs + 2 * tail + tokens / ratio * entry)))


def view(args: tuple[Any, ...], result: tuple[Entries, Tail]) -> Any:
    """The values of entries, however they are laid out; the other results as they are."""
    entries, tail = result
    values = decode(entries.rows, args[5].shape[0], GROUP, jnp.float32)
    return values, entries.first, entries.count, tail


def case(*, layout: str, **shape: Any) -> Case:
    """One layer's chunk. The TPU kernel is for prefill from the start of a window."""
    aligned = shape.get("whole", False)
    tpu = aligned and shape["tokens"] >= shape["ratio"]
    static = {"ratio": shape["ratio"], "eps": EPS, "layout": layout, "aligned": aligned}
    return Case(
        op="compress",
        call=compress,
        make=make,
        floor=floor,
        shape={**shape, "layout": layout},
        static=static,
        tolerance=TOLERANCES[layout],
        view=view,
        declined=() if tpu else (dispatch.MOSAIC_TPU,),
    )


CASES = (
    case(layout="float32", batch=3, tokens=13, dim=128, ratio=4),
    case(layout="float32", batch=3, tokens=70, dim=128, ratio=4, whole=True),
    case(layout="bfloat16", batch=2, tokens=33, dim=128, ratio=4, dtype="bfloat16", whole=True),
    case(layout="fp8", batch=3, tokens=9, dim=512, ratio=4, far=True),
    case(layout="fp8", batch=2, tokens=300, dim=512, ratio=128),
    case(layout="float32", batch=2, tokens=300, dim=128, ratio=128, whole=True),
    case(layout="float32", batch=3, tokens=3, dim=128, ratio=128).named("inside a window"),
    case(layout="float32", batch=12, tokens=1, dim=128, ratio=4).named("decode"),
    case(layout="fp8", batch=9, tokens=1, dim=512, ratio=4, full=True).named("decode"),
    case(layout="fp8", batch=5, tokens=1, dim=512, ratio=128, full=True).named("decode"),
)
_CSA, _HCA = {"dim": 512, "ratio": 4}, {"dim": 512, "ratio": 128}
_INDEX = {"dim": 128, "ratio": 4, "layout": "float32"}
_CHUNK = {"batch": 1, "whole": True, "full": True}
BENCH = (
    case(layout="fp8", tokens=8192, **_CSA, **_CHUNK).named("CSA prefill", aot=True),
    case(layout="fp8", tokens=8192, **_HCA, **_CHUNK).named("HCA prefill", aot=True),
    case(tokens=8192, **_INDEX, **_CHUNK).named("index prefill", aot=True),
    case(layout="fp8", tokens=65536, **_CSA, **_CHUNK).named("CSA prefill"),
    case(layout="fp8", tokens=65536, **_HCA, **_CHUNK).named("HCA prefill"),
    case(layout="fp8", tokens=8192, dtype="bfloat16", **_CSA, **_CHUNK).named(
        "CSA prefill, bfloat16 in"
    ),
    case(layout="fp8", batch=32, tokens=1, full=True, **_CSA).named("CSA decode", aot=True),
    case(layout="fp8", batch=32, tokens=1, full=True, **_HCA).named("HCA decode", aot=True),
    case(batch=32, tokens=1, full=True, **_INDEX).named("index decode"),
    case(layout="fp8", batch=256, tokens=1, full=True, **_CSA).named("CSA decode"),
    case(layout="fp8", batch=1, tokens=1, full=True, **_CSA).named("CSA decode"),
)
