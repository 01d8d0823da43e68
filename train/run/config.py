"""The configuration of a training run: TOML tables that are frozen dataclasses, and overrides.

Every table and field is optional and has its class's default. The authors' recipe, commented, is
`configs/indexer.toml`.
"""

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from lsa_jax.config import ConfigError
from lsa_jax.config_checks import number, refusal, shown, table
from lsa_jax.lsa.indexer_config import Ensemble, QueryMode
from train.data.dataset import DataConfig
from train.data.labels import SamplingConfig
from train.run.losses import ObjectiveConfig
from train.run.optimizer import OptimizerConfig

# Beside the package, in a checkout and in site-packages alike.
_PRESETS = Path(__file__).resolve().parents[2] / "configs"

InitKind = Literal["random", "native", "indexer"]
ComputeDtype = Literal["bfloat16", "float32"]
ValidationPool = Literal["all", "evictable"]

FREE_FIELDS = (
    *("data.cache_bytes", "data.prefetch", "data.threads"),
    *("run.checkpoint_every", "run.keep", "run.log_every"),
)
"""Fields without influence on what is trained: a run may go on with others."""


def _check_word(field: str, value: object, known: Any) -> None:
    if value not in get_args(known):
        raise refusal(field, value, f"one of {', '.join(get_args(known))}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerOptions:
    """What the traces do not decide of the indexer (`lsa_jax.lsa.indexer_config`).

    `query_mode` is how it is deployed; training rounds queries as `run.compute_dtype` says.
    """

    n_heads: int = 128
    q_lora_rank: int = 2048
    ensemble: Ensemble = "max"
    query_mode: QueryMode = "float32"

    def __post_init__(self) -> None:
        for name in ("n_heads", "q_lora_rank"):
            if number(f"indexer.{name}", getattr(self, name), int) < 1:
                raise refusal(f"indexer.{name}", getattr(self, name), ">= 1")
        _check_word("indexer.ensemble", self.ensemble, Ensemble)
        _check_word("indexer.query_mode", self.query_mode, QueryMode)


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """What training starts from: random weights, a checkpoint's native indexers, an indexer file.

    `path` is a converted checkpoint for "native", a file that `lsa_jax.lsa.indexer_reader` knows
    for "indexer", and empty for "random".
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


def load_train_config(source: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """The configuration of a TOML file, or of a preset in `configs/` by name, with overrides.

    An override is "table.field=value", the value as in TOML; text needs no quotes. Raises
    ConfigError, in one line, for a file that cannot be read, an unknown field, or a bad value.
    """
    path = _find(source)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as why:
        reason = " ".join(str(why).split())
        raise ConfigError(f"config must be a readable TOML file ({reason}), got {path}") from None
    for text in overrides:
        _override(raw, text)
    return from_table(raw)


def _find(source: str | Path) -> Path:
    if Path(source).is_file():
        return Path(source)
    preset = _PRESETS / f"{source}.toml"
    if preset.parent != _PRESETS or not preset.is_file():
        raise refusal("config", str(source), "a TOML file, or indexer for the authors' recipe")
    return preset


def _override(raw: dict[str, Any], text: str) -> None:
    """Sets one field in nested tables; the field's type decides how its value is read."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or len(keys) < 2 or not all(keys):
        raise refusal("--set", text, "table.field=value")
    kind: Any = TrainConfig
    for i, key in enumerate(keys):
        hints = get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if key not in hints:
            where = ".".join(keys[:i]) or "the configuration"
            known = f"one of {', '.join(hints)}" if hints else "no further field"
            raise refusal(f"--set {name.strip()}: field of {where}", key, known)
        kind = hints[key]
    if dataclasses.is_dataclass(kind):
        raise refusal("--set", text, f"a field of the table {name.strip()}, not all of it")
    for key in keys[:-1]:
        raw = table(key, raw.setdefault(key, {}))
    raw[keys[-1]] = _parse(name.strip(), value.strip(), kind)


def _parse(name: str, text: str, kind: Any) -> Any:
    """A TOML value, or text as it is where the field takes text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        takes_text = str in (kind, *get_args(kind)) or get_origin(kind) is Literal
        if takes_text and text.isprintable():
            return text
        raise refusal(name, text, "a TOML value") from None


def from_table(raw: Mapping[str, Any]) -> TrainConfig:
    """The configuration of parsed TOML, or of `to_json`'s; raises ConfigError."""
    return _build("", TrainConfig, raw)


def _build(where: str, kind: Any, raw: object) -> Any:
    """A dataclass of a table: types are checked here, values by the class itself."""
    values = table(where or "the configuration", raw)
    hints = get_type_hints(kind)
    unknown = ", ".join(sorted(key for key in values if key not in hints))
    if unknown:
        wanted = f"one of {', '.join(hints)}"
        raise refusal(f"field of {where or 'the configuration'}", unknown, wanted)
    prefix = f"{where}." if where else ""
    return kind(**{key: _value(prefix + key, hints[key], x) for key, x in values.items()})


def _value(field: str, kind: Any, value: object) -> Any:
    """A value of a field's type; none of an optional field is `false` in TOML, null in JSON."""
    if dataclasses.is_dataclass(kind):
        return _build(field, kind, value)
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or value is False:
            return None
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
        return _value(field, kind, value)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise refusal(field, value, "a list")
        item = get_args(kind)[0]
        return tuple(_value(f"{field}[{i}]", item, x) for i, x in enumerate(value))
    if origin is Literal:
        _check_word(field, value, kind)
        return value
    if kind in (int, float):
        return number(field, value, kind)
    if not isinstance(value, kind):
        raise refusal(field, value, {bool: "true or false", str: "text"}[kind])
    return value


def to_json(cfg: TrainConfig) -> dict[str, Any]:
    """A JSON object that `from_table` reads back to an equal configuration."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def _flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in raw.items():
        inner = isinstance(value, Mapping)
        out |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return out


def trained_fields(cfg: TrainConfig) -> dict[str, Any]:
    """The fields that decide what is trained, by dotted name."""
    return {name: x for name, x in _flat(to_json(cfg)).items() if name not in FREE_FIELDS}


def check_same(begun: TrainConfig, now: TrainConfig, where: Path) -> None:
    """Refuses to go on with a run under another configuration, naming what differs."""
    before, after = trained_fields(begun), trained_fields(now)
    changed = [name for name in before if before[name] != after[name]]
    if changed:
        listed = "; ".join(
            f"{name} = {shown(before[name])}, now {shown(after[name])}" for name in changed
        )
        raise ConfigError(f"{where} was begun with {listed}: choose another --out, or the same")
