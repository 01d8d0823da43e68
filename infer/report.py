"""Output files and the summary line. Files are checked before the work, and appear atomically."""

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from infer.options import Options
from infer.session import Session, Turn
from lsa_jax.config import ConfigError
from lsa_jax.model_io import model_bytes
from lsa_jax.text.tokenizer import Tokenizer


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.partial")


def check_writable(options: Options) -> None:
    """Raises ConfigError unless every output file can be created; touches none that exists."""
    for flag, path in options.outputs():
        wanted = f"{flag} must be a file that can be written, got {path}"
        try:
            if path.exists() and not path.is_file():  # a directory, a device
                raise ConfigError(f"{wanted}: not a regular file")
            _partial(path).touch()
            _partial(path).unlink()
        except (OSError, ValueError) as why:
            if isinstance(why, ConfigError):
                raise
            raise ConfigError(f"{wanted}: {getattr(why, 'strerror', why)}") from why


def write(path: Path, content: Callable[[IO[bytes]], object]) -> None:
    """Writes beside `path` and renames: readers find the old file or the whole new one."""
    try:
        with _partial(path).open("wb") as file:
            content(file)
            file.flush()
            os.fsync(file.fileno())
        _partial(path).replace(path)
    finally:
        _partial(path).unlink(missing_ok=True)


def write_outputs(options: Options, session: Session, tokenizer: Tokenizer | None) -> None:
    """Writes the files that were asked for, from what there is: after Ctrl-C too."""
    if options.json is not None:
        content = json.dumps(as_json(options, session, tokenizer), indent=1).encode()
        write(options.json, lambda file: file.write(content))
    if options.dump_logits is not None and session.logits:
        turn = session.turns[0]
        ids = np.array(turn.prompt_ids + turn.ids, np.int32)
        rows = len(turn.prompt_ids) + turn.decoded
        logits = np.concatenate(session.logits)[:rows]
        write(options.dump_logits, lambda file: np.savez(file, ids=ids, logits=logits))


def _speed(tokens: int, seconds: float) -> dict[str, float | None]:
    rate = tokens / seconds if tokens and seconds > 0 else None
    return {"tokens": tokens, "seconds": seconds, "tokens_per_second": rate}


def _speeds(turns: list[Turn]) -> dict[str, dict[str, float | None]]:
    return {
        "prefill": _speed(sum(t.prefilled for t in turns), sum(t.prefill_seconds for t in turns)),
        "decode": _speed(sum(t.decoded for t in turns), sum(t.decode_seconds for t in turns)),
    }


def as_json(options: Options, session: Session, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The content of `--json`.

    `ids` and `text` are all that was generated, `turns` has each reply with its prompt. Seconds
    leave out compilation. Decoding counts the tokens after the first of a turn, which prefill
    draws. A rate without tokens is null.
    """

    def text(ids: list[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(ids, skip_special=True)

    ids = [id_ for turn in session.turns for id_ in turn.ids]
    return {
        "ids": ids,
        "text": text(ids),
        "turns": [
            {
                "prompt_ids": turn.prompt_ids,
                "ids": turn.ids,
                "text": text(turn.ids),
                "ended": turn.ended,
                **_speeds([turn]),
            }
            for turn in session.turns
        ],
        **_speeds(session.turns),
        "compile_seconds": session.compile_seconds,
        "compilations": session.compilations,
        "kv_bytes": {**session.kv_bytes, "total": sum(session.kv_bytes.values())},
        "kv_capacity_tokens": session.capacity,
        "model_bytes": model_bytes(session.model),
        **circumstances(options, session),
    }


def circumstances(options: Options, session: Session) -> dict[str, Any]:
    """On what and with which settings it ran."""
    device = jax.devices()[0]
    settings = dataclasses.asdict(options)
    settings |= settings.pop("lsa")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": 1 if session.mesh is None else session.mesh.size,
        "jax_version": jax.__version__,
        "dtype": session.model.compute.dtype,
        "kv_format": session.cache.kv_format,
        "settings": {name: _plain(value) for name, value in settings.items()},
    }


def _plain(value: object) -> object:
    if isinstance(value, dict):  # a budget: bytes or a share
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, Fraction):
        return float(value)
    return str(value) if isinstance(value, Path) else value


def print_summary(session: Session) -> None:
    """One line on stderr."""
    speeds = _speeds(session.turns)

    def rate(name: str) -> str:
        value = speeds[name]["tokens_per_second"]
        return "-" if value is None else f"{value:,.1f} tokens/s"

    new = sum(len(turn.ids) for turn in session.turns)
    print(
        f"{speeds['prefill']['tokens']} prompt and {new} new tokens; prefill {rate('prefill')}, "
        f"decode {rate('decode')}; {session.kv_summary}; "
        f"compilation {session.compile_seconds:.1f} s",
        file=sys.stderr,
    )
