"""Attention over the state, by the operations of `pallas_kernels`: decode steps and prefill chunks.

Which entries a query attends to, where they are, and which operation is asked for them. A backend
that the model names (`ComputeConfig.backend`) runs wherever an operation has it, or raises.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.cache import codec
from lsa_jax.cache.resident import Resident
from lsa_jax.cache.state import LayerState, flat_entries
from lsa_jax.nn import attend_blocks, planes
from lsa_jax.nn import lightning_indexer as indexer
from lsa_jax.nn.site import IndexQueries, Site
from pallas_kernels import dense_decode, dense_prefill, dispatch, sparse_decode, sparse_prefill
from pallas_kernels.rows import Rows

PICK_BYTES = 1 << 30  # index scores that a prefill chunk holds at once


def token(
    site: Site,
    q: Float[Array, "B H c"],
    index_q: IndexQueries | None,
    state: LayerState,
    positions: Int[Array, "B 1"],
    resident: Resident | None,
) -> Float[Array, "B H c"]:
    """A decode step. The ring has position p already, all of its slots count once it is full."""
    ring = state.window.astype(q.dtype)
    recent = jnp.minimum(positions[:, 0] + 1, ring.shape[1])
    if index_q is not None:
        rows, index, valid = _pick(site, index_q, state, positions, resident)
        how = site.options | {"own": True, "backend": site.of(sparse_decode)}
        return sparse_decode.sparse_decode(q, ring, recent, rows, index, valid, site.sink, **how)
    if state.entries is None:
        # Kernels share out entries among a device's units; a window is too little to share.
        rows, seen, backend = ring[:, :0], jnp.zeros_like(recent), dispatch.XLA
    else:
        rows, backend = planes.rows(flat_entries(state.entries)), site.of(dense_decode)
        seen = site.seen(state, positions[:, 0])
    args = (q, ring, recent, rows, seen, site.sink)
    return dense_decode.dense_decode(*args, **site.options, backend=backend)


def _pick(
    site: Site,
    index_q: IndexQueries,
    state: LayerState,
    positions: Int[Array, "B 1"],
    resident: Resident | None,
) -> tuple[Rows, Int[Array, "B k"] | None, Bool[Array, "B k"]]:
    """The top-k of all entries, or, at level 2 of LSA, of what is resident: rows, which of these
    they are (None: all in turn), and whether each counts."""
    backend, k = site.compute.kernel_backend, site.cfg.index_topk
    if resident is None:
        assert state.entries is not None and state.index_keys is not None
        seen = site.seen(state, positions)
        scores = indexer.index_scores(
            *index_q, flat_entries(state.index_keys), seen, backend=backend
        )
        index, valid = indexer.topk_indices(scores, seen, k, backend=backend)
        return planes.rows(flat_entries(state.entries)), index[:, 0], valid[:, 0]
    # Columns that may be read are no prefix, so all are scored.
    scores = indexer.index_scores(*index_q, resident.keys(state), backend=backend)
    visible = resident.visible(positions, site.cfg.ratio(site.layer_type))
    index, valid = indexer.topk_indices(scores, visible, k, backend=backend)
    resident.picked.append((index, valid))
    # Entries lie in two places, the pool and the fresh pages, so `Resident` fetches them first.
    picked = jax.tree.map(lambda x: x[:, 0], resident.entries(state, index))
    return planes.rows(picked), None, valid[:, 0]


def chunk(
    site: Site,
    q: Float[Array, "B T H c"],
    kv: Float[Array, "B T c"],
    index_q: IndexQueries | None,
    state: LayerState,
    positions: Int[Array, "B T"],
) -> Float[Array, "B T H c"]:
    """A prefill chunk. `state` has its entries, but as a window what came before it.

    Where no kernel serves, `attend_blocks` does, not the operations' definitions: in reverse mode
    these compute all scores again, and their blocks of queries, made for caches, leave an
    accelerator idle between its kernels when a model is small.
    """
    op, kernel = (dense_prefill, _dense) if index_q is None else (sparse_prefill, _sparse)
    name = op.__name__.rpartition(".")[-1]
    paths: dict[str, Any] = {n: functools.partial(kernel, backend=n) for n in op.IMPLEMENTATIONS}
    paths[dispatch.XLA] = attend_blocks.attend
    return dispatch.run(name, paths, site.of(op), site, q, kv, index_q, state, positions)


def _dense(
    site: Site,
    q: Array,
    kv: Array,
    _: None,
    state: LayerState,
    positions: Int[Array, "B T"],
    *,
    backend: str,
) -> Float[Array, "B T H c"]:
    ratio = 1 if state.entries is None else site.cfg.ratio(site.layer_type)
    rows = None if state.entries is None else planes.rows(flat_entries(state.entries))
    start, how = positions[:, 0], site.options | {"ratio": ratio, "backend": backend}
    past = attend_blocks.ordered_ring(state.window, start).astype(kv.dtype)
    return dense_prefill.dense_prefill(q, past, kv, start, rows, site.sink, **how)


def _sparse(
    site: Site,
    q: Array,
    kv: Array,
    index_q: IndexQueries,
    state: LayerState,
    positions: Int[Array, "B T"],
    *,
    backend: str,
) -> Float[Array, "B T H c"]:
    assert state.entries is not None
    start, rows = positions[:, 0], planes.rows(flat_entries(state.entries))
    past = attend_blocks.ordered_ring(state.window, start).astype(kv.dtype)
    index, valid = _pick_chunk(site, index_q, state, positions)
    args = (q, past, kv, start, rows, index, valid, site.sink)
    return sparse_prefill.sparse_prefill(*args, **site.options, backend=backend)


def _pick_chunk(
    site: Site, index_q: IndexQueries, state: LayerState, positions: Int[Array, "B T"]
) -> tuple[Int[Array, "B T k"], Bool[Array, "B T k"]]:
    """The top-k of each query, as many queries at a time as have PICK_BYTES of scores."""
    assert state.index_keys is not None
    (batch, tokens), keys = positions.shape, flat_entries(state.index_keys)
    backend, k = site.compute.picking_backend, site.cfg.index_topk
    size = min(tokens, max(1, PICK_BYTES // (4 * batch * codec.capacity(state.index_keys))))
    blocks = -(-tokens // size)

    def pick(block: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, w, seen = block
        scores = indexer.index_scores(q, w, keys, seen, backend=backend)
        return indexer.topk_indices(scores, seen, k, backend=backend)

    def split(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, blocks * size - tokens)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(batch, blocks, size, *x.shape[2:]).swapaxes(0, 1)

    parts = (*index_q, site.seen(state, positions))
    if blocks == 1:
        return pick(parts)
    index, valid = jax.lax.map(pick, tuple(map(split, parts)))
    index, valid = (x.swapaxes(0, 1).reshape(batch, -1, x.shape[-1]) for x in (index, valid))
    return index[:, :tokens], valid[:, :tokens]
