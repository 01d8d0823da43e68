"""Fits an indexer's thresholds to a budget of KV bytes, by length, and stores them with it.

    python -m train.calibrate --indexer RUN_OR_FILE --traces DIR --budgets 0.10 --out FILE2

With the policy "budget", decoding recalls the pages that have an entry above the threshold: fitted
here so that, on average over the decisions of a length bucket, what is on the device takes the
budget. Prints what thresholds alone come to on documents that they were not fitted on; decoding
never exceeds the budget that it is given. A file holds the thresholds of one budget: with several,
{budget} in --out is replaced by each.
"""

import argparse
import bisect
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lsa_jax import cli, config_io
from lsa_jax.config import ConfigError
from lsa_jax.config_checks import refusal
from lsa_jax.lsa.budget import Budget, Calibration, allowed_pages, fit_thresholds
from lsa_jax.lsa.indexer_file import write_indexer
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from train import study_options
from train.data.labels import ResidentRule
from train.outputs import check_file
from train.quality.evaluation import (
    Recording,
    check_distinct,
    check_trace,
    decisions,
    open_traces,
    scores_at,
)
from train.quality.intervals import Interval, bootstrap
from train.quality.metrics import length_bucket, per_page
from train.quality.pareto import DeviceRoom, Sizes, forced_pages, parse_budgets
from train.quality.study import deployed
from train.traces.trace import Trace

_LEAST_SHARE = 10  # of the decisions, one in so many, must be in a bucket that nobody asked for


class Sample(NamedTuple):
    """One decision: the best score of each page that can be evicted, float32."""

    document: int
    entries: int
    forced: int  # pages
    maxima: np.ndarray
    sizes: Sizes


class Row(NamedTuple):
    """What the thresholds come to in a length bucket, as shares of KV bytes."""

    bucket: str
    threshold: float | None
    decisions: int
    requested: float
    obtained: Interval


def samples(
    indexer: MemoryIndexer,
    traces: Sequence[Trace],
    room: DeviceRoom,
    rule: ResidentRule,
    interval: int,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Sample]:
    """Every decision at which a page can be evicted."""
    found = []
    for number, trace in enumerate(traces):
        recording = Recording.of(trace)
        for at in decisions(indexer, trace, recording, recording.decisions(interval)):
            scores = scores_at(indexer, at)[deployed(indexer)].astype(np.float32)
            free = scores[slice(*rule.evictable_range(at.entries))]
            sizes = room.sizes(int(recording.positions[at.token]) + 1)
            if len(free):
                maxima = per_page(free, rule.page_entries, np.maximum)
                forced = forced_pages(at.entries, rule)
                found.append(Sample(number, at.entries, forced, maxima, sizes))
            progress(1)
    if not found:
        wanted = f"a decision with more than the forced entries (recency {rule.recency})"
        raise ConfigError(f"traces must have {wanted}, got none")
    return found


def usual_edges(entries: Sequence[int]) -> tuple[int, ...]:
    """Powers of two that leave no bucket with less than a tenth of the decisions."""
    lengths, least = sorted(entries), max(1, len(entries) // _LEAST_SHARE)
    edges: list[int] = []
    before = 0
    for power in range(1, 31):
        below = bisect.bisect_left(lengths, 2**power)
        if below - before >= least and len(lengths) - below >= least:
            edges.append(2**power)
            before = below
    return tuple(edges)


def kept_share(part: Sequence[Sample], limit: Budget) -> float:
    """Mean share of the unforced pages that a budget has room for; ConfigError where a budget has
    none for the forced ones."""
    shares = []
    for one in part:
        full, fixed, page = one.sizes
        pages = allowed_pages(limit, full, fixed, page, forced_pages=one.forced)
        shares.append(min(1.0, (pages - one.forced) / len(one.maxima)))
    return float(np.mean(shares))


def fit(found: Sequence[Sample], edges: tuple[int, ...], limit: Budget) -> Calibration:
    """Thresholds of a budget, one for each length bucket. Raises ConfigError."""
    thresholds, kept = [], []
    for bucket in range(len(edges) + 1):
        part = [one for one in found if bisect.bisect_right(edges, one.entries) == bucket]
        if not part:
            name = length_bucket((0, *edges)[bucket], edges)
            raise ConfigError(f"length bucket {name} must have a decision to fit on, got none")
        share = kept_share(part, limit)
        if share == 0:
            raise ConfigError("the budget must have room for a page that is not forced, got none")
        # A page is one score here, and none of these is forced.
        pages = {"page_entries": 1, "recency": 0}
        maxima = [one.maxima for one in part]
        one = fit_thresholds(maxima, edges=(), kept_pages=share, **pages)
        thresholds += one.thresholds
        kept += [share] * len(part)
    return Calibration(edges, tuple(thresholds), float(np.mean(kept)))


def outcome(found: Sequence[Sample], calibration: Calibration, limit: Budget) -> list[Row]:
    """Requested and obtained shares on these decisions: by bucket, and of all of them."""
    groups: dict[str, list[Sample]] = {}
    for one in sorted(found, key=lambda one: one.entries):
        groups.setdefault(length_bucket(one.entries, calibration.edges), []).append(one)
    rows = [
        _row(name, part, calibration, limit, calibration.threshold(part[0].entries))
        for name, part in groups.items()
    ]
    return [*rows, _row("all", found, calibration, limit, None)]


def _row(
    name: str,
    part: Sequence[Sample],
    calibration: Calibration,
    limit: Budget,
    threshold: float | None,
) -> Row:
    documents = sorted({one.document for one in part})
    sums = np.zeros((len(documents), 2, 2))
    for one in part:
        kept = int(np.sum(one.maxima > calibration.threshold(one.entries)))
        used = one.sizes.used(one.forced + kept)
        wanted, full = limit.limit(one.sizes.full), one.sizes.full
        sums[documents.index(one.document)] += ((wanted, full), (used, full))
    requested, obtained = bootstrap(sums)
    return Row(name, threshold, len(part), requested.value, obtained)


def split(traces: list[Trace], share: float, seed: int) -> tuple[list[Trace], list[Trace]]:
    """Traces to fit on, and at least one that is held out."""
    if len(traces) < 2:
        raise ConfigError(f"traces must be two or more without --holdout, got {len(traces)}")
    order = np.random.default_rng(seed).permutation(len(traces))
    held = set(order[: min(len(traces) - 1, max(1, round(share * len(traces))))].tolist())
    fitted = [trace for i, trace in enumerate(traces) if i not in held]
    return fitted, [traces[i] for i in sorted(held)]


def destinations(out: Path, budgets: Sequence[str]) -> dict[str, Path]:
    """A file for each budget; none may exist."""
    if len(budgets) > 1 and "{budget}" not in out.name:
        wanted = "a name with {budget} for several budgets"
        raise ConfigError(f"--out must be {wanted}, got {out.name!r}")
    found = {name: out.with_name(out.name.replace("{budget}", name)) for name in budgets}
    for path in found.values():
        if path.exists():
            raise FileExistsError(f"{path} exists already: delete it or choose another --out")
        check_file("--out", path)
    return found


def _parts(args: argparse.Namespace) -> tuple[list[Trace], list[Trace]]:
    """Traces to fit on and to test on. Raises ConfigError and TraceError."""
    traces = open_traces(args.traces, verify=args.verify)
    if not args.holdout:
        check_distinct(traces)
        return split(traces, args.holdout_share, args.seed)
    held = open_traces(args.holdout, verify=args.verify)
    both = {trace.path.resolve() for trace in traces} & {trace.path.resolve() for trace in held}
    if both:
        raise refusal("--holdout", str(min(both)), "traces that are not fitted on")
    check_distinct([*traces, *held])
    return traces, held


def run(args: argparse.Namespace) -> list[str]:
    """Fits, writes the files, and returns the lines to print."""
    budgets = parse_budgets(args.budgets)
    paths = destinations(args.out, list(budgets))
    cfg = config_io.load_config(args.config)
    file = study_options.read_indexer(args.indexer, cfg, named=args.config).indexer
    traces, held = _parts(args)
    rule = study_options.resident_rule(args, [*traces, *held])
    room = study_options.device_room(args, cfg, file.config, rule)
    for trace in (*traces, *held):
        room.check(trace)
        check_trace(file.config, trace)
    total = sum(-(-trace.tokens // args.interval) for trace in (*traces, *held))
    with cli.token_progress(total, "score") as progress:
        options = (room, rule, args.interval, progress)
        indexer = from_file(file)
        fitted, tested = (samples(indexer, part, *options) for part in (traces, held))
    edges = args.length_edges
    if edges is None:
        edges = usual_edges([one.entries for one in fitted])
    calibrations = {name: fit(fitted, edges, limit) for name, limit in budgets.items()}
    lines = [f"fitted on {len(traces):,} documents, tested on {len(held):,} others"]
    for name, calibration in calibrations.items():
        table = json.loads(calibration.to_json())
        write_indexer(paths[name], dataclasses.replace(file, calibration=table))
        rows = outcome(tested, calibration, budgets[name])
        lines += ["", f"{paths[name]}: budget {name}", *(_line(row) for row in rows)]
    return lines


def _line(row: Row) -> str:
    at = "" if row.threshold is None else f", threshold {row.threshold:.4f}"
    return (
        f"{row.bucket} entries, {row.decisions:,} decisions: requested {100 * row.requested:.2f} %,"
        f" obtained {row.obtained.percent(2)} %{at}"
    )


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m train.calibrate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--indexer", type=Path, required=True, metavar="FILE", help="run, file or export")
    add("--out", type=Path, required=True, metavar="FILE2", help="it with the thresholds")
    study_options.add_study(parser)
    budgets = "KV bytes on the device: 0.10, 400MB; several by commas"
    add("--budgets", required=True, metavar="A,B,..", help=budgets)
    held = "traces to test on (default: some of --traces, which are not fitted on)"
    add("--holdout", type=Path, nargs="+", action="extend", metavar="DIR", help=held)
    share = "of the documents, without --holdout (0.2)"
    add("--holdout-share", type=study_options.inner, default=0.2, help=share)
    edges = "bounds of length buckets, in entries (default: powers of two, by what there is)"
    add("--length-edges", type=study_options.counts, metavar="A,B,..", help=edges)
    add("--seed", type=study_options.natural, default=0, help="of what is held out (0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        print("\n".join(run(args)))

    return cli.exit_code(body, interrupted="interrupted: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
