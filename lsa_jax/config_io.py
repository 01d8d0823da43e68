"""Where configurations come from: presets by name, TOML files, HF `config.json` files.

Standard library only, like `lsa_jax.config`, so that every tool can read a configuration without
starting a backend. The TOML schema is `ModelConfig` field by field, with its defaults, and

    layer_types = [{ repeat = 2, of = ["sliding"] }, { repeat = 20, of = ["csa", "hca"] }, "csa"]
    yarn = false     # none; or a table [yarn]

where `mlp_types` takes the same runs.
"""

import dataclasses
import json
import logging
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lsa_jax.config import ConfigError, ModelConfig, YarnConfig
from lsa_jax.config_checks import check_keys, check_token_ids, number, numbers, refusal, table
from lsa_jax.config_hf import has_drafter, read_hf, to_json

__all__ = ["load_config", "preset_names", "read_hf", "read_toml", "to_json", "to_toml"]

# Presets lie beside the package in a checkout and in site-packages alike. Not looked up by package
# name: `configs` is a common one, and the user's own would shadow ours.
_PRESETS = Path(__file__).resolve().parents[1] / "configs"
_MAX_LAYERS = 10_000  # bounds what a repeat in a TOML file can ask for

_FIELDS = dataclasses.fields(ModelConfig)
_NUMBERS = {field.name: field.type for field in _FIELDS if field.type in (int, float)}
_REQUIRED = [field.name for field in _FIELDS if field.default is dataclasses.MISSING]
_YARN_NUMBERS = {field.name: field.type for field in dataclasses.fields(YarnConfig)}


def preset_names() -> list[str]:
    """Names that `load_config` takes for the models in `configs/`, where training runs are too."""
    texts = {path.stem: path.read_text("utf-8") for path in _PRESETS.glob("*.toml")}
    return sorted(name for name, text in texts.items() if "vocab_size" in tomllib.loads(text))


def load_config(source: str | Path) -> ModelConfig:
    """The configuration that `source` names.

    A string equal to a preset's name is that preset; else `source` is a `.toml` file, a HF
    `config.json` file, or a directory that holds one. Raises ConfigError, in one line, for what
    cannot be read or is not DeepSeek-V4. A DSpark drafter is left out, which is logged.
    """
    path = _find(source)
    try:
        return _load_file(path)
    except ConfigError as why:
        raise ConfigError(f"{path}: {why}") from None
    except (OSError, ValueError, RecursionError) as why:
        reason = " ".join(str(why).split())
        wanted = f"a readable TOML or JSON file ({reason})"
        raise ConfigError(f"config must be {wanted}, got {str(path)!r}") from None


def _find(source: str | Path) -> Path:
    if isinstance(source, str) and source in preset_names():
        return _PRESETS / f"{source}.toml"
    path = Path(source)
    try:
        path = path / "config.json" if path.is_dir() else path
        found = path.exists()
    except (OSError, ValueError):  # a name too long, or with a null byte
        found = False
    if not found:
        wanted = f"one of {', '.join(preset_names())}, a file, or a directory with a config.json"
        raise refusal("config", str(source), wanted)
    return path


def _load_file(path: Path) -> ModelConfig:
    if path.suffix == ".toml":
        return read_toml(tomllib.loads(path.read_text("utf-8")))
    if path.suffix != ".json":
        raise refusal("config", path.name, "a .toml or .json file")
    text = path.read_text("utf-8")
    raw = table("config.json", json.loads(text, object_pairs_hook=_without_duplicates))
    cfg = read_hf(raw)
    if has_drafter(raw):
        log = logging.getLogger("lsa_jax")
        log.warning("%s: its DSpark drafter is skipped; the backbone loads without MTP", path)
    return cfg


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        keys = [key for key, _ in pairs]
        repeated = sorted({key for key in keys if keys.count(key) > 1})
        raise refusal("config.json", repeated, "without repeated keys")
    return unique


def read_toml(raw: Mapping[str, Any]) -> ModelConfig:
    """The ModelConfig of a parsed TOML file; raises ConfigError."""
    check_keys("config", raw, [field.name for field in _FIELDS], _REQUIRED)
    values = numbers("", raw, _NUMBERS)
    for name in ("layer_types", "mlp_types"):
        values[name] = _expand_runs(name, raw[name])
    if "yarn" in raw:
        values["yarn"] = None if raw["yarn"] is False else _read_yarn(raw["yarn"])
    cfg = ModelConfig(**values)
    check_token_ids(cfg)
    return cfg


def _expand_runs(field: str, items: object) -> tuple[Any, ...]:
    """A list of types with runs `{repeat, of}` written out; ModelConfig checks the types."""
    if not isinstance(items, list):
        raise refusal(field, items, "a list")
    out: list[Any] = []
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            out.append(item)
            continue
        where = f"{field}[{i}]"
        check_keys(where, item, ("repeat", "of"), ("repeat", "of"))
        repeat, of = number(f"{where}.repeat", item["repeat"], int), item["of"]
        if not isinstance(of, list):
            raise refusal(f"{where}.of", of, "a list")
        if not 1 <= repeat * len(of) <= _MAX_LAYERS:
            raise refusal(where, item, f"1 to {_MAX_LAYERS} layers")
        out += of * int(repeat)
    return tuple(out)


def _read_yarn(raw: object) -> YarnConfig:
    raw = table("yarn", raw)
    check_keys("yarn", raw, _YARN_NUMBERS, ())
    return YarnConfig(**numbers("yarn.", raw, _YARN_NUMBERS))


def to_toml(cfg: ModelConfig) -> str:
    """The TOML text of a configuration, every field written out; `read_toml` inverts it."""
    values = {field.name: getattr(cfg, field.name) for field in _FIELDS if field.name != "yarn"}
    lines = [f"{name} = {_toml_value(value)}" for name, value in values.items()]
    if cfg.yarn is None:
        return "\n".join([*lines, "yarn = false", ""])
    yarn = [f"{name} = {value!r}" for name, value in dataclasses.asdict(cfg.yarn).items()]
    return "\n".join([*lines, "", "[yarn]", *yarn, ""])


def _toml_value(value: object) -> str:
    # A number's repr is TOML, and so is the JSON of a list of plain words.
    return json.dumps(list(value)) if isinstance(value, tuple) else repr(value)
