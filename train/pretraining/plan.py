"""What a backbone's pre-training is a function of: model, stages, losses, optimizer."""

import dataclasses
from collections.abc import Hashable, Mapping
from typing import Any, Literal

import optax
from jaxtyping import Array

from lsa_jax.config import ModelConfig
from lsa_jax.config_checks import number, refusal
from train.pretraining.lm_init import EntriesInit
from train.pretraining.lm_step import LossConfig

FREE_FIELDS = ("run.checkpoint_every", "run.keep", "run.log_every", "run.workers")
"""Fields without influence on what is trained: a run may go on with others."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of steps on sequences of one length.

    A CSA layer attends to the `top_k` entries that its lightning indexer picks; with 0 to all that
    are visible, as before the indexer can pick. `taught` queries of each sequence teach it. With a
    `window` its layers see that many raw entries instead of the model's: a wide one first, in which
    copying is learned as in any transformer. The learning rate goes linearly from `rate[0]` to
    `rate[1]` times the optimizer's. `rows` is for whoever makes the sequences.
    """

    tokens: int
    batch: int
    steps: int
    top_k: int = 0
    taught: int = 0
    window: int = 0
    rate: tuple[float, float] = (1.0, 1.0)
    rows: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        least = {"tokens": 2, "batch": 1, "steps": 1, "top_k": 0, "taught": 0, "window": 0}
        for name, bound in least.items():
            if number(f"stages.{name}", getattr(self, name), int) < bound:
                raise refusal(f"stages.{name}", getattr(self, name), f">= {bound}")
        if self.taught >= self.tokens:
            raise refusal("stages.taught", self.taught, f"below the stage's {self.tokens} tokens")
        if min(self.rate) < 0:
            raise refusal("stages.rate", self.rate, "two factors from 0 on")

    def model(self, cfg: ModelConfig) -> ModelConfig:
        """The model as this stage runs it."""
        window = self.window or cfg.sliding_window
        return dataclasses.replace(cfg, index_topk=self.top_k or self.tokens, sliding_window=window)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW, or Muon for hidden matrices and AdamW for the rest; the rate rises over a warmup.

    Decay is of matrices only. Gradients are scaled down to a global norm of at most `clip`.
    """

    name: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    warmup_steps: int = 100

    def __post_init__(self) -> None:
        for name in ("learning_rate", "eps", "clip"):
            if number(f"optimizer.{name}", getattr(self, name), float) <= 0:
                raise refusal(f"optimizer.{name}", getattr(self, name), "> 0")
        for name in ("beta1", "beta2"):
            if not 0 <= number(f"optimizer.{name}", getattr(self, name), float) < 1:
                raise refusal(f"optimizer.{name}", getattr(self, name), "in [0, 1)")
        for name in ("weight_decay", "warmup_steps"):
            if number(f"optimizer.{name}", getattr(self, name), float) < 0:
                raise refusal(f"optimizer.{name}", getattr(self, name), ">= 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How a run goes: `workers` processes make sequences ahead (0: the run itself does).

    `init_entries` says how compressors begin: "random"; "average", with the projection that makes
    the layer's raw entries, so that an entry begins as an average of those it stands for; or
    "slots", where besides each channel of an overlapping entry begins by preferring one token.
    `init_gain` is the first gain of all that is attended to. Queries and keys are normalised, so no
    score exceeds gain * sqrt(head_dim): with 1, too little to tell one of many entries from others.
    """

    seed: int = 0
    init_scale: float = 0.02
    init_embedding: float = 0.02
    init_gain: float = 1.0
    init_mixing: float = 1.0
    init_entries: EntriesInit = "random"
    compute_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 50
    workers: int = 4

    def __post_init__(self) -> None:
        least = {"seed": 0, "checkpoint_every": 1, "keep": 1, "log_every": 1, "workers": 0}
        for name, bound in least.items():
            if number(f"run.{name}", getattr(self, name), int) < bound:
                raise refusal(f"run.{name}", getattr(self, name), f">= {bound}")
        for name in ("init_scale", "init_embedding", "init_gain", "init_mixing"):
            if number(f"run.{name}", getattr(self, name), float) <= 0:
                raise refusal(f"run.{name}", getattr(self, name), "> 0")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A model, by preset name or file, and the stages that train it, one after another."""

    model: str
    stages: tuple[Stage, ...]
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        if not self.stages:
            raise refusal("stages", self.stages, "at least one stage")

    @property
    def total(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> tuple[int, Stage]:
        """The number of the stage that makes a step, counted from 0, and the stage."""
        for i, stage in enumerate(self.stages):
            if step < stage.steps:
                return i, stage
            step -= stage.steps
        raise refusal("step", step, "of the stages")


def learning_rate(cfg: PretrainConfig, step: int) -> float:
    """That of a step, from 0. The first one's is not 0, which would be a step for nothing."""
    _, stage = cfg.at(step)
    risen = min((step + 1) / max(cfg.optimizer.warmup_steps, 1), 1.0)
    done = step - sum(earlier.steps for earlier in cfg.stages[: cfg.at(step)[0]])
    share = done / max(stage.steps - 1, 1)
    begin, end = stage.rate
    return cfg.optimizer.learning_rate * risen * (begin + share * (end - begin))


def _is_hidden(path: str, leaf: Array) -> bool:
    """Whether Muon takes a leaf: matrices between activations, neither ends nor routers."""
    ends = path.startswith(("embed.", "head.")) or ".gate." in path or "hc_" in path
    return leaf.ndim == 2 and not ends


def make_optimizer(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """The update rule on leaves by path, for a learning rate of 1."""
    adamw = optax.adamw(
        1.0,
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=_matrices,
    )
    clip = optax.clip_by_global_norm(cfg.clip)
    if cfg.name == "adamw":
        return optax.chain(clip, adamw)
    # Muon's own update has a norm that grows with the matrix; this makes the two rates alike.
    muon = optax.contrib.muon(1.0, consistent_rms=0.2, weight_decay=cfg.weight_decay)
    parts: dict[Hashable, optax.GradientTransformation] = {"muon": muon, "adamw": adamw}
    return optax.chain(clip, optax.transforms.partition(parts, _labels))


def _matrices(tree: Any) -> dict[str, bool]:
    # Of a part of the leaves, the others are placeholders without a shape.
    return {path: getattr(leaf, "ndim", 0) >= 2 for path, leaf in tree.items()}


def _labels(tree: Any) -> dict[str, str]:
    return {path: "muon" if _is_hidden(path, x) else "adamw" for path, x in tree.items()}
