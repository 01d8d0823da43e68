"""Cases of `sparse_prefill`: what tests check, what is compiled ahead of time, what is timed."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.casebook import Case, Work
from pallas_kernels.dense_prefill import cases as dense
from pallas_kernels.sparse_prefill import sparse_prefill

GARBAGE = (-5, 1 << 30)  # what indices may hold where they are not valid


def make(key: Array, *, selected: int, ratio: int, **shape: Any) -> tuple[Any, ...]:
    """Arguments; each query selects visible entries at random, fewer where fewer are visible."""
    keys = jax.random.split(key, 4)
    q, past, kv, at, rows, sink = dense.chunk(keys[0], ratio=ratio, **shape)
    visible = jnp.minimum((at[:, None] + jnp.arange(q.shape[1]) + 1) // ratio, shape["entries"])
    i, lead = jnp.arange(selected), (*q.shape[:2], selected)
    # One entry of each of `selected` equal stretches of what is visible, in a query's own order.
    stretch = jnp.maximum(visible // selected, 1)[..., None]
    within = jax.random.randint(keys[1], lead, 0, 1 << 30) % stretch
    turn = jax.random.randint(keys[2], (*lead[:2], 1), 0, selected)
    slot = (i + turn) % selected
    index, valid = slot * stretch + within, slot < visible[..., None]
    garbage = jnp.asarray(GARBAGE, jnp.int32)[i % len(GARBAGE)]
    index = jnp.where(valid, index, garbage).astype(jnp.int32)
    return q, past, kv, at, rows, index, valid, sink


def floor(*, selected: int, ratio: int, **shape: Any) -> Work:
    """Both products over the keys that each query sees; each input and output once.

    Entries count once, however many queries select them, if any can.
    """
    position = np.asarray(dense.starts(shape["start"], shape["batch"]))[:, None]
    position = position + np.arange(shape["tokens"])
    visible = np.minimum((position + 1) // ratio, shape["entries"])
    picked = np.minimum(visible, selected)
    seen = np.minimum(position + 1, shape["window"]) + picked
    without: dict[str, Any] = shape | {"entries": 0}
    alone = dense.floor(ratio=ratio, **without)
    each = dense.entry_bytes(shape["dims"], shape["fp8"], shape["dtype"])
    moved = alone.bytes + each * int(np.minimum(visible[:, -1], picked.sum(-1)).sum())
    flops = 4 * shape["heads"] * shape["dims"] * int(seen.sum())
    return Work(bytes=moved + 5 * position.size * selected, flops=flops)


def case(*where: Any, selected: int = 512, **shape: Any) -> Case:
    """A chunk as in `dense_prefill`'s cases; ratio 4 unless it is given."""
    alike = dense.case(*where, **({"ratio": 4} | shape))
    declined = tuple(name for name in alike.declined if name != "mosaic_gpu")
    return Case(
        op="sparse_prefill",
        call=sparse_prefill,
        make=make,
        floor=floor,
        shape={"selected": selected} | dict(alike.shape),
        tolerance=alike.tolerance,
        static={name: alike.static[name] for name in ("scale", "group")},
        declined=declined,
    )


SMALL: dict[str, Any] = {"dims": 128, "heads": 16}
CASES = (
    case(2, 5, (0, 301), 80, selected=40, **SMALL).named("ragged, starts differ"),
    case(2, 3, (9, 255), 70, selected=33, window=20, fp8=True, **SMALL).named("fp8"),
    case(1, 9, 700, 180, selected=64, heads=64, dims=128).named("64 heads, whole tiles"),
    case(1, 2, 0, 5, selected=8, **SMALL).named("nothing is selected"),
    case(1, 5, 90, 30, selected=12, dtype="float32", **SMALL).named("float32"),
)
BENCH = (
    case(1, 8192, 57344, 16384).named("64K", aot=True),
    case(1, 8192, 57344, 16384, fp8=True).named("64K fp8", aot=True),
    case(1, 8192, 253952, 65536, fp8=True).named("256K fp8"),
    case(1, 8192, 1040384, 262144, fp8=True).named("1M fp8", aot=True),
    case(8, 1024, 64512, 16384, fp8=True).named("64K fp8"),
    case(1, 65536, 0, 16384).named("64K at once"),
)
