"""Cases of `quant_matmul`: the projections of DeepSeek-V4-Flash in fp8, its experts in fp4."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import dispatch
from pallas_kernels.casebook import Case, Tolerance, Work
from pallas_kernels.quant_matmul import expert_matmul, quant_matmul
from pallas_kernels.quant_matmul.reference import BLOCK, FP4_GROUP

EXPERTS, TOP, HIDDEN, INTERMEDIATE = 256, 6, 4096, 2048
F32 = Tolerance("exact products; float32 sums in another order", relative=2e-5)
BF16 = Tolerance("float32 sums rounded to neighbouring bfloat16 values", each=2**-7, relative=1e-4)


def weights(key: Array, lead: tuple[int, ...], n: int, k: int, fp4: bool) -> tuple[Array, Array]:
    """Every finite code, with scales that bring values to about 1."""
    keys = jax.random.split(key)
    if fp4:
        shape = (*lead, n, k // FP4_GROUP)
        scale = jax.random.randint(keys[1], shape, 123, 128).astype(jnp.uint8)
        return jax.random.bits(keys[0], (*lead, n, k // 2), jnp.uint8), scale
    codes = jax.random.bits(keys[0], (*lead, n, k), jnp.uint8)
    codes = jnp.where(codes & 0x7F == 0x7F, jnp.uint8(0), codes)
    shape = (*lead, -(-n // BLOCK), -(-k // BLOCK))
    scale = jax.random.randint(keys[1], shape, 119, 123).astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn), scale


def _weight_bytes(n: int, k: int, fp4: bool) -> int:
    if fp4:
        return n * k // 2 + n * k // FP4_GROUP
    return n * k + -(-n // BLOCK) * -(-k // BLOCK)


def make(
    key: Array, *, rows: int, n: int, k: int, fp4: bool = False, dtype: str = "bfloat16"
) -> tuple[Any, ...]:
    """A plain product."""
    keys = jax.random.split(key)
    return jax.random.normal(keys[0], (rows, k)).astype(dtype), *weights(keys[1], (), n, k, fp4)


def floor(*, rows: int, n: int, k: int, fp4: bool = False, **_: Any) -> Work:
    """Weights as stored, rows in, rows out."""
    return Work(bytes=_weight_bytes(n, k, fp4) + 2 * rows * (n + k), flops=2 * rows * n * k)


def make_experts(
    key: Array, *, tokens: int, n: int, k: int, top: int = TOP, groups: int = EXPERTS,
    fp4: bool = True, own: bool = False, wrong: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Pairs of tokens and experts drawn evenly; `own`: each pair has a row (the down projection);
    `wrong`: some experts do not exist."""
    keys, pairs = jax.random.split(key, 3), tokens * top
    x = jax.random.normal(keys[0], (pairs if own else tokens, k), jnp.bfloat16)
    low, high = (-2, groups + 2) if wrong else (0, groups)
    experts = jax.random.randint(keys[1], (pairs,), low, high)
    return x, experts, *weights(keys[2], (groups,), n, k, fp4)


def floor_experts(
    *,
    tokens: int,
    n: int,
    k: int,
    top: int = TOP,
    groups: int = EXPERTS,
    fp4: bool = True,
    **_: Any,
) -> Work:
    """Weights of as many experts as so many draws are expected to touch, rows in and out."""
    pairs = tokens * top
    used = groups * (1 - (1 - 1 / groups) ** pairs)
    moved = used * _weight_bytes(n, k, fp4) + pairs * (2 * k + 4 * n)
    return Work(bytes=int(moved), flops=2 * pairs * n * k)


def _case(
    call: Callable[..., Any], maker: Callable[..., Any], least: Callable[..., Work],
    tolerance: Tolerance, declined: tuple[str, ...], shape: dict[str, Any], **static: Any,
) -> Case:  # fmt: skip
    return Case(
        op="quant_matmul",
        call=call,
        make=maker,
        floor=least,
        shape=shape,
        tolerance=tolerance,
        declined=declined,
        static=static,
        shared=(2, 3) if call is expert_matmul else (),
    )


def plain(*declined: str, **shape: Any) -> Case:
    """One projection."""
    if shape.get("fp4"):
        declined = (*declined, dispatch.MOSAIC_TPU)
    out = jnp.dtype("float32") if shape["n"] < 1024 else None
    tolerance = BF16 if out is None else F32
    return _case(quant_matmul, make, floor, tolerance, declined, shape, out_dtype=out)


def experts(*declined: str, **shape: Any) -> Case:
    """One projection of the routed experts. There is no TPU kernel."""
    every = (dispatch.MOSAIC_TPU, *declined)
    return _case(expert_matmul, make_experts, floor_experts, F32, every, shape)


_SMALL = {"n": 192, "k": 256, "groups": 5}
CASES = (
    plain(rows=1, n=256, k=256),
    plain(rows=20, n=384, k=512),
    plain(dispatch.MOSAIC_TPU, rows=70, n=192, k=256).named("ragged N"),
    plain(rows=5, n=128, k=1024, fp4=True),
    plain(dispatch.TRITON, dispatch.MOSAIC_TPU, rows=3, n=96, k=160, fp4=True).named("odd K"),
    plain(dispatch.TRITON, dispatch.MOSAIC_TPU, rows=3, n=130, k=200).named("ragged blocks"),
    plain(dispatch.TRITON, dispatch.MOSAIC_TPU, rows=2, n=64, k=128, dtype="float32"),
    experts(tokens=9, top=3, **_SMALL).named("few rows an expert"),
    experts(tokens=60, top=2, wrong=True, **_SMALL).named("experts that do not exist"),
    experts(tokens=50, top=2, own=True, fp4=False, **_SMALL).named("more rows than a tile"),
    plain(rows=9, n=96, k=384, fp4=True).named("ragged N"),
    experts(tokens=40, top=2, n=96, k=256, groups=3).named("more pairs than a tile"),
    experts(tokens=64, top=2, n=128, k=256, groups=16).named("many programs"),
)
BENCH = (
    experts(tokens=32, n=INTERMEDIATE, k=HIDDEN).named("up", aot=True),
    plain(rows=32, n=4096, k=4096).named("fp8", aot=True),
    plain(rows=1, n=32768, k=1024).named("wq_b", aot=True),
    experts(tokens=1, n=INTERMEDIATE, k=HIDDEN).named("up"),
    experts(tokens=8, n=INTERMEDIATE, k=HIDDEN).named("up"),
    experts(tokens=32, n=HIDDEN, k=INTERMEDIATE, own=True).named("down"),
    experts(tokens=128, n=INTERMEDIATE, k=HIDDEN).named("up"),
    experts(tokens=256, n=INTERMEDIATE, k=HIDDEN).named("up"),
    plain(rows=1, n=4096, k=4096).named("fp8"),
    plain(rows=64, n=4096, k=4096).named("fp8"),
    plain(rows=32, n=1024, k=4096).named("wq_a"),
)
