"""Page records between device pools: the definition against NumPy, the kernels against both."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.dispatch import Unsupported
from pallas_kernels.page_gather import (
    IMPLEMENTATIONS,
    SCATTER,
    mosaic_gpu,
    mosaic_tpu,
    page_gather,
    page_scatter,
)
from pallas_kernels.page_recall import mosaic_tpu as recall_tpu

SLOTS = 9
# Distinct; slots that do not exist among them, negative ones as well as those beyond the pool.
AT = [3, -1, 0, 8, SLOTS, 5, 1, 2, -7, 100]


def draw(rows: int, at: list[int] = AT) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    rng = np.random.default_rng(rows)
    pool, records = (rng.integers(0, 256, (n, rows, 128), np.uint8) for n in (SLOTS, len(at)))
    return pool, records, jnp.array(at, jnp.int32)


def gathered(pool: np.ndarray, at: list[int] = AT) -> np.ndarray:
    nothing = np.zeros_like(pool[0])
    return np.stack([pool[s] if 0 <= s < len(pool) else nothing for s in at])


def scattered(pool: np.ndarray, records: np.ndarray, at: list[int] = AT) -> np.ndarray:
    out = pool.copy()
    for record, slot in zip(records, at, strict=True):
        if 0 <= slot < len(pool):
            out[slot] = record
    return out


@pytest.mark.parametrize("rows", [1, 8])
def test_the_definition_moves_named_records_and_nothing_else(rows: int) -> None:
    pool, records, at = draw(rows)
    got = page_gather(jnp.asarray(pool), at)
    np.testing.assert_array_equal(got, gathered(pool))
    got = page_scatter(jnp.asarray(pool), jnp.asarray(records), at)
    np.testing.assert_array_equal(got, scattered(pool, records))


def test_no_slots_move_nothing() -> None:
    pool, records, at = draw(4, [])
    assert page_gather(jnp.asarray(pool), at).shape == (0, 4, 128)
    got = page_scatter(jnp.asarray(pool), jnp.asarray(records), at)
    np.testing.assert_array_equal(got, pool)


def test_scatter_updates_the_donated_pool_in_place() -> None:
    pool, records, at = draw(64)
    args = jnp.asarray(pool), jnp.asarray(records), at
    memory: Any = page_scatter.lower(*args).compile().memory_analysis()
    assert memory.alias_size_in_bytes == pool.nbytes
    assert memory.temp_size_in_bytes <= records.nbytes + 1024
    page_scatter(*args)
    assert args[0].is_deleted() and not args[1].is_deleted()


def test_tpu_kernels_move_the_same_records_when_interpreted() -> None:
    pool, records, at = draw(8)  # more entries than copies in flight
    sizes: dict[str, Any] = {"in_flight": 3, "interpret": pltpu.InterpretParams()}
    got = mosaic_tpu.page_gather(jnp.asarray(pool), at, **sizes)
    np.testing.assert_array_equal(got, gathered(pool))
    got = mosaic_tpu.page_scatter(jnp.asarray(pool), jnp.asarray(records), at, **sizes)
    np.testing.assert_array_equal(got, scattered(pool, records))


def test_tpu_recall_reads_each_segment_where_it_is_when_interpreted() -> None:
    pool, stored, _ = draw(32)
    segments = jnp.asarray(stored[:4]), jax.device_put(stored[4:], jax.memory.Space.Host)
    src, dst = [3, 4, -1, 9, 0, 10], [0, 8, 1, 5, SLOTS, 2]
    indices = [jnp.array(x, jnp.int32) for x in (src, dst)]
    sizes: dict[str, Any] = {"in_flight": 2, "interpret": True}
    got = recall_tpu.page_recall(jnp.asarray(pool), segments, *indices, **sizes)
    np.testing.assert_array_equal(got, scattered(pool, gathered(stored, src)[[0, 1, 3]], [0, 8, 5]))


# A tile that divides no record, and a record smaller than a tile.
@pytest.mark.parametrize(("rows", "tile"), [(11, 4), pytest.param(3, 128, marks=pytest.mark.slow)])
def test_the_hopper_gather_moves_the_same_records_when_interpreted(rows: int, tile: int) -> None:
    pool, _, at = draw(rows)
    sizes: dict[str, Any] = {"tile": tile, "blocks": 2, "interpret": True}
    got = mosaic_gpu.page_gather(jnp.asarray(pool), at, **sizes)
    np.testing.assert_array_equal(got, gathered(pool))


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "tile"), [(11, 4), (3, 128)])
def test_the_hopper_scatter_moves_the_same_records_when_interpreted(rows: int, tile: int) -> None:
    pool, records, at = draw(rows)
    sizes: dict[str, Any] = {"tile": tile, "blocks": 2, "interpret": True}
    got = mosaic_gpu.page_scatter(jnp.asarray(pool), jnp.asarray(records), at, **sizes)
    np.testing.assert_array_equal(got, scattered(pool, records))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="needs the package triton")
def test_triton_kernels_move_the_same_records_when_interpreted() -> None:
    script = Path(__file__).with_name("triton_interpreted.py")
    subprocess.run([sys.executable, script, "page_gather"], check=True, timeout=300)


def test_tpu_kernels_decline_records_that_would_be_laid_out_anew() -> None:
    pool, records, at = draw(12)
    with pytest.raises(Unsupported, match="4 rows or a multiple of 8, got 12"):
        mosaic_tpu.page_gather(jnp.asarray(pool), at)
    with pytest.raises(Unsupported, match="whole tiles of 32 rows, got 12"):
        recall_tpu.page_recall(jnp.asarray(pool), (jnp.asarray(records),), at, at)


@pytest.mark.parametrize("impl", sorted(set(IMPLEMENTATIONS) - {"xla"}))
def test_a_named_kernel_never_falls_back(impl: str) -> None:
    pool, records, at = draw(8)
    assert set(SCATTER) == set(IMPLEMENTATIONS)
    with pytest.raises(Unsupported, match=f"{impl} needs"):
        page_gather(jnp.asarray(pool), at, backend=impl)
    with pytest.raises(Unsupported, match=f"{impl} needs"):
        page_scatter(jnp.asarray(pool), jnp.asarray(records), at, backend=impl)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"pool": np.zeros((4, 8, 64), np.uint8)}, r"pool must be uint8 \[S, R, 128\], got uint8"),
        ({"pool": np.zeros((4, 8, 128), np.int8)}, "got int8"),
        ({"slots": np.zeros((2, 1), np.int32)}, r"slots must be int32 \[M\], got int32 \[2, 1\]"),
        ({"records": np.zeros((2, 4, 128), np.uint8)}, r"records must be uint8 \[2, 8, 128\], got"),
    ],
)
def test_arguments_of_another_shape_or_type_are_named(change: dict, why: str) -> None:
    good = {"pool": np.zeros((4, 8, 128), np.uint8), "slots": np.zeros(2, np.int32)}
    good["records"] = np.zeros((2, 8, 128), np.uint8)
    with pytest.raises(ValueError, match=why):
        page_scatter(**(good | change))
