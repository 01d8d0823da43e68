"""What the parts of `evals.bench_lsa` share: sizes, contents, timing, the steps of a boundary."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.sharding import SingleDeviceSharding

from lsa_jax.cache import codec
from lsa_jax.config import ModelConfig
from lsa_jax.config_io import load_config
from lsa_jax.lsa import pool_map, resident_set
from lsa_jax.lsa.indexer_config import IndexerConfig, QueryMode
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from lsa_jax.lsa.policy import PolicyConfig

PAGE = 64
TARGETS = (10, 12, 20)
PLANS = 4  # different inputs in turn, so that no cache helps


def say(line: str) -> None:
    """Prints a line with the time of day, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of one request's compressed KV in the two-plane fp8 layout."""

    context: int
    cfg: ClassVar[ModelConfig] = load_config("v4_flash")

    @property
    def entries(self) -> int:
        """CSA entries of a layer."""
        return self.context // self.cfg.csa_ratio

    @property
    def pages(self) -> int:
        """Pages of the request, all complete."""
        return self.entries // PAGE

    @property
    def recall_pages(self) -> int:
        """The published setting, 384 pages at 2^20 tokens, in proportion elsewhere."""
        return max(1, self.pages * 384 // 4096)

    @property
    def record_rows(self) -> int:
        """Rows of 128 bytes of a page record: entries of all CSA layers, other layers' keys."""
        return self._page_bytes(len(TARGETS)) // codec.LANES

    @property
    def record_bytes(self) -> int:
        """Bytes of a page record."""
        return self.record_rows * codec.LANES

    @property
    def hca_lead(self) -> tuple[int, int]:
        """HCA layers, and entries of each."""
        return self.cfg.layer_types.count("hca"), self.context // self.cfg.hca_ratio

    @property
    def fixed_bytes(self) -> int:
        """What stays on the device: HCA entries and the target layers' keys."""
        hca = self.hca_lead[0] * self.hca_lead[1] * codec.entry_bytes(self.cfg, "fp8")
        return hca + len(TARGETS) * self.entries * codec.key_bytes(self.cfg, "fp8")

    @property
    def full_bytes(self) -> int:
        """Everything on the device."""
        return self.fixed_bytes + self.pages * self.record_bytes

    def _page_bytes(self, targets: int) -> int:
        layers = self.cfg.layer_types.count("csa")
        keys = (layers - targets) * codec.key_bytes(self.cfg, "fp8")
        return PAGE * (layers * codec.entry_bytes(self.cfg, "fp8") + keys)


def median_seconds(run: Callable[[int], object], repeats: int) -> float:
    """Median time of run(0), run(1), .. to completion, after one round of PLANS calls."""
    times = []
    for i in range(PLANS + repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(i))
        times.append(time.perf_counter() - start)
    return statistics.median(times[PLANS:])


def on_gpu() -> bool:
    """Whether there is host memory to recall from in place."""
    return jax.default_backend() == "gpu"


def host_sharding() -> SingleDeviceSharding:
    """Pinned host memory; on other devices than GPUs, device memory in its place."""
    kind = "pinned_host" if on_gpu() else None
    return SingleDeviceSharding(jax.devices()[0], memory_kind=kind)


def random_records(shapes: Shapes, count: int, seed: int) -> np.ndarray:
    """Random bytes, uint8 [count, record_rows, 128]."""
    words = count * shapes.record_bytes // 8
    values = np.random.default_rng(seed).integers(0, 1 << 63, words, np.int64)
    return values.view(np.uint8).reshape(count, shapes.record_rows, codec.LANES)


def in_segments(shapes: Shapes, host: np.ndarray, nbytes: int) -> tuple[jax.Array, ...]:
    """Host rows as arrays of at most `nbytes` that a kernel can read."""
    rows = nbytes // shapes.record_bytes
    parts = [host[i : i + rows] for i in range(0, len(host), rows)]
    return tuple(jax.device_put(p, host_sharding()).block_until_ready() for p in parts)


def indexer(shapes: Shapes, query_mode: QueryMode = "bfloat16") -> tuple[Any, Any]:
    """A memory indexer of the released size with random bfloat16 weights: (graph, weights)."""
    cfg = IndexerConfig.for_model(shapes.cfg, target_layers=TARGETS, query_mode=query_mode)
    # On the host, because temporaries would leave holes among the weights in device memory, and its
    # allocator counts a hole as used in full by an array that is somewhat smaller.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        leaves = random_leaves(cfg, jax.random.key(0), jnp.bfloat16)
    return nnx.split(MemoryIndexer(cfg, jax.device_put(leaves, jax.devices()[0])))


def level1_inputs(shapes: Shapes) -> tuple[list[jax.Array], jax.Array, list[codec.Planes]]:
    """PLANS attention inputs [3, 1, D], the last position [1], and keys of the target layers."""
    rng, n = np.random.default_rng(4), shapes.entries
    size = (PLANS, len(TARGETS), 1, shapes.cfg.hidden_size)
    hidden = [jnp.asarray(x, jnp.bfloat16) for x in rng.normal(size=size).astype(np.float32)]
    keys: list[codec.Planes] = []
    for _ in TARGETS:  # without bit 6 every code is a number, below 2
        codes = rng.integers(0, 256, (1, n, shapes.cfg.index_head_dim), np.uint8) & 0xBF
        values = jnp.asarray(codes.view(ml_dtypes.float8_e4m3fn))
        keys.append(codec.Fp8Keys(values, jnp.asarray(rng.random((1, n), np.float32))))
    return hidden, jnp.asarray([shapes.context - 1], jnp.int32), keys


def fire(graph: Any, weights: Any, x: jax.Array, positions: jax.Array, keys: Any) -> jax.Array:
    """Probabilities of all entries, [1, N]."""
    model = nnx.merge(graph, weights)
    return model.ensemble(model(x, positions, keys))


def choose(
    shapes: Shapes, policy: PolicyConfig, slots: int, scores: jax.Array, held: Any, cycle: jax.Array
) -> tuple[pool_map.PoolMap, pool_map.Copies, pool_map.Table, jax.Array]:
    """Select and assign for one row whose page p is host row p; see `pool_map.assign`."""
    one = jnp.ones((1,), jnp.int32)
    chosen = resident_set.select(
        scores,
        shapes.entries * one,
        shapes.pages * one,
        policy,
        page_entries=PAGE,
        allowed=slots,
        live=one > 0,
    )
    rows = jnp.arange(shapes.pages, dtype=jnp.int32)
    return pool_map.assign(
        held, rows[None], jnp.zeros_like(rows), chosen.pages, slots, cycle, width=slots
    )
