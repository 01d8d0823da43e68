"""Selection: every backend picks the definition's sets; the densest pages are the resident set's.

The Triton kernel runs in its interpreter where triton is installed, the TPU kernel in Pallas's.
"""

import functools
import itertools
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.resident_set import select_pages
from pallas_kernels import casebook
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.top_k import IMPLEMENTATIONS, mosaic_tpu, top_k, triton_gpu
from pallas_kernels.top_k.cases import CASES, make_ragged
from pallas_kernels.top_k.pages import densest_pages


def sets(result: tuple[jax.Array, jax.Array]) -> list[set[int]]:
    """Each row's columns, once it is sure that they lead the row and the rest is column 0."""
    index, valid = map(np.asarray, result)
    assert (np.diff(valid.astype(int)) <= 0).all() and not index[~valid].any()
    return [set(row[ok].tolist()) for row, ok in zip(index, valid, strict=True)]


def by_hand(scores: np.ndarray, visible: np.ndarray, k: int, limit: list[int]) -> list[set[int]]:
    out = []
    for row, seen, most in zip(scores, visible, limit, strict=True):
        columns = [i for i in range(len(row)) if seen[i] and row[i] > -np.inf]
        columns.sort(key=lambda i: (-row[i], i))
        out.append(set(columns[: max(0, min(k, most))]))
    return out


def ragged(masked: bool, ties: bool, columns: int = 50) -> tuple[np.ndarray, jax.Array, np.ndarray]:
    shape = {"rows": 5, "columns": columns, "masked": masked, "ties": ties}
    scores, visible = make_ragged(jax.random.key(columns), **shape)
    seen = visible if masked else jnp.arange(columns) < visible[:, None]
    return np.asarray(scores), visible, np.asarray(seen)


@pytest.mark.parametrize(("masked", "ties"), [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("k", [7, 60])  # some; more than there are columns
def test_the_definition_picks_the_highest_and_at_equal_scores_the_first(
    masked: bool, ties: bool, k: int
) -> None:
    scores, visible, seen = ragged(masked, ties)
    got = jax.jit(functools.partial(top_k, k=k, backend="xla"))(scores, visible)
    assert got[0].shape == got[1].shape == (5, k) and got[0].dtype == jnp.int32
    assert sets(got) == by_hand(scores, seen, k, [k] * 5)


def test_a_limit_asks_for_fewer_in_some_rows() -> None:
    scores, visible, seen = ragged(False, True)
    limit = [3, 0, 99, -1, 7]
    got = top_k(jnp.asarray(scores), visible, 7, limit=jnp.array(limit, jnp.int32))
    assert sets(got) == by_hand(scores, seen, 7, limit)


def test_equal_zeros_of_either_sign_go_to_the_first() -> None:
    scores = jnp.array([[-0.0, 0.0, -0.0, 0.0, -1.0]])
    assert sets(top_k(scores, jnp.array([5]), 3)) == [{0, 1, 2}]


def test_infinities_and_nan_in_visible_columns() -> None:
    scores = jnp.array([[jnp.nan, -jnp.inf, jnp.inf, 3.0, -3.4e38]])
    assert sets(top_k(scores, jnp.array([5]), 5)) == [{2, 3, 4}]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_tpu_kernel_picks_the_same_sets_when_interpreted(case: casebook.Case) -> None:
    args = case.arguments(jax.random.key(3))
    got = mosaic_tpu.top_k(*args, **case.static, interpret=True)
    want = case.run(args, "xla")
    assert sets(got) == sets(want)
    for index, valid in zip(*map(np.asarray, got), strict=True):
        assert (np.diff(index[valid]) > 0).all()  # in order of column


@pytest.mark.slow
def test_the_tpu_kernel_waits_for_its_blocks_and_takes_limits() -> None:
    scores, visible, seen = ragged(True, True, columns=300)
    limit = [3, 0, 99, -1, 7]
    got = mosaic_tpu.top_k(
        jnp.asarray(scores),
        visible,
        16,
        limit=jnp.array(limit, jnp.int32),
        rows=2,
        interpret=pltpu.InterpretParams(),
    )
    assert sets(got) == by_hand(scores, seen, 16, limit)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_the_triton_kernel_picks_the_same_sets_when_interpreted() -> None:
    script = Path(__file__).with_name("triton_interpreted.py")
    subprocess.run([sys.executable, script, "top_k"], check=True, timeout=300)


@pytest.mark.parametrize("columns", [1, 127, 8192, 8193, 24_576, 262_144, 1 << 20])
@pytest.mark.parametrize("k", [1, 512, 1024])
def test_launches_shrink_a_row_until_one_program_holds_it(columns: int, k: int) -> None:
    plan = triton_gpu.launches(columns, k, 8192)
    assert plan[0][0] == columns and plan[-1][2] == 1
    for (_, _, chunks), (width, _, _) in itertools.pairwise(plan):
        assert width == chunks * k
    for width, size, chunks in plan:
        assert (chunks - 1) * size < width <= chunks * size and size <= 8192


def test_triton_declines_what_a_program_cannot_hold() -> None:
    with pytest.raises(Unsupported, match="k must be at most 4096, got 5000"):
        triton_gpu.top_k(jnp.zeros((1, 9000)), jnp.array([9000]), 5000)


@pytest.mark.parametrize("impl", sorted(set(IMPLEMENTATIONS) - {"xla"}))
def test_a_named_kernel_never_falls_back(impl: str) -> None:
    with pytest.raises(Unsupported, match=f"{impl} needs"):
        top_k(jnp.zeros((1, 4)), jnp.array([4]), 2, backend=impl)


GOOD = {"scores": np.zeros((2, 4), np.float32), "visible": np.zeros(2, np.int32), "k": 2}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"scores": np.zeros((2, 4), np.float16)}, r"scores must be float32 \[R, N\], got float16"),
        ({"scores": np.zeros(4, np.float32)}, r"got float32 \[4\]"),
        ({"visible": np.zeros((2, 3), bool)}, r"int32 \[2\] or bool \[2, 4\], got bool \[2, 3\]"),
        ({"visible": np.zeros(2, np.int64)}, "got int64"),
        ({"k": 0}, "k must be at least 1, got 0"),
        ({"limit": np.zeros(3, np.int32)}, r"limit must be int32 \[2\], got int32 \[3\]"),
    ],
)
def test_arguments_of_another_shape_or_type_are_named(change: dict, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        top_k(**(GOOD | change))


def resident(scores, entries, wanted, allowed) -> np.ndarray:
    """What the resident set's own selection grants, without forced or sticky pages."""
    policy = PolicyConfig(policy="top", recency=0, sink=0)
    select = jax.jit(functools.partial(select_pages, cfg=policy, page_entries=64))
    live = jnp.ones(len(entries), bool)
    chosen = select(scores, entries, entries // 64, allowed=allowed, live=live, wanted=wanted)
    return np.asarray(chosen.pages)


@pytest.mark.parametrize(("shared", "budget"), [(False, 4), (True, 4), (True, 40)])
def test_densest_pages_are_those_of_the_resident_set(shared: bool, budget: int) -> None:
    keys = jax.random.split(jax.random.key(budget), 2)
    counts = jax.random.randint(keys[0], (4, 9), 0, 4).astype(jnp.float32)  # many ties
    wanted = jax.random.bernoulli(keys[1], 0.8, (4, 9))
    entries = jnp.array([9 * 64, 5 * 64 + 3, 0, 7 * 64 + 63])
    allowed = jnp.full((), budget) if shared else jnp.array([budget, 2, 3, budget - 1])
    pages = jax.jit(functools.partial(densest_pages, budget=budget, shared=shared))
    got = pages(counts, entries // 64, wanted=wanted, allowed=allowed)
    np.testing.assert_array_equal(got, resident(counts, entries, wanted, allowed))


def test_densest_pages_prefer_the_end_of_a_row_then_the_lower_row() -> None:
    ones, pages = jnp.ones((2, 4)), jnp.array([4, 3])
    choose = jax.jit(densest_pages, static_argnums=2, static_argnames="shared")
    got = choose(ones, pages, 3, shared=True)
    np.testing.assert_array_equal(got, [[0, 0, 1, 1], [0, 0, 1, 0]])
    got = choose(ones, pages, 2)
    np.testing.assert_array_equal(got, [[0, 0, 1, 1], [0, 1, 1, 0]])
