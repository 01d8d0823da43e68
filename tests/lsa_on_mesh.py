"""What sessions and stores do on fake devices: run by test_lsa_mesh.py in processes of their own.

Usage: lsa_on_mesh.py sessions FILE.npz    greedy tokens and logits, on one device and on meshes
       lsa_on_mesh.py memory DEVICES       bytes of a full host store, as this process grew
"""

import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsa_jax import shardings
from lsa_jax.config import CacheConfig, ComputeConfig
from lsa_jax.config_io import load_config
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.host_store import chain_digest, chain_root
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.pool_map import Copies
from lsa_jax.lsa.session import LsaSession
from lsa_jax.lsa.tiers import Tiers
from lsa_jax.nn.transformer import DeepSeekV4
from tests import lsa_models, small_model

MESHES = {"one": None, "four": (1, 2, 2)}
SLOTS = 4
STORE_BYTES = 200 * 10**6


def sharded(mesh: jax.sharding.Mesh | None) -> DeepSeekV4:
    cfg, leaves = lsa_models.CONFIG, small_model.leaves("f32", lsa_models.CONFIG)
    if mesh is not None:
        place = shardings.leaf_sharding
        leaves = {p: jax.device_put(x, place(cfg, mesh, p, x.shape)) for p, x in leaves.items()}
    return DeepSeekV4(cfg, ComputeConfig(dtype="float32"), leaves)


def session(mesh: jax.sharding.Mesh | None) -> LsaSession:
    lsa = LsaConfig(
        targets=lsa_models.TARGETS,
        lookahead=8,
        policy=lsa_models.ALL,
        budget=parse_budget("0.7"),
    )
    return LsaSession(
        sharded(mesh),
        lsa_models.cache(),
        lsa,
        lsa_models.indexer(),
        rows=2,
        capacity=128,
        prefill_chunk=32,
        mesh=mesh,
    )


def serve(mesh: jax.sharding.Mesh | None) -> dict[str, Any]:
    """Two requests, one of them with a second turn; what they drew and what the store holds."""
    of = session(mesh)
    run = lsa_models.Run(of)
    # Chunks of 32 all: every other size would be compiled twice over.
    run.admit(lsa_models.prompt(50, seed=1), new=60)
    run.admit(lsa_models.prompt(61, seed=2), new=30)
    run.decode(16)
    run.extend(0, lsa_models.prompt(20, seed=3), new=30)
    run.decode(8)
    tiers = of.batch.tiers
    kept = (of.batch.state, tiers.records, tiers.table, tiers.pool)
    stats = tiers.store.stats()
    return {
        "tokens": run.drawn(0),
        "other_tokens": run.drawn(1),
        "logits": run.scores(0),
        "other_logits": run.scores(1),
        "host": np.array([stats.live, stats.allocated, stats.stored, tiers.store.memory.nbytes]),
        "pages": np.array([len(event.pages) for event in of.batch.events]),
        "recalled": np.array([event.recalled for event in of.batch.events]),
        "copies": np.array(sorted({len(x.addressable_shards) for x in jax.tree.leaves(kept)})),
        "whole": np.array(all(x.is_fully_replicated for x in jax.tree.leaves(kept))),
    }


def sessions(file: Path) -> None:
    found = {}
    for name, shape in MESHES.items():
        mesh = None if shape is None else shardings.make_mesh(*shape)
        found |= {f"{name}.{key}": value for key, value in serve(mesh).items()}
    np.savez(file, **found)


def resident_bytes() -> int:
    """Of this process, without what it freed: simulated devices allocate slabs from its heap, and
    the allocator keeps some of them for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def memory(devices: int) -> None:
    """Fills a host store with V4-Flash pages and recalls some of them to every device."""
    cfg, cache = load_config("v4_flash"), CacheConfig(kv_format="fp8")
    plan = Level2(cfg, cache, targets=(10, 12, 20), lookahead=64, path="paged")
    mesh = shardings.make_mesh(tensor=devices) if devices > 1 else None
    count = STORE_BYTES // plan.layout.nbytes
    tiers = Tiers(plan, rows=1, pages=count, host_limit=STORE_BYTES, mesh=mesh)
    tiers.set_pool(SLOTS)
    page = np.random.default_rng(0).integers(0, 256, plan.layout.shape, np.uint8)
    digests = [chain_root(b"")]
    tiers.store.admit(0, count)

    def fill(until: int) -> jax.Array:
        """Appends pages up to so many, and recalls the last of them to the devices."""
        for at in range(len(digests) - 1, until):
            digests.append(chain_digest(digests[-1], [at]))
            tiers.store.append(0, digests[-1], page + np.uint8(at % 256))
        last = jnp.arange(until - SLOTS, until, dtype=jnp.int32)
        copies = Copies(last, jnp.arange(SLOTS, dtype=jnp.int32), jnp.int32(SLOTS))
        tiers.records, _ = tiers.recall(tiers.records, copies)
        return jax.block_until_ready(tiers.records)

    for warm in (1, 2, 3):  # compiles what a recall needs, and takes what recalls keep
        fill(warm * SLOTS)
    before = resident_bytes()
    records = fill(count)
    grown = resident_bytes() - before
    want = tiers.store.memory.read(np.arange(count - SLOTS, count))
    report = {
        "grown": grown,
        "written": (count - 3 * SLOTS) * plan.layout.nbytes,
        "live": tiers.store.stats().live,
        "allocated": tiers.store.stats().allocated,
        "devices": len(records.addressable_shards),
        "same": all(
            np.array_equal(np.asarray(part.data), want) for part in records.addressable_shards
        ),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1] == "sessions":
        sessions(Path(sys.argv[2]))
    else:
        memory(int(sys.argv[2]))
