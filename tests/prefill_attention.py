"""What the tests of both prefill attentions share: their cases, and the spec's sum in float64."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import casebook, rows


def arguments(case: casebook.Case, seed: int) -> tuple[Any, ...]:
    """Random arguments from a generator that takes the compiler little time."""
    return case.arguments(jax.random.key(seed, impl="unsafe_rbg"))


@functools.cache
def given(op: str, name: str) -> tuple[casebook.Case, tuple[Any, ...]]:
    """An operation's case of that name and arguments for it, made once."""
    case = next(case for case in casebook.correctness(op) if case.name == name)
    return case, arguments(case, 1)


def every_name(op: str, *fast: str) -> list[Any]:
    """Names of an operation's cases for `parametrize`, those not given marked slow."""
    others = [c.name for c in casebook.correctness(op) if c.name not in fast]
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in others)]


def in_float64(
    q, past, kv, start, entries, sink, seen: Callable[[int, int, np.ndarray], np.ndarray], *,
    scale: float, group: int,
) -> np.ndarray:  # fmt: skip
    """The spec's sum (3.1, 3.3), one query at a time, over its window and what of the entries
    `seen(b, t, entries)` takes, and over nothing else."""
    dims, window = q.shape[-1], past.shape[1]
    stored = np.zeros((len(q), 0, dims))
    if entries is not None:
        decode = jax.jit(lambda x: rows.decode(x, dims, group, jnp.float32))
        stored = np.asarray(decode(entries), np.float64)
    band = np.concatenate([np.asarray(x, np.float64) for x in (past, kv)], axis=1)
    q64, sink64, out = np.asarray(q, np.float64), np.asarray(sink, np.float64), np.zeros(q.shape)
    for b, t in np.ndindex(*q.shape[:2]):
        missing = max(0, window - 1 - int(start[b]) - t)  # positions before the sequence's first
        near = band[b, t + 1 + missing : t + 1 + window]
        keys = np.concatenate([near, seen(b, t, stored[b])])
        weights = np.exp(q64[b, t] @ keys.T * scale)
        out[b, t] = weights @ keys / (weights.sum(-1) + np.exp(sink64))[:, None]
    return out


def check(case: casebook.Case, got: Any, want: np.ndarray) -> None:
    """Within the case's tolerance."""
    result = casebook.compare(case.tolerance, got, want.astype(got.dtype))
    assert result.ok, f"{case}: {result.why}"
