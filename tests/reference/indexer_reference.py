"""The memory indexer in NumPy, from LSA spec 2.1: float64 arithmetic, float32 angles.

One retriever layer, one token at a time. Nothing of `lsa_jax` but the YaRN constants' class.
"""

import math

import numpy as np

from lsa_jax.config import YarnConfig

Array = np.ndarray


def thetas(rope_dims: int, base: float, yarn: YarnConfig | None) -> Array:
    """Angle per position of each pair, float32."""
    out = []
    for i in range(rope_dims // 2):
        f = base ** (-2 * i / rope_dims)
        if yarn is not None:
            length = yarn.original_max_position_embeddings

            def turn(beta: float, length: int = length) -> float:
                return rope_dims * math.log(length / (2 * math.pi * beta)) / (2 * math.log(base))

            low = max(math.floor(turn(yarn.beta_fast)), 0)
            high = min(math.ceil(turn(yarn.beta_slow)), rope_dims - 1)
            gamma = 0.0 if i < low else 1.0 if i >= high else (i - low) / (high - low)
            f = f * (1 - gamma) + f * gamma / yarn.factor
        out.append(f)
    return np.array(out, np.float32)


def rotation(position: int, theta: Array) -> Array:
    """e^(i angle) of each pair, complex128; the angle is the float32 product."""
    angle = np.float32(position) * theta
    assert angle.dtype == np.float32
    return np.exp(1j * angle.astype(np.float64))


def rope(q: Array, position: int, theta: Array) -> Array:
    """q [H, d] with the pairs of its last channels turned."""
    q = q.copy()
    start = q.shape[-1] - 2 * len(theta)
    turned = (q[:, start::2] + 1j * q[:, start + 1 :: 2]) * rotation(position, theta)
    q[:, start::2], q[:, start + 1 :: 2] = turned.real, turned.imag
    return q


def hadamard(q: Array) -> Array:
    """Butterflies in natural order: a + b, then a - b, over doubling strides; normalised."""
    q = q.copy()
    n, stride = q.shape[-1], 1
    while stride < n:
        pairs = q.reshape(-1, n // (2 * stride), 2, stride)
        a, b = pairs[:, :, 0].copy(), pairs[:, :, 1].copy()
        pairs[:, :, 0], pairs[:, :, 1] = a + b, a - b
        stride *= 2
    return q / math.sqrt(n)


def queries(
    weights: dict[str, Array], x: Array, position: int, theta: Array, eps: float
) -> tuple[Array, Array]:
    """Rotated queries [H, d] and head weights [H] of one token."""
    a = weights["wq_a.weight"] @ x
    latent = weights["q_norm_weight"] * a / np.sqrt(np.mean(a * a) + eps)
    heads = len(weights["weights_proj.weight"])
    q = (weights["wq_b.weight"] @ latent).reshape(heads, -1)
    scale = q.shape[1] ** -0.5 * heads**-0.5
    return hadamard(rope(q, position, theta)), (weights["weights_proj.weight"] @ x) * scale


def e4m3(code: int) -> float:
    """Value of one float8_e4m3fn code: s eeee mmm, bias 7, no infinities."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = code >> 3 & 15, code & 7
    if code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def decode_rows(rows: Array) -> Array:
    """Index keys [N, d] from stored rows uint8 [N, d + 4]: e4m3 codes, little-endian float32."""
    values = np.array([e4m3(code) for code in range(256)])
    scale = np.ascontiguousarray(rows[:, -4:]).view("<f4").astype(np.float64)
    return values[rows[:, :-4]] * scale


def logits(q: Array, w: Array, keys: Array) -> Array:
    """sum_h w_h relu(q_h . k_j) -> [N]."""
    return w @ np.maximum(q @ keys.T, 0.0)
