"""Checks shared by the configuration readers: value types, key sets, lists of known words.

Every refusal is a ConfigError of one line that names the field, the value got and the one wanted.
"""

import sys
from collections.abc import Collection, Mapping
from typing import Any

from lsa_jax.config import ConfigError, ModelConfig


def shown(value: object) -> str:
    """The repr of a value, its middle left out where it is too long for an error line.

    Both ends stay: what tells two paths apart is mostly at their end.
    """
    text = repr(value)
    return text if len(text) <= 160 else f"{text[:77]}...{text[-80:]}"


def refusal(field: str, got: object, wanted: str) -> ConfigError:
    """The error for one bad value; the caller raises it."""
    return ConfigError(f"{field} must be {wanted}, got {shown(got)}")


def check_keys(
    where: str, raw: Mapping[str, Any], known: Collection[str], required: Collection[str]
) -> None:
    """Refuse a table with keys outside `known`, or without one of `required`; lists all of them."""
    unknown = ", ".join(sorted(repr(key) for key in raw if key not in known))
    if unknown:
        raise ConfigError(f"{where} must have only keys of DeepSeek-V4, got unknown {unknown}")
    missing = ", ".join(sorted(repr(key) for key in required if key not in raw))
    if missing:
        raise ConfigError(f"{where} must have the keys {missing}, got none of these")


def check_fixed(prefix: str, raw: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse a key of `fixed` that is present with none of its values; `prefix` is for the error.

    Types are compared as well: `True == 1`, yet `"num_key_value_heads": true` is a mistake.
    """
    for key, wanted in fixed.items():
        if key in raw and not any(type(raw[key]) is type(w) and raw[key] == w for w in wanted):
            raise refusal(prefix + key, raw[key], " or ".join(map(repr, wanted)))


def table(field: str, value: object) -> dict[str, Any]:
    """The value itself where it is a table (a JSON object)."""
    if not isinstance(value, dict):
        raise refusal(field, value, "a table of keys and values")
    return value


def number(field: str, value: object, kind: object) -> int | float:
    """The value as `kind`: int takes ints only; float takes finite numbers and returns a float."""
    if kind is int:
        # 64 bits: larger ones would overflow in the arithmetic of later checks.
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) >= 2**63:
            raise refusal(field, value, "an int of 64 bits")
        return value
    # `<=` is false for NaN, and exact for ints too large to become a float.
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise refusal(field, value, "a number")
    if not abs(value) <= sys.float_info.max:
        raise refusal(field, value, "finite")
    return float(value)


def numbers(prefix: str, raw: Mapping[str, Any], kinds: Mapping[str, object]) -> dict[str, Any]:
    """`number` for every key of `kinds` that is present."""
    return {k: number(prefix + k, raw[k], kind) for k, kind in kinds.items() if k in raw}


def words(field: str, value: object, meaning: Mapping[Any, Any]) -> list[Any]:
    """Translate a list item by item; `meaning` maps each word (or int) accepted."""
    if not isinstance(value, list):
        raise refusal(field, value, "a list")
    for i, item in enumerate(value):
        # Membership alone would take True for 1, and raise on unhashable items.
        if type(item) not in (str, int) or item not in meaning:
            raise refusal(f"{field}[{i}]", item, f"one of {', '.join(map(repr, meaning))}")
    return [meaning[item] for item in value]


def check_token_ids(cfg: ModelConfig) -> None:
    """Refuse special tokens outside the vocabulary."""
    for name in ("bos_token_id", "eos_token_id"):
        if not 0 <= getattr(cfg, name) < cfg.vocab_size:
            raise refusal(name, getattr(cfg, name), f"in [0, vocab_size={cfg.vocab_size})")
