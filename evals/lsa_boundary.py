"""`evals.bench_lsa`, parts "published" and "budget": peak device memory while boundaries run."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.lsa_workload import (
    PAGE,
    TARGETS,
    Shapes,
    choose,
    fire,
    in_segments,
    indexer,
    level1_inputs,
    random_records,
    say,
)
from lsa_jax.cache import codec
from lsa_jax.config import CacheConfig
from lsa_jax.lsa import pool_map
from lsa_jax.lsa.policy import PolicyConfig
from pallas_kernels.page_recall import page_recall

SEGMENT_BYTES = 1 << 30
KEY_DTYPES = (jnp.float8_e4m3fn, jnp.float32)


class Boundary:
    """Fire, select, assign and recall as one program over a pool of `slots`, compiled without
    allocating KV, so that the compiler's own use of the device comes before what is measured."""

    def __init__(self, shapes: Shapes, policy: PolicyConfig, slots: int, segments: Any, model: Any):
        self.shapes, self.slots, self.segments = shapes, slots, segments
        graph, self.weights = model
        self.pool_shape = (slots, shapes.record_rows, codec.LANES)

        def step(weights, keys, x, positions, pool, held, segments, cycle):
            scores = fire(graph, weights, x, positions, keys)
            held, copies, table, missing = choose(shapes, policy, slots, scores, held, cycle)
            pool = page_recall(pool, segments, copies.src, copies.dst)
            return pool, held, table, copies.count, missing

        n, index_dim = shapes.entries, shapes.cfg.index_head_dim
        planes: list[Any] = list(map(jax.ShapeDtypeStruct, ((1, n, index_dim), (1, n)), KEY_DTYPES))
        x = jax.ShapeDtypeStruct((len(TARGETS), 1, shapes.cfg.hidden_size), jnp.bfloat16)
        pool = jax.ShapeDtypeStruct(self.pool_shape, jnp.uint8)
        held = jax.eval_shape(lambda: pool_map.empty_pool(slots))
        one = jax.ShapeDtypeStruct((1,), jnp.int32)
        cycle = jax.ShapeDtypeStruct((), jnp.int32)
        keys = [codec.Fp8Keys(*planes)] * len(TARGETS)
        args = (self.weights, keys, x, one, pool, held, segments, cycle)
        self.step = jax.jit(step, donate_argnums=(4, 5)).lower(*args).compile()
        memory: Any = self.step.memory_analysis()
        fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
        self.temporary_bytes = memory.temp_size_in_bytes + fresh

    def run(self, host: np.ndarray) -> dict[str, Any]:
        """Allocates the KV, passes boundaries, and compares what the last table names."""
        shapes = self.shapes
        cache = CacheConfig(kv_format="fp8", page_entries=PAGE)
        hca = codec.empty_entries(shapes.cfg, cache, shapes.hca_lead)
        hidden, positions, keys = level1_inputs(shapes)
        pool, held = jnp.zeros(self.pool_shape, jnp.uint8), pool_map.empty_pool(self.slots)
        times = []
        for i, x in enumerate(hidden):
            start = time.perf_counter()
            pool, held, table, count, missing = jax.block_until_ready(
                self.step(self.weights, keys, x, positions, pool, held, self.segments, jnp.int32(i))
            )
            times.append(round((time.perf_counter() - start) * 1e3, 3))
        peak = device_bytes("peak_bytes_in_use")
        pages, slots = np.asarray(table.pages[0]), np.asarray(table.slots[0])
        right = np.array_equal(np.asarray(pool)[slots[pages >= 0]], host[pages[pages >= 0]])
        return {
            "peak": peak,
            "ms": times,
            "resident_pages": int(np.sum(pages >= 0)),
            "last_recalled": int(count),
            "missing": int(missing),
            "bytes_right": right,
            "hca_bytes": sum(x.nbytes for x in jax.tree.leaves(hca)),
        }


def device_bytes(name: str) -> int | None:
    """An allocator statistic; None where the device keeps none."""
    stats = jax.devices()[0].memory_stats()
    return stats[name] if stats else None


def measure_memory(shapes: Shapes, share: float | None) -> dict[str, Any]:
    """Peak device memory above weights while boundaries run, as a share of full KV.

    The pool has the published number of pages, or what `share` of full KV leaves beside the fixed
    part and the program's temporaries.
    """
    host = random_records(shapes, shapes.pages, seed=0)
    segments, model = in_segments(shapes, host, SEGMENT_BYTES), indexer(shapes)
    if share is None:
        policy = PolicyConfig(policy="published", recall_pages=shapes.recall_pages)
        boundary = Boundary(shapes, policy, shapes.recall_pages, segments, model)
    else:
        room = int(share * shapes.full_bytes) - shapes.fixed_bytes
        first = Boundary(shapes, PolicyConfig(), room // shapes.record_bytes, segments, model)
        room -= first.temporary_bytes + (1 << 20)  # small arrays: tables, inputs, the pool's map
        if room < shapes.record_bytes:
            raise ValueError(f"a share of {share} leaves {room} bytes for pages: use more context")
        boundary = Boundary(shapes, PolicyConfig(), room // shapes.record_bytes, segments, model)
    start, before = device_bytes("bytes_in_use"), device_bytes("peak_bytes_in_use")
    result = boundary.run(host)
    kv = shapes.fixed_bytes + boundary.slots * shapes.record_bytes
    result |= {"full_kv_bytes": shapes.full_bytes, "kv_bytes": kv, "slots": boundary.slots}
    result |= {"temporary_bytes": boundary.temporary_bytes, "kv_share": kv / shapes.full_bytes}
    if result["peak"] is not None and start is not None:
        above = result["peak"] - start
        result |= {"start": start, "peak_before_kv": before, "above_weights": above}
        result |= {"share": above / shapes.full_bytes, "valid": before < result["peak"]}
    say(f"boundary memory, budget {share or 'published'}: {result}")
    return result
