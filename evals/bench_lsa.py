"""Speed and memory of the LSA path on one accelerator, at the true shapes of V4-Flash's KV path.

    python -m evals.bench_lsa [--context 1M] [--parts recall level1 ...] [--json F]

Contents are synthetic: times and bytes do not depend on them. 1M = 2^20 tokens. Each part runs in a
process of its own, because the peak of device memory only grows, and so that a fault in one kernel
leaves the other parts their device:

    recall     pages from pinned host memory into the pool, beside its peers
    level1     scoring of all entries by the three target layers' retrievers
    published  peak memory of a boundary (fire, select, assign, recall) at the published 384 pages
    budget     the same under a budget of 10 % of full KV
    select     the two steps between scoring and recall
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.bench_backbone import read_bandwidth
from evals.lsa_boundary import measure_memory
from evals.lsa_recall import measure_recall
from evals.lsa_workload import (
    PAGE,
    PLANS,
    Shapes,
    choose,
    fire,
    indexer,
    level1_inputs,
    median_seconds,
    on_gpu,
    say,
)
from lsa_jax.cli import Parser
from lsa_jax.lsa import pool_map
from lsa_jax.lsa.policy import PolicyConfig


def measure_level1(shapes: Shapes, repeats: int) -> dict[str, Any]:
    """One fire: projections, scoring, ensemble. Alone, and as one of many in flight."""
    bandwidth = read_bandwidth() if on_gpu() else 1e10
    hidden, positions, keys = level1_inputs(shapes)
    result: dict[str, Any] = {"read_bytes_per_second": bandwidth}
    for mode in ("bfloat16", "fp8"):
        graph, weights = indexer(shapes, mode)
        jitted = jax.jit(functools.partial(fire, graph))

        def run(i: int, jitted: Any = jitted, weights: Any = weights) -> jax.Array:
            return jitted(weights, hidden[i % PLANS], positions, keys)

        nbytes = sum(x.nbytes for x in jax.tree.leaves((weights, keys)))
        alone = median_seconds(run, repeats)
        many = median_seconds(lambda _, run=run: [run(i) for i in range(repeats)], 3) / repeats
        result[mode] = {
            "ms_alone": round(alone * 1e3, 3),
            "ms_back_to_back": round(many * 1e3, 3),
            "floor_ms": round(nbytes / bandwidth * 1e3, 3),
        }
        say(f"level 1, {shapes.entries} entries x 3 layers, {mode} queries: {result[mode]}")
    return result


def measure_select(shapes: Shapes, repeats: int) -> dict[str, Any]:
    """Select and assign together, by the published rule and by ours under the same number."""
    slots = shapes.recall_pages
    shape = (PLANS, 1, shapes.entries)
    scores = jnp.asarray(np.random.default_rng(5).random(shape, np.float32))
    result = {}
    published = PolicyConfig(policy="published", recall_pages=slots)
    for name, policy in (("published", published), ("budget", PolicyConfig())):
        step = jax.jit(functools.partial(choose, shapes, policy, slots), donate_argnums=1)
        held = pool_map.empty_pool(slots)

        def run(i: int, step: Any = step) -> Any:
            nonlocal held
            held, *rest = step(scores[i % PLANS], held, jnp.int32(i))
            return rest

        result[name] = {"ms": round(median_seconds(run, repeats) * 1e3, 3)}
        say(f"select + assign of {shapes.pages} pages, policy {name}: {result[name]}")
    return result


PARTS: dict[str, Callable[[Shapes, int], dict[str, Any]]] = {
    "recall": measure_recall,
    "level1": measure_level1,
    "published": lambda shapes, _: measure_memory(shapes, None),
    "budget": lambda shapes, _: measure_memory(shapes, 0.10),
    "select": measure_select,
}


def apart(parts: Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Each part in a process of its own; one that fails is named, and the next one runs."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        for part in parts:
            file = Path(directory) / part
            command = [sys.executable, "-m", "evals.bench_lsa", "--parts", part]
            options = ["--context", str(args.context), "--repeats", str(args.repeats)]
            done = subprocess.run([*command, *options, "--json", str(file)], check=False)
            if done.returncode:
                say(f"part {part} failed with exit code {done.returncode}")
                results[part] = {"failed": done.returncode}
            else:
                results |= json.loads(file.read_text())
    return results


def tokens(text: str) -> int:
    """A context such as 1M, 64K (powers of two) or 16384: whole pages, at least 16 of them."""
    unit = {"K": 1 << 10, "M": 1 << 20}.get(text[-1:], 1)
    digits = text.rstrip("KM")
    step = 16 * PAGE * Shapes.cfg.csa_ratio
    if not digits.isdecimal() or not int(digits) or int(digits) * unit % step:
        raise argparse.ArgumentTypeError(f"must be a positive multiple of {step}, got {text!r}")
    return int(digits) * unit


def main(argv: list[str] | None = None) -> int:
    """Command line. 1 where a part failed."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=tokens, default=1 << 20, help="tokens (default: 1M)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    if len(args.parts) > 1:
        results = apart(args.parts, args)
    else:
        (part,) = args.parts
        say(f"{part}: {jax.devices()[0].device_kind}, JAX {jax.__version__}")
        results = {part: PARTS[part](Shapes(args.context), args.repeats)}
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n")
    return int(any("failed" in result for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
