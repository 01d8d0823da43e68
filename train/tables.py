"""Configurations as TOML: nested tables that are frozen dataclasses, overrides of single fields.

Types are checked here, values by the classes themselves. Every table and field that has a default
is optional.
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

# Beside the package, in a checkout and in site-packages alike.
_PRESETS = Path(__file__).resolve().parents[1] / "configs"


def load[T](kind: type[T], source: str | Path, overrides: Sequence[str], *, preset: str) -> T:
    """The configuration of a TOML file, or of `preset` in `configs/` by its name, with overrides.

    An override is "table.field=value", the value as in TOML; text needs no quotes. Raises
    ConfigError, in one line, for a file that cannot be read, an unknown field, or a bad value.
    """
    path = _find(source, preset)
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as why:
        reason = " ".join(str(why).split())
        raise ConfigError(f"config must be a readable TOML file ({reason}), got {path}") from None
    for text in overrides:
        _override(kind, raw, text)
    return build(kind, raw)


def _find(source: str | Path, preset: str) -> Path:
    if Path(source).is_file():
        return Path(source)
    path = _PRESETS / f"{preset}.toml"
    if str(source) != preset or not path.is_file():
        raise refusal("config", str(source), f"a TOML file, or {preset}")
    return path


def _override(kind: Any, raw: dict[str, Any], text: str) -> None:
    """Sets one field in nested tables; the field's type decides how its value is read."""
    name, equals, value = text.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise refusal("--set", text, "table.field=value")
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
        found = tomllib.loads(f"value = {text}")
        if len(found) != 1:
            raise refusal(name, text, "a single TOML value")
        return found["value"]
    except tomllib.TOMLDecodeError:
        takes_text = str in (kind, *get_args(kind)) or get_origin(kind) is Literal
        if takes_text and text.isprintable():
            return text
        raise refusal(name, text, "a TOML value") from None


def build[T](kind: type[T], raw: object, where: str = "") -> T:
    """A dataclass of a table of parsed TOML, or of `to_json`'s; raises ConfigError."""
    values = table(where or "the configuration", raw)
    hints = get_type_hints(kind)
    unknown = ", ".join(sorted(key for key in values if key not in hints))
    if unknown:
        wanted = f"one of {', '.join(hints)}"
        raise refusal(f"field of {where or 'the configuration'}", unknown, wanted)
    prefix = f"{where}." if where else ""
    try:
        return kind(**{key: _value(prefix + key, hints[key], x) for key, x in values.items()})
    except TypeError:
        fields: Any = dataclasses.fields(typing.cast(Any, kind))
        none = (dataclasses.MISSING, dataclasses.MISSING)
        needed = [f.name for f in fields if (f.default, f.default_factory) == none]
        missing = ", ".join(prefix + name for name in needed if name not in values)
        raise ConfigError(f"{missing} must be given, got none") from None


def _value(field: str, kind: Any, value: object) -> Any:
    """A value of a field's type; none of an optional field is `false` in TOML, null in JSON."""
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, field)
    origin = get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        if value is None or value is False:
            return None
        (kind,) = (part for part in get_args(kind) if part is not types.NoneType)
        return _value(field, kind, value)
    if origin is tuple:
        return _items(field, get_args(kind), value)
    if origin is Literal:
        if value not in get_args(kind):
            raise refusal(field, value, f"one of {', '.join(get_args(kind))}")
        return value
    if kind in (int, float):
        return number(field, value, kind)
    if origin is not None:  # a table that somebody else reads
        return table(field, value)
    if not isinstance(value, kind):
        raise refusal(field, value, {bool: "true or false", str: "text"}[kind])
    return value


def _items(field: str, kinds: tuple[Any, ...], value: object) -> tuple[Any, ...]:
    """A tuple of any length of one type, or of as many as there are types."""
    if not isinstance(value, list | tuple):
        raise refusal(field, value, "a list")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(kinds) != len(value):
        raise refusal(field, value, f"a list of {len(kinds)}")
    parts = enumerate(zip(kinds, value, strict=True))
    return tuple(_value(f"{field}[{i}]", kind, x) for i, (kind, x) in parts)


def to_json(cfg: Any) -> dict[str, Any]:
    """A JSON object that `build` reads back to an equal configuration."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def _flat(raw: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in raw.items():
        inner = isinstance(value, Mapping)
        out |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return out


def fields(cfg: Any, *, without: Sequence[str]) -> dict[str, Any]:
    """A configuration's fields by dotted name, in the order of their classes, but for some."""
    return {name: x for name, x in _flat(to_json(cfg)).items() if name not in without}


def check_same(begun: Mapping[str, Any], now: Mapping[str, Any], where: Path) -> None:
    """Refuses to go on with a run under other `fields`, naming what differs."""
    changed = [name for name in begun if begun[name] != now[name]]
    if changed:
        listed = "; ".join(
            f"{name} = {shown(begun[name])}, now {shown(now[name])}" for name in changed
        )
        raise ConfigError(f"{where} was begun with {listed}: choose another --out, or the same")
