"""Peak device memory of a run on the accelerator at hand, against that of `lsa_jax.plan`.

    python -m evals.live_memory [--json F] [options of lsa_jax.plan, but --topology and --layers]

Without options: `--config bench --weights bf16 --context 64K --batch 1 --attention full`. The plan
is made first, of all layers, by a process of its own, for one device of the kind that is here and
from shapes alone. Then the case runs: synthetic weights, a prompt that leaves room for the decoded
tokens, two cycles of decoding. Exits with 1 where the two differ by more than 5 %, or where making
the weights took more memory than the run.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from evals.lsa_workload import say
from lsa_jax import cli, plan
from lsa_jax.config import ConfigError
from lsa_jax.engine import Engine
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from lsa_jax.lsa.session import LsaSession
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.planning.case import Case
from lsa_jax.planning.hardware import DEVICES
from lsa_jax.sampling import Greedy

TOLERANCE = 0.05
CYCLES = 2


def here() -> Any:
    """The device that runs the case."""
    return jax.devices()[0]


def topology_here() -> str:
    """One device of the kind that is here, as `plan` names it. ConfigError where it is unknown."""
    kind = here().device_kind
    for name, device in DEVICES.items():
        if device.kind == kind:
            return f"{name}:1"
    raise ConfigError(f"device must be one of {sorted(DEVICES)}, got {kind}")


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _random(key: jax.Array, shape: tuple[int, ...], dtype: str, std: float) -> jax.Array:
    return (jax.random.normal(key, shape, jnp.bfloat16) * std).astype(dtype)


def random_weights(case: Case) -> dict[str, jax.Array]:
    """Dense leaves, large ones first, so that the last to be made are made in little memory."""
    leaves = {}
    order = sorted(case.leaves.items(), key=lambda item: -np.prod(item[1].shape))
    for i, (path, info) in enumerate(order):
        if jnp.issubdtype(info.dtype, jnp.integer):
            start = np.arange(np.prod(info.shape)) % case.cfg.n_routed_experts
            leaves[path] = jnp.asarray(start.reshape(info.shape), info.dtype)
            continue
        std = info.shape[-1] ** -0.5 if len(info.shape) > 1 else 0.1
        leaves[path] = _random(jax.random.key(i), info.shape, str(info.dtype), std)
        leaves[path].block_until_ready()
    return leaves


def _full(case: Case, model: DeepSeekV4, prompt: list[list[int]], cycle: int) -> None:
    engine = Engine(model, case.cache, prefill_chunk=case.prefill_chunk)
    state = engine.start(batch=case.batch, capacity=case.context)
    logits, state = engine.prefill(state, prompt)
    assert isinstance(logits, jax.Array)
    key, greedy = jax.random.key(0), Greedy()
    token = engine.sample(logits, greedy, key, state)
    for _ in range(CYCLES):
        burst, state = engine.decode(state, token, steps=cycle, sampler=greedy, key=key)
        token = jax.block_until_ready(burst.last_token(token))


def _two_level(case: Case, model: DeepSeekV4, prompt: list[list[int]], cycle: int) -> None:
    assert case.lsa is not None and case.indexer is not None
    leaves = random_leaves(case.indexer, jax.random.key(1))
    session = LsaSession(
        model,
        case.cache,
        case.lsa,
        MemoryIndexer(case.indexer, leaves),
        rows=case.batch,
        capacity=case.context,
        prefill_chunk=case.prefill_chunk,
    )
    first = []
    for ids in prompt:
        logits = session.admit(ids, max_new_tokens=case.context - len(ids))[1]
        first.append(int(np.argmax(np.asarray(logits))))
    token, key = jnp.asarray(first, jnp.int32), jax.random.key(0)
    for _ in range(CYCLES):
        burst = session.decode(token, steps=cycle, sampler=Greedy(), key=key)
        token = burst.last_token(token)


def run_live(case: Case) -> dict[str, int]:
    """Runs the case; the allocator's peaks after making the weights, and after all."""
    device = here()

    def peak() -> int:
        stats = device.memory_stats()
        if not stats:
            raise ConfigError(f"device must count its memory, got {device.device_kind}")
        return stats["peak_bytes_in_use"]

    weights = random_weights(case)
    made = peak()
    model = DeepSeekV4(case.cfg, case.compute, weights)
    cycle = 64 if case.lsa is None else case.lsa.lookahead
    size = (case.batch, case.context - CYCLES * cycle - 1)
    prompt = np.random.default_rng(0).integers(2, case.cfg.vocab_size, size).tolist()
    (_full if case.lsa is None else _two_level)(case, model, prompt, cycle)
    return {"weights_made": made, "live": peak()}


def planned(argv: list[str]) -> int:
    """The plan's peak in bytes, by another process."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "plan.json"
        command = [sys.executable, "-m", "lsa_jax.plan", *argv, "--layers", "all"]
        subprocess.run([*command, "--json", str(file)], check=True)
        return json.loads(file.read_text())["peak"]


def compare(argv: list[str]) -> dict[str, Any]:
    """Plan and run of the case that these options of `lsa_jax.plan` describe."""
    case = plan.read_case(plan.parse(argv))
    if case.weights != "bf16":
        raise ConfigError(f"--weights must be bf16 here, got {case.weights}")
    say(f"case: {' '.join(argv)}")
    result: dict[str, Any] = {"case": argv, "jax": jax.__version__, "planned": planned(argv)}
    result |= run_live(case)
    result["ratio"] = result["live"] / result["planned"]
    result["holds"] = (
        abs(result["ratio"] - 1) <= TOLERANCE and result["weights_made"] < result["live"]
    )
    say(f"peak bytes: {result}")
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line. 1 where plan and run differ."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    args, rest = parser.parse_known_args(argv)
    failed = 0

    def run() -> None:
        nonlocal failed
        defaults = ["--config", "bench", "--weights", "bf16", "--topology", topology_here()]
        result = compare([*defaults, *rest])
        if args.json:
            args.json.write_text(json.dumps(result, indent=2) + "\n")
        failed = int(not result["holds"])

    return cli.exit_code(run, interrupted="interrupted") or failed


if __name__ == "__main__":
    sys.exit(main())
