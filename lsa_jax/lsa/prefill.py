"""Prefill with the history in host memory: one layer's history at a time on the device.

A chunk goes through the model layer by layer. A CSA layer needs all of its history, because every
query of the prompt may pick anywhere in it: its pages come from the host for the time of that
layer, and the pages that the chunk completes go back. They are sent once the layer before is done,
so that the device never holds the history of two layers, whatever the length; the result is that of
any other prefill.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int, UInt8

from lsa_jax.cache import codec
from lsa_jax.cache.records import ROW
from lsa_jax.cache.state import LayerState, flat_entries
from lsa_jax.lsa.arms import prompt_votes
from lsa_jax.lsa.devices import replicate, send
from lsa_jax.lsa.level2 import Level2, LsaState
from lsa_jax.nn.lightning_indexer import index_scores
from lsa_jax.nn.transformer import Block, DeepSeekV4

OBSERVED = 32  # last tokens of a prompt whose picks are counted for the arms that want them


# Those rows of the records of a row's complete pages, one slice after the other, uint8 [n, r, 128].
ReadPages = Callable[[list[slice]], np.ndarray]


class Chunk(NamedTuple):
    """What a chunk left behind besides the state: records of the pages it completed."""

    records: np.ndarray  # uint8 [n, r, 128]
    votes: Float[Array, "1 N"] | None


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2, 4))
def _whole(
    plan: Level2,
    block: Block,
    streams: Array,
    ids: Array,
    layer: LayerState,
    start: Array,
    count: Array,
    observe: Int[Array, ""] | None,
) -> tuple[Array, LayerState, Array, Array | None]:
    """A layer whose cache is all here."""
    streams, layer, x = block.attend(streams, layer, start, count)
    votes = _observed(plan, block, layer, x, start, count, observe)
    return block.mix(streams, ids), layer, _tail(plan, x, count), votes


def _tail(plan: Level2, x: Float[Array, "B T D"], count: Int[Array, " B"]) -> Array:
    """Of the first `count` tokens the last `lookback` [B, W, D]; anything where there are fewer."""
    at = count[:, None] - plan.lookback + jnp.arange(plan.lookback)
    return jnp.take_along_axis(x, jnp.maximum(at, 0)[..., None], axis=1)


@jax.jit
def _recent(
    before: Float[Array, "L B W D"], tails: list[Float[Array, "B W D"]], count: Int[Array, " B"]
) -> Float[Array, "L B W D"]:
    """The last tokens of all, of which `count` are new."""
    width = before.shape[2]
    at = jnp.arange(width) + count[:, None]  # in what was there and then what is new
    old = jnp.minimum(at, width - 1)[None, ..., None]
    new = (at >= width)[..., None]
    return jnp.where(new, jnp.stack(tails), jnp.take_along_axis(before, old, axis=2))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=(3, 5))
def _csa(
    plan: Level2,
    like: int,
    block: Block,
    streams: Array,
    ids: Array,
    layer: LayerState,
    history: UInt8[Array, "P r 128"],
    at: tuple[Array, Array, Array],
    observe: Int[Array, ""] | None,
) -> tuple[Array, LayerState, Array, Array, Array | None]:
    """A CSA layer: its history unpacked, the chunk, the pages that it completed packed.

    `like` is any CSA ordinal with the same kind of record; `at` are start, count and base.
    """
    start, count, base = at
    whole = _assemble(plan, like, layer, history, base)
    streams, whole, x = block.attend(streams, whole, start, count)
    votes = _observed(plan, block, whole, x, start, count, observe)
    streams = block.mix(streams, ids)
    per_page = plan.cache.page_entries
    first = base // per_page
    entries = (start + count) // plan.cfg.csa_ratio
    assert whole.entries is not None and whole.index_keys is not None
    new = -(-x.shape[1] // (plan.cfg.csa_ratio * per_page)) + 1
    packed = plan.layout.pack(
        like, _cut(whole.entries, first, new), _cut(whole.index_keys, first, new)
    )
    fresh = entries // per_page
    keys = whole.index_keys
    if like not in plan.targets:
        keys = _cut(keys, fresh, plan.fresh_pages)
    entries = _cut(whole.entries, fresh, plan.fresh_pages)
    layer = dataclasses.replace(whole, entries=entries, index_keys=keys)
    return streams, layer, _tail(plan, x, count), packed[0], votes


def _cut(planes: codec.Planes, first: Int[Array, " 1"], count: int) -> codec.Planes:
    """Pages first .. first + count - 1 [1, count, ...]; those past the end repeat the last."""

    def cut(x: Array) -> Array:
        return x[:, jnp.minimum(first[0] + jnp.arange(count), x.shape[1] - 1)]

    return jax.tree.map(cut, planes)


def _assemble(
    plan: Level2,
    like: int,
    layer: LayerState,
    history: UInt8[Array, "P r 128"],
    base: Int[Array, " 1"],
) -> LayerState:
    """The layer with all of its pages: history, then the page in formation."""
    assert layer.entries is not None and layer.index_keys is not None
    target = like in plan.targets
    entries, keys = jax.tree.map(lambda x: x[None], plan.layout.unpack(like, history))
    keys = layer.index_keys if target else keys
    first = base[0] // plan.cache.page_entries

    def put(x: Array, fresh: Array) -> Array:
        return x.at[:, first].set(fresh[:, 0])

    entries = jax.tree.map(put, entries, layer.entries)
    if not target:
        keys = jax.tree.map(put, keys, layer.index_keys)
    return dataclasses.replace(layer, entries=entries, index_keys=keys)


def _observed(
    plan: Level2,
    block: Block,
    whole: LayerState,
    x: Array,
    start: Array,
    count: Array,
    observe: Int[Array, ""] | None,
) -> Float[Array, "1 N"] | None:
    """Votes of the chunk's `observe` <= OBSERVED last tokens in this layer."""
    if observe is None:
        return None
    attn = block.attn
    assert attn.indexer is not None and whole.index_keys is not None
    size = min(OBSERVED, x.shape[1])
    first = jnp.maximum(count[0] - size, 0)
    tail = jax.lax.dynamic_slice_in_dim(x, first, size, axis=1)
    positions = start[:, None] + first + jnp.arange(size)
    q, w = attn.indexer.queries(attn.latent_query(tail), tail, positions)
    scores = index_scores(q, w, flat_entries(whole.index_keys), backend=attn.backend)
    end = start[:, None] + count[:, None]
    counts = (positions < end) & (positions >= end - observe)
    positions = jnp.where(counts, positions, -1)  # from there nothing is visible
    return prompt_votes(plan, scores, positions)


_streams = jax.jit(DeepSeekV4.streams)
_all_logits = jax.jit(DeepSeekV4.logits)


@jax.jit
def _logits(model: DeepSeekV4, streams: Array, count: Array) -> Array:
    at = jnp.maximum(count - 1, 0)[:, None, None, None]
    return model.logits(jnp.take_along_axis(streams, at, axis=1))[:, 0]


def run_chunk(
    plan: Level2,
    model: DeepSeekV4,
    state: LsaState,
    ids: Int[Array, "1 T"],
    count: int,
    read: ReadPages | None,
    *,
    mesh: Mesh | None = None,
    observe: int = 0,
    all_logits: bool = False,
) -> tuple[Array, LsaState, Chunk]:
    """Appends ids[:, :count] to a state of one row; returns logits [1, V] at the last of them, or
    with `all_logits` [1, T, V] at all of them (those past `count` mean nothing).

    `read` reads the row's complete pages; None says that there are none. Its fresh pages must hold
    no complete page. `mesh` are the devices that the model and the state lie on. The votes of
    the chunk's `observe` <= OBSERVED last tokens in all CSA layers are counted.
    """
    start, base, counts = state.lengths, state.base, jnp.full((1,), count, jnp.int32)
    pages = plan.pages_of(state)
    streams = _streams(model, ids)
    layers: list[LayerState] = []
    hidden: list[Array] = []
    packed: list[Array] = []
    votes, observed = None, jnp.int32(observe) if observe else None
    for i, (block, layer) in enumerate(zip(model.layers, state.layers, strict=True)):
        if i not in plan.csa or plan.path == "mask":
            streams, layer, x, seen = _whole(
                plan, block, streams, ids, layer, start, counts, observed if i in plan.csa else None
            )
        else:
            ordinal = plan.csa.index(i)
            slab = _slab(plan.layout.spans(ordinal), read, pages, mesh, after=streams)
            like = next(o for o in range(ordinal + 1) if plan.same_record(o, ordinal))
            streams, layer, x, rows, seen = _csa(
                plan, like, block, streams, ids, layer, slab, (start, counts, base), observed
            )
            packed.append(rows)
        votes = seen if votes is None else votes if seen is None else votes + seen
        layers.append(layer)
        if i in plan.target_layers:
            hidden.append(x)
    done = (int(start[0]) + count) // plan.cfg.csa_ratio // plan.cache.page_entries
    new = done - int(base[0]) // plan.cache.page_entries
    state = LsaState(
        layers=tuple(layers),
        lengths=start + counts,
        base=jnp.full_like(base, done * plan.cache.page_entries),
        hidden=_recent(state.hidden, hidden, counts),
        reads=state.reads,
        streak=jnp.zeros_like(state.streak),
        votes=state.votes,
    )
    state = replicate(state, mesh)
    logits = _all_logits(model, streams) if all_logits else _logits(model, streams, counts)
    return logits, state, Chunk(_records(plan, packed, new), votes)


def _slab(
    parts: list[slice], read: ReadPages | None, count: int, mesh: Mesh | None, *, after: Array
) -> UInt8[Array, "P r 128"]:
    """A layer's history with zeros up to `count` pages: one shape, and so one program, whatever
    the length. Read at once, sent when `after` is there. Without history the zeros are made on the
    device."""
    shape = (count, sum(part.stop - part.start for part in parts), ROW)
    if read is None:
        return replicate(jnp.zeros(shape, jnp.uint8), mesh)
    slab, pages = np.zeros(shape, np.uint8), read(parts)
    slab[: len(pages)] = pages
    jax.block_until_ready(after)
    return send(slab, mesh)


def _records(plan: Level2, packed: list[Array], new: int) -> np.ndarray:
    """Records of the chunk's complete pages out of every layer's part of them."""
    records = np.zeros((new if packed else 0, *plan.layout.shape), np.uint8)
    for ordinal, rows in enumerate(packed if new else ()):
        part, at = np.asarray(rows)[:new], 0
        for span in plan.layout.spans(ordinal):
            size = span.stop - span.start
            records[:, span] = part[:, at : at + size]
            at += size
    return records
