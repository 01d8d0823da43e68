"""Recall of pages: the definition against NumPy, the kernel's chunks, what is declined.

The kernel needs a GPU; `evals.bench_lsa` verifies its bytes there.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.lsa.host_memory import HostMemory
from lsa_jax.lsa.pool_map import Copies
from lsa_jax.lsa.recall import Recall
from pallas_kernels.dispatch import Unsupported
from pallas_kernels.page_recall import IMPLEMENTATIONS, page_recall, triton_gpu

SLOTS = 7


def draw(seed: int, rows: int, *counts: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Distinct random bytes: a pool of SLOTS records, and a segment of each count."""
    rng = np.random.default_rng(seed)
    blocks = [rng.integers(0, 256, (n, rows, 128), np.uint8) for n in (SLOTS, *counts)]
    return blocks[0], blocks[1:]


def in_numpy(pool: np.ndarray, segments: list[np.ndarray], src: list[int], dst: list[int]):
    host, out = np.concatenate(segments), pool.copy()
    for row, slot in zip(src, dst, strict=True):
        if 0 <= row < len(host) and 0 <= slot < len(pool):
            out[slot] = host[row]
    return out


def arguments(pool: np.ndarray, segments: list[np.ndarray], src: list[int], dst: list[int]):
    indices = [jnp.asarray(x, jnp.int32) for x in (src, dst)]
    return jnp.asarray(pool), tuple(map(jnp.asarray, segments)), *indices


CASES = {
    "one segment": ((5,), [4, 0, 2], [6, 1, 3]),
    "rows on both sides of a segment's end": ((3, 3, 2), [2, 3, 5, 6, 7], [0, 1, 2, 3, 4]),
    "padding between entries": ((4,), [-1, 3, -1, 1], [2, 5, 0, 4]),
    "padding that names no slot": ((4,), [1, -1, -1], [3, -1, -1]),
    "nothing to do": ((4,), [-1, -1], [0, 1]),
    "one host row in two slots": ((4,), [2, 2], [0, 6]),
    "a row or a slot that does not exist": ((2, 2), [4, 1, 0, 3], [1, SLOTS, -2, 5]),
    "no entries": ((3,), [], []),
}


@pytest.mark.parametrize("case", CASES)
def test_the_definition_copies_named_records_and_nothing_else(case: str) -> None:
    counts, src, dst = CASES[case]
    pool, segments = draw(0, 3, *counts)
    got = page_recall(*arguments(pool, segments, src, dst), backend="xla")
    np.testing.assert_array_equal(got, in_numpy(pool, segments, src, dst))


@pytest.mark.parametrize("record", [128, 640, 16_256, 16_384, 16_512, 37_504, 1_012_224])
def test_chunks_cover_every_byte_of_a_record_in_aligned_powers_of_two(record: int) -> None:
    chunk = triton_gpu.chunk_bytes(record)
    starts = [min(i * chunk, record - chunk) for i in range(-(-record // chunk))]
    assert chunk <= triton_gpu.CHUNK_BYTES and chunk & (chunk - 1) == 0
    assert all(start % 128 == 0 for start in starts)
    covered = np.zeros(record, bool)
    for start in starts:
        covered[start : start + chunk] = True
    assert covered.all()


def test_the_pool_is_donated_so_that_recall_needs_no_second_one() -> None:
    pool, segments, src, dst = arguments(*draw(2, 2, 3), [1], [4])
    page_recall(pool, segments, src, dst)
    assert pool.is_deleted() and not segments[0].is_deleted()


def test_recall_compiles_to_an_update_in_place() -> None:
    pool, segments, src, dst = arguments(*draw(3, 64, 4), [1, 2], [4, 0])
    compiled = page_recall.lower(pool, segments, src, dst).compile()
    memory: Any = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool.nbytes
    staged = src.size * pool.nbytes // SLOTS
    assert memory.temp_size_in_bytes <= staged + 1024  # the records, never the pool


def test_recall_is_part_of_a_larger_program() -> None:
    pool, segments = draw(4, 2, 4)

    @jax.jit
    def boundary(pool, segments, src, dst):
        return page_recall(pool, segments, src + 1, dst) ^ jnp.uint8(255)

    got = boundary(*arguments(pool, segments, [0, -2], [3, 4]))
    np.testing.assert_array_equal(got, in_numpy(pool, segments, [1, -1], [3, 4]) ^ 255)


def test_recall_in_place_from_a_store_without_a_page_leaves_the_pool_as_it_is() -> None:
    pool, _ = draw(7, 2)
    memory = HostMemory((2, 128), 4 * 256, kind="pinned")
    none = jnp.full(SLOTS, -1, jnp.int32)
    got, moved = Recall(memory, in_place=True)(
        jnp.asarray(pool), Copies(none, none, jnp.zeros((), jnp.int32))
    )
    np.testing.assert_array_equal(got, pool)
    assert moved == 0


def test_the_definition_declines_segments_in_host_memory() -> None:
    pool, segments, src, dst = arguments(*draw(5, 2, 4), [1], [3])
    host = jax.device_put(segments[0], segments[0].sharding.with_memory_kind("pinned_host"))
    with pytest.raises(Unsupported, match="xla: segments must be in device memory"):
        page_recall(pool, (host,), src, dst)


@pytest.mark.parametrize("impl", sorted(set(IMPLEMENTATIONS) - {"xla"}))
def test_a_named_kernel_never_falls_back(impl: str) -> None:
    with pytest.raises(Unsupported, match=f"{impl} needs"):
        page_recall(*arguments(*draw(6, 2, 4), [1], [3]), backend=impl)


def test_an_unknown_implementation_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match="got 'cuda'"):
        page_recall(*arguments(*draw(7, 2, 4), [1], [3]), backend="cuda")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"segments": ()}, "segments must name at least one array"),
        ({"segments": (np.zeros((4, 3, 128), np.uint8),)}, r"segments\[0\] must be uint8 \[\*, 2,"),
        ({"segments": (np.zeros((4, 2, 128), np.int8),)}, "got int8"),
        ({"pool": np.zeros((4, 2, 64), np.uint8)}, r"pool must be uint8 \[\*, 2, 128\], got"),
        ({"src": np.zeros((1, 1), np.int32)}, r"src must be int32 \[1\], got"),
        ({"dst": np.zeros(2, np.int32)}, r"dst must be int32 \[1\], got int32 \[2\]"),
    ],
)
def test_arguments_of_another_shape_or_type_are_named(change: dict, why: str) -> None:
    names = ("pool", "segments", "src", "dst")
    good = dict(zip(names, arguments(*draw(8, 2, 4), [1], [3]), strict=True))
    with pytest.raises(ValueError, match=why):
        page_recall(**(good | change))
