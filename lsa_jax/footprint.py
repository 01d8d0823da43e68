"""What a context costs in bytes and in arithmetic, without running it.

    python -m lsa_jax.footprint --config v4_flash --context 1M --attention lsa --recall-pages 384

Lengths: K is 1000 with --layout pages584, where the published tables are reproduced, else 1024;
--kilo says otherwise. 1M is 2^20 tokens; with a fraction (1.024M), M is a million. A GiB is 2^30.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
from fractions import Fraction
from typing import Any, get_args

from lsa_jax import cli, config_io
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.lsa import accounting, budget, flops, room, targets
from lsa_jax.lsa.accounting import Footprint, Layout, Offload, Placement
from lsa_jax.lsa.budget import Budget
from lsa_jax.lsa.policy import PolicyConfig

RUNNING_LAYOUT: Layout = "bf16"  # what infer.generate keeps on an accelerator unless told otherwise

_LENGTH = re.compile(r"(\d{1,15})(\.\d{1,9})?([KkMm]?)", re.ASCII)


def parse_length(text: str, kilo: int) -> tuple[int, int]:
    """Tokens, and the unit they were read in: "46K" in units of `kilo`, "1M" of 2^20, "1.024M" of a
    million, "524288" of 1."""
    match = _LENGTH.fullmatch(text)
    if match is None:
        raise ConfigError(f"context must be tokens such as 46K, 1M or 524288, got {text!r}")
    whole, fraction, suffix = match[1], match[2] or "", match[3].upper()
    unit = {"": 1, "K": kilo, "M": 1_000_000 if fraction else 1 << 20}[suffix]
    tokens = Fraction(whole + fraction) * unit
    if tokens.denominator != 1:
        raise ConfigError(
            f"context must be whole tokens, got {text!r} = {float(tokens):,} in units of {unit:,}"
        )
    return int(tokens), unit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A parsed command line that makes sense: a placement of equal requests, and its words."""

    name: str
    context: str
    unit: int  # of that context, in tokens
    decoded: int
    cfg: ModelConfig
    layout: Layout
    at: Placement
    level1: flops.Level1

    @property
    def tokens(self) -> int:
        """Tokens of each request, decoded ones too."""
        return self.at.lengths[0]


def read_case(args: argparse.Namespace) -> Case:
    """Checks the options together; raises ConfigError."""
    cfg = config_io.load_config(args.config)
    kilo = args.kilo or (1000 if args.layout == "pages584" else 1024)
    prompt, unit = parse_length(args.context, kilo)
    tokens = prompt + args.decoded
    if not 1 <= tokens <= cfg.max_position_embeddings:
        bound = f"within 1..max_position_embeddings={cfg.max_position_embeddings:,}"
        raise ConfigError(f"context + decoded must be {bound} tokens, got {tokens:,}")
    chosen = targets.default_target_layers(cfg)
    if args.target_layers is not None or args.attention == "lsa":
        chosen = targets.check_targets(cfg, args.target_layers or chosen)
    at = Placement(
        lengths=(tokens,) * args.requests,
        targets=chosen,
        page_entries=args.page_entries,
        window_bytes=4 if args.layout == "f32" else 2,
    )
    if args.attention == "lsa":
        at = dataclasses.replace(at, offload=_offload(args, cfg, at))
    else:
        for name in ("recall_pages", "kept_entries", "kv_budget", "path_i", "staging_pages"):
            if getattr(args, name) is not None:
                raise ConfigError(f"{name} is for --attention lsa, got --attention full")
    return Case(
        name=args.config,
        context=args.context,
        unit=unit,
        decoded=args.decoded,
        cfg=cfg,
        layout=args.layout,
        at=at,
        level1=flops.Level1(
            target_layers=len(chosen),
            heads=args.indexer_heads,
            rank=args.indexer_rank,
            lookahead=args.lookahead,
        ),
    )


def _offload(args: argparse.Namespace, cfg: ModelConfig, at: Placement) -> Offload:
    """The pool: what was asked for, and no more pages than there are."""
    rows, per = len(at.lengths), at.page_entries
    # The published server keeps entries in formation in pages; ours in a buffer beside them.
    ours = args.layout != "pages584"
    fresh = per * accounting.fresh_pages(cfg.csa_ratio, per, args.lookahead) if ours else 0
    path_i = args.path_i is not False
    empty = Offload(pool_pages=0, resident_entries=0, path_i=path_i, fresh_entries=fresh)
    at = dataclasses.replace(at, offload=empty)
    formed = at.entries(cfg) // rows
    hosted = formed - at.in_formation(cfg) // rows
    if args.kept_entries is not None:
        if args.kept_entries > formed:
            wanted = f"<= the {formed:,} entries of the context"
            raise ConfigError(f"kept_entries must be {wanted}, got {args.kept_entries:,}")
        kept = max(0, args.kept_entries - at.in_formation(cfg) // rows)
        pool, resident = rows * -(-kept // per), rows * kept
    else:
        pages = -(-hosted // per)
        pool = min(rows * pages, _pool_pages(args, cfg, at, pages))
        resident = min(pool * per, rows * hosted)
    return dataclasses.replace(
        empty,
        pool_pages=pool,
        resident_entries=resident,
        table_pages=min(max(1, -(-formed // per)), pool),  # a row may have all of it
        staging_bytes=(args.staging_pages or 0) * accounting.record_of(cfg, args.layout, at),
    )


def _pool_pages(args: argparse.Namespace, cfg: ModelConfig, at: Placement, pages: int) -> int:
    """Pool pages for all requests together, of each of which the host holds so many `pages`."""
    rows, per = len(at.lengths), at.page_entries
    if args.recall_pages is not None:
        return rows * args.recall_pages
    policy = PolicyConfig(recency=args.recency, sink=args.sink)
    if args.kv_budget is not None:
        forced = rows * room.forced_pages(policy, pages, per)
        return room.affordable_pages(cfg, args.layout, at, args.kv_budget, forced=forced)
    if args.layout == "pages584":
        return rows * math.ceil(pages * room.PUBLISHED_SHARE)
    return rows * room.default_pages(policy, pages, per)


def report(case: Case) -> dict[str, Any]:
    """Everything that `--json` prints; bytes unless a name says otherwise."""
    cfg, at = case.cfg, case.at
    found = accounting.footprint(cfg, case.layout, at)
    csa, rows = targets.csa_layers(cfg), len(at.lengths)
    kept = None
    if at.offload is not None:
        kept = (at.offload.resident_entries + at.in_formation(cfg)) // rows
    gflop = flops.gflop_per_token(cfg, case.tokens, kept_entries=kept, level1=case.level1)
    return {
        "config": case.name,
        "context": case.context,
        "context_unit": case.unit,
        "decoded": case.decoded,
        "tokens": case.tokens,
        "requests": rows,
        "layout": case.layout,
        "page_entries": at.page_entries,
        "target_layers": list(at.targets),
        "target_transformer_layers": [csa[ordinal] for ordinal in at.targets],
        "attention": "full" if at.offload is None else "lsa",
        "entries": case.tokens // cfg.csa_ratio,
        "kept_entries": case.tokens // cfg.csa_ratio if kept is None else kept,
        "kv_gib": {
            "logical": found.logical,
            "device": found.device,
            "device_plus_host": found.device_plus_host,
        },
        "kv_share": found.share,
        **_reserved_report(found),
        "components": dataclasses.asdict(found.occupied),
        "gflop_per_token": dataclasses.asdict(gflop),
        **_recall_report(case),
    }


def _reserved_report(found: Footprint) -> dict[str, Any]:
    device, host = found.reserved.kv, found.reserved.host
    return {
        "kv_gib_reserved": {
            "device": device / accounting.GIB,
            "device_plus_host": (device + host) / accounting.GIB,
        },
        "kv_share_reserved": found.share_reserved,
        "components_reserved": dataclasses.asdict(found.reserved),
    }


def _recall_report(case: Case) -> dict[str, Any]:
    """What fills one request's even share of the pool from empty."""
    off = case.at.offload
    if off is None:
        return {}
    page = accounting.page_bytes(case.cfg, case.layout, case.at.page_entries)
    record = accounting.record_of(case.cfg, case.layout, case.at)
    entries = len(targets.csa_layers(case.cfg)) * page.record_csa
    pages = off.pool_pages // len(case.at.lengths)
    return {
        "path_i": off.path_i,
        "recall_pages": pages,
        "pool_pages": off.pool_pages,
        "page_record_bytes": record,
        "cold_recall_bytes": {"entries": pages * entries, "keys": pages * (record - entries)},
    }


def _size(nbytes: float) -> str:
    unit, name = next(
        ((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB")) if nbytes >= unit / 20),
        (2**10, "KiB"),
    )
    return f"{nbytes / unit:,.3f} {name}"


def _unit_note(unit: int) -> str:
    published = ", as in the published tables" if unit == 1000 else ""
    letter = {1: "", 1000: "K", 1024: "K"}.get(unit, "M")
    return f" ({letter} = {unit:,}{published})" if letter else ""


def as_text(found: dict[str, Any]) -> str:
    """The report for people."""
    kv, held = found["kv_gib"], found["kv_gib_reserved"]
    extra = f" + {found['decoded']:,} decoded" if found["decoded"] else ""
    lines = [
        f"{found['config']}, {found['context']}{extra} = {found['tokens']:,} tokens"
        f"{_unit_note(found['context_unit'])}, requests: {found['requests']:,}",
        f"attention {found['attention']}, layout {found['layout']}, "
        f"{found['kept_entries']:,} of {found['entries']:,} CSA entries kept per request",
    ]
    if found["attention"] == "lsa":
        ordinals, layers = found["target_layers"], found["target_transformer_layers"]
        lines.append(
            f"target layers: CSA {', '.join(map(str, ordinals))} = transformer "
            f"{', '.join(map(str, layers))}; pages recalled per request: "
            f"{found['recall_pages']:,} of {found['page_record_bytes']:,} bytes"
        )
    lines += [
        f"KV        logical {_size(kv['logical'] * accounting.GIB)}, device "
        f"{_size(kv['device'] * accounting.GIB)} ({100 * found['kv_share']:.2f} % of full), "
        f"device + host {_size(kv['device_plus_host'] * accounting.GIB)}",
        f"reserved  device {_size(held['device'] * accounting.GIB)} "
        f"({100 * found['kv_share_reserved']:.2f} % of full)",
        f"{'component':<12}{'occupied':>16}{'reserved':>16}",
    ]
    other = found["components_reserved"]
    for name, nbytes in found["components"].items():
        lines.append(f"{name:<12}{_size(nbytes):>16}{_size(other[name]):>16}")
    flop = found["gflop_per_token"]
    lines.append(
        f"GFLOP per token: published {flop['published']:.4g}, like for like "
        f"{flop['like_for_like']:.4g}, with HCA {flop['with_hca']:.4g}"
    )
    return "\n".join(lines)


def _count(least: int, most: int = 10**9) -> Any:
    """A type for argparse: integers from `least` to `most`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or len(text) > 15 or not least <= int(text) <= most:
            wanted = f"an integer in {least}..{most}"
            raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
        return int(text)

    return convert


def _budget(text: str) -> Budget:
    try:
        return budget.parse_budget(text)
    except ConfigError as why:
        raise argparse.ArgumentTypeError(str(why)) from None


def _ordinals(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"must be CSA ordinals such as 10,12,20, got {text!r}")
    return tuple(map(int, parts))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m lsa_jax.footprint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add, positive, natural = parser.add_argument, _count(1), _count(0)
    add("--config", required=True, help="a preset, a .toml, or a config.json")
    add("--context", required=True, help="tokens of each request: 46K, 1M, 524288")
    add("--kilo", type=int, choices=(1000, 1024), help="what K means (default: see above)")
    add("--decoded", type=natural, default=0, help="tokens decoded after it")
    add("--requests", type=_count(1, 100_000), default=1, help="equal requests at once")
    add("--attention", choices=("full", "lsa"), default="full")
    kept = parser.add_mutually_exclusive_group()
    pages = "pages on the device, per request (default: 3/32 of all, or those that are forced)"
    kept.add_argument("--recall-pages", type=natural, help=pages)
    entries = "CSA entries on the device, per request, those in formation too"
    kept.add_argument("--kept-entries", type=natural, help=entries)
    kept.add_argument(
        "--kv-budget", type=_budget, help="occupied bytes, of all requests: 0.10, 400MB"
    )
    path_i = "index keys of all but the target layers are in host pages too (default)"
    add("--path-i", action=argparse.BooleanOptionalAction, help=path_i)
    add("--target-layers", type=_ordinals, help="CSA ordinals (default for V4-Flash: 10,12,20)")
    add("--layout", choices=get_args(Layout), default=RUNNING_LAYOUT, help="bytes of an entry")
    add("--page-entries", type=positive, default=64)
    add("--lookahead", type=positive, default=64, help="decode steps served by one resident set")
    recency = PolicyConfig().recency
    add("--recency", type=natural, default=recency, help="newest entries that a budget must hold")
    add("--sink", type=natural, default=0, help="first entries that a budget must hold")
    add(
        "--staging-pages", type=natural, help="landing room of recalls (default: recalled in place)"
    )
    add("--indexer-heads", type=positive, default=128, help="of the memory indexer")
    add("--indexer-rank", type=positive, default=2048, help="of the memory indexer's queries")
    add("--json", action="store_true", help="print the report as one JSON object")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        found = report(read_case(args))
        print(json.dumps(found, indent=2) if args.json else as_text(found))

    return cli.exit_code(body, interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
