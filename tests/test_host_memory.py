"""Segments of host memory: rows over segments, limits, pinned buffers written in place."""

import gc
import itertools
import weakref

import jax
import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa import host_memory
from lsa_jax.lsa.host_memory import SEGMENT_BYTES, HostLimitError, HostMemory, Segment

SHAPE = (3, 128)
RECORD = 3 * 128
V4_SHAPE = (7908, 128)  # 64 entries x (640 B x 21 layers + 132 B x 18 layers)
V4_RECORD = 1_012_224


def small(rows: int = 10, *, kind: host_memory.Kind = "pageable") -> HostMemory:
    """Segments of 4 rows: the last one is ragged, and so are the limit and the segment size."""
    memory = HostMemory(SHAPE, rows * RECORD + 5, kind=kind, segment_bytes=4 * RECORD + 7)
    memory.grow(rows)
    return memory


def records(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, *SHAPE), np.uint8)


@pytest.mark.parametrize("kind", ["pageable", "pinned"])
def test_rows_come_back_in_any_order_from_any_segment(kind: host_memory.Kind) -> None:
    memory, data = small(kind=kind), records(10)
    order = np.random.default_rng(1).permutation(10)
    memory.write(order, data[order])
    for ids in ([3], [0, 1, 2], [9, 0, 4, 3, 8, 7], [5, 5, 1, 5], []):
        np.testing.assert_array_equal(memory.read(np.array(ids, int)), data[ids])
    out = np.zeros((10, *SHAPE), np.uint8)
    assert memory.read(np.arange(10), out) is out
    np.testing.assert_array_equal(out, data)


def test_a_write_changes_its_rows_only() -> None:
    memory = small()
    memory.write(np.array([7, 2, 4]), records(3))
    want = np.zeros((10, *SHAPE), np.uint8)
    want[[7, 2, 4]] = records(3)
    np.testing.assert_array_equal(memory.read(np.arange(10)), want)


def test_memory_grows_by_whole_segments_up_to_the_limit_and_no_further() -> None:
    memory = HostMemory(SHAPE, 10 * RECORD + 5, kind="pageable", segment_bytes=4 * RECORD)
    sizes = []
    for rows in (0, 1, 4, 5, 9, 10):
        memory.grow(rows)
        sizes.append((memory.rows, memory.nbytes // RECORD, len(memory.segments)))
    assert sizes == [(0, 0, 0), (4, 4, 1), (4, 4, 1), (8, 8, 2), (10, 10, 3), (10, 10, 3)]
    assert [len(segment.view) for segment in memory.segments] == [4, 4, 2]


def test_growth_over_the_limit_states_needed_and_available_bytes() -> None:
    memory = HostMemory(SHAPE, 10 * RECORD + 5, kind="pageable", segment_bytes=4 * RECORD)
    memory.grow(4)
    with pytest.raises(HostLimitError, match=f"{7 * RECORD} bytes.*{6 * RECORD} bytes") as refused:
        memory.grow(11)
    assert (refused.value.needed, refused.value.available) == (7 * RECORD, 6 * RECORD)
    assert memory.rows == 4


def test_a_refusal_of_the_system_is_one_line_and_keeps_what_there_is() -> None:
    def allocate(shape: tuple[int, int, int]) -> Segment:
        if memory.rows:
            raise MemoryError("Unable to allocate\nmore")
        return Segment(np.zeros(shape, np.uint8), None)

    memory = HostMemory(SHAPE, 9 * RECORD, segment_bytes=4 * RECORD, allocate=allocate)
    with pytest.raises(ConfigError, match=f"{4 * RECORD} bytes more.*Unable to allocate$"):
        memory.grow(9)
    assert memory.rows == 4


def test_a_pinned_segment_is_one_memory_for_host_and_programs() -> None:
    memory, data = small(kind="pinned"), records(10)
    device = jax.local_devices()[0]
    for fill in (data, 255 - data):  # the second must be seen too, by a program that ran before
        memory.write(np.arange(10), fill)
        for segment, start in zip(memory.segments, (0, 4, 8), strict=True):
            array = segment.array
            assert array is not None and array.sharding.memory_kind == "pinned_host"
            want = fill[start : start + len(segment.view)]
            np.testing.assert_array_equal(np.asarray(array), want)
            on_device = jax.device_put(array, jax.sharding.SingleDeviceSharding(device))
            np.testing.assert_array_equal(np.asarray(on_device), want)


def test_a_program_recalls_rows_of_a_pinned_segment_without_copying_the_rest() -> None:
    memory, data = small(4, kind="pinned"), records(4)
    array = memory.segments[0].array
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0], memory_kind="device")

    @jax.jit
    def row(segment: jax.Array, i: int) -> jax.Array:
        found = jax.lax.dynamic_slice(segment, (i, 0, 0), (1, *SHAPE))
        return jax.device_put(found, device)

    for fill, i in itertools.product((data, 255 - data), (0, 3)):
        memory.write(np.arange(4), fill)
        np.testing.assert_array_equal(np.asarray(row(array, i))[0], fill[i])


def test_the_view_alone_keeps_a_pinned_segment_alive() -> None:
    segment = small(4, kind="pinned").segments[0]
    view, alive = segment.view, weakref.ref(segment.array)
    del segment
    gc.collect()
    assert alive() is not None
    del view
    gc.collect()
    assert alive() is None


def test_an_array_that_does_not_see_the_writes_is_refused() -> None:
    class CachedCopy:
        """Reads its bytes once, late enough to see the first write, and keeps them."""

        copy = None

        def __array__(self, dtype=None, copy=None):
            self.copy = view.copy() if self.copy is None else self.copy
            return self.copy

    view = np.zeros((2, *SHAPE), np.uint8)
    for array in (np.zeros_like(view), CachedCopy()):
        with pytest.raises(ConfigError, match="pinned memory must allow its array to see"):
            host_memory._check_same_memory(view, array)


class FakeDevice:
    """A device of a platform that this machine lacks."""

    def __init__(self, platform: str, kinds: list[str]) -> None:
        self.platform, self.kinds = platform, kinds

    def addressable_memories(self) -> list:
        return [type("Memory", (), {"kind": kind}) for kind in self.kinds]


def test_auto_is_pinned_on_accelerators_and_pageable_on_a_cpu() -> None:
    both = ["device", "pinned_host"]
    for platform, kind in (("gpu", "pinned"), ("tpu", "pinned"), ("cpu", "pageable")):
        memory = HostMemory(SHAPE, RECORD, device=FakeDevice(platform, both))
        assert memory.kind == kind
    assert small().segments[0].array is None


@pytest.mark.parametrize("kind", ["pinned", "auto"])
def test_pinned_memory_is_refused_where_the_device_has_none(kind: host_memory.Kind) -> None:
    with pytest.raises(ConfigError, match="kind 'pinned' must have a device with pinned_host"):
        HostMemory(SHAPE, RECORD, kind=kind, device=FakeDevice("gpu", ["device"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"record_shape": (0, 128)}, "record_shape must be"),
        ({"record_shape": (3, 64)}, "record_shape must be"),
        ({"limit_bytes": RECORD - 1}, "limit_bytes must be at least a record of 384 bytes"),
        ({"segment_bytes": RECORD - 1}, "segment_bytes must be at least a record"),
        ({"segment_bytes": 2**31}, "below 2147483648, got 2147483648"),
        ({"kind": "hbm"}, "kind must be one of"),
    ],
)
def test_a_bad_argument_is_refused_and_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HostMemory(**({"record_shape": SHAPE, "limit_bytes": 10 * RECORD} | change))


def test_rows_and_records_that_do_not_fit_are_refused() -> None:
    memory = small()
    for ids in (np.array([-1]), np.array([0, 10]), np.array([0.0]), np.array([[0]])):
        with pytest.raises(ConfigError, match="row ids must be"):
            memory.read(ids)
    for data in (records(2), records(1)[:, :2], records(1).astype(np.int8)):
        with pytest.raises(ConfigError, match="records must be uint8"):
            memory.write(np.array([0]), data)
        with pytest.raises(ConfigError, match="out must be uint8"):
            memory.read(np.array([0]), data)


def test_rows_beyond_two_gibibytes_are_found_by_segment_and_row() -> None:
    shapes = []

    def allocate(shape: tuple[int, int, int]) -> Segment:
        """No memory: every byte of row r of segment s reads as r % 199 + s % 57."""
        marks = (np.arange(shape[0]) % 199 + len(shapes) % 57).astype(np.uint8)
        shapes.append(shape)
        return Segment(np.broadcast_to(marks[:, None, None], shape), None)

    limit = 200 * 2**30
    memory = HostMemory(V4_SHAPE, limit, allocate=allocate)
    memory.grow(memory.max_rows)
    per = SEGMENT_BYTES // V4_RECORD
    assert (memory.record_nbytes, memory.rows_per_segment) == (V4_RECORD, per)
    assert memory.rows == sum(shape[0] for shape in shapes) == limit // V4_RECORD
    assert memory.nbytes == memory.rows * V4_RECORD > limit - V4_RECORD
    assert all(shape[0] * V4_RECORD < 2**31 and shape[1:] == V4_SHAPE for shape in shapes)

    around = [2**31 // V4_RECORD + i for i in (-1, 0, 1)]  # the record that straddles 2^31
    ids = np.array([0, per - 1, per, *around, memory.rows - 1])
    segment, row = memory.locate(ids)
    assert segment.dtype == row.dtype == np.int32
    np.testing.assert_array_equal(segment.astype(np.int64) * per + row, ids)
    np.testing.assert_array_equal(memory.read(ids)[:, -1, -1], row % 199 + segment % 57)


@pytest.mark.slow
def test_a_real_pool_over_two_gibibytes_keeps_rows_on_both_sides_of_the_limit() -> None:
    memory = HostMemory(
        V4_SHAPE, 5 * 2**29, kind="pageable"
    )  # zeros that nobody reads cost nothing
    memory.grow(memory.max_rows)
    assert memory.nbytes > 2**31
    around = 2**31 // V4_RECORD
    ids = np.array([0, around - 1, around, around + 1, memory.rows - 1])
    data = np.random.default_rng(0).integers(0, 256, (len(ids), *V4_SHAPE), np.uint8)
    memory.write(ids[::-1], data[::-1])
    np.testing.assert_array_equal(memory.read(ids), data)
    assert not memory.read(np.array([1, around - 2, around + 2])).any()
