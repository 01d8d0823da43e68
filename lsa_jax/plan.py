"""What a model will need on accelerators that are not here: memory, collectives, time of a step.

    python -m lsa_jax.plan --config v4_flash --topology v5p:2x2x2 --context 1M --batch 8 \\
        --attention lsa --kv-budget 0.10

First arithmetic, which refuses what cannot be held; then every program is compiled ahead of time
for the topology, from shapes alone. K is 1024 and 1M is 2^20 tokens. Exit codes: 0, 2 after an
error (one line), also where a topology cannot hold the case.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

import jax

from lsa_jax import cli, config_io
from lsa_jax.checkpoint.leaf import Weights
from lsa_jax.config import CacheConfig, ComputeConfig, ConfigError, KVFormat
from lsa_jax.footprint import parse_length
from lsa_jax.lsa.budget import Budget, parse_budget
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.targets import check_targets, default_target_layers
from lsa_jax.planning import fit
from lsa_jax.planning.case import Case, MeshShape
from lsa_jax.planning.hardware import DEVICES, parse_topology
from lsa_jax.planning.plan import Plan, as_json, make_plan, notes
from lsa_jax.planning.programs import Compiled
from pallas_kernels.targets import LIBTPU_ENVIRONMENT

_KV_FORMATS: dict[str, KVFormat] = {"f32": "float32", "bf16": "bfloat16", "fp8": "fp8"}
_CONTEXTS = ("256K", "512K", "1M")  # of --smallest
_BATCHES = (1, 32)


def read_case(args: argparse.Namespace) -> Case:
    """The case that options ask for; ConfigError where they make no sense."""
    cfg = config_io.load_config(args.config)
    context, _ = parse_length(args.context, 1024)
    lsa = indexer = None
    if args.attention == "lsa":
        targets = check_targets(cfg, default_target_layers(cfg))
        lsa = LsaConfig(
            targets=targets,
            lookahead=args.lookahead,
            budget=args.kv_budget,
            policy=PolicyConfig(recency=args.recency),
        )
        indexer = IndexerConfig.for_model(cfg, target_layers=targets)
    elif args.kv_budget is not None:
        raise ConfigError("--kv-budget needs --attention lsa, got --attention full")
    return Case(
        name=args.config,
        cfg=dataclasses.replace(cfg, num_nextn_predict_layers=0),  # runs load no drafter
        context=context,
        batch=args.batch,
        weights=args.weights,
        compute=ComputeConfig(),
        cache=CacheConfig(kv_format=_KV_FORMATS[args.kv], page_entries=args.page_entries),
        prefill_chunk=args.prefill_chunk,
        lsa=lsa,
        indexer=indexer,
    )


def _size(nbytes: float) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if abs(nbytes) >= unit / 10:
            return f"{nbytes / unit:,.2f} {name}"
    return f"{nbytes / 2**10:,.2f} KiB"


def as_text(plan: Plan) -> str:
    """The plan for people."""
    case, device = plan.case, plan.topology.device
    data, expert, tensor = plan.mesh
    pool = "" if case.lsa is None else f", pool of {case.pool_slots:,} pages"
    lines = [
        f"{case.name}, {case.attention} attention{pool}: {case.batch} x {case.context:,} tokens, "
        f"weights {case.weights}, KV {case.cache.kv_format}",
        f"{plan.topology.name}: {plan.topology.devices} x {device.kind}, "
        f"mesh data {data}, expert {expert}, tensor {tensor}; JAX {jax.__version__}",
        "",
        "memory of one device",
    ]
    parts = dataclasses.asdict(plan.memory)
    lines += [f"  {name:<12}{_size(n):>14}" for name, n in parts.items() if name != "host"]
    lines.append(f"  {'resident':<12}{_size(plan.memory.device):>14}")
    lines.append(f"host memory, of all devices together: {_size(plan.memory.host)}")
    if plan.programs:
        lines += ["", *_program_lines(plan)]
        verdict = "fits" if plan.fits else "does not fit"
        lines.append(f"peak {_size(plan.peak)} of {_size(device.memory)}: {verdict}")
    return "\n".join([*lines, "", *_step_lines(plan), "", *(f"note: {n}" for n in notes(plan))])


def _program_lines(plan: Plan) -> list[str]:
    lines = [
        f"{'program':<26}{'layers':>7}{'temporary':>13}{'passing':>13}{'collectives':>24}"
        f"{'compiled in':>13}"
    ]
    for p in plan.programs:
        said = f"{sum(p.collectives.count.values())} ({_size(p.collectives.nbytes)})"
        passing = _size(p.passing + p.added + p.code)
        lines.append(
            f"{p.name:<26}{p.layers:>7}{_size(p.temporary):>13}{passing:>13}{said:>24}"
            f"{p.seconds:>11.1f} s"
        )
    return lines


def _step_lines(plan: Plan) -> list[str]:
    step = plan.step
    parts = ", ".join(f"{name} {_size(n)}" for name, n in step.nbytes.items())
    lines = [
        "roofline of a decode step (an estimate: ceilings of one device, work divided evenly)",
        f"  reads {_size(sum(step.nbytes.values()))}: {parts}",
        f"  {step.flops / 1e9:,.1f} GFLOP; memory {1e3 * step.memory_seconds:,.3f} ms, arithmetic "
        f"{1e3 * step.compute_seconds:,.3f} ms: {1e3 * step.seconds:,.3f} ms a step, "
        f"{plan.case.batch / step.seconds:,.0f} tokens/s",
    ]
    if step.link_seconds is not None and plan.topology.devices > 1:
        lines.append(f"  collectives over links: {1e3 * step.link_seconds:,.3f} ms a step besides")
    return lines


def smallest_table(args: argparse.Namespace) -> str:
    """Smallest topologies by arithmetic: a row per attention, context and batch."""
    names = list(DEVICES)
    head = "".join(f"{name:>14}" for name in names)
    lines = [
        f"{args.config}, weights {args.weights}, KV {args.kv}: smallest topologies by arithmetic, "
        f"{_size(fit.RESERVE)} left for temporaries on each device",
        f"{'attention':<11}{'context':>8}{'batch':>7}{'host memory':>14}{head}",
    ]
    for attention in ("full", "lsa"):
        for context in _CONTEXTS:
            for batch in _BATCHES:
                options = vars(args) | {
                    "attention": attention,
                    "context": context,
                    "batch": batch,
                    "kv_budget": args.kv_budget if attention == "lsa" else None,
                }
                case = read_case(argparse.Namespace(**options))
                found = [fit.smallest(case, device) for device in DEVICES.values()]
                cells = "".join(f"{t.name.split(':')[1] if t else '-':>14}" for t in found)
                host = _size(case.host_bytes) if case.host_bytes else "-"
                lines.append(f"{attention:<11}{context:>8}{batch:>7}{host:>14}{cells}")
    return "\n".join(lines)


def _budget(text: str) -> Budget:
    try:
        return parse_budget(text)
    except ConfigError as why:
        raise argparse.ArgumentTypeError(str(why)) from None


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and 1 <= int(text) <= 10**9):
        raise argparse.ArgumentTypeError(f"must be an integer in 1..10^9, got {text!r}")
    return int(text)


def _mesh(text: str) -> MeshShape:
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and 1 <= int(part) <= 10**5 for part in parts):
        wanted = "three positive integers DATA,EXPERT,TENSOR"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command's options; exits with 2 where they make no sense."""
    parser = cli.Parser(
        prog="python -m lsa_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, help="a preset, a .toml, or a config.json")
    add("--topology", help="such as v5e:4x4, v5p:2x2x2, v6e:2x4, tpu7x:2x2x1, h100:8, h200:4")
    add("--smallest", action="store_true", help="in place of a plan: the smallest topologies")
    add("--context", default="64K", help="tokens of each row, decoded ones too (default 64K)")
    add("--batch", type=_positive, default=1, help="rows (default 1)")
    add("--attention", choices=("full", "lsa"), default="full")
    add("--kv-budget", type=_budget, help="with lsa: occupied KV bytes of all rows: 0.10, 4GiB")
    add("--weights", choices=get_args(Weights), default="keep", help="as converted (default keep)")
    add("--kv", choices=_KV_FORMATS, default="bf16", help="entries and index keys (default bf16)")
    add("--mesh", type=_mesh, metavar="DATA,EXPERT,TENSOR", help="default: least bytes a device")
    add("--prefill-chunk", type=_positive, default=1024)
    add("--page-entries", type=_positive, default=64)
    add("--lookahead", type=_positive, default=64)
    add("--recency", type=_positive, default=PolicyConfig().recency)
    layers = "kinds (default): a layer of each kind computes; all: every one; none: arithmetic only"
    add("--layers", choices=("kinds", "all", "none"), default="kinds", help=layers)
    add("--json", type=Path, metavar="FILE", help="the plan as JSON")
    args = parser.parse_args(argv)
    if (args.topology is None) != args.smallest:
        parser.error("one of --topology and --smallest must be given")
    return args


def _show(program: Compiled) -> None:
    print(f"compiled {program.name} in {program.seconds:.1f} s", file=sys.stderr, flush=True)


def plan(args: argparse.Namespace) -> None:
    """Prints a plan; DoesNotFit after it where the programs need more than there is."""
    if args.smallest:
        print(smallest_table(args))
        return
    made = make_plan(
        read_case(args),
        parse_topology(args.topology),
        mesh=args.mesh,
        depth=None if args.layers == "none" else args.layers,
        progress=_show,
    )
    found: dict[str, Any] = as_json(made)
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    print(as_text(made))
    made.require_fit()


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = parse(argv)
    jax.config.update("jax_platforms", "cpu")  # compilers are wanted here, and no accelerator
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)  # of this process; what the user has set stays
    return cli.exit_code(lambda: plan(args), interrupted="interrupted")


if __name__ == "__main__":
    sys.exit(main())
