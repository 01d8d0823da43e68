"""A small recording, the trace of it, and what tests compare of one."""

import ml_dtypes
import numpy as np

from lsa_jax.config import YarnConfig
from train.traces.trace import TraceWriter, open_trace
from train.traces.trace_info import KeyRope, Keys, TraceInfo
from train.traces.votes import SparseRows, VoteConfig

T, L, D, N, K = 37, 2, 6, 30, 8
INFO = TraceInfo(
    name="doc-1",
    source="a test",
    model="0" * 64,
    target_layers=(1, 3),
    csa_layers=5,
    csa_ratio=4,
    page_entries=8,
    prompt_tokens=83,
    rope=KeyRope(rope_head_dim=4, rope_theta=1e4, yarn=YarnConfig(factor=2), norm_eps=1e-5),
    votes=VoteConfig(),
)


def sparse(rng, dtype, most=5):
    pointers = np.concatenate([[0], np.cumsum(rng.integers(0, 4, T))])
    values = rng.integers(1, most + 1, pointers[-1]).astype(dtype)
    return SparseRows(rng.integers(0, N, pointers[-1]).astype(np.int32), values, pointers)


def rows_of(rows, start, stop):
    ends = rows.pointers[start : stop + 1]
    span = slice(ends[0], ends[-1])
    return SparseRows(rows.indices[span], rows.values[span], ends - ends[0])


def recording(seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 126, (N, L, K)).astype(np.uint8).view(ml_dtypes.float8_e4m3fn)
    return {
        "hidden": rng.normal(size=(T, L, D)).astype(ml_dtypes.bfloat16),
        "positions": 83 + np.arange(T),
        "votes": sparse(rng, np.uint8),
        "mass": sparse(rng, np.float32),
        "keys": Keys(codes, rng.random((N, L)).astype(np.float32)),
        "golden": np.where(rng.random((3, L, 21)) < 0.1, np.nan, 1).astype(np.float32),
    }


def record(root, data, *, blocks=(T,), mass=True, info=INFO):
    dtype = data["hidden"].dtype
    with TraceWriter(root, info, hidden_size=D, hidden_dtype=dtype, mass=mass) as writer:
        for start, stop in zip((0, *np.cumsum(blocks)[:-1]), np.cumsum(blocks), strict=True):
            part = slice(start, stop)
            votes, weights = (rows_of(data[name], start, stop) for name in ("votes", "mass"))
            arrays = (data["hidden"][part], data["positions"][part], votes)
            writer.append(*arrays, weights if mass else None)
        return open_trace(writer.finish(data["keys"], data["golden"]))


def same(trace, data, mass=True):
    np.testing.assert_array_equal(trace.read("hidden"), data["hidden"])
    np.testing.assert_array_equal(trace.read("positions"), data["positions"])
    for got, want in ((trace.votes(), data["votes"]), *([(trace.mass(), data["mass"])] * mass)):
        np.testing.assert_array_equal(got.indices, want.indices)
        np.testing.assert_array_equal(got.pointers, want.pointers)
        np.testing.assert_array_equal(got.values, want.values.astype(got.values.dtype))
    np.testing.assert_array_equal(trace.keys().dequantised(), data["keys"].dequantised())
    np.testing.assert_array_equal(trace.golden_logits(), data["golden"])
