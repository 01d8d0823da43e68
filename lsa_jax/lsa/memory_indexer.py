"""The memory indexer, level 1 of LSA: scores every entry once per lookahead (LSA spec 2.1).

For each target layer, a widened copy of the backbone's lightning indexer scores that layer's own
index keys from that layer's attention input (after the hyper-connection mix and its norm):

    logit[n] = sum_h w[h] * relu(q[h] . k[n]),   w = W x / sqrt(head_dim * heads),

with queries through a low rank, RMSNorm, RoPE at the token's absolute position and the Hadamard
rotation that stored keys already have. An all-zero key has logit 0 and probability exactly 0.5.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from lsa_jax import quant
from lsa_jax.cache import codec
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, IndexerConfig, leaf_name, leaf_shapes
from lsa_jax.nn import planes, rope
from lsa_jax.nn.layers import matmul, rms_normalise
from pallas_kernels import dispatch, index_score

SCORE_BLOCK_BYTES = index_score.reference.DECODE_BLOCK_BYTES


def rope_frequencies(cfg: IndexerConfig) -> np.ndarray:
    """Angle per position of each channel pair, float32 [rope_head_dim / 2]."""
    dim, base = cfg.rope_head_dim, cfg.rope_theta
    freqs = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    if cfg.yarn is not None:
        ramp = rope.yarn_ramp(dim, base, cfg.yarn)
        freqs = freqs * (1 - ramp) + freqs / cfg.yarn.factor * ramp
    return freqs.astype(np.float32)


def random_leaves(
    cfg: IndexerConfig, key: Array, dtype: DTypeLike = jnp.float32
) -> dict[str, Array]:
    """Leaves to train from: norms of one, an even ensemble, matrices that keep the variance."""
    leaves: dict[str, Array] = {}
    for i, (name, shape) in enumerate(leaf_shapes(cfg).items()):
        if name == ENSEMBLE_LEAF:
            leaves[name] = jnp.zeros(shape, dtype)
        elif len(shape) == 1:
            leaves[name] = jnp.ones(shape, dtype)
        else:
            scale = jnp.asarray(shape[-1] ** -0.5, dtype)
            leaves[name] = scale * jax.random.normal(jax.random.fold_in(key, i), shape, dtype)
    return leaves


def score_keys(
    q: Float[Array, "B H K"],
    w: Float[Array, "B H"],
    keys: codec.Planes,
    *,
    backend: str | None = None,
    block_bytes: int | None = None,
) -> Float[Array, "B N"]:
    """sum_h w[h] * relu(q[h] . k) for N keys, float32. `q` is float32, bfloat16 or e4m3 (whose
    scales are in `w`). `backend` is a model's: see `dispatch.of_model`. With `block_bytes` it is
    the definition, whose per-head scores take at most about that much at once."""
    values, scale = planes.keys(keys)
    q, w = q[:, None], w[:, None]
    if block_bytes is not None:
        inputs = (q, w, values, scale, None, None)
        return index_score.reference.index_score(*inputs, block_bytes=block_bytes)[:, 0]
    backend = dispatch.of_model(index_score.IMPLEMENTATIONS, backend)
    return index_score.index_score(q, w, values, scale, backend=backend)[:, 0]


class Retriever(nnx.Module):
    """The weights of one target layer; matrices are [out, in]."""

    def __init__(self, leaves: Mapping[str, Array], ordinal: int):
        def param(name: str, *axes: str | None) -> nnx.Param:
            return nnx.Param(leaves[leaf_name(ordinal, name)], axes=axes)

        self.wq_a = param("wq_a.weight", None, None)
        self.q_norm_weight = param("q_norm_weight", None)
        self.wq_b = param("wq_b.weight", "index_heads", None)
        self.weights_proj = param("weights_proj.weight", "index_heads", None)


class MemoryIndexer(nnx.Module):
    """One retriever per target layer, in the order of `cfg.target_layers`, and their ensemble.

    `leaves` maps `leaf_shapes(cfg)`'s names to arrays; missing, unknown or misshapen ones raise
    ValueError. Parameters keep their dtype: projections run in it, except that query_mode "float32"
    computes everything in float32.
    """

    def __init__(self, cfg: IndexerConfig, leaves: Mapping[str, Array]):
        want = leaf_shapes(cfg)
        got = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
        if got != want:
            names = sorted(n for n in want.keys() | got.keys() if want.get(n) != got.get(n))
            faults = "; ".join(f"{n} must be {want.get(n)}, got {got.get(n)}" for n in names)
            raise ValueError(f"leaves must fit the indexer's configuration: {faults}")
        self.cfg = cfg
        self.freqs = tuple(map(float, rope_frequencies(cfg)))
        self.retrievers = nnx.List([Retriever(leaves, i) for i in cfg.target_layers])
        learned = cfg.ensemble == "learned"
        self.ensemble_weight = nnx.Param(leaves[ENSEMBLE_LEAF], axes=(None,)) if learned else None

    def leaves(self) -> dict[str, Array]:
        """The parameters by their released names; the constructor takes them back."""
        out: dict[str, Array] = {}
        for ordinal, layer in zip(self.cfg.target_layers, self.retrievers, strict=True):
            out[leaf_name(ordinal, "wq_a.weight")] = layer.wq_a[...]
            out[leaf_name(ordinal, "q_norm_weight")] = layer.q_norm_weight[...]
            out[leaf_name(ordinal, "wq_b.weight")] = layer.wq_b[...]
            out[leaf_name(ordinal, "weights_proj.weight")] = layer.weights_proj[...]
        if self.ensemble_weight is not None:
            out[ENSEMBLE_LEAF] = self.ensemble_weight[...]
        return out

    def queries(
        self, i: int, x: Float[Array, "B D"], positions: Int[Array, " B"]
    ) -> tuple[Float[Array, "B H K"], Float[Array, "B H"]]:
        """What the i-th target layer scores with: rotated queries and float32 head weights.

        Queries are float32, bfloat16 or e4m3 by `cfg.query_mode`; weights include 1/sqrt(K H) and,
        for e4m3, the query's scale. `positions` are absolute token positions, from 0.
        """
        cfg, layer = self.cfg, self.retrievers[i]
        dtype = jnp.float32 if cfg.query_mode == "float32" else layer.wq_a.dtype

        def project(weight: nnx.Param, x: Array) -> Array:
            return matmul(x.astype(dtype), weight[...].astype(dtype), jnp.float32)

        latent = rms_normalise(project(layer.wq_a, x), cfg.norm_eps, layer.q_norm_weight[...])
        q = project(layer.wq_b, latent).reshape(-1, cfg.n_heads, cfg.head_dim)
        if cfg.query_mode == "bfloat16":  # a pair of casts, which compilers may drop, would not do
            q = jax.lax.reduce_precision(q, exponent_bits=8, mantissa_bits=7)
        q = quant.hadamard(rope.rotate(q, positions, np.asarray(self.freqs, np.float32)))
        w = project(layer.weights_proj, x) * (cfg.head_dim**-0.5 * cfg.n_heads**-0.5)
        if cfg.query_mode != "fp8":
            return q.astype(cfg.query_mode), w
        codes = codec.encode_keys("fp8", q)
        assert isinstance(codes, codec.Fp8Keys)
        return codes.values, w * codes.scale

    def layer_logits(
        self,
        i: int,
        x: Float[Array, "B D"],
        positions: Int[Array, " B"],
        keys: codec.Planes,
        *,
        backend: str | None = None,
    ) -> Float[Array, "B N"]:
        """Logits of the i-th target layer for its own N index keys (planes [B, N, ...]), float32.

        Any N; entries that do not exist yet are scored like others and are the caller's to drop.
        """
        q, w = self.queries(i, x, positions)
        return score_keys(q, w, keys, backend=backend)

    def __call__(
        self,
        hidden: Float[Array, "L B D"],
        positions: Int[Array, " B"],
        keys: Sequence[codec.Planes],
        *,
        backend: str | None = None,
    ) -> Float[Array, "L B N"]:
        """Logits of all target layers: `hidden[l]` and `keys[l]` are those of target layer l.
        `backend` is the model's."""
        count = len(self.cfg.target_layers)
        if hidden.shape[0] != count or len(keys) != count:
            got = f"got {hidden.shape[0]} and {len(keys)}"
            raise ValueError(f"hidden and keys must be those of {count} target layers, {got}")
        return jnp.stack(
            [
                self.layer_logits(i, hidden[i], positions, keys[i], backend=backend)
                for i in range(count)
            ]
        )

    def recent(
        self,
        hidden: Float[Array, "L B W D"],
        positions: Int[Array, " B"],
        keys: Sequence[codec.Planes],
        entries: Int[Array, " B"],
        *,
        backend: str | None = None,
    ) -> Float[Array, "L B N"]:
        """What the last W tokens say together, of those that there are; `positions` are the last
        one's, `entries` of the N keys exist.

        Their highest logit, or, with the score "softmax", the logarithm of the mean of their shares
        (-inf where no entry exists); dilated, so that columns behind the entries may say something
        too.
        """
        width, dilation, falloff = hidden.shape[2], self.cfg.dilation, self.cfg.falloff
        if width == 1 and self.cfg.score == "sigmoid":
            logits = self(hidden[:, :, 0], positions, keys, backend=backend)
            return dilated(logits, entries, dilation, falloff)
        at = positions[:, None] - jnp.arange(width)[::-1]
        backend = dispatch.of_model(index_score.IMPLEMENTATIONS, backend)
        logits = []
        for i, x in enumerate(hidden):
            q, w = self.queries(i, x.reshape(-1, x.shape[-1]), jnp.maximum(at, 0).reshape(-1))
            q, w = (y.reshape(*at.shape, *y.shape[1:]) for y in (q, w))
            values, scale = planes.keys(keys[i])
            scores = index_score.index_score(q, w, values, scale, backend=backend)
            if self.cfg.score == "softmax":
                logits.append(log_shares(scores, at >= 0, entries))
            else:
                logits.append(jnp.max(jnp.where(at[..., None] >= 0, scores, -jnp.inf), axis=1))
        return dilated(jnp.stack(logits), entries, dilation, falloff)

    def ensemble(self, logits: Float[Array, "L B N"]) -> Float[Array, "B N"]:
        """Score of each entry, from what `recent` says: max or mean of the layers' probabilities,
        or, learned, the sigmoid of sum_l softmax(weight)[l] * logits[l]. So are shares joined."""
        shares = self.cfg.score == "softmax"
        if self.ensemble_weight is not None:
            weight = jax.nn.softmax(self.ensemble_weight[...].astype(jnp.float32))[:, None, None]
            if shares:
                return jnp.sum(weight * jnp.exp(logits), axis=0)
            return jax.nn.sigmoid(jnp.sum(weight * logits, axis=0))
        score = jnp.exp(logits) if shares else jax.nn.sigmoid(logits)
        reduce = jnp.max if self.cfg.ensemble == "max" else jnp.mean
        return reduce(score, axis=0)


def dilated(
    logits: Float[Array, "L B N"], entries: Int[Array, " B"], dilation: int, falloff: float
) -> Float[Array, "L B N"]:
    """The highest of each entry's logit and those of its neighbours up to `dilation` entries away,
    less `falloff` times the square of their distance: of shares, a Gaussian.

    Only the first `entries` say something. A NaN makes its neighbours NaN.
    """
    if not dilation:
        return logits
    count = logits.shape[2]
    out = logits = jnp.where(jnp.arange(count) < entries[:, None], logits, -jnp.inf)
    ends = ((0, 0), (0, 0), (dilation, dilation))
    wide = jnp.pad(logits, ends, constant_values=-jnp.inf)
    for distance in range(1, dilation + 1):
        for at in (dilation - distance, dilation + distance):
            out = jnp.maximum(out, wide[..., at : at + count] - falloff * distance**2)
    return out


def log_shares(
    logits: Float[Array, "B W N"], counts: Bool[Array, "B W"], entries: Int[Array, " B"]
) -> Float[Array, "B N"]:
    """Logarithm of the mean over the tokens that count of their softmax over a row's entries; -inf
    where no entry exists. A NaN makes all of its row NaN."""
    exists = (jnp.arange(logits.shape[2]) < entries[:, None])[:, None]
    logits = jnp.where(exists, logits, -jnp.inf)
    total = jax.nn.logsumexp(logits, axis=2, keepdims=True)
    return log_mean(jnp.where(exists, logits - total, -jnp.inf), counts)


def log_mean(share: Float[Array, "B W N"], counts: Bool[Array, "B W"]) -> Float[Array, "B N"]:
    """Logarithm of the mean over the tokens that count of what these are the logarithms of."""
    share = jnp.where(counts[..., None], share, -jnp.inf)
    tokens = jnp.sum(counts, axis=1, keepdims=True).astype(jnp.float32)
    return jax.nn.logsumexp(share, axis=1) - jnp.log(tokens)
