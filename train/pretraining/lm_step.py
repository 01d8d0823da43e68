"""One step of pre-training a backbone: losses, gradients, the update, and the routers' biases.

The loss of a step is the mean cross entropy of answer tokens, plus `rest` times that of all other
tokens, plus `mtp` times the same of the MTP module's predictions, plus a small balance loss, plus
the lightning indexers' divergence where they are taught. Master parameters, optimizer and losses
are float32; matrices are cast to the compute dtype at the start of the step.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lsa_jax.config import ComputeConfig, ConfigError, ModelConfig
from lsa_jax.config_checks import number, refusal
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.parameters import parameter_table
from train.pretraining import sequence
from train.pretraining.index_teacher import IndexLoss, Lesson

Params = dict[str, Array]

REST, ANSWER, FIRST = 0, 1, 2
"""Kinds of targets: any token, a token of an answer, an answer's first token. The first cannot be
copied from the token before it, so its accuracy is what retrieval is judged by."""


class LmBatch(NamedTuple):
    """Token ids and what each but the first is as a target; negative kinds do not count."""

    ids: Any  # int32 [B, S]
    kinds: Any  # int32 [B, S]


class LmState(NamedTuple):
    """Everything that a step changes. `fixed` are leaves that gradients do not train."""

    params: Params
    fixed: Params
    opt_state: optax.OptState
    step: Int[Array, ""]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the losses beside the answers', and the speed of the routers' biases."""

    rest: float = 0.1
    mtp: float = 0.3
    balance: float = 1e-4
    index: float = 1.0
    bias_rate: float = 1e-3

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if number(f"loss.{field.name}", value, float) < 0:
                raise refusal(f"loss.{field.name}", value, ">= 0")


def is_fixed(path: str) -> bool:
    """Whether a leaf is set by rule: the routers' biases by load, hash tables not at all."""
    return path.endswith((".gate.bias", ".tid2eid"))


def compute_leaves(cfg: ModelConfig, params: Mapping[str, Array], dtype: str) -> Params:
    """The leaves as a step computes with them: big matrices in `dtype`, the rest in float32."""
    table = parameter_table(cfg)

    def cast(path: str, leaf: Array) -> Array:
        wide = table[path].kind not in ("linear", "expert", "matrix") or ".gate." in path
        return leaf if wide else leaf.astype(dtype)

    return {path: cast(path, leaf) for path, leaf in params.items()}


def _cross_entropy(
    logits: Float[Array, "B T V"], ids: Int[Array, "B T"], kinds: Int[Array, "B T"]
) -> tuple[Array, Array, dict[str, Array]]:
    """Mean cross entropy of answers and of the rest; accuracies, and those of each row's FIRST
    targets as counts [B]."""
    hit = jnp.arange(logits.shape[-1]) == ids[..., None]  # a gather's gradient would be a scatter
    losses = jax.nn.logsumexp(logits, axis=-1) - jnp.sum(jnp.where(hit, logits, 0), axis=-1)
    right = jnp.argmax(logits, axis=-1) == ids

    def mean(x: Array, where: Array) -> Array:
        return jnp.sum(jnp.where(where, x, 0)) / jnp.maximum(jnp.sum(where), 1)

    answer, rest = mean(losses, kinds >= ANSWER), mean(losses, kinds == REST)
    shown = {"answer": answer, "rest": rest}
    shown["accuracy"] = mean(right, kinds >= ANSWER)
    shown["first_accuracy"] = mean(right, kinds == FIRST)
    shown["first_right"] = jnp.sum(right & (kinds == FIRST), axis=-1)
    shown["first_count"] = jnp.sum(kinds == FIRST, axis=-1)
    return answer, rest, shown


def _mtp_loss(
    model: DeepSeekV4, streams: Array, batch: LmBatch, cfg: LossConfig
) -> tuple[Array, Array]:
    """The first MTP module's loss on the tokens two ahead, and the load of its experts."""
    out, seen = sequence.mtp_streams(model, streams[:, :-1], batch.ids[:, 1:-1])
    module = model.mtp[0]
    logits = model.head(module.norm(module.hc_head(out)), jnp.float32)
    answer, rest, _ = _cross_entropy(logits, batch.ids[:, 2:], batch.kinds[:, 2:])
    return answer + cfg.rest * rest, seen.load


def _index_terms(losses: list[IndexLoss]) -> dict[str, Array]:
    """Divergence summed over layers, for the loss; and what the indexers capture, over all."""
    per_layer = [part.divergence / jnp.maximum(part.mass, 1e-9) for part in losses]
    captured = sum(part.captured for part in losses)
    mass = sum(part.mass for part in losses)
    return {
        "index": jnp.stack(per_layer).sum(),
        "captured": jnp.asarray(captured) / jnp.maximum(jnp.asarray(mass), 1e-9),
    }


def loss_and_loads(
    cfg: ModelConfig,
    compute: ComputeConfig,
    loss_cfg: LossConfig,
    params: Params,
    fixed: Params,
    batch: LmBatch,
    lesson: Lesson | None,
) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
    """The loss, what to log, and the experts' loads by the path of their router's bias."""
    leaves = compute_leaves(cfg, {**params, **fixed}, compute.dtype)
    model = DeepSeekV4(cfg, compute, leaves)
    streams, seen = sequence.forward(cfg, compute, leaves, batch.ids[:, :-1], lesson=lesson)
    targets = (batch.ids[:, 1:], batch.kinds[:, 1:])
    answer, rest, shown = _cross_entropy(model.logits(streams), *targets)
    balance = jnp.mean(jnp.stack([layer.balance for layer in seen]))
    loss = answer + loss_cfg.rest * rest + loss_cfg.balance * balance
    loads = {f"layers.{i}.ffn.gate.bias": layer.load for i, layer in enumerate(seen)}
    if loss_cfg.mtp and cfg.num_nextn_predict_layers:
        shown["mtp"], loads["mtp.0.ffn.gate.bias"] = _mtp_loss(model, streams, batch, loss_cfg)
        loss += loss_cfg.mtp * shown["mtp"]
    taught = [layer.index for layer in seen if layer.index is not None]
    if taught:
        terms = _index_terms(taught)
        loss, shown = loss + loss_cfg.index * terms["index"], shown | terms
    return loss, (shown | {"loss": loss, "balance": balance}, loads)


def balanced(bias: Float[Array, " E"], load: Float[Array, " E"], rate: float) -> Array:
    """A router's bias after a step: up by `rate` where an expert got less than its share, down
    where it got more (6.1: no gradient reaches it)."""
    return bias + rate * jnp.sign(1 / len(load) - load)


def step(
    cfg: ModelConfig,
    compute: ComputeConfig,
    loss_cfg: LossConfig,
    optimizer: optax.GradientTransformation,
    state: LmState,
    batch: LmBatch,
    rate: Float[Array, ""] | float,
    lesson: Lesson | None = None,
) -> tuple[LmState, dict[str, Array]]:
    """One update, `rate` times the optimizer's, which is for a learning rate of 1: so one program
    serves every schedule. Where a gradient is not finite only the count changes.

    Raises ConfigError where a kernel without a gradient was asked for.
    """
    if compute.backend != "xla":
        raise ConfigError(f"backend must be xla to train, got {compute.backend}")

    def loss(params: Params) -> tuple[Array, tuple[dict[str, Array], dict[str, Array]]]:
        return loss_and_loads(cfg, compute, loss_cfg, params, state.fixed, batch, lesson)

    grads, (shown, loads) = jax.grad(loss, has_aux=True)(state.params)
    norm = optax.tree.norm(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    updates = jax.tree.map(lambda x: rate * x, updates)
    fixed = {
        path: balanced(leaf, loads[path], loss_cfg.bias_rate) if path in loads else leaf
        for path, leaf in state.fixed.items()
    }
    params = cast(Params, optax.apply_updates(state.params, updates))
    new = LmState(params, fixed, opt_state, state.step + 1)
    old = state._replace(step=state.step + 1)
    finite = jnp.isfinite(norm)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)
    return kept, shown | {"grad_norm": norm, "skipped": ~finite}
