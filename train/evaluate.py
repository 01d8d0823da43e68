"""Evaluates memory indexers on traces as they will be deployed, beside untrained arms.

    python -m train.evaluate --indexer RUN_OR_FILE --traces DIR --out OUT

A decision scores all entries that exist at its token, and a budget of KV bytes says how many pages
are on the device until the next one. Every arm gets the same pages: forced ones (--recency,
--sink), then by its scores. "Evictable" entries are those in the other pages. Intervals are 95 %,
by bootstrap over documents. Writes report.json, pareto.csv, calibration.csv and a picture of each;
calibration is of probabilities, which an indexer with the score "softmax" does not give.
"""

import argparse
import dataclasses
import importlib
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from lsa_jax import cli, config_io
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_config import Score
from lsa_jax.lsa.indexer_file import IndexerFile
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.policy import default_threshold
from train import study_options
from train.data.labels import ResidentRule
from train.outputs import check_directory
from train.quality import evaluation_report as report
from train.quality.baselines import BASELINES, DESCRIPTIONS, Baseline, PagePolicy
from train.quality.evaluation import check_distinct, check_trace, open_traces
from train.quality.evaluation_report import Summary
from train.quality.metrics import MetricsConfig
from train.quality.pareto import DeviceRoom, parse_budgets
from train.quality.study import Protocol, Study, study
from train.traces.trace import Trace

BUDGETS = "0.02,0.05,0.10,0.20,0.40"
EDGES = (16384, 32768, 65536)  # entries; the authors' length buckets
REPORT = "report.json"


def indexer_names(paths: list[Path]) -> dict[str, Path]:
    """Indexers by a short name: the file's or the directory's, or its path where two are alike."""
    if len({path.resolve() for path in paths}) < len(paths):
        raise ConfigError(f"--indexer must be given once for a file, got {[*map(str, paths)]}")
    stems = [path.resolve().name if path.is_dir() else path.stem for path in paths]
    return {
        str(path) if stems.count(stem) > 1 else stem: path
        for stem, path in zip(stems, paths, strict=True)
    }


def _protocol(
    args: argparse.Namespace, path: Path, file: IndexerFile, rule: ResidentRule
) -> Protocol:
    """Thresholds that a file brings hold for the policy "budget" unless one is given, as in
    decoding."""
    calibrated = args.threshold is None and args.policy == "budget"
    return Protocol(
        metrics=MetricsConfig(threshold=args.threshold, ks=args.ks, resident=rule),
        budgets=parse_budgets(args.budgets),
        interval=args.interval,
        window=args.window,
        taus=args.taus,
        policy=args.policy,
        baselines=args.baselines,
        calibration=study_options.calibration_of(path, file) if calibrated else None,
        seed=args.seed,
    )


def check_output(args: argparse.Namespace) -> None:
    """Raises FileExistsError or ConfigError before anything is computed."""
    if (args.out / REPORT).exists() and not args.overwrite:
        raise FileExistsError(f"{args.out / REPORT} exists already: --overwrite replaces it")
    check_directory("--out", args.out)
    if args.plots and importlib.util.find_spec("matplotlib") is None:
        got = "got none: pip install 'lsa_jax[plot]', or --no-plots"
        raise ConfigError(f"pictures need matplotlib, {got}")


class Case(NamedTuple):
    """One indexer, and how it is judged."""

    path: Path
    file: IndexerFile
    step: int | None  # of a run: its checkpoint
    room: DeviceRoom
    protocol: Protocol


def read_cases(args: argparse.Namespace, cfg: ModelConfig, traces: list[Trace]) -> dict[str, Case]:
    """The indexers by name, held to the backbone and to every trace."""
    rule = study_options.resident_rule(args, traces, args.policy)
    cases = {}
    for name, path in indexer_names(args.indexer).items():
        source = study_options.read_indexer(path, cfg, named=args.config)
        file = source.indexer
        room = study_options.device_room(args, cfg, file.config, rule)
        for trace in traces:
            room.check(trace)
            check_trace(file.config, trace)
        cases[name] = Case(path, file, source.step, room, _protocol(args, path, file, rule))
    return cases


def run(args: argparse.Namespace) -> list[str]:
    """Evaluates, writes all files, and returns the lines to print."""
    check_output(args)
    cfg = config_io.load_config(args.config)
    traces = open_traces(args.traces, verify=args.verify)
    check_distinct(traces)
    cases = read_cases(args, cfg, traces)
    total = len(cases) * sum(-(-trace.tokens // args.interval) for trace in traces)
    with cli.token_progress(total, "evaluate") as progress:
        studies = {
            name: study(from_file(case.file), traces, case.room, case.protocol, progress)
            for name, case in cases.items()
        }
    if not all(found.decisions for found in studies.values()):
        raise ConfigError("traces must have a token at which an entry exists, got none")
    summaries = {name: report.summary(found, args.length_edges) for name, found in studies.items()}
    content = as_json(args, traces, cases, studies, summaries)
    write_files(args, content, summaries)
    return _lines(args, content, summaries)


def as_json(
    args: argparse.Namespace,
    traces: list[Trace],
    cases: Mapping[str, Case],
    studies: Mapping[str, Study],
    summaries: Mapping[str, Summary],
) -> dict[str, Any]:
    """The content of report.json. Figures are [value, low, high], null where undefined."""
    first = next(iter(studies.values()))
    baselines = [arm for arm in DESCRIPTIONS if arm in first.arms]
    return {
        "schema": report.SCHEMA,
        "command": study_options.settings(args),
        "traces": {
            "documents": len(first.entries),
            "without_decisions": len(traces) - len(first.entries),
            "decisions": first.decisions,
            "tokens": sum(trace.tokens for trace in traces),
            "entries": [min(first.entries), int(np.median(first.entries)), max(first.entries)],
            "models": sorted({str(trace.info.model) for trace in traces}),
            "dropped_labels": sum(trace.info.dropped_labels for trace in traces),
        },
        "resident": dataclasses.asdict(next(iter(cases.values())).protocol.metrics.resident),
        "arms": {arm: DESCRIPTIONS[arm] for arm in baselines},
        "indexers": {
            name: {
                "file": str(case.path),
                "step": case.step,
                "config": indexer_config.to_json(case.file.config),
                "threshold": _threshold(case.protocol, case.file.config.score),
                **report.summary_json(summaries[name]),
            }
            for name, case in cases.items()
        },
        "differences": report.as_json(report.differences(studies, baselines)),
    }


def _threshold(protocol: Protocol, score: Score) -> Any:
    """One for all lengths, an even share, or the calibration that was used."""
    if protocol.calibration is not None:
        return dataclasses.asdict(protocol.calibration)
    given = protocol.metrics.threshold
    return default_threshold(score) if given is None else given


def write_files(
    args: argparse.Namespace, content: dict[str, Any], summaries: Mapping[str, Summary]
) -> None:
    """Writes what was found; the report last, so that one that is there is complete."""
    budgets = list(parse_budgets(args.budgets))
    args.out.mkdir(parents=True, exist_ok=True)
    rows = {"pareto": report.pareto_rows(summaries, budgets)}
    rows["calibration"] = report.calibration_rows(summaries)
    for name, lines in rows.items():
        (args.out / f"{name}.csv").write_text(report.as_csv(lines), encoding="utf-8")
    if args.plots:
        plots = importlib.import_module("train.quality.evaluation_plots")  # needs matplotlib
        plots.pareto(summaries, budgets).savefig(args.out / "pareto.png")
        plots.calibration(summaries).savefig(args.out / "calibration.png")
    text = json.dumps(content, indent=1, allow_nan=False)
    (args.out / REPORT).write_text(text + "\n", encoding="utf-8")


def _lines(
    args: argparse.Namespace, content: dict[str, Any], summaries: Mapping[str, Summary]
) -> list[str]:
    """The short report."""
    budgets = list(parse_budgets(args.budgets))
    k = 512 if 512 in args.ks else max(args.ks, default=0)
    of = content["traces"]
    lines = [f"{of['documents']:,} documents, {of['decisions']:,} decisions; {args.out / REPORT}"]
    if of["documents"] == 1:
        lines.append(report.NO_INTERVALS)
    for name, found in summaries.items():
        lines += ["", f"{name}: next {args.window} tokens, evictable entries, %"]
        lines += report.table(found, budgets, k)
        if not found.curves:
            lines.append(report.NO_PROBABILITIES)
    return [*lines, "", *report.difference_lines(content["differences"], budgets)]


def _baselines(text: str) -> tuple[Baseline, ...]:
    words = text.split(",") if text else []
    if unknown := [word for word in words if word not in BASELINES]:
        wanted = f"some of {','.join(BASELINES)}"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {unknown[0]!r}")
    return tuple(arm for arm in BASELINES if arm in words)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m train.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    several = "runs, indexer files, exports; several are compared, each with the first"
    of = {"type": Path, "nargs": "+", "action": "extend", "required": True}
    add("--indexer", **of, metavar="FILE", help=several)
    add("--out", type=Path, required=True, metavar="DIR", help="where the report goes")
    add("--overwrite", action="store_true", help="replaces the report that is there")
    study_options.add_study(parser)
    budgets = f"KV bytes on the device, shares of all or sizes (default: {BUDGETS})"
    add("--budgets", default=BUDGETS, metavar="A,B,..", help=budgets)
    arms = f"untrained arms (default: {','.join(BASELINES)}; an empty text: none)"
    add("--baselines", type=_baselines, default=BASELINES, metavar="A,B,..", help=arms)
    ks = MetricsConfig().ks
    add("--ks", type=study_options.counts, default=ks, help=f"K of recall@K (default: {ks})")
    taus = (16, 32, 64, 128, 256)
    since = f"bounds of tokens since the decision (default: {taus})"
    add("--taus", type=study_options.counts, default=taus, help=since)
    edges = f"bounds of length buckets, in entries (default: {EDGES})"
    add("--length-edges", type=study_options.counts, default=EDGES, help=edges)
    policy = "from scores to the order of pages (default: budget); top: by the best entry"
    add("--policy", choices=get_args(PagePolicy), default="budget", help=policy)
    threshold = "default: the file's, for the policy budget; else 0.5, or an even share of shares"
    add("--threshold", type=study_options.inner, help=threshold)
    add("--seed", type=study_options.natural, default=0, help="of the random arm (0)")
    pictures = "draw pareto.png and calibration.png (default)"
    add("--plots", action=argparse.BooleanOptionalAction, default=True, help=pictures)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        print("\n".join(run(args)))

    return cli.exit_code(body, interrupted="interrupted: nothing was written")


if __name__ == "__main__":
    sys.exit(main())
