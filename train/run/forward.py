"""The memory indexer's logits of drawn candidates, to be differentiated at little memory.

The same mathematics as `lsa_jax.lsa.memory_indexer`, which serves, on candidates that each sample
has for itself. Matrix products take operands in the dtype of training and sum in float32, in the
backward pass too; norm, rotation and the head sum are float32.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, DTypeLike, Float, Int

from lsa_jax import quant
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_name
from lsa_jax.lsa.memory_indexer import log_mean, rope_frequencies
from lsa_jax.nn import rope
from lsa_jax.nn.layers import precision, rms_normalise
from train.data.batch import Drawn
from train.run import losses


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(spec: str, a: Array, b: Array) -> Array:
    """An einsum of two operands of one dtype with float32 sums and a float32 result.

    Its gradient rounds what arrives to the operands' dtype, which is what makes the backward
    products as cheap as the forward one.
    """
    return jnp.einsum(spec, a, b, precision=precision(a.dtype), preferred_element_type=jnp.float32)


def _contract_forward(spec: str, a: Array, b: Array) -> tuple[Array, tuple[Array, Array]]:
    return contract(spec, a, b), (a, b)


def _contract_backward(
    spec: str, kept: tuple[Array, Array], gradient: Array
) -> tuple[Array, Array]:
    a, b = kept
    inputs, out = spec.split("->")
    left, right = inputs.split(",")
    gradient = gradient.astype(a.dtype)
    of_a = contract(f"{out},{right}->{left}", gradient, b)
    of_b = contract(f"{out},{left}->{right}", gradient, a)
    return of_a.astype(a.dtype), of_b.astype(b.dtype)


contract.defvjp(_contract_forward, _contract_backward)


def compute_leaves(params: Mapping[str, Array], dtype: DTypeLike) -> dict[str, Array]:
    """What a step computes with: matrices in `dtype`, vectors (norms, the ensemble) as they are."""
    return {name: x.astype(dtype) if x.ndim == 2 else x for name, x in params.items()}


def layer_logits(
    cfg: IndexerConfig,
    leaves: Mapping[str, Array],
    hidden: Float[Array, "B W D"],
    positions: Int[Array, "B W"],
    keys: Float[Array, "B C K"],
    key_scale: Float[Array, "B C"] | None,
) -> Float[Array, "B W C"]:
    """Logits of one target layer by token, float32, computed in the dtype of the matrices.

    `leaves` are by their names within the layer. Keys may be e4m3: their scale, if any, is positive
    and multiplies the sum over heads.
    """
    dtype = leaves["wq_a.weight"].dtype
    size, width, _ = hidden.shape
    x = hidden.reshape(size * width, -1).astype(dtype)
    latent = contract("bd,rd->br", x, leaves["wq_a.weight"])
    latent = rms_normalise(latent, cfg.norm_eps, leaves["q_norm_weight"])
    q = contract("br,or->bo", latent.astype(dtype), leaves["wq_b.weight"])
    q = q.reshape(-1, cfg.n_heads, cfg.head_dim)
    q = quant.hadamard(rope.rotate(q, positions.reshape(-1), rope_frequencies(cfg)))
    q = q.reshape(size, width * cfg.n_heads, cfg.head_dim)
    w = contract("bd,hd->bh", x, leaves["weights_proj.weight"])
    w = w * (cfg.head_dim**-0.5 * cfg.n_heads**-0.5)
    dots = contract("bhk,bck->bhc", q.astype(dtype), keys.astype(dtype))
    dots = dots.reshape(size, width, cfg.n_heads, -1)
    logits = jnp.sum(jax.nn.relu(dots) * w.reshape(size, width, -1, 1), axis=2)
    return logits if key_scale is None else logits * key_scale[:, None]


def indexer_logits(
    cfg: IndexerConfig,
    leaves: Mapping[str, Array],
    hidden: Float[Array, "L B W D"],
    drawn: Drawn,
    keys: Sequence[Float[Array, "B C K"]] | Float[Array, "L B C K"],
    key_scale: Sequence[Float[Array, "B C"]] | Float[Array, "L B C"] | None,
) -> Float[Array, "L B C"]:
    """Logits of all target layers by released leaf names: what a fire says, of the last W tokens.

    What a layer's backward pass needs of [B, W, H, C] is computed again, a layer at a time.
    """
    back = jnp.arange(hidden.shape[2])[::-1]
    positions = drawn.positions[:, None] - back
    amounts = losses.log_counts(drawn.targets)
    # A row's own token counts always: rows without a sample (token -1) are to be finite too.
    counts = (drawn.sample[:, 1, None] >= back) | (back == 0)

    @jax.checkpoint
    def score(layer: dict[str, Array], *inputs: Any) -> Array:
        logits = layer_logits(cfg, layer, *inputs)
        if len(back) == 1:  # a share's denominator is the loss's
            return logits[:, 0]
        return together(cfg, logits, counts, amounts)

    out = []
    for i, ordinal in enumerate(cfg.target_layers):
        prefix = leaf_name(ordinal, "")
        layer = {n.removeprefix(prefix): x for n, x in leaves.items() if n.startswith(prefix)}
        scale = None if key_scale is None else key_scale[i]
        out.append(score(layer, hidden[i], positions, keys[i], scale))
    return jnp.stack(out)


def together(
    cfg: IndexerConfig,
    logits: Float[Array, "B W C"],
    counts: Bool[Array, "B W"],
    amounts: Float[Array, "B C"],
) -> Float[Array, "B C"]:
    """What the tokens that count say together (`MemoryIndexer.recent`): the highest logit, or the
    logarithm of the mean of their shares.

    Drawn candidates are in the shares as many times as they stand for (`losses.log_counts`).
    """
    if cfg.score == "sigmoid":
        return jnp.max(jnp.where(counts[..., None], logits, -jnp.inf), axis=1)
    total = jax.nn.logsumexp(logits + amounts[:, None], axis=2, keepdims=True)
    return log_mean(logits - total, counts)


def log_length_scale(entries: Int[Array, " B"], reference: int) -> Float[Array, " B"]:
    """ln N / ln reference of each sample's entries; those with fewer than two count as two.

    Among more entries a logit has to stand out further. It does not change a sample's order, and
    so no recall at a size; thresholds are to be calibrated by length.
    """
    return jnp.log(jnp.maximum(entries, 2).astype(jnp.float32)) / np.log(reference)
