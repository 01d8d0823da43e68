"""Cases of `sparse_decode`."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from pallas_kernels import casebook, dispatch
from pallas_kernels import split_softmax_cases as shared
from pallas_kernels.casebook import Case, Work
from pallas_kernels.sparse_decode import sparse_decode
from pallas_kernels.sparse_decode.mosaic_gpu import Tuning

PAGE, PICKS = 64, 512
RECENT = (128, 5, 0, 128)  # a full window, part of one, none


def make(key: Array, *, batch: int, pages: int, kv: str) -> tuple[Any, ...]:
    """Picks anywhere in a pool."""
    keys = jax.random.split(key, 3)
    q, window, sink = shared.queries(keys[0], batch)
    pool = shared.entries(keys[1], (pages, PAGE), kv)
    index = jax.random.randint(keys[2], (batch, PICKS), 0, pages * PAGE)
    count = jnp.full((batch,), shared.SLOTS, jnp.int32)
    return q, window, count, pool, index, jnp.ones((batch, PICKS), bool), sink


def floor(*, batch: int, pages: int, kv: str) -> Work:
    """Every picked entry read once."""
    del pages
    picked = batch * PICKS * (shared.ROW_BYTES[kv] + 4 + 1)
    keys = batch * (PICKS + shared.SLOTS)
    flops = 4 * shared.HEADS * shared.DIMS * keys
    return Work(bytes=shared.fixed_bytes(batch) + picked, flops=flops)


def make_small(
    key: Array, *, kv: str, own: bool, picks: int, heads: int, flat: bool
) -> tuple[Any, ...]:
    """Picks with repeats; what no row picked is NaN, and so is the window beyond its count. The
    last two rows have no valid picks; indices that are not valid name nothing."""
    keys, batch = jax.random.split(key, 4), len(RECENT)
    q, window, sink = shared.queries(keys[0], batch, heads)
    window, count = shared.poisoned_window(window, RECENT)
    lead = (batch, 40) if own else (5, 24)
    rows, total = shared.entries(keys[1], lead, kv), lead[0] * lead[1]
    index = jax.random.randint(keys[2], (batch, picks), 0, lead[1] if own else total)
    index = index.at[:, picks // 2 :].set(index[:, : picks - picks // 2])  # every entry twice
    valid = jax.random.bernoulli(keys[3], 0.7, index.shape).at[-2:].set(False)
    first = jnp.arange(batch)[:, None] * (lead[1] if own else 0)
    used = jnp.zeros(total, bool).at[jnp.where(valid, first + index, total)].set(True, mode="drop")
    rows = casebook.poisoned(rows, ~used.reshape(lead))
    if flat and kv != "fp8":
        rows = rows.reshape(*lead, shared.DIMS)
    wild = jnp.where(jnp.arange(picks) % 2 == 0, -1, jnp.iinfo(jnp.int32).max // 2)
    return q, window, count, rows, jnp.where(valid, index, wild), valid, sink


def floor_small(*, kv: str, own: bool, picks: int, heads: int, flat: bool) -> Work:
    """As if all picks were valid."""
    del own, flat
    batch = len(RECENT)
    flops = 4 * batch * heads * shared.DIMS * (shared.SLOTS + picks)
    entries = batch * picks * shared.ROW_BYTES[kv]
    return Work(bytes=shared.fixed_bytes(batch, heads) + entries, flops=flops)


def small(
    name: str,
    kv: str = "bfloat16",
    own: bool = False,
    picks: int = 48,
    heads: int = shared.HEADS,
    flat: bool = False,
    declined: tuple[str, ...] = (),
) -> Case:
    """A correctness case."""
    return Case(
        op="sparse_decode",
        name=name,
        call=sparse_decode,
        make=make_small,
        floor=floor_small,
        shape={"kv": kv, "own": own, "picks": picks, "heads": heads, "flat": flat},
        tolerance=shared.ROUNDING,
        static={"scale": shared.SCALE, "group": shared.GROUP, "own": own},
        declined=declined,
    )


def true(batch: int, kv: str, aot: bool = False) -> Case:
    """V4's sizes and a pool of 2^20 entries, which no cache holds."""
    return Case(
        op="sparse_decode",
        call=sparse_decode,
        make=make,
        floor=floor,
        shape={"batch": batch, "pages": (1 << 20) // PAGE, "kv": kv},
        tolerance=shared.ROUNDING,
        static={"scale": shared.SCALE, "group": shared.GROUP, "own": False},
        declined=FP8_DECLINED if kv == "fp8" else (),
        aot=aot,
        zero_copy=True,
        shared=(3,),
    )


FP8_DECLINED = (dispatch.MOSAIC_TPU,)
CASES = (
    small("a pool"),
    small("a pool", "fp8", declined=FP8_DECLINED),
    small("own rows", own=True),
    small("own rows", "fp8", own=True, declined=FP8_DECLINED),
    small("128 heads", heads=128),
    small("8 heads", heads=8),
    small("24 heads", heads=24),
    small("96 heads", heads=96),
    small("32 heads", "fp8", heads=32, declined=FP8_DECLINED),
    small("picks that no chunk divides", picks=37, declined=(dispatch.MOSAIC_TPU,)),
    small("picks that no block divides", "fp8", picks=3, declined=FP8_DECLINED),
    small("plain vectors", flat=True, declined=(dispatch.MOSAIC_TPU,)),
)
BENCH = (
    true(32, "fp8", aot=True),
    true(32, "bfloat16", aot=True),
    true(128, "fp8", aot=True),
    true(128, "bfloat16", aot=True),
    *(true(batch, kv) for batch in (256, 1, 8, 64) for kv in ("fp8", "bfloat16")),
)
TUNINGS = {
    f"{dispatch.MOSAIC_GPU} splits={splits}{' scorer' * scorer}{' cluster' * cluster}": (
        dispatch.MOSAIC_GPU,
        Tuning(splits=splits, cluster=cluster, scorer=scorer),
    )
    for scorer in (False, True)
    for cluster in (True, False)
    for splits in (1, 2, 3, 4, 8)
    if cluster or splits > 1
}
