"""`evals.bench_lsa`, part "recall": the kernel that reads pinned host memory, and its peers."""

import concurrent.futures
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from evals.lsa_workload import (
    PLANS,
    Shapes,
    host_sharding,
    in_segments,
    median_seconds,
    on_gpu,
    random_records,
    say,
)
from pallas_kernels.page_recall import page_recall

SEGMENT_BYTES = 1 << 30
SPARE_SLOTS = 16  # cells that nothing may touch
TURNOVER = 0.15


def host_bandwidth() -> float:
    """Bytes/s of `jax.device_put` of one pinned GiB, or 16 MiB where nothing is pinned."""
    block = np.ones(1 << (30 if on_gpu() else 24), np.uint8)
    pinned = jax.device_put(block, host_sharding()).block_until_ready()
    device = SingleDeviceSharding(jax.devices()[0])
    return block.nbytes / median_seconds(
        lambda _: jax.device_put(pinned, device, may_alias=False), 7
    )


class Recall:
    """Recalls of `count` random pages into a pool of `slots`, beside what the pool must hold."""

    def __init__(self, shapes: Shapes, host: np.ndarray, slots: int, count: int):
        self.host, self.nbytes = host, count * shapes.record_bytes
        self.want = random_records(shapes, slots, seed=1)
        self.pool = jax.device_put(self.want.copy(), jax.devices()[0])
        rng = np.random.default_rng(2)
        self.plans = []
        for _ in range(PLANS):
            plan = np.full((2, slots - SPARE_SLOTS), -1, np.int32)
            plan[0, :count] = rng.choice(len(host), count, replace=False)
            plan[1, :count] = SPARE_SLOTS + rng.permutation(slots - SPARE_SLOTS)[:count]
            self.plans.append(plan)
        self.indices = [tuple(map(jnp.asarray, plan)) for plan in self.plans]

    def seconds(self, segments: tuple[jax.Array, ...], backend: str, repeats: int) -> float:
        """Median time of a recall. Whole rounds of plans run, so the last round tells the bytes."""

        def run(i: int) -> jax.Array:
            src, dst = self.indices[i % PLANS]
            self.pool = page_recall(self.pool, segments, src, dst, backend=backend)
            return self.pool

        out = median_seconds(run, -(-repeats // PLANS) * PLANS)
        for src, dst in self.plans:
            self.want[dst[src >= 0]] = self.host[src[src >= 0]]
        return out

    def is_right(self) -> bool:
        """Compares every byte of the pool, slots that no plan names included."""
        return bool(np.array_equal(np.asarray(self.pool), self.want))


def measure_recall(shapes: Shapes, repeats: int) -> dict[str, Any]:
    """Cold recall and turnover, with their peers and the bus's bandwidth."""
    bandwidth = host_bandwidth()
    say(f"host to device by device_put: {bandwidth / 2**30:.1f} GiB/s")
    host = random_records(shapes, shapes.pages, seed=0)
    slots, cold = shapes.recall_pages + SPARE_SLOTS, shapes.recall_pages
    turnover = max(1, round(TURNOVER * cold))
    result: dict[str, Any] = {"pinned_bytes_per_second": bandwidth, "host_bytes": host.nbytes}
    say(f"{shapes.pages} host pages of {shapes.record_bytes} bytes, {host.nbytes / 1e9:.2f} GB")
    for name, seconds in recall_peers(shapes, host, cold, repeats).items():
        result[name] = {"ms": round(seconds * 1e3, 3)}
        say(f"peer, {name}, {cold} pages: {result[name]}")
    backend = "triton" if on_gpu() else "xla"
    layouts = {"1 GiB segments": SEGMENT_BYTES, "one segment": host.nbytes}
    for layout, nbytes in layouts.items():
        segments = in_segments(shapes, host, nbytes)
        for name, count in (("cold", cold), ("turnover", turnover)):
            key = f"{name}, {backend}, {layout}"
            recall = Recall(shapes, host, slots, count)
            result[key] = _one_recall(recall, segments, backend, repeats, bandwidth)
            say(f"{key}, {count} pages: {result[key]}")
        del segments
    return result


def _one_recall(
    recall: Recall, segments: tuple[jax.Array, ...], backend: str, repeats: int, bandwidth: float
) -> dict[str, Any]:
    seconds = recall.seconds(segments, backend, repeats)
    return {
        "ms": round(seconds * 1e3, 3),
        "floor_ms": round(recall.nbytes / bandwidth * 1e3, 3),
        "share_of_bandwidth": round(recall.nbytes / seconds / bandwidth, 3),
        "bytes_right": recall.is_right(),
    }


def recall_peers(shapes: Shapes, host: np.ndarray, count: int, repeats: int) -> dict[str, float]:
    """Seconds of a copy of `count` contiguous pages, and of the path without host-memory reads."""
    device, threads = jax.devices()[0], 12
    slab = jax.device_put(host[:count], host_sharding()).block_until_ready()
    order = np.random.default_rng(3).choice(len(host), (PLANS, count), replace=False)
    staging = np.empty((count, *host.shape[1:]), np.uint8)
    pool = jax.device_put(staging.copy(), device)
    rows, chunk = jnp.arange(count, dtype=jnp.int32), -(-count // threads)

    def gather(i: int, start: int) -> None:
        staging[start : start + chunk] = host[order[i, start : start + chunk]]

    def staged(i: int) -> jax.Array:
        nonlocal pool
        list(executor.map(functools.partial(gather, i % PLANS), range(0, count, chunk)))
        pool = page_recall(pool, (jax.device_put(staging, device),), rows, rows, backend="xla")
        return pool

    with concurrent.futures.ThreadPoolExecutor(threads) as executor:
        return {
            "contiguous pinned slab + device_put": median_seconds(
                lambda _: jax.device_put(slab, device, may_alias=False), repeats
            ),
            f"gather by {threads} threads + device_put + scatter": median_seconds(staged, repeats),
        }
