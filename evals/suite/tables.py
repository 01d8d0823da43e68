"""Figures as JSON and as Markdown."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from evals.suite.summary import AVERAGES, Line
from evals.suite.variants import UNBOUNDED, SuiteArm, Variant
from lsa_jax.config import ConfigError

SCHEMA = 1
MARKS = {  # what stands between two lines of a document, by what it is
    "tables": ("<!-- evals.run: begin -->", "<!-- evals.run: end -->"),
    "overview": ("<!-- evals.run: overview begin -->", "<!-- evals.run: overview end -->"),
}
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


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def shared(lines: Sequence[Line]) -> dict[str, Any]:
    """Settings, arm and budget apart, that are the same wherever they mean something."""
    variants = {line.variant for line in lines if line.variant.arm not in UNBOUNDED}
    known: dict[SuiteArm, set[str]] = {}
    for variant in variants:
        known.setdefault(variant.arm, set()).update(variant.as_dict())
    found: dict[str, set[Any]] = {}
    for variant in variants:
        # No fallback is a setting of every arm; others that are not there mean nothing for it.
        for name in known[variant.arm] - {"arm", "budget"} | {"fallback"}:
            found.setdefault(name, set()).add(getattr(variant, name))
    same = {name: value for name, (value, *more) in sorted(found.items()) if not more}
    return {name: value for name, value in same.items() if value is not None}


def _name(line: Line, said: Mapping[str, Any]) -> str:
    """The variant's, without the settings that are `said` elsewhere."""
    return dataclasses.replace(line.variant, **dict.fromkeys(said, None)).name


def _row(line: Line, said: Mapping[str, Any]) -> str:
    evidence = "-" if line.evidence is None else ", ".join(map(_percent, line.evidence))
    cells = (
        f"{line.length:,}",
        _name(line, said),
        f"{line.questions:,} in {line.haystacks:,}",
        line.accuracy.percent(),
        "" if line.minus_full is None else line.minus_full.percent(),
        _percent(line.device),
        _percent(line.both),
        _percent(line.logical),
        _percent(line.reserved),
        f"{line.device_bytes / 1e6:.3f} / {line.reserved_bytes / 1e6:.3f}",
        evidence,
        str(line.fallbacks),
    )
    return "| " + " | ".join(cells) + " |"


def _markdown(headings: Sequence[str], rows: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings), *rows, ""]


def overview(lines: Sequence[Line], *, source: str) -> str:
    """The averages in one table, and the bytes they were reached in; `source` says what was run."""
    said = shared(lines)
    names = [name for name in AVERAGES if any(line.task == name for line in lines)]
    by_variant: dict[tuple[int, Variant], dict[str, Line]] = {}
    for line in lines:
        if line.task in names:
            by_variant.setdefault((line.length, line.variant), {})[line.task] = line
    headings = ["tokens", "arm", "KV on the device"]
    for name in names:
        headings += [f"{name} tasks, %", "minus full, points"]
    rows = []
    for (length, _), of in by_variant.items():
        most = list(of.values())[-1]
        cells = [f"{length:,}", _name(most, said), f"{_percent(most.device)} %"]
        for name in names:
            cells += _accuracy(of[name]) if name in of else ["", ""]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([f"{source} {_told(said)}", "", *_markdown(headings, rows)])


def _accuracy(line: Line) -> list[str]:
    minus = "" if line.minus_full is None else line.minus_full.percent()
    return [line.accuracy.percent(), minus]


def _told(said: Mapping[str, Any]) -> str:
    if not said:
        return ""
    return f"Everywhere: {', '.join(f'{name} {value}' for name, value in said.items())}."


def markdown(lines: Sequence[Line], *, heading: str, source: str) -> str:
    """Averages first, then every task; `source` says what was run."""
    said = shared(lines)
    out = [
        f"{heading}",
        "",
        f"{source} {_told(said)} Accuracy is the mean score with its 95 % interval over haystacks, "
        "and the difference to full attention is paired. Shares are of full attention's KV bytes; "
        "`no_csa` is an ablation that holds them all and reads no CSA entry.",
        "",
    ]
    names = [name for name in AVERAGES if any(line.task == name for line in lines)]
    tasks = sorted({line.task for line in lines} - set(AVERAGES))
    for name in names + tasks:
        title = f"average, {name} tasks" if name in names else name
        rows = [_row(line, said) for line in lines if line.task == name]
        out += [f"### {title}", "", *_markdown(_HEADINGS, rows)]
    return "\n".join(out)


def to_text(content: dict[str, Any]) -> str:
    """JSON with a line for each of the lines, so that two runs can be compared."""
    head = {name: value for name, value in content.items() if name != "lines"}
    lines = ",\n  ".join(json.dumps(line) for line in content["lines"])
    return json.dumps(head, indent=1)[:-2] + f',\n "lines": [\n  {lines}\n ]\n}}\n'


def into(text: str, blocks: Mapping[str, str], name: str) -> str:
    """Text with what stands between its marks replaced, of every block that it has marks for.

    ConfigError where it has none, or not once each and in order.
    """
    for kind in marked(text, name):
        begin, end = MARKS[kind]
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n{blocks[kind].rstrip()}\n{after}"
    return text


def marked(text: str, name: str) -> list[str]:
    """The blocks that a document has marks for; ConfigError as `into` says."""
    found = [kind for kind, marks in MARKS.items() if any(mark in text for mark in marks)]
    for begin, end in [MARKS[kind] for kind in found] or [MARKS["tables"]]:
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise ConfigError(f"{name} must have the lines {begin} and {end} once each, in order")
    return found
