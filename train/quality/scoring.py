"""Scores of all entries of a document at many of its tokens, as level 1 computes them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsa_jax.cache import codec
from lsa_jax.config_checks import refusal
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.memory_indexer import SCORE_BLOCK_BYTES, MemoryIndexer, score_keys
from train.traces.trace_info import Keys

TOKENS = 8  # of one call: with 128 heads their queries fill the matrix units
_LEAST = 512


def padded_size(entries: int) -> int:
    """The smallest of 512, 768, 1024, 1536, 2048, .. that is no less: at most a third is padding,
    and a program is compiled for two lengths per doubling."""
    size = _LEAST
    while size < entries:
        size *= 2
    return size // 4 * 3 if size > _LEAST and size // 4 * 3 >= entries else size


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    graph: nnx.GraphDef,
    state: nnx.State,
    hidden: Float[Array, "T L D"],
    positions: Int[Array, " T"],
    values: Float[Array, "N L K"],
    scale: Float[Array, "N L"] | None,
) -> Float[Array, "T L N"]:
    indexer = nnx.merge(graph, state)
    assert isinstance(indexer, MemoryIndexer)
    block_bytes = max(1, SCORE_BLOCK_BYTES // len(positions))

    def of_layer(i: int) -> Float[Array, "T N"]:
        q, w = indexer.queries(i, hidden[:, i], positions)
        plane = values[None, :, i]
        keys = (
            codec.DensePlanes(plane) if scale is None else codec.Fp8Keys(plane, scale[None, :, i])
        )

        def of_token(q: Float[Array, "H K"], w: Float[Array, " H"]) -> Float[Array, " N"]:
            return score_keys(q[None], w[None], keys, block_bytes=block_bytes)[0]

        return jax.vmap(of_token)(q, w)  # all tokens' queries meet a key in one matrix product

    return jnp.stack([of_layer(i) for i in range(hidden.shape[1])], axis=1)


class Scorer:
    """Scores documents with indexers of one configuration.

    Parameters are arguments of the compiled programs: those of a running training can be scored
    again and again. A program is compiled for each padded number of entries.
    """

    def __init__(self, cfg: IndexerConfig) -> None:
        self.cfg = cfg

    def logits(
        self,
        indexer: MemoryIndexer,
        hidden: np.ndarray,
        positions: np.ndarray,
        keys: Keys,
        most_entries: int,
    ) -> np.ndarray:
        """Logits of the first `most_entries` entries at T tokens, float32 [T, L, most_entries].

        Nothing is read of later keys. Entries that do not exist yet at a token are the caller's to
        drop: no other entry's logit depends on them.

        Args:
          indexer: of this scorer's configuration.
          hidden: [T, L, D] of the indexer's target layers, in their order.
          positions: [T], absolute.
          keys: [N, L, K] of these layers.
          most_entries: at most N.
        """
        self._check(indexer, hidden, positions, keys, most_entries)
        graph, state = nnx.split(indexer)
        size = padded_size(most_entries)

        def on_device(x: np.ndarray) -> Array:
            rest = [(0, 0)] * (x.ndim - 1)
            return jnp.asarray(np.pad(x[:most_entries], [(0, size - most_entries), *rest]))

        planes = on_device(keys.values), None if keys.scale is None else on_device(keys.scale)
        parts = []
        for start in range(0, len(positions), TOKENS):
            # The last call is filled up with its last token.
            rows = np.minimum(np.arange(start, start + TOKENS), len(positions) - 1)
            at = jnp.asarray(positions[rows], jnp.int32)
            found = _logits(graph, state, jnp.asarray(hidden[rows]), at, *planes)
            parts.append(np.asarray(found)[..., :most_entries])
        empty = np.zeros((0, len(self.cfg.target_layers), most_entries), np.float32)
        return np.concatenate([empty, *parts])[: len(positions)]

    def _check(
        self,
        indexer: MemoryIndexer,
        hidden: np.ndarray,
        positions: np.ndarray,
        keys: Keys,
        most_entries: int,
    ) -> None:
        cfg, tokens = self.cfg, len(positions)
        if indexer.cfg != cfg:
            raise refusal("the indexer's configuration", indexer.cfg, "the scorer's")
        layers = len(cfg.target_layers)
        if hidden.shape != (tokens, layers, cfg.hidden_size):
            raise refusal("hidden", hidden.shape, f"[{tokens}, {layers}, {cfg.hidden_size}]")
        if keys.values.shape[1:] != (layers, cfg.head_dim):
            raise refusal("keys", keys.values.shape, f"[N, {layers}, {cfg.head_dim}]")
        if not 0 <= most_entries <= len(keys.values):
            raise refusal("most_entries", most_entries, f"in 0..{len(keys.values)}")
