"""One question to plan for, and the shapes that answer it: weights, decode state, pool, host pages.

Everything is abstract: shapes, dtypes and shardings, no array and no device.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from lsa_jax import shardings
from lsa_jax.cache.state import DecodeState, LayerState, init_state
from lsa_jax.checkpoint.leaf import LeafInfo, Weights
from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.config import CacheConfig, ComputeConfig, ConfigError, ModelConfig
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_shapes
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.lsa.pool_map import PoolMap, Table
from lsa_jax.lsa.room import Room

MeshShape = tuple[int, int, int]  # data, expert, tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model and what it is to do. `context` tokens a row, decoded ones too; `lsa` None is full
    attention. `indexer` is the memory indexer of a case with LSA; it is float32, as released."""

    name: str
    cfg: ModelConfig
    context: int
    batch: int
    weights: Weights
    compute: ComputeConfig
    cache: CacheConfig
    prefill_chunk: int
    lsa: LsaConfig | None
    indexer: IndexerConfig | None

    def __post_init__(self) -> None:
        most = self.cfg.max_position_embeddings
        if not 1 <= self.context <= most:
            raise ConfigError(
                f"context must be within 1..max_position_embeddings={most:,} tokens, "
                f"got {self.context:,}"
            )
        if self.batch < 1 or self.prefill_chunk < 1:
            got = f"{self.batch} and {self.prefill_chunk}"
            raise ConfigError(f"batch and prefill_chunk must be positive, got {got}")

    @property
    def attention(self) -> str:
        """How history is attended: lsa or full."""
        return "full" if self.lsa is None else "lsa"

    @property
    def leaves(self) -> Mapping[str, LeafInfo]:
        """Every leaf that a model is loaded from."""
        return _leaves(self.cfg, self.weights)

    @property
    def compute_bytes(self) -> int:
        """Bytes of an activation."""
        return jnp.dtype(self.compute.dtype).itemsize

    @property
    def indexer_bytes(self) -> int:
        """Bytes of the memory indexer; 0 without one."""
        shapes = leaf_shapes(self.indexer).values() if self.indexer is not None else ()
        return 4 * sum(math.prod(shape) for shape in shapes)

    @functools.cached_property
    def level2(self) -> Level2:
        """Shapes of two-level decoding; only with LSA."""
        assert self.lsa is not None
        return Level2(
            self.cfg,
            self.cache,
            targets=self.lsa.targets,
            lookahead=self.lsa.lookahead,
            path=self.lsa.resident_path,
        )

    @functools.cached_property
    def room(self) -> Room:
        """How many pages may be on the device; only with LSA."""
        assert self.lsa is not None
        return Room(
            cfg=self.cfg,
            cache=self.cache,
            lsa=self.lsa,
            fresh_entries=self.level2.fresh_pages * self.cache.page_entries,
            window_bytes=self.compute_bytes,
        )

    @property
    def row_pages(self) -> int:
        """Complete pages of a row at its end."""
        return self.room.complete_pages(self.context)

    @functools.cached_property
    def pool_slots(self) -> int:
        """Pages of the device pool, as a session of full rows reserves them.

        ConfigError where the budget is below its floor.
        """
        allowed = self.room.allowed((self.context,) * self.batch, self.context, strict=True)
        return max(1, min(self.row_pages * self.batch, allowed))

    @property
    def host_bytes(self) -> int:
        """Page records in host memory once every row is full; one copy for all devices."""
        if self.lsa is None or self.lsa.simulated:
            return 0
        return self.batch * self.row_pages * self.level2.layout.nbytes

    def state(self, rows: int | None = None) -> DecodeState | LsaState:
        """Decode state of all rows, or of so many."""
        count, dtype = rows or self.batch, jnp.dtype(self.compute.dtype)
        if self.lsa is None:
            empty = functools.partial(init_state, self.cfg, self.cache, dtype=dtype)
            return jax.eval_shape(lambda: empty(batch=count, capacity=self.context))
        start = self.level2.start
        return jax.eval_shape(lambda: start(batch=count, capacity=self.context, dtype=dtype))

    @functools.cached_property
    def state_bytes(self) -> Mapping[str, int]:
        """Bytes of the decode state's and the pool's components, of all rows; see `Memory`."""
        sizes = dict.fromkeys(("csa", "hca", "keys", "recurrent"), 0)
        state = self.state()
        layers: tuple[LayerState, ...] = state.layers
        for layer, kind in zip(layers, self.cfg.layer_types, strict=True):
            sizes["recurrent"] += tree_bytes((layer.window, layer.tail, layer.index_tail))
            sizes["keys"] += tree_bytes(layer.index_keys)
            if kind != "sliding":
                sizes[kind] += tree_bytes(layer.entries)
        tables = tree_bytes(dataclasses.replace(state, layers=()))
        if self.lsa is None:
            return sizes | {"pool": 0, "tables": tables}
        records, *maps = self.pool()
        return sizes | {"pool": tree_bytes(records), "tables": tables + tree_bytes(maps)}

    def pool(self) -> tuple[jax.ShapeDtypeStruct, PoolMap, Table]:
        """The pool's records, what is in its slots, and the table of a cycle."""
        slots = self.pool_slots
        records = jax.ShapeDtypeStruct((slots, *self.level2.layout.shape), jnp.uint8)
        slot: Any = jax.ShapeDtypeStruct((slots,), jnp.int32)
        column: Any = jax.ShapeDtypeStruct((self.batch, min(slots, self.row_pages)), jnp.int32)
        return records, PoolMap(slot, slot, slot), Table(column, column)


def abstract_mesh(shape: MeshShape) -> Any:
    """A mesh of those axes without devices, which shardings take like one with devices."""
    return AbstractMesh(shape, shardings.MESH_AXES, axis_types=(AxisType.Auto,) * 3)


def shard_bytes(x: Any, sharding: NamedSharding) -> int:
    """Bytes of one device's part of an array."""
    return math.prod(sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, whole."""
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(x.shape) * _itemsize(x.dtype) for x in leaves)


def _itemsize(dtype: Any) -> int:
    return 8 if jnp.issubdtype(dtype, jax.dtypes.prng_key) else jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device by component, before anything is compiled; `host` is of all together.

    `experts` and `weights` (all others) are the model's; `indexer` the memory indexer's. `csa`,
    `hca` and `keys` are entries and index keys in the decode state, `pool` the resident pages,
    `recurrent` windows and tails, `tables` what says which page is where.
    """

    experts: int
    weights: int
    indexer: int
    csa: int
    hca: int
    keys: int
    pool: int
    recurrent: int
    tables: int
    host: int

    @property
    def device(self) -> int:
        """Bytes that stay on a device from step to step."""
        parts = dataclasses.asdict(self)
        return sum(parts.values()) - self.host

    @property
    def kv(self) -> int:
        """Entries and index keys on a device."""
        return self.csa + self.hca + self.keys + self.pool


def memory_of(case: Case, shape: MeshShape) -> Memory:
    """What a device of that mesh holds. ConfigError where the mesh does not divide the model."""
    if case.lsa is not None and shape[0] != 1:
        raise ConfigError(f"mesh must have a data axis of 1 with attention lsa, got {shape}")
    if case.batch % shape[0]:
        raise ConfigError(f"batch must be a multiple of the data axis {shape[0]}, got {case.batch}")
    experts, weights = _weight_bytes(case.cfg, case.weights, shape)
    state = {name: part // shape[0] for name, part in case.state_bytes.items()}
    return Memory(
        experts=experts,
        weights=weights,
        indexer=case.indexer_bytes,
        host=case.host_bytes,
        **state,
    )


@functools.cache  # a search asks for the same few meshes again and again
def _weight_bytes(cfg: ModelConfig, weights: Weights, shape: MeshShape) -> tuple[int, int]:
    """A device's bytes of routed experts, and of everything else of the model."""
    mesh, experts, others = abstract_mesh(shape), 0, 0
    for path, info in _leaves(cfg, weights).items():
        size = shard_bytes(info, shardings.leaf_sharding(cfg, mesh, path, info.shape))
        experts, others = (
            (experts + size, others) if ".experts." in path else (experts, others + size)
        )
    return experts, others


@functools.cache
def _leaves(cfg: ModelConfig, weights: Weights) -> Mapping[str, LeafInfo]:
    return SyntheticModel(cfg).leaves(weights)


def choose_mesh(case: Case, devices: int) -> MeshShape:
    """The mesh over so many devices that leaves the least on each.

    At equal bytes the tensor axis is preferred to the expert axis: tokens then read the experts
    they use on every device, in place of all experts. ConfigError where no mesh divides the model,
    or the budget is below its floor.
    """
    _ = case.state_bytes  # of no mesh: an error here is not that none divides the model
    found: dict[MeshShape, int] = {}
    for shape in _factorings(devices):
        if (case.lsa is not None and shape[0] != 1) or case.cfg.o_groups % shape[2]:
            continue  # the output projection's groups are computed apart
        try:
            found[shape] = memory_of(case, shape).device
        except ConfigError:
            continue  # a mesh that does not divide the model is no candidate
    if not found:
        only = "data = 1, " if case.lsa is not None else ""
        raise ConfigError(
            f"mesh over {devices} devices must divide the model ({only}tensor a divisor of its "
            f"heads, o_groups={case.cfg.o_groups} and widths, expert of its experts), found none"
        )
    return min(found, key=lambda shape: (found[shape], shape[1], shape[0]))


def _factorings(n: int) -> list[MeshShape]:
    return [
        (d, e, n // d // e)
        for d in range(1, n + 1)
        if n % d == 0
        for e in range(1, n // d + 1)
        if (n // d) % e == 0
    ]


def whole(mesh: Any) -> NamedSharding:
    """The whole array on every device of a mesh."""
    return NamedSharding(mesh, PartitionSpec())
