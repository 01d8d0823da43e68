"""Level 2: a decode step in which every CSA layer picks its own top-k from what is resident.

What a layer can read are *columns*: the pages of the cycle's table, then the fresh pages, which
hold every entry formed since the last boundary and the page in formation before it. Complete pages
never change, so that a page has the same bytes on the host and in the pool.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from lsa_jax.cache import codec
from lsa_jax.cache.records import RecordLayout
from lsa_jax.cache.resident import Resident, masked, take_entries
from lsa_jax.cache.state import LayerState, flat_entries, init_state
from lsa_jax.config import CacheConfig, ModelConfig
from lsa_jax.lsa.accounting import fresh_pages
from lsa_jax.lsa.config import ResidentPath
from lsa_jax.lsa.memory_indexer import score_keys
from lsa_jax.lsa.pool_map import Table
from lsa_jax.lsa.targets import csa_layers
from lsa_jax.nn.attention import Attention
from lsa_jax.nn.lightning_indexer import topk_mask
from lsa_jax.nn.transformer import DeepSeekV4


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LsaState:
    """Decode state of B rows whose complete CSA pages are elsewhere.

    CSA layers keep fresh pages only, from entry `base` on (a multiple of the page size); target
    layers' index keys, HCA entries, windows and tails are whole. On the path "mask" everything is
    whole and `base` only says which entries are new. `hidden` are the target layers' attention
    inputs at the last W tokens, the last one's behind (`Level2`'s lookback; zeros before a text).
    `reads` counts, per page, what level 2 picked of it since the last boundary, over layers and
    steps. `streak` counts the last tokens in a row that missed more than the fallback's bound,
    where that is patient (`LsaConfig`). `votes` counts, per entry, the layers and steps since the
    last boundary whose native top-k had it (None: not counted).
    """

    layers: tuple[LayerState, ...]
    lengths: Int[Array, " B"]
    base: Int[Array, " B"]
    hidden: Float[Array, "L B W D"]
    reads: Int[Array, "B P"]
    streak: Int[Array, " B"]
    votes: Float[Array, "B N"] | None

    def last_hidden(self, n: int) -> Float[Array, "B D"]:
        """The attention input of the n-th target layer at the last token."""
        return self.hidden[n, :, -1]


@dataclasses.dataclass(frozen=True)
class Level2:
    """Shapes of two-level decoding for one model, and its step. Holds no arrays.

    Equal ones share compiled programs: a session like one before compiles no prefill.
    """

    cfg: ModelConfig
    cache: CacheConfig
    _: dataclasses.KW_ONLY
    targets: tuple[int, ...]
    lookahead: int
    path: ResidentPath
    count_votes: bool = False
    lookback: int = 1

    @functools.cached_property
    def csa(self) -> tuple[int, ...]:
        """The CSA layers as the transformer counts, by ordinal."""
        return csa_layers(self.cfg)

    @functools.cached_property
    def layout(self) -> RecordLayout:
        """Of a page's record."""
        return RecordLayout(self.cfg, self.cache, self.targets)

    @property
    def fresh_pages(self) -> int:
        """Pages that hold what is formed between two boundaries."""
        return fresh_pages(self.cfg.csa_ratio, self.cache.page_entries, self.lookahead)

    @property
    def fresh_tokens(self) -> int:
        """Tokens whose entries the fresh pages hold."""
        return self.fresh_pages * self.cache.page_entries * self.cfg.csa_ratio

    @property
    def target_layers(self) -> tuple[int, ...]:
        """The target layers as the transformer counts."""
        return tuple(self.csa[ordinal] for ordinal in self.targets)

    def same_record(self, a: int, b: int) -> bool:
        """Whether two CSA ordinals have the same kind of part in a record."""
        return (a in self.targets) == (b in self.targets)

    def pages_of(self, state: LsaState) -> int:
        """Pages that a row of this state may have in all."""
        keys = state.layers[self.target_layers[0]].index_keys
        assert keys is not None
        return codec.capacity(keys) // self.cache.page_entries

    def start(self, *, batch: int, capacity: int, dtype: jnp.dtype) -> LsaState:
        """An empty state."""
        shape = self.cfg, self.cache, batch, capacity, jnp.dtype(dtype)
        options = self.fresh_pages, self.path, self.count_votes, self.lookback
        return _start(shape, self.targets, *options)

    def step(
        self,
        model: DeepSeekV4,
        state: LsaState,
        records: UInt8[Array, "S r 128"],
        table: Table,
        token: Int[Array, " B"],
        live: Bool[Array, " B"],
    ) -> tuple[Float[Array, "B 1 n D"], LsaState]:
        """Feeds one token to the live rows; returns the last layer's streams."""
        ids, count = token[:, None], live.astype(jnp.int32)
        streams = model.streams(ids)
        layers, hidden, pages, votes = [], [], [], state.votes
        for i, (block, layer) in enumerate(zip(model.layers, state.layers, strict=True)):
            ordinal = self.csa.index(i) if i in self.csa else None
            resident = None
            if ordinal is not None:
                resident = self.resident(ordinal, state, records, table)
            with jax.named_scope(f"layer_{i}"):
                streams, layer, x = block.attend(streams, layer, state.lengths, count, resident)
                streams = block.mix(streams, ids)
            layers.append(layer)
            if resident is not None:
                pages.append(self._picked_pages(resident, live))
            if ordinal in self.targets:
                hidden.append(x[:, 0])
            if votes is not None and ordinal is not None:
                picks = self._native_picks(block.attn, x, layer, state.lengths)
                votes = votes + jnp.where(live[:, None], picks, 0)
        newest = jnp.concatenate([state.hidden[:, :, 1:], jnp.stack(hidden)[:, :, None]], axis=2)
        kept = jnp.where(live[:, None, None], newest, state.hidden)
        rows = jnp.arange(live.shape[0])[:, None]
        read = state.reads.at[rows, jnp.concatenate(pages, axis=1)].add(1, mode="drop")
        return streams, dataclasses.replace(
            state,
            layers=tuple(layers),
            lengths=state.lengths + count,
            hidden=kept,
            reads=read,
            votes=votes,
        )

    def _picked_pages(self, resident: Resident, live: Bool[Array, " B"]) -> Int[Array, "B k"]:
        """Pages of what a layer picked in this step; out of range where it picked nothing."""
        ((column, valid),) = resident.picked
        entry = jnp.take_along_axis(resident.entry, column[:, 0], axis=1)
        there = valid[:, 0] & (entry >= 0) & live[:, None]
        return jnp.where(there, entry // self.cache.page_entries, jnp.iinfo(jnp.int32).max)

    def _native_picks(
        self, attn: Attention, x: Array, layer: LayerState, lengths: Int[Array, " B"]
    ) -> Bool[Array, "B N"]:
        """What the layer's own indexer takes from all of the history; needs it all here."""
        scores = native_scores(attn, x[:, 0], lengths, layer)
        entries = (lengths + 1) // self.cfg.csa_ratio
        exists = jnp.arange(scores.shape[1]) < entries[:, None]
        return topk_mask(scores, exists, self.cfg.index_topk)

    def readable(self, state: LsaState, table: Table) -> Bool[Array, "B N"]:
        """Entries that a step with this table can read, of a target layer's N."""
        per_page = self.cache.page_entries
        n = self.pages_of(state) * per_page
        rows = jnp.arange(table.pages.shape[0])[:, None]
        at = jnp.where(table.pages < 0, n // per_page, table.pages)
        pages = jnp.zeros((table.pages.shape[0], n // per_page + 1), bool).at[rows, at].set(True)
        old = jnp.repeat(pages[:, :-1], per_page, axis=1)
        return old | (jnp.arange(n) >= state.base[:, None])

    def resident(self, ordinal: int, state: LsaState, records: Array, table: Table) -> Resident:
        """What a CSA layer can read in steps with this table."""
        if self.path == "mask":
            return masked(self.readable(state, table))
        per_page, width = self.cache.page_entries, table.pages.shape[1]
        fresh = state.base[:, None] // per_page + jnp.arange(self.fresh_pages, dtype=jnp.int32)
        pages = jnp.concatenate([table.pages, fresh], axis=1)
        entry = pages[..., None] * per_page + jnp.arange(per_page, dtype=jnp.int32)
        entry = jnp.where(pages[..., None] < 0, -1, entry)
        slots = jnp.maximum(table.slots, 0)
        target = ordinal in self.targets

        def keys(layer: LayerState) -> codec.Planes:
            assert layer.index_keys is not None
            if target:
                return _flat(jax.tree.map(functools.partial(_pages, pages), layer.index_keys))
            old = self._pool_keys(ordinal, records, slots)
            return _flat(_join(old, layer.index_keys))

        def entries(layer: LayerState, column: Int[Array, "B T k"]) -> codec.Planes:
            assert layer.entries is not None
            count = width * per_page
            old = jnp.minimum(column, count - 1)
            row = jnp.arange(column.shape[0])[:, None, None]
            slot = table.slots[row, old // per_page]
            there = self.layout.take(ordinal, records, jnp.maximum(slot, 0), old % per_page)
            # A column without a page must not show what another request left in the pool: its
            # weight is zero, but zero times NaN is not.
            there = _choose(slot < 0, jax.tree.map(jnp.zeros_like, there), there)
            here = take_entries(flat_entries(layer.entries), jnp.maximum(column - count, 0))
            return _choose(column >= count, here, there)

        zeros = jnp.zeros_like(state.base)
        return Resident(
            entry=entry.reshape(entry.shape[0], -1),
            base=state.base,
            key_base=zeros if target else state.base,
            keys=keys,
            entries=entries,
        )

    def _pool_keys(self, ordinal: int, records: Array, slots: Int[Array, "B K"]) -> codec.Planes:
        """Index keys of the table's pages [B, K, page_entries, ...]. Gathered sets lie in the order
        of their rows, so that these are slices of the pool and no gather."""
        if self.path == "gathered":
            rows = records.reshape(*slots.shape, *records.shape[1:])
            return self.layout.keys_of(ordinal, rows)
        return self.layout.take_keys(ordinal, records, slots)


def native_scores(
    attn: Attention, x: Float[Array, "B D"], positions: Int[Array, " B"], layer: LayerState
) -> Float[Array, "B N"]:
    """A CSA layer's own index scores at one token, over its whole index keys.

    `x` is the attention input at `positions`.
    """
    assert attn.indexer is not None and layer.index_keys is not None
    latent = attn.latent_query(x[:, None])
    q, w = attn.indexer.queries(latent, x[:, None], positions[:, None])
    keys = flat_entries(layer.index_keys)
    return score_keys(q[:, 0], w[:, 0], keys, backend=attn.backend)


def _pages(pages: Int[Array, "B K"], plane: Array) -> Array:
    """Pages [B, P, ...] of their own rows, those out of range clipped: they are never visible."""
    return plane[jnp.arange(pages.shape[0])[:, None], jnp.clip(pages, 0, plane.shape[1] - 1)]


def _flat(planes: codec.Planes) -> codec.Planes:
    return flat_entries(planes)


def _join(a: codec.Planes, b: codec.Planes) -> codec.Planes:
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y], axis=1), a, b)


def _choose(first: Bool[Array, "B T k"], a: codec.Planes, b: codec.Planes) -> codec.Planes:
    def pick(x: Array, y: Array) -> Array:
        return jnp.where(first.reshape(*first.shape, *[1] * (x.ndim - first.ndim)), x, y)

    return jax.tree.map(pick, a, b)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4, 5))
def _start(
    shape: tuple[ModelConfig, CacheConfig, int, int, jnp.dtype],
    targets: tuple[int, ...],
    fresh_pages: int,
    path: ResidentPath,
    count_votes: bool,
    lookback: int,
) -> LsaState:
    cfg, cache, batch, capacity, dtype = shape
    state = init_state(cfg, cache, batch=batch, capacity=capacity, dtype=dtype)
    layers, csa = list(state.layers), csa_layers(cfg)
    for ordinal, i in enumerate(csa if path != "mask" else ()):
        layer = layers[i]
        lead = (batch, fresh_pages, cache.page_entries)
        keys = layer.index_keys if ordinal in targets else codec.empty_keys(cfg, cache, lead)
        entries = codec.empty_entries(cfg, cache, lead)
        layers[i] = dataclasses.replace(layer, entries=entries, index_keys=keys)
    hidden = jnp.zeros((len(targets), batch, lookback, cfg.hidden_size), dtype)
    keys = state.layers[csa[targets[0]]].index_keys
    assert keys is not None
    votes = jnp.zeros((batch, codec.capacity(keys)), jnp.float32) if count_votes else None
    zeros = jnp.zeros_like(state.lengths)
    reads = jnp.zeros((batch, codec.capacity(keys) // cache.page_entries), jnp.int32)
    return LsaState(tuple(layers), state.lengths, zeros, hidden, reads, zeros, votes)
