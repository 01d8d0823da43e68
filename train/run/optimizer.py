"""AdamW with warmup and a cosine to zero, and updates left out where gradients are not finite."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.config_checks import number, refusal

Params = dict[str, Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as the authors run it: decay of all parameters, norms included; no warmup.

    Gradients are scaled down to a global norm of at most `clip`. A batch is computed in
    `accumulate` parts, which need less memory and give the same update.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float = 1.0
    warmup_steps: int = 0
    accumulate: int = 1

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip"):
            if number(f"optimizer.{name}", getattr(self, name), float) <= 0:
                raise refusal(f"optimizer.{name}", getattr(self, name), "> 0")
        if number("optimizer.weight_decay", self.weight_decay, float) < 0:
            raise refusal("optimizer.weight_decay", self.weight_decay, ">= 0")
        for name in ("beta1", "beta2"):
            if not 0 <= number(f"optimizer.{name}", getattr(self, name), float) < 1:
                raise refusal(f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        for name, least in (("warmup_steps", 0), ("accumulate", 1)):
            if number(f"optimizer.{name}", getattr(self, name), int) < least:
                raise refusal(f"optimizer.{name}", getattr(self, name), f">= {least}")


class TrainState(NamedTuple):
    """All that a step changes. Counters are int32.

    `updates` is the position in the schedule: it counts the steps that changed the parameters, and
    stands still where one is left out.
    """

    params: Params
    moments: optax.OptState
    updates: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_a_row: Int[Array, ""]


class Applied(NamedTuple):
    """What an update did: the gradient's norm before clipping, the rate, whether it was taken."""

    norm: Float[Array, ""]
    rate: Float[Array, ""]
    taken: Bool[Array, ""]


def check_warmup(cfg: OptimizerConfig, total: int) -> None:
    """ConfigError where a run of so many steps would end in its warmup."""
    if cfg.warmup_steps >= total:
        raise refusal("optimizer.warmup_steps", cfg.warmup_steps, f"below the run's {total} steps")


def schedule(cfg: OptimizerConfig, total: int) -> optax.Schedule:
    """Update number, from 0, -> learning rate: linear over the warmup, then a cosine to 0.

    Without warmup the rate of update k is rate (1 + cos(pi k / total)) / 2. The warmup's first rate
    is not 0, which would be a step for nothing.
    """
    check_warmup(cfg, total)
    warmup = cfg.warmup_steps
    cosine = optax.cosine_decay_schedule(cfg.learning_rate, total - warmup)
    if not warmup:
        return cosine
    line = optax.linear_schedule(cfg.learning_rate / (warmup + 1), cfg.learning_rate, warmup)
    return optax.join_schedules([line, cosine], [warmup])


def _transform(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """The update for a learning rate of -1: clipping, Adam, decay."""
    return optax.chain(
        optax.clip_by_global_norm(cfg.clip),
        optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.eps),
        optax.add_decayed_weights(cfg.weight_decay),
    )


def init_state(cfg: OptimizerConfig, params: Params) -> TrainState:
    """The state before the first step; moments are zeros of the parameters' dtype."""
    zero = jnp.zeros((), jnp.int32)
    return TrainState(params, _transform(cfg).init(params), zero, zero, zero)


def apply(
    cfg: OptimizerConfig,
    rates: optax.Schedule,
    state: TrainState,
    gradients: Params,
    loss: Float[Array, ""],
) -> tuple[TrainState, Applied]:
    """One AdamW update; the same parameters, moments and position where anything is not finite."""
    norm = optax.tree.norm(gradients)
    taken = jnp.isfinite(norm) & jnp.isfinite(loss)
    rate = rates(state.updates)
    steps, moments = _transform(cfg).update(gradients, state.moments, state.params)
    params = jax.tree.map(lambda p, step: p - rate * step, state.params, steps)

    def kept(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(taken, a, b), new, old)

    after = TrainState(
        params=kept(params, state.params),
        moments=kept(moments, state.moments),
        updates=state.updates + taken,
        skipped=state.skipped + ~taken,
        skipped_in_a_row=jnp.where(taken, 0, state.skipped_in_a_row + 1),
    )
    return after, Applied(norm, jnp.asarray(rate, jnp.float32), taken)
