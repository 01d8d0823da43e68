"""The lightning indexer: scores every visible entry and keeps the top-k (spec 5)."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt32

from lsa_jax import quant
from lsa_jax.cache import codec
from lsa_jax.cache.state import Tail
from lsa_jax.config import ComputeConfig, ModelConfig
from lsa_jax.nn import planes as to_planes
from lsa_jax.nn import rope
from lsa_jax.nn.compressor import Compressor, NewEntries
from lsa_jax.nn.layers import Leaves, Linear
from pallas_kernels import dispatch, index_score, top_k


def index_scores(
    q: Float[Array, "B T H K"],
    w: Float[Array, "B T H"],
    planes: codec.Planes,
    lengths: Int[Array, " B"] | Int[Array, "B T"] | None = None,
    *,
    backend: str | None = None,
) -> Float[Array, "B T N"]:
    """Scores of N index keys, float32 (5.1): sum_h w[h] * relu(q[h] . k).

    With `lengths` a query sees that many keys only; the others, which kernels then do not read,
    score -inf. `backend` is a model's: see `dispatch.of_model`.
    """
    keys, scale = to_planes.keys(planes)
    backend = dispatch.of_model(index_score.IMPLEMENTATIONS, backend)
    return index_score.index_score(q, w, keys, scale, lengths=lengths, backend=backend)


def _one_zero(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """-0.0 -> 0.0, so that they tie. (Adding 0.0 would do too, but compilers fold that away.)"""
    return jnp.where(x == 0, 0.0, x)


def _sortable(x: Float[Array, "*n"]) -> UInt32[Array, "*n"]:
    """float32 -> uint32 of the same order; -0.0 counts as 0.0."""
    bits = jax.lax.bitcast_convert_type(_one_zero(x), jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(0x80000000))


def topk_mask(
    scores: Float[Array, "*n N"], visible: Bool[Array, "*n N"], k: int
) -> Bool[Array, "*n N"]:
    """The k highest visible scores of each row, equal scores by lowest index; fewer if fewer exist.

    Finds the k-th score four bits at a time from counts: no sort, eight reads of the row. This is
    no copy of `pallas_kernels.top_k`: where all entries are read anyway and only weighed by the
    mask, indices would have to be scattered back into one.
    """
    # Computed once: were it fused into every count, compilers might round it in several ways.
    order = jax.lax.optimization_barrier(jnp.where(visible, _sortable(scores), 0))
    digits = jnp.arange(1, 16, dtype=jnp.uint32)

    def refine(i: Int[Array, ""], kth: Array) -> Array:
        shift = jnp.uint32(28) - 4 * i.astype(jnp.uint32)
        candidates = kth[..., None] | (digits << shift)
        reached = jnp.sum(order[..., None, :] >= candidates[..., None], axis=-1) >= k
        return kth | (jnp.sum(reached, axis=-1).astype(jnp.uint32) << shift)

    kth = jnp.zeros(scores.shape[:-1], jnp.uint32)
    kth = jax.lax.fori_loop(0, 8, refine, kth, unroll=True)[..., None]
    above, equal = order > kth, (order == kth) & visible
    room = k - jnp.sum(above, axis=-1, keepdims=True)
    return above | (equal & (jnp.cumsum(equal, axis=-1) <= room))


def topk_indices(
    scores: Float[Array, "*n N"],
    visible: Int[Array, "*n"] | Bool[Array, "*n N"],
    k: int,
    *,
    backend: str | None = None,
) -> tuple[Int[Array, "*n k"], Bool[Array, "*n k"]]:
    """The same set as `topk_mask`, as indices and their validity: min(k, N) places, those that are
    filled first. `visible` marks entries, or counts a row's first ones. Only with backend "xla" are
    places in order of falling score.
    """
    lead, n = scores.shape[:-1], scores.shape[-1]
    visible = visible.reshape(-1, n) if visible.ndim == scores.ndim else visible.reshape(-1)
    backend = dispatch.of_model(top_k.IMPLEMENTATIONS, backend)
    found = top_k.top_k(scores.reshape(-1, n), visible, min(k, n), backend=backend)
    index, valid = (x.reshape(*lead, -1) for x in found)
    return index, valid


class LightningIndexer(nnx.Module):
    """Level 2 of LSA and V4's own selector: queries, head weights, and the index-key compressor.

    Queries and keys are Hadamard-rotated, which cancels in their product (5.2); stored keys are
    always rotated because the memory indexer is trained on rotated keys.
    """

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig, freqs: np.ndarray):
        self.cfg, self.compute, self.freqs = cfg, compute, tuple(map(float, freqs))
        self.wq_b = Linear(leaves.sub("wq_b"), compute)
        self.weights_proj = Linear(leaves.sub("weights_proj"), compute)
        self.compressor = Compressor(leaves.sub("compressor"), cfg, compute, freqs)

    def _rotate(self, x: Array) -> Array:
        rotated = quant.hadamard(x)
        return quant.fp4_round(rotated) if self.compute.simulate_index else rotated

    def queries(
        self, latent: Float[Array, "B T r"], x: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]:
        """Rotated queries in the activation dtype, and float32 head weights with both scales."""
        heads, dim = self.cfg.index_n_heads, self.cfg.index_head_dim
        q = self.wq_b(latent).reshape(*latent.shape[:2], heads, dim)
        q = rope.rotate(q, positions, np.asarray(self.freqs, np.float32))
        weights = self.weights_proj(x, jnp.float32) * (dim**-0.5 * heads**-0.5)
        return self._rotate(q), weights

    def keys(
        self, x: Float[Array, "B T D"], start: Array, count: Array, tail: Tail
    ) -> tuple[NewEntries, Tail]:
        """Rotated index keys that the chunk completes."""
        new, tail = self.compressor(x, start, count, tail)
        return new._replace(values=self._rotate(new.values)), tail
