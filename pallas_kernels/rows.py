"""Compressed entries as kernels read them: plain vectors, or planes of fp8 codes.

An entry of c dims is a key and a value at once. `Rows` are either one array [..., c] in bfloat16 or
float32, or the two planes of `Fp8Rows`, whose last `rope.shape[-1]` dims carry rotary position.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, BFloat16, Float, UInt8

LANES = 128


class Fp8Rows(NamedTuple):
    """Entries as e4m3 codes with one ue8m0 scale per group of dims, and bfloat16 rotary dims.

    A nope row is: the codes, one scale byte per group, zeros up to whole 128-byte lanes (for 448
    dims in groups of 64: 448 + 7 + 57 = 512 bytes).
    """

    nope: UInt8[Array, "*n R 128"]
    rope: BFloat16[Array, "*n r"]


Rows = Array | Fp8Rows


def lead_shape(rows: Rows) -> tuple[int, ...]:
    """Shape of the axes in front of an entry."""
    return rows.rope.shape[:-1] if isinstance(rows, Fp8Rows) else rows.shape[:-1]


def e8m0(byte: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Scale bytes -> float32 powers of two: 2^(byte - 127), byte 0 is 2^-127, 255 is NaN."""
    bits = byte.astype(jnp.uint32) << 23
    bits = jnp.where(byte == 0, jnp.uint32(1 << 22), bits)  # 2^-127 is subnormal
    bits = jnp.where(byte == 255, jnp.uint32(0x7FC00000), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def decode(rows: Rows, dims: int, group: int, dtype: Any) -> Float[Array, "*n c"]:
    """Entries [..., dims] in `dtype`; exact for bfloat16 and float32."""
    if not isinstance(rows, Fp8Rows):
        return rows.astype(dtype)
    lead, nope = rows.rope.shape[:-1], dims - rows.rope.shape[-1]
    row = rows.nope.reshape(*lead, -1)
    codes = jax.lax.bitcast_convert_type(row[..., :nope], jnp.float8_e4m3fn).astype(dtype)
    scale = e8m0(row[..., nope : nope + nope // group]).astype(dtype)
    values = codes.reshape(*lead, nope // group, group) * scale[..., None]
    return jnp.concatenate([values.reshape(*lead, nope), rows.rope.astype(dtype)], axis=-1)
