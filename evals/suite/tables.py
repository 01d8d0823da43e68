"""Figures as JSON and as Markdown."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from evals.suite.summary import AVERAGES, Line
from evals.suite.variants import Variant
from lsa_jax.config import ConfigError

SCHEMA = 1
BEGIN, END = "<!-- evals.run: begin -->", "<!-- evals.run: end -->"
_HEADINGS = (
    *("length", "arm", "questions", "accuracy %", "minus full, points", "KV device %"),
    *("device + host %", "logical %", "reserved %", "MB occupied / reserved"),
    *("evidence %: first, any cycle", "fallbacks"),
)


def as_json(lines: Sequence[Line], **circumstances: Any) -> dict[str, Any]:
    """The lines with how they were made; intervals are [value, low, high], undefined is null."""
    return {
        "schema": SCHEMA,
        **circumstances,
        "lines": [
            {
                **_plain(dataclasses.asdict(dataclasses.replace(line, variant=_NO_VARIANT))),
                "variant": line.variant.as_dict(),
            }
            for line in lines
        ],
    }


_NO_VARIANT = Variant(arm="full")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _row(line: Line) -> str:
    def percent(share: float) -> str:
        return f"{100 * share:.1f}"

    evidence = "-" if line.evidence is None else ", ".join(map(percent, line.evidence))
    cells = (
        f"{line.length:,}",
        line.variant.name,
        f"{line.questions:,} in {line.haystacks:,}",
        line.accuracy.percent(),
        "" if line.minus_full is None else line.minus_full.percent(),
        percent(line.device),
        percent(line.both),
        percent(line.logical),
        percent(line.reserved),
        f"{line.device_bytes / 1e6:.3f} / {line.reserved_bytes / 1e6:.3f}",
        evidence,
        str(line.fallbacks),
    )
    return "| " + " | ".join(cells) + " |"


def _table(lines: Sequence[Line]) -> list[str]:
    rule = "|" + " --- |" * len(_HEADINGS)
    return ["| " + " | ".join(_HEADINGS) + " |", rule, *map(_row, lines), ""]


def markdown(lines: Sequence[Line], *, heading: str, source: str) -> str:
    """Averages first, then every task; `source` says what was run."""
    out = [
        f"{heading}",
        "",
        f"{source} Accuracy is the mean score with its 95 % interval over haystacks, and the "
        "difference to full attention is paired. Shares are of full attention's KV bytes; "
        "`no_csa` is an ablation that holds them all and reads no CSA entry.",
        "",
    ]
    names = [name for name in AVERAGES if any(line.task == name for line in lines)]
    tasks = sorted({line.task for line in lines} - set(AVERAGES))
    for name in names + tasks:
        title = f"average, {name} tasks" if name in names else name
        out += [f"### {title}", "", *_table([line for line in lines if line.task == name])]
    return "\n".join(out)


def to_text(content: dict[str, Any]) -> str:
    """JSON with a line for each of the lines, so that two runs can be compared."""
    head = {name: value for name, value in content.items() if name != "lines"}
    lines = ",\n  ".join(json.dumps(line) for line in content["lines"])
    return json.dumps(head, indent=1)[:-2] + f',\n "lines": [\n  {lines}\n ]\n}}\n'


def into(text: str, block: str, name: str) -> str:
    """Text with what stands between its marks replaced; ConfigError where it has none."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(f"{name} must have the lines {BEGIN} and {END} once each, in this order")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    return f"{before}{BEGIN}\n{block.rstrip()}\n{after}"
