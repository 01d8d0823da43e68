"""Mixture of experts: hash- and score-routed, one shared expert, clamped SwiGLU (spec 6).

Several ways to run the routed experts give the same sums. Few tokens gather the rows of the experts
they use and multiply in place, so a decode step reads active weights only. Many tokens are sorted
by expert and run as batched matmuls of fixed capacity, in as many rounds as the fullest expert
needs; or, where there is a kernel for it, as one grouped matmul. Training, which needs gradients
and has small experts, runs all of them on every token. No token is ever dropped and no shape
depends on the routing.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lsa_jax import quant
from lsa_jax.config import ComputeConfig, MlpType, ModelConfig
from lsa_jax.nn.layers import Leaves, Linear, matmul, precision
from pallas_kernels import dispatch, quant_matmul
from pallas_kernels.grouped_matmul import grouped_matmul

MANY_ROWS = 16  # rows an expert gets on average from which sorting them for a kernel pays
CAPACITY_FACTOR = 1.25  # room per expert and round, over a perfectly even load
GATHER_BYTES = 1 << 30  # gathered rows held at once, where a compiler does write them after all
DEQUANTISE_BYTES = 1 << 30  # dequantised experts held at once while many tokens run


class Routing(NamedTuple):
    """Chosen experts of each token and their weights (float32)."""

    experts: Int[Array, "T k"]
    weights: Float[Array, "T k"]


def swiglu(gate: Array, up: Array, limit: float) -> Array:
    """silu(min(gate, L)) * clip(up, -L, L) in float32: clamped before the activation (6.2)."""
    gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


class Router(nnx.Module):
    """Token -> experts and weights; hash layers look the experts up by token id (6.1)."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, mlp_type: MlpType):
        self.cfg = cfg
        self.weight = leaves.param("weight")
        hashed = mlp_type == "hash"
        self.tid2eid = leaves.param("tid2eid") if hashed else None
        self.bias = None if hashed else leaves.param("bias")

    def logits(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """Raw affinities in float32."""
        weight = self.weight[...]
        if weight.dtype != x.dtype:  # bf16 x bf16 is exact in float32; anything else is widened
            x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
        return matmul(x, weight, jnp.float32)

    def affinity(self, x: Float[Array, "T D"]) -> Float[Array, "T E"]:
        """sqrt(softplus(logits)), which both choice and weights are made of."""
        return jnp.sqrt(jax.nn.softplus(self.logits(x)))

    def choose(self, affinity: Float[Array, "T E"], ids: Int[Array, " T"]) -> Int[Array, "T k"]:
        """The experts of each token."""
        if self.tid2eid is not None:
            return self.tid2eid[...][ids]
        assert self.bias is not None
        return jax.lax.top_k(affinity + self.bias[...], self.cfg.num_experts_per_tok)[1]

    def __call__(self, x: Float[Array, "T D"], ids: Int[Array, " T"]) -> Routing:
        """The experts of each token, and their weights."""
        affinity = self.affinity(x)
        experts = self.choose(affinity, ids)
        picked = jnp.take_along_axis(affinity, experts, axis=-1)
        weights = picked / jnp.sum(picked, axis=-1, keepdims=True)
        return Routing(experts, weights * self.cfg.routed_scaling_factor)


class ExpertWeights(nnx.Module):
    """One stacked expert matrix [E, out, in], dense or quantised."""

    def __init__(self, leaves: Leaves, backend: str | None):
        self.shape, self.backend = leaves.spec("weight").shape, backend
        self.weight, self.scale = leaves.param("weight"), leaves.scale()

    def leaves(self) -> tuple[Array, Array | None]:
        """Stored weight and scale grid."""
        return self.weight[...], None if self.scale is None else self.scale[...]

    def rows(self, x: Float[Array, "S in"], experts: Int[Array, " S"]) -> Float[Array, "S out"]:
        """x[s] . W[experts[s]]^T in float32 as one multiply-and-reduce over gathered rows, so that
        a compiler reads each stored row once and never writes a gathered or dequantised copy."""
        weight, scale = self.leaves()
        if scale is not None and self.shape[-1] % quant.FP4_GROUP == 0:
            backend = dispatch.of_model(quant_matmul.EXPERT_IMPLEMENTATIONS, self.backend)
            return quant_matmul.expert_matmul(x, experts, weight, scale, backend=backend)
        # Dense, or, in the smallest models only, with a last group of scales that is not full.
        picked = None if scale is None else scale[experts]
        dense = quant.dequantise(weight[experts], picked, self.shape[-1], jnp.float32)
        return jnp.sum(dense * x.astype(jnp.float32)[:, None], axis=-1)


class Mlp(nnx.Module):
    """The shared expert: one SwiGLU MLP with the same clamp."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig):
        self.limit = cfg.swiglu_limit
        self.w1 = Linear(leaves.sub("w1"), compute)
        self.w2 = Linear(leaves.sub("w2"), compute)
        self.w3 = Linear(leaves.sub("w3"), compute)

    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        """In float32, whatever x is: the caller adds it to the routed experts."""
        hidden = swiglu(self.w1(x, jnp.float32), self.w3(x, jnp.float32), self.limit)
        return self.w2(hidden.astype(x.dtype), jnp.float32)


class Experts(nnx.Module):
    """The routed experts."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig):
        self.cfg, self.simulate = cfg, compute.simulate_activations
        self.backend = compute.kernel_backend
        self.w1 = ExpertWeights(leaves.sub("w1"), self.backend)
        self.w2 = ExpertWeights(leaves.sub("w2"), self.backend)
        self.w3 = ExpertWeights(leaves.sub("w3"), self.backend)

    def _round(self, x: Array) -> Array:
        return quant.fp8_round(x, group=128) if self.simulate else x

    def everywhere(
        self, x: Float[Array, "T D"], weight: Float[Array, "T E"]
    ) -> Float[Array, "T D"]:
        """All experts on all tokens, with weight 0 where they were not chosen: differentiable, and
        E / k times the work. Dense experts only."""
        exact = {"precision": precision(x.dtype), "preferred_element_type": jnp.float32}
        rounded = self._round(x)
        w1, w2, w3 = (w.weight[...].astype(x.dtype) for w in (self.w1, self.w2, self.w3))
        gate = jnp.einsum("td,eid->tei", rounded, w1, **exact)
        up = jnp.einsum("td,eid->tei", rounded, w3, **exact)
        hidden = swiglu(gate, up, self.cfg.swiglu_limit) * weight[..., None]
        return jnp.einsum("tei,edi->td", self._round(hidden.astype(x.dtype)), w2, **exact)

    def __call__(self, x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        """sum_e weight_e * f_e(x), float32. The weight multiplies the hidden activation, as in the
        released code; only quantisation of W2's input can tell (6.2)."""
        tokens, k = routing.experts.shape
        sharded = jax.sharding.get_abstract_mesh().shape.get("expert", 1) > 1
        if tokens * k <= self.cfg.n_routed_experts and not sharded:
            return self.gathered(x, routing)
        if tokens * k < MANY_ROWS * self.cfg.n_routed_experts:
            return self.rounds(x, routing)
        paths = {dispatch.XLA: self.rounds}
        if all(w.scale is None for w in (self.w1, self.w2, self.w3)):  # else there is no kernel
            paths[dispatch.MOSAIC_GPU] = self.grouped
        backend = dispatch.of_model(paths, self.backend)
        return dispatch.run("grouped_matmul", paths, backend, x, routing)

    def gathered(self, x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        """Each (token, expert) pair reads its expert's rows, GATHER_BYTES of them at a time."""
        tokens, k = routing.experts.shape
        _, n_out, n_in = self.w1.shape
        size = min(tokens * k, max(1, GATHER_BYTES // (4 * n_out * n_in)))
        blocks = -(-tokens * k // size)
        pairs = (
            jnp.repeat(self._round(x), k, axis=0),
            routing.experts.reshape(-1),
            routing.weights.reshape(-1, 1),
        )
        if blocks == 1:
            out = self._pairs(pairs)
        else:
            spare = blocks * size - tokens * k
            padded = [jnp.pad(a, [(0, spare)] + [(0, 0)] * (a.ndim - 1)) for a in pairs]
            split = tuple(a.reshape(blocks, size, *a.shape[1:]) for a in padded)
            out = jax.lax.map(self._pairs, split).reshape(blocks * size, -1)[: tokens * k]
        return jnp.sum(out.reshape(tokens, k, -1), axis=1)

    def _pairs(self, pairs: tuple[Array, Array, Array]) -> Float[Array, "S D"]:
        rows, experts, weights = pairs
        gate, up = self.w1.rows(rows, experts), self.w3.rows(rows, experts)
        hidden = swiglu(gate, up, self.cfg.swiglu_limit) * weights
        return self.w2.rows(self._round(hidden.astype(rows.dtype)), experts)

    def grouped(self, x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        """Pairs sorted by expert, as three grouped matmuls on the kernel's own terms. Dense experts
        only."""
        tokens, k = routing.experts.shape
        flat = routing.experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        sizes = jnp.bincount(flat, length=self.cfg.n_routed_experts).astype(jnp.int32)
        rows = self._round(x)[order // k]
        run = functools.partial(grouped_matmul, group_sizes=sizes, backend=dispatch.MOSAIC_GPU)
        gate, up = run(rows, self.w1.weight[...]), run(rows, self.w3.weight[...])
        hidden = swiglu(gate, up, self.cfg.swiglu_limit) * routing.weights.reshape(-1, 1)[order]
        y = run(self._round(hidden.astype(x.dtype)), self.w2.weight[...])
        place = jnp.zeros_like(order).at[order].set(jnp.arange(tokens * k))
        return jnp.sum(y[place].reshape(tokens, k, -1).astype(jnp.float32), axis=1)

    def rounds(self, x: Float[Array, "T D"], routing: Routing) -> Float[Array, "T D"]:
        """Pairs sorted by expert; every round gives each expert up to `capacity` of its pairs."""
        tokens, k = routing.experts.shape
        n_experts, pairs = self.cfg.n_routed_experts, tokens * k
        even = int(CAPACITY_FACTOR * pairs / n_experts) + 1
        capacity = min(tokens, -(-even // 64) * 64)
        flat = routing.experts.reshape(-1)
        order = jnp.argsort(flat, stable=True)
        first = jnp.searchsorted(flat[order], jnp.arange(n_experts + 1), side="left")
        rank = jnp.zeros_like(flat).at[order].set(jnp.arange(pairs) - first[flat[order]])
        rounded = self._round(x)

        def one_round(i: Array | int, out: Array) -> Array:
            slot = first[:-1, None] + i * capacity + jnp.arange(capacity)
            taken = slot < first[1:, None]
            pair = jnp.where(taken, order[jnp.minimum(slot, pairs - 1)], 0)
            weight = jnp.where(taken, routing.weights.reshape(-1)[pair], 0.0)
            y = self._batched(rounded[pair // k], weight)
            mine = (rank >= i * capacity) & (rank < (i + 1) * capacity)
            back = y[flat, jnp.where(mine, rank - i * capacity, 0)].reshape(tokens, k, -1)
            return out + jnp.sum(jnp.where(mine.reshape(tokens, k, 1), back, 0), axis=1)

        out = jnp.zeros((tokens, self.cfg.hidden_size), jnp.float32)
        if capacity == tokens:  # an expert sees a token at most once: one round is enough
            return one_round(0, out)
        rounds = -(-jnp.max(first[1:] - first[:-1]) // capacity)
        return jax.lax.fori_loop(0, rounds, one_round, out)

    def _batched(
        self, x: Float[Array, "E C D"], weight: Float[Array, "E C"]
    ) -> Float[Array, "E C D"]:
        """All experts on their own C rows; quantised experts are dequantised a few at a time."""
        args = (x, weight, self.w1.leaves(), self.w2.leaves(), self.w3.leaves())
        n_experts, n_out, n_in = self.w1.shape
        groups = 1
        if self.w1.scale is not None:
            budget = max(1, DEQUANTISE_BYTES // (3 * n_out * n_in * x.dtype.itemsize))
            divisors = (g for g in range(1, n_experts + 1) if n_experts % g == 0)
            groups = next(g for g in divisors if n_experts // g <= budget)
        if groups == 1:
            return self._batch(args)
        split = jax.tree.map(lambda a: a.reshape(groups, -1, *a.shape[1:]), args)
        return jax.lax.map(self._batch, split).reshape(n_experts, *x.shape[1:])

    def _batch(self, args: tuple) -> Float[Array, "E C D"]:
        x, weight, w1, w2, w3 = args
        exact = {"precision": precision(x.dtype), "preferred_element_type": jnp.float32}

        def run(rows: Array, leaves: tuple[Array, Array | None]) -> Array:
            dense = quant.dequantise(*leaves, rows.shape[-1], x.dtype)
            return jnp.einsum("eci,eoi->eco", rows, dense, **exact)

        gate, up = run(x, w1), run(x, w3)
        hidden = swiglu(gate, up, self.cfg.swiglu_limit) * weight[..., None]
        return run(self._round(hidden.astype(x.dtype)), w2).astype(x.dtype)


class Moe(nnx.Module):
    """Router, routed experts and the shared expert; float32 accumulation with one cast."""

    def __init__(self, leaves: Leaves, cfg: ModelConfig, compute: ComputeConfig, mlp_type: MlpType):
        self.gate = Router(leaves.sub("gate"), cfg, mlp_type)
        self.experts = Experts(leaves.sub("experts"), cfg, compute)
        self.shared_experts = Mlp(leaves.sub("shared_experts"), cfg, compute)

    def __call__(self, x: Float[Array, "B T D"], ids: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The sum of the chosen experts and the shared one; `ids` are for hash routing."""
        flat = x.reshape(-1, x.shape[-1])
        routed = self.experts(flat, self.gate(flat, ids.reshape(-1)))
        return (routed + self.shared_experts(flat)).astype(x.dtype).reshape(x.shape)
