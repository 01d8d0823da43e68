"""The configuration of a training run, as `train.tables` reads it.

Every table and field is optional and has its class's default. The authors' recipe, commented, is
`configs/indexer.toml`.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lsa_jax.config_checks import number, refusal
from lsa_jax.lsa.indexer_config import Ensemble, QueryMode, Score, check_dilation, check_lookback
from train import tables
from train.data.dataset import DataConfig
from train.data.labels import SamplingConfig
from train.run.checks import check_program
from train.run.losses import OF_MASS, ObjectiveConfig
from train.run.optimizer import OptimizerConfig, check_warmup

InitKind = Literal["random", "native", "indexer"]
ComputeDtype = Literal["bfloat16", "float32"]
ValidationPool = Literal["all", "evictable"]

FREE_FIELDS = (
    *("data.cache_bytes", "data.pool_bytes", "data.prefetch", "data.threads", "data.workers"),
    *("run.checkpoint_every", "run.keep", "run.log_every"),
)
"""Fields without influence on what is trained: a run may go on with others."""


def _check_word(field: str, value: object, known: Any) -> None:
    if value not in get_args(known):
        raise refusal(field, value, f"one of {', '.join(get_args(known))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerOptions:
    """What the traces do not decide of the indexer (`lsa_jax.lsa.indexer_config`).

    `query_mode` is how it is deployed; training rounds queries as `run.compute_dtype` says. The
    last `lookback` tokens are asked together, in training as in a fire. `score` should be what the
    objective teaches: shares of attention by `objective.share`, probabilities by all others. Losses
    are on logits without `dilation` and `falloff`, which are for what is served and what is judged.
    """

    n_heads: int = 128
    q_lora_rank: int = 2048
    ensemble: Ensemble = "max"
    query_mode: QueryMode = "float32"
    lookback: int = 1
    score: Score = "sigmoid"
    dilation: int = 0
    falloff: float = 0.0

    def __post_init__(self) -> None:
        for name in ("n_heads", "q_lora_rank", "lookback"):
            if number(f"indexer.{name}", getattr(self, name), int) < 1:
                raise refusal(f"indexer.{name}", getattr(self, name), ">= 1")
        check_lookback(self.lookback)
        check_dilation(self.dilation, self.falloff)
        _check_word("indexer.ensemble", self.ensemble, Ensemble)
        _check_word("indexer.query_mode", self.query_mode, QueryMode)
        _check_word("indexer.score", self.score, Score)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What training starts from: random weights, a checkpoint's native indexers, an indexer file.

    `path` is a converted checkpoint for "native", a file that `lsa_jax.lsa.indexer_reader` knows or
    a run's directory for "indexer", and empty for "random".
    """

    kind: InitKind = "random"
    path: str = ""

    def __post_init__(self) -> None:
        _check_word("init.kind", self.kind, InitKind)
        if bool(self.path) == (self.kind == "random"):
            wanted = "empty" if self.kind == "random" else f"given, as init.kind is {self.kind!r}"
            raise refusal("init.path", self.path, wanted)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long to train, what to watch, and what to keep; counts are of steps.

    A run has `steps` steps, or all of `epochs` epochs where that is 0. Every `validate_every`
    steps (0: at the end only) the validation traces are scored at every `validate_interval`-th
    token; recall of the deployed ensemble's `validate_top` best among `validate_pool` candidates
    decides which checkpoint is best, and `patience` validations without a better one end the run
    (0: never). `max_bad_steps` steps in a row without finite gradients stop it. `log_n_reference`
    scales logits by ln N / ln of it (0: does not).
    """

    epochs: int = 3
    steps: int = 0
    checkpoint_every: int = 500
    keep: int = 2
    log_every: int = 50
    validate_every: int = 1000
    validate_interval: int = 64
    validate_top: int = 512
    validate_pool: ValidationPool = "all"
    patience: int = 0
    max_bad_steps: int = 10
    compute_dtype: ComputeDtype = "bfloat16"
    seed: int = 0
    log_n_reference: int = 0

    def __post_init__(self) -> None:
        least = dict.fromkeys(("epochs", "checkpoint_every", "keep", "log_every"), 1)
        least |= dict.fromkeys(("validate_interval", "validate_top", "max_bad_steps"), 1)
        least |= dict.fromkeys(("steps", "validate_every", "patience"), 0)
        least |= dict.fromkeys(("seed", "log_n_reference"), 0)
        for name, bound in least.items():
            if number(f"run.{name}", getattr(self, name), int) < bound:
                raise refusal(f"run.{name}", getattr(self, name), f">= {bound}")
        _check_word("run.compute_dtype", self.compute_dtype, ComputeDtype)
        _check_word("run.validate_pool", self.validate_pool, ValidationPool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that a training run is a function of, besides the traces."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    sampling: SamplingConfig = dataclasses.field(default_factory=SamplingConfig)
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    indexer: IndexerOptions = dataclasses.field(default_factory=IndexerOptions)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    run: RunConfig = dataclasses.field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        pages, drawn = self.objective.page_entries, self.sampling.unit_entries
        if pages > 1 and pages != drawn:
            wanted = "1, or sampling.resident.page_entries with sampling.unit = 'page'"
            raise refusal("objective.page_entries", pages, wanted)
        for name in OF_MASS:
            if getattr(self.objective, name) and not self.data.mass:
                raise refusal("data.mass", self.data.mass, f"true with objective.{name}")
        # What no data can change is refused before any is read.
        check_program(self.indexer, self.objective, self.run.log_n_reference)
        if self.run.steps:
            check_warmup(self.optimizer, self.run.steps)


def load_train_config(source: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a TOML file, or `indexer`, the authors' recipe, with overrides.

    See `train.tables.load`, which raises ConfigError.
    """
    return tables.load(TrainConfig, source, overrides, preset="indexer")


def trained_fields(cfg: TrainConfig) -> dict[str, Any]:
    """The fields that decide what is trained, by dotted name."""
    return tables.fields(cfg, without=FREE_FIELDS)
