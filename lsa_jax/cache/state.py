"""DecodeState: everything that changes while decoding, as one frozen pytree of arrays.

A state is a value: it is passed to `DeepSeekV4.__call__`, which returns the next one; callers
donate the old one. Row b of every array belongs to sequence b and depends on nothing else.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lsa_jax.cache import codec
from lsa_jax.config import CacheConfig, ConfigError, LayerType, ModelConfig

EMPTY_GATE = -1e30  # finite stand-in for -inf: the online softmax must not compute inf - inf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tail:
    """A compressor's unfinished entries, as running softmax statistics per channel (float32).

    The middle axis holds (gate maximum, sum of weights, weighted sum of values), so the size does
    not grow with the compression ratio.
    """

    current: Float[Array, "B 3 width"]  # tokens of the unfinished entry
    previous: Float[Array, "B 3 dim"] | None  # overlap: last finished window's first half


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerState:
    """Cache of one layer; compressed parts are None on sliding layers, index parts on HCA too."""

    window: Float[Array, "B W c"]  # ring: position p lives in slot p mod W
    entries: codec.Planes | None  # [B, pages, page_entries, ...]
    tail: Tail | None
    index_keys: codec.Planes | None  # [B, pages, page_entries, ...]
    index_tail: Tail | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Caches of all layers and the number of tokens each row has seen."""

    layers: tuple[LayerState, ...]
    lengths: Int[Array, " B"]


def init_tail(batch: int, dim: int, overlap: bool) -> Tail:
    """The tail of a compressor that has seen no token; entries are `dim` wide."""

    def empty(width: int) -> Array:
        return jnp.zeros((batch, 3, width), jnp.float32).at[:, 0].set(EMPTY_GATE)

    return Tail(empty(2 * dim if overlap else dim), empty(dim) if overlap else None)


def pages_for(cfg: ModelConfig, cache: CacheConfig, layer_type: LayerType, capacity: int) -> int:
    """Pages that hold every entry of `capacity` tokens."""
    entries = capacity // cfg.ratio(layer_type)
    return max(1, -(-entries // cache.page_entries))


def _layer_state(
    cfg: ModelConfig,
    cache: CacheConfig,
    layer_type: LayerType,
    batch: int,
    capacity: int,
    dtype: Any,
) -> LayerState:
    window = jnp.zeros((batch, cfg.sliding_window, cfg.head_dim), dtype)
    if layer_type == "sliding":
        return LayerState(window, None, None, None, None)
    pages = pages_for(cfg, cache, layer_type, capacity)
    lead = (batch, pages, cache.page_entries)
    csa = layer_type == "csa"
    return LayerState(
        window=window,
        entries=codec.empty_entries(cfg, cache, lead),
        tail=init_tail(batch, cfg.head_dim, overlap=csa),
        index_keys=codec.empty_keys(cfg, cache, lead) if csa else None,
        index_tail=init_tail(batch, cfg.index_head_dim, overlap=True) if csa else None,
    )


def init_state(
    cfg: ModelConfig, cache: CacheConfig, *, batch: int, capacity: int, dtype: Any
) -> DecodeState:
    """An empty state for `batch` rows of up to `capacity` tokens; the window is kept in `dtype`."""
    if batch < 1 or capacity < 1:
        raise ConfigError(f"batch and capacity must be positive, got {batch} and {capacity}")
    if capacity > cfg.max_position_embeddings:
        raise ConfigError(
            f"capacity must be <= max_position_embeddings={cfg.max_position_embeddings}, "
            f"got {capacity}"
        )
    return _zeros(cfg, cache, batch, capacity, jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _zeros(
    cfg: ModelConfig, cache: CacheConfig, batch: int, capacity: int, dtype: jnp.dtype
) -> DecodeState:
    """One program: hundreds of separate fills would take as long as a short prefill."""
    layers = (_layer_state(cfg, cache, kind, batch, capacity, dtype) for kind in cfg.layer_types)
    return DecodeState(tuple(layers), jnp.zeros((batch,), jnp.int32))


def grow(cfg: ModelConfig, cache: CacheConfig, state: DecodeState, capacity: int) -> DecodeState:
    """The same state with room for `capacity` tokens; never shrinks."""

    def pad(planes: codec.Planes | None, layer_type: LayerType) -> codec.Planes | None:
        pages = pages_for(cfg, cache, layer_type, capacity) if planes is not None else 0

        def widen(x: Array) -> Array:
            extra = max(0, pages - x.shape[1])
            return jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))

        return jax.tree.map(widen, planes)

    layers = tuple(
        dataclasses.replace(
            layer, entries=pad(layer.entries, kind), index_keys=pad(layer.index_keys, kind)
        )
        for layer, kind in zip(state.layers, cfg.layer_types, strict=True)
    )
    return DecodeState(layers, state.lengths)


def token_room(cfg: ModelConfig, state: DecodeState) -> int:
    """Tokens a row of this state can hold before a compressed layer runs out of pages; sliding
    layers never do."""
    room = cfg.max_position_embeddings
    for layer, kind in zip(state.layers, cfg.layer_types, strict=True):
        if layer.entries is not None:
            room = min(room, (codec.capacity(layer.entries) + 1) * cfg.ratio(kind) - 1)
    return room


def write_pages(
    planes: codec.Planes, new: codec.Planes, first: Int[Array, " B"], count: Int[Array, " B"]
) -> codec.Planes:
    """Writes new [B, E, ...] at entry indices first .. first + count - 1 of each row.

    Entries past `count` are dropped, so a padded chunk leaves the cache as it was.
    """

    def scatter(pool: Array, rows: Array) -> Array:
        batch, pages, per_page = pool.shape[:3]
        offset = jnp.arange(rows.shape[1])[None]
        beyond = pages * per_page + offset  # no index twice, which the gradient profits from
        index = jnp.where(offset < count[:, None], first[:, None] + offset, beyond)
        flat = pool.reshape(batch, pages * per_page, *pool.shape[3:])
        flat = flat.at[jnp.arange(batch)[:, None], index].set(
            rows, mode="drop", unique_indices=True
        )
        return flat.reshape(pool.shape)

    return jax.tree.map(scatter, planes, new)


def flat_entries(planes: codec.Planes) -> codec.Planes:
    """[B, pages, page_entries, ...] -> [B, N, ...]; a view, pages are contiguous."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), planes)


def kv_bytes(cfg: ModelConfig, state: DecodeState) -> dict[str, int]:
    """Allocated bytes by component: what `--json` and the summary line report."""
    names = ("window", "csa_entries", "hca_entries", "index_keys", "tails")
    sizes: dict[str, int] = dict.fromkeys(names, 0)

    def nbytes(tree: Any) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    for layer, kind in zip(state.layers, cfg.layer_types, strict=True):
        sizes["window"] += nbytes(layer.window)
        sizes["tails"] += nbytes((layer.tail, layer.index_tail))
        if kind != "sliding":
            sizes[f"{kind}_entries"] += nbytes(layer.entries)
        sizes["index_keys"] += nbytes(layer.index_keys)
    return sizes
