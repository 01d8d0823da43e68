"""Speed of training a memory indexer on one accelerator: the step, its data, a peer in torch.

    python -m evals.bench_train [--workers N] [--peer] [--json F]

The step is `train.indexer`'s own at true shapes: 3 layers of 128 heads and rank 2048, 64 samples of
2,048 candidates from documents of 65,536 entries, contents random. Four figures: the step on
batches that are on the device already, beside the floor that memory and arithmetic set; CPU time of
drawing a batch; the input pipeline alone, from traces on disk; and both together, as a run has
them, with the share of time that is spent waiting for batches. `--peer` also runs
`evals.torch_train_peer`, after comparing losses and gradient norms of a small model in float32 and
in bfloat16; it runs in a process of its own, by another Python if one is named.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from evals.lsa_workload import say
from evals.train_workload import (
    RUNS,
    SMOKE,
    Ceilings,
    Floor,
    Sizes,
    drawing_seconds,
    measure_ceilings,
    random_inputs,
    random_planes,
    sending_seconds,
    write_traces,
)
from lsa_jax.lsa.indexer_config import leaf_name, leaf_shapes
from lsa_jax.lsa.memory_indexer import random_leaves, rope_frequencies
from lsa_jax.shardings import make_mesh
from train.data.dataset import Batches, Corpus, DataConfig, batches
from train.data.workers import Taker
from train.run.key_pool import KeyPlanes, KeyPool, gather
from train.run.loop import AHEAD
from train.run.optimizer import TrainState
from train.run.step import Inputs, Step, StepConfig, taken_from

BATCHES = 4  # different ones in turn
CHECK_STEPS = 3
CHECK_SIZES = dataclasses.replace(SMOKE, hidden=64, heads=8, rank=48, head_dim=32, rope_dim=16)
# Of losses and norms. Float32: sums in other orders, and Adam's division by moments near 0.
# bfloat16: torch rounds more intermediates than we do, 2^-9 each.
TOLERANCES = {"float32": 1e-4, "bfloat16": 1e-2}
CHECK_CLIP = 0.05  # below the norms met, so that clipping is compared too
WAITING = 0.05  # of the loop's time, by the host
SLOWER = 0.05  # than on batches that are there: beyond, the pipeline holds the device up
MODES = ("eager", "compiled", "compiled, CUDA graphs")


class PeerError(ValueError):
    """The peer did not run, or computes something else."""


def median_step(run: Callable[[], None], steps: int) -> float:
    """Median seconds of a step over RUNS runs of `steps` steps to completion, after a first one."""
    times = []
    for _ in range(RUNS + 1):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) / steps)
    return statistics.median(times[1:])


class Training:
    """A step and its state, from random parameters."""

    def __init__(self, sizes: Sizes, cfg: StepConfig):
        self.step = Step(cfg, make_mesh())
        self.parameters = random_leaves(sizes.indexer, jax.random.key(0))
        self.state: TrainState = self.step.init(self.parameters)

    def on_device(self, sizes: Sizes, steps: int) -> dict[str, float]:
        """Seconds to compile and of a step, on batches that are there."""
        planes = random_planes(sizes, BATCHES)
        placed = [self.step.place(random_inputs(sizes, seed)) for seed in range(BATCHES)]
        start = time.perf_counter()
        self.state, packed = self.step(self.state, placed[0], planes)
        jax.block_until_ready(packed)
        compile_seconds = time.perf_counter() - start

        def run() -> None:
            packed = None
            for i in range(steps):
                self.state, packed = self.step(self.state, placed[i % BATCHES], planes)
            jax.block_until_ready((self.state, packed))

        return {"first_seconds": compile_seconds, "seconds": median_step(run, steps)}

    def from_pipeline(self, stream: Batches, pool: KeyPool, steps: int) -> dict[str, float]:
        """Seconds of a step on the pipeline's batches, as the training loop takes them.

        Of these, how long it waits for batches, and for how long the host is busy itself: with the
        pool of keys, and with dispatching the step. Batches are taken and sent by a thread.
        """
        spent = np.zeros(2)
        taker = Taker(taken_from(stream, self.step.mesh), ahead=AHEAD)

        def run() -> None:
            pending = None
            for _ in range(steps):
                times = [time.perf_counter()]
                taken = next(taker)
                times.append(time.perf_counter())
                pool.supply(taken.demand)
                self.state, packed = self.step(self.state, taken.placed, pool.planes)
                times.append(time.perf_counter())
                if pending is not None:
                    self.step.report(pending)
                pending = packed
                spent[:] += np.diff(times)
            jax.block_until_ready(self.state)

        with contextlib.closing(taker):
            run()
            spent[:] = 0
            seconds = median_step(run, steps)
        waiting, dispatching = spent / ((RUNS + 1) * steps)
        return {"seconds": seconds, "waiting_seconds": waiting, "dispatch_seconds": dispatching}

    def check_steps(self, inputs: Inputs, planes: KeyPlanes) -> dict[str, list[float]]:
        """Losses and gradient norms of the first steps on one batch."""
        reports = []
        for _ in range(CHECK_STEPS):
            self.state, packed = self.step(self.state, self.step.place(inputs), planes)
            reports.append(self.step.report(packed))
        return {"loss": [r.loss for r in reports], "grad_norm": [r.norm for r in reports]}


def measure_pipeline(
    sizes: Sizes, training: Training, steps: int, data: DataConfig
) -> dict[str, Any]:
    """Batches a second from traces on disk, alone and with the step behind them."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as open_:
        start = time.perf_counter()
        corpus = Corpus.open([write_traces(sizes, Path(folder))])
        say(f"traces written in {time.perf_counter() - start:.1f} s")
        first = open_.enter_context(contextlib.closing(batches(corpus, data, sizes.sampling)))
        epochs = -(-(2 * RUNS + 3) * steps // first.steps_per_epoch)
        stream = batches(corpus, data, sizes.sampling, epochs=epochs)
        open_.enter_context(contextlib.closing(stream))
        pool = KeyPool(corpus, data, stream.table, training.step.mesh)
        open_.enter_context(contextlib.closing(pool))
        drawing, candidates = drawing_seconds(first), []
        sending = sending_seconds(first, training.step)

        def drain() -> None:
            candidates.extend(next(stream).drawn.index.shape[1] for _ in range(steps))

        alone = median_step(drain, steps)
        loop = training.from_pipeline(stream, pool, steps)
    return {
        "workers": data.workers,
        "threads": data.threads,
        "drawing_seconds": drawing,
        "sending_seconds": sending,
        "batches_per_second": 1 / alone,
        "mean_candidates": statistics.fmean(candidates),
        "loop": loop,
        "waiting_share": loop["waiting_seconds"] / loop["seconds"],
    }


def call_peer(python: str, command: str, argument: str) -> dict[str, Any]:
    """The JSON that the peer prints. PeerError where it fails."""
    arguments = [python, "-m", "evals.torch_train_peer", command, argument]
    root = Path(__file__).parents[1]
    done = subprocess.run(arguments, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise PeerError(f"{' '.join(arguments[:4])} failed: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_inputs(
    path: Path, training: Training, inputs: Inputs, planes: KeyPlanes, *, bf16: bool
) -> None:
    """The parameters, a batch and settings as the peer's `check` reads them."""
    cfg, step = training.step.cfg.indexer, training.step
    settings = {
        "layers": [leaf_name(ordinal, "") for ordinal in cfg.target_layers],
        "heads": cfg.n_heads,
        "norm_eps": cfg.norm_eps,
        "bf16": bf16,
        "rates": [np.asarray(step.rates(k)).item() for k in range(CHECK_STEPS)],
        "optimizer": dataclasses.asdict(step.cfg.optimizer),
    }
    drawn = inputs.drawn
    keys, scale = jax.jit(gather)(planes, drawn.sample[:, 0], drawn.index)
    keys = np.stack([np.asarray(part).view(np.uint8) for part in keys])
    targets = {name: getattr(drawn.targets, name) for name in ("labels", "weights", "valid")}
    arrays = {name: np.asarray(leaf) for name, leaf in training.parameters.items()}
    arrays |= {"hidden": inputs.hidden[:, :, 0].astype(np.float32), "positions": drawn.positions}
    arrays |= {"keys": keys, "scale": np.stack(scale or []), **targets}
    arrays |= {"settings": np.array(json.dumps(settings)), "theta": rope_frequencies(cfg)}
    np.savez(path, allow_pickle=False, **arrays)


def check_peer(python: str) -> dict[str, Any]:
    """Losses and norms of both, and the largest relative difference. PeerError beyond tolerance."""
    result: dict[str, Any] = {}
    for dtype, tolerance in TOLERANCES.items():
        cfg = CHECK_SIZES.step(total=10, compute_dtype=dtype, clip=CHECK_CLIP)
        training = Training(CHECK_SIZES, cfg)
        inputs, planes = random_inputs(CHECK_SIZES, seed=9), random_planes(CHECK_SIZES, seed=8)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "inputs.npz"
            write_inputs(path, training, inputs, planes, bf16=dtype == "bfloat16")
            theirs = call_peer(python, "check", str(path))
        ours = training.check_steps(inputs, planes)
        pairs = [(np.array(ours[name]), np.array(theirs[name])) for name in ours]
        worst = max(float(np.max(np.abs(a - b) / np.abs(b))) for a, b in pairs)
        result[dtype] = {"ours": ours, "peer": theirs, "difference": worst}
        say(f"peer's losses and gradient norms in {dtype}: within {worst:.1e} of ours")
        if not worst <= tolerance:
            raise PeerError(f"the peer must agree within {tolerance} in {dtype}, got {worst:.1e}")
    return result


def time_peer(python: str, sizes: Sizes, steps: int, modes: Sequence[str]) -> dict[str, Any]:
    """The peer's seconds a step by mode."""
    fields = {name: getattr(sizes, name) for name in ("batch", "candidates", "hidden", "heads")}
    fields |= {"layers": len(sizes.target_layers), "rank": sizes.rank}
    fields |= {"head_dim": sizes.head_dim, "rope_dim": sizes.rope_dim}
    settings = {"sizes": fields, "modes": list(modes), "steps": steps, "batches": BATCHES}
    settings["optimizer"] = dataclasses.asdict(sizes.step(total=1).optimizer)
    return call_peer(python, "time", json.dumps(settings))


def describe(result: dict[str, Any], sizes: Sizes) -> Iterator[str]:
    """The figures, a line at a time."""
    step, floor, data = result["step"], result["floor"], result["pipeline"]
    yield (
        f"step: {step['seconds'] * 1e3:.3f} ms, {1 / step['seconds']:,.0f} steps/s; floor "
        f"{floor['seconds'] * 1e3:.3f} ms, {100 * floor['seconds'] / step['seconds']:.0f} % of it;"
        f" first call {step['first_seconds']:.1f} s"
    )
    loop, where = data["loop"], f"{data['workers']} workers"
    yield (
        f"drawing a batch: {data['drawing_seconds'] * 1e3:.1f} ms of CPU, sending it "
        f"{data['sending_seconds'] * 1e3:.2f} ms; pipeline alone, {where}: "
        f"{data['batches_per_second']:,.1f} batches/s of {sizes.batch} samples, "
        f"{data['mean_candidates']:,.0f} candidates"
    )
    yield (
        f"loop: {loop['seconds'] * 1e3:.3f} ms a step, {1 / loop['seconds']:,.1f} steps/s; waiting "
        f"for batches {loop['waiting_seconds'] * 1e3:.3f} ms, the host's own part, dispatch: "
        f"{loop['dispatch_seconds'] * 1e3:.3f} ms"
    )
    # The host may wait while the device still computes; either alone is called the bottleneck.
    slower, waiting = loop["seconds"] / step["seconds"] - 1, data["waiting_share"]
    verdict = "is" if slower > SLOWER or waiting > WAITING else "is not"
    yield (
        f"the input pipeline {verdict} the bottleneck: with it a step takes {100 * slower:.2f} % "
        f"longer than on batches that are on the device (at most {100 * SLOWER:g}); the host waits "
        f"for batches in {100 * waiting:.2f} % of the time (at most {100 * WAITING:g})"
    )
    for mode, seconds in result.get("peer", {}).get("seconds", {}).items():
        ratio = seconds / step["seconds"]
        yield f"peer, torch {mode}: {seconds * 1e3:.3f} ms, {ratio:.2f} times our step"


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All measurements, as the JSON has them."""
    sizes = SMOKE if args.smoke else Sizes()
    device = jax.devices()[0]
    result: dict[str, Any] = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "sizes": dataclasses.asdict(sizes) | {"candidates": sizes.candidates},
        "parameters": sum(int(np.prod(s)) for s in leaf_shapes(sizes.indexer).values()),
    }
    if args.peer:
        result["check"] = check_peer(args.peer_python)
    ceilings: Ceilings = measure_ceilings(*((1 << 18, 256) if args.smoke else (1 << 30, 8192)))
    result["ceilings"] = ceilings._asdict()
    result["floor"] = Floor.of(sizes, ceilings)._asdict()
    say(
        f"{device.device_kind}: {ceilings.bytes_per_second / 1e9:,.0f} GB/s, "
        f"{ceilings.flops_per_second / 1e12:,.1f} TFLOP/s"
    )
    training = Training(sizes, sizes.step(total=10**6))
    result["step"] = training.on_device(sizes, args.steps)
    # Without mass, as the objective has no use for it; one size, as one step is compiled.
    given = {"workers": args.workers, "threads": args.threads}
    data = DataConfig(batch_size=sizes.batch, sizes=1, mass=False, **given)
    result["pipeline"] = measure_pipeline(sizes, training, args.steps, data)
    if args.peer:
        modes = MODES[:1] if args.smoke else MODES
        result["peer"] = time_peer(args.peer_python, sizes, args.steps, modes)
    return result


def main(argv: list[str] | None = None) -> int:
    """Command line; 1 where the peer fails or disagrees."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peer", action="store_true", help="also run the step in torch")
    parser.add_argument("--peer-python", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run (default: 40)")
    spare = max(0, (os.cpu_count() or 1) - 2)  # the loop and its thread have the other two
    parser.add_argument(
        "--workers",
        type=int,
        default=spare,
        help="processes that draw batches (default: the cores but two, here %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=DataConfig().threads, help="that do so with --workers 0"
    )
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    try:
        result = run(args)
    except PeerError as why:
        print(f"error: {why}", file=sys.stderr)
        return 1
    for line in describe(result, SMOKE if args.smoke else Sizes()):
        say(line)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
