"""Memory that a device can reach: its kinds, the host store's in both directions, and how fast."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from lsa_jax.checks.finding import Finding
from lsa_jax.lsa.host_memory import HostMemory

RECORD = (32, 128)  # bytes of a page record: whole tiles of a TPU's host memory
RECORDS = 16384  # of the transfers that are timed: 64 MiB
REPEATS = 5
# Slower than this is no link but a fault: PCIe 3.0 with 8 lanes moves 7 GB/s.
SLOWEST = {"cpu": 0.1e9, "gpu": 2e9, "tpu": 1e9}


def kinds() -> Iterator[Finding]:
    """`device` and `pinned_host` are there, and bytes survive a way through both."""
    device = jax.local_devices()[0]
    there = sorted(memory.kind for memory in device.addressable_memories())
    default = device.default_memory().kind
    yield Finding(f"memory kinds {', '.join(there)}; default {default}", "pinned_host" in there)
    data = np.random.default_rng(0).integers(0, 256, (64, *RECORD), np.uint8)
    near, pinned = _near(device), _pinned(device)
    placed = jax.device_put(jax.device_put(data, near), pinned)
    back = np.asarray(jax.device_put(placed, near))
    right = placed.sharding.memory_kind == "pinned_host" and np.array_equal(back, data)
    yield Finding(f"device to pinned_host and back: bytes equal {right}", right)


def store() -> Iterator[Finding]:
    """What is written to the host store's memory is what a transfer brings to the device."""
    memory = HostMemory(RECORD, 64 * RECORD[0] * RECORD[1])
    memory.grow(8)
    data = np.random.default_rng(1).integers(0, 256, (8, *RECORD), np.uint8)
    memory.write(np.arange(8), data)
    wanted = data[[5, 2, 7]]
    read = memory.read(np.array([5, 2, 7]))
    arrays = [segment.array for segment in memory.segments if segment.array is not None]
    seen = all(np.array_equal(np.asarray(array)[:8], data) for array in arrays)
    on_device = np.asarray(jax.device_put(read, _near(jax.local_devices()[0])))
    right = seen and np.array_equal(on_device, wanted)
    yield Finding(f"host store ({memory.kind}): bytes equal on the device {right}", right)


def bandwidth() -> Iterator[Finding]:
    """Bytes a second from pinned host memory to the device, and back."""
    device = jax.local_devices()[0]
    near, pinned = _near(device), _pinned(device)
    least = SLOWEST.get(device.platform, 0.0)
    there = jax.device_put(np.ones((RECORDS, *RECORD), np.uint8), pinned)
    here = jax.device_put(there, near)
    for what, move in (
        ("pinned host to device", lambda: jax.device_put(there, near)),
        ("device to pinned host", lambda: jax.device_put(here, pinned)),
    ):
        rate = there.nbytes / _seconds(move)
        said = f"{what}: {rate / 1e9:.2f} GB/s, at least {least / 1e9:.1f}"
        yield Finding(said, rate >= least)


def _near(device: Any) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(device, memory_kind="device")


def _pinned(device: Any) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")


def _seconds(move: Callable[[], jax.Array]) -> float:
    """The median of a few, after one that warms up."""
    move().block_until_ready()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        move().block_until_ready()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
