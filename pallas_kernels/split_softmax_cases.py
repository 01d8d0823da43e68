"""Inputs that the decode operations' cases share: DeepSeek-V4's head size, windows of 128."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import casebook
from pallas_kernels.casebook import Tolerance
from pallas_kernels.rows import Rows

DIMS, HEADS, SLOTS, GROUP = 512, 64, 128, 64
SCALE = DIMS**-0.5
ROW_BYTES = {"bfloat16": 2 * DIMS, "fp8": 512 + 128}
ROUNDING = Tolerance(
    "weights and output are rounded to bfloat16 by both, 2^-9 each of a value and of the largest",
    relative=2**-7,
)


def entries(key: Array, lead: tuple[int, int], kv: str) -> Rows:
    """Random entries: bfloat16 in lanes, as every backend can fetch them, or fp8 planes."""
    if kv == "fp8":
        return casebook.fp8_rows(key, lead)
    return jax.random.normal(key, (*lead, DIMS // 128, 128), jnp.bfloat16)


def queries(
    key: Array, batch: int, heads: int = HEADS, slots: int = SLOTS
) -> tuple[Float[Array, "B H c"], Float[Array, "B W c"], Float[Array, " H"]]:
    """Queries, windows and sinks."""
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (batch, heads, DIMS), jnp.bfloat16)
    window = jax.random.normal(keys[1], (batch, slots, DIMS), jnp.bfloat16)
    return q, window, jax.random.normal(keys[2], (heads,))


def poisoned_window(
    window: Float[Array, "B W c"], counts: tuple[int, ...]
) -> tuple[Float[Array, "B W c"], Int[Array, " B"]]:
    """A window with NaN beyond these counts, and the counts."""
    count = jnp.asarray(counts, jnp.int32)
    unused: Bool[Array, "B W"] = jnp.arange(window.shape[1]) >= count[:, None]
    return casebook.poisoned(window, unused), count


def fixed_bytes(batch: int, heads: int = HEADS, slots: int = SLOTS) -> int:
    """Bytes of queries, outputs, windows and sinks."""
    return 2 * batch * DIMS * (2 * heads + slots) + 4 * heads
