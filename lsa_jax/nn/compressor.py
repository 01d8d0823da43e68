"""Token-to-entry compression: CSA (overlapping windows) and HCA, prefill and decode in one code.

An entry is a per-channel softmax average over its tokens (spec 4). Softmax statistics are
associative, so a chunk of any length is reduced window by window and the first window is merged
with the statistics that earlier chunks left in the tail: one-shot, chunked and token-by-token
prefill are the same computation, that of `pallas_kernels.compress`.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from lsa_jax.cache.state import Tail
from lsa_jax.config import ComputeConfig, KVFormat, ModelConfig
from lsa_jax.nn.layers import Leaves, Linear, RMSNorm, take_rows
from pallas_kernels import compress, dispatch
from pallas_kernels.rows import Fp8Rows


class NewEntries(NamedTuple):
    """Entries that a chunk completed: row b owns the first count[b], at indices first[b] + i."""

    values: Float[Array, "B E dim"]  # normed, roped, float32
    first: Int[Array, " B"]
    count: Int[Array, " B"]


class Compressor(nnx.Module):
    """Turns normed sublayer inputs into compressed entries (or index keys) of width `dim`."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig, freqs: np.ndarray):
        self.ratio = leaves.spec("ape").shape[0]
        self.dim = leaves.spec("norm.weight").shape[0]
        self.overlap = leaves.spec("ape").shape[1] == 2 * self.dim
        self.freqs = tuple(map(float, freqs))
        self.group, self.backend = cfg.kv_quant_group, compute.kernel_backend
        self.ape = leaves.param("ape")
        self.wkv = Linear(leaves.sub("wkv"), compute)
        self.wgate = Linear(leaves.sub("wgate"), compute)
        self.norm = RMSNorm(leaves.sub("norm"), cfg.rms_norm_eps)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        tail: Tail,
    ) -> tuple[NewEntries, Tail]:
        """Row b's tokens are x[b, :count[b]], from position start[b]; returns what they finish."""
        new, left = self.stored(x, start, count, tail, "float32")
        assert not isinstance(new.rows, Fp8Rows)
        return NewEntries(new.rows, new.first, new.count), left

    def stored(
        self,
        x: Float[Array, "B T D"],
        start: Int[Array, " B"],
        count: Int[Array, " B"],
        tail: Tail,
        layout: KVFormat,
    ) -> tuple[compress.Entries, Tail]:
        """The same entries as the state's planes hold them."""
        slot = (start[:, None] + jnp.arange(x.shape[1])) % self.ratio
        gate = self.wgate(x, jnp.float32) + take_rows(self.ape[...], slot)
        new, left = compress.compress(
            self.wkv(x, jnp.float32),
            gate,
            start,
            count,
            compress.Tail(tail.current, tail.previous),
            self.norm.weight[...],
            jnp.asarray(self.freqs, jnp.float32),
            ratio=self.ratio,
            eps=self.norm.eps,
            layout=layout,
            group=self.group,
            backend=dispatch.of_model(compress.IMPLEMENTATIONS, self.backend),
        )
        return new, Tail(left.current, left.previous)
