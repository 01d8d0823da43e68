"""Speed of the backbone on one accelerator: floors, our times, and HF transformers beside them.

    python -m evals.bench_backbone [--config bench] [--peer] [--json F]

Weights are synthetic: random values at the config's true shapes, routers balanced as aux-loss-free
training leaves them (bias 0, hash tables even). Speed does not depend on more than that.
`--peer` also times HuggingFace transformers (needs torch, transformers, accelerate) on the same
arrays, after comparing its float32 logits with ours.
"""

import argparse
import dataclasses
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from lsa_jax.config import CacheConfig, ComputeConfig, ModelConfig
from lsa_jax.config_io import load_config
from lsa_jax.engine import Engine
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.parameters import ParamSpec, parameter_table
from lsa_jax.sampling import Greedy

PREFILL_TOKENS, CONTEXT, BATCHES = 8192, 2048, (1, 16)
CHECK_TOKENS = 2304  # 576 entries: more than the indexer keeps


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str, std: float) -> jax.Array:
    # bfloat16 values in either dtype, so that both runs have the same weights
    return (jax.random.normal(key, shape, jnp.bfloat16) * std).astype(jnp.bfloat16).astype(dtype)


def _leaf(cfg: ModelConfig, path: str, spec: ParamSpec, key: jax.Array) -> jax.Array:
    name = path.rsplit(".", 1)[-1]
    if spec.kind == "table":
        tokens, k = spec.shape
        start = np.arange(tokens)[:, None] * k + np.arange(k)
        return jnp.asarray(start % cfg.n_routed_experts, jnp.int32)
    if spec.kind == "norm":
        return 1 + _normal(key, spec.shape, "float32", 0.2)
    if name == "bias":
        return jnp.zeros(spec.shape, jnp.float32)
    plain = spec.kind == "f32" and name != "fn"
    std = 0.5 if plain else 1.0 if path == "embed.weight" else spec.shape[-1] ** -0.5
    return _normal(key, spec.shape, "float32", std)


def random_leaves(cfg: ModelConfig, seed: int = 0) -> dict[str, jax.Array]:
    """Float32 leaves made on the device."""
    table = parameter_table(cfg)
    keys = jax.random.split(jax.random.key(seed), len(table))
    return {p: _leaf(cfg, p, s, k) for (p, s), k in zip(table.items(), keys, strict=True)}


def to_bfloat16(cfg: ModelConfig, leaves: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """What a released checkpoint holds in bfloat16, in bfloat16; frees each source as it goes."""
    table, out = parameter_table(cfg), {}
    for path in list(leaves):
        value = leaves.pop(path)
        keep = table[path].kind in ("f32", "table")
        out[path] = value if keep else value.astype(jnp.bfloat16)
    return out


def read_bandwidth() -> float:
    """Bytes/s of summing 4 GiB, best of ten."""
    x = jnp.ones((1 << 30,), jnp.float32)
    run = jax.jit(jnp.sum)
    return x.nbytes / min(_times(lambda: run(x), 10))


def _times(run: Callable[[], object], repeats: int) -> list[float]:
    jax.block_until_ready(run())
    out = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        out.append(time.perf_counter() - start)
    return out


def active_bytes(cfg: ModelConfig, leaves: dict[str, jax.Array], tokens: int) -> float:
    """Weight bytes a decode step of `tokens` rows must read: all but the embedding, and of the
    experts the expected number of distinct ones under even routing."""
    k, e = cfg.num_experts_per_tok, cfg.n_routed_experts
    share = 1 - (1 - k / e) ** tokens
    total = 0.0
    for path, spec in parameter_table(cfg).items():
        if path != "embed.weight" and spec.kind != "table":
            total += leaves[path].nbytes * (share if spec.kind == "expert" else 1)
    return total


class Bench:
    """One engine and random prompts."""

    def __init__(self, cfg: ModelConfig, leaves: dict[str, jax.Array], *, chunk: int):
        self.cfg, self.leaves = cfg, leaves
        self.engine = Engine(
            DeepSeekV4(cfg, ComputeConfig(dtype="bfloat16"), leaves),
            CacheConfig(kv_format="bfloat16"),
            prefill_chunk=chunk,
        )

    def prompts(self, batch: int, tokens: int) -> list[list[int]]:
        """Uniform random ids."""
        draw = np.random.default_rng(batch * tokens)
        return draw.integers(0, self.cfg.vocab_size, (batch, tokens)).tolist()

    def prefill(self, repeats: int) -> float:
        """Median seconds for one prompt of PREFILL_TOKENS, its state's allocation included."""
        prompt = self.prompts(1, PREFILL_TOKENS)

        def run() -> jax.Array:
            state = self.engine.start(batch=1, capacity=PREFILL_TOKENS)
            logits, _ = self.engine.prefill(state, prompt)
            assert isinstance(logits, jax.Array)  # not all_logits
            return logits

        return statistics.median(_times(run, repeats))

    def decode(self, batch: int, repeats: int) -> float:
        """Median seconds per greedy step after CONTEXT tokens."""
        engine, key = self.engine, jax.random.key(0)
        state = engine.start(batch=batch, capacity=2 * CONTEXT)
        logits, state = engine.prefill(state, self.prompts(batch, CONTEXT))
        assert isinstance(logits, jax.Array)  # not all_logits
        token = engine.sample(logits, Greedy(), key, state)
        steps, times = engine.max_burst, []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            burst, state = engine.decode(state, token, steps=steps, sampler=Greedy(), key=key)
            jax.block_until_ready(burst)
            times.append((time.perf_counter() - start) / steps)
            token = burst.last_token(token)
        return statistics.median(times[1:])


def kernel_times(run: Callable[[], object], directory: Path) -> dict[str, tuple[int, float]]:
    """Device kernels of one call, from a profile: name -> (launches, milliseconds)."""
    with jax.profiler.trace(str(directory)):
        jax.block_until_ready(run())
    file = max(directory.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    out: dict[str, tuple[int, float]] = {}
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        if "GPU" in plane.name:
            for event in (e for line in plane.lines if "Stream" in line.name for e in line.events):
                count, ms = out.get(event.name, (0, 0.0))
                out[event.name] = (count + 1, ms + event.duration_ns / 1e6)
    return out


def check_peer(cfg: ModelConfig, leaves: dict[str, jax.Array], log: Callable[[str], None]) -> dict:
    """Compares float32 one-shot logits; frees HF's copies afterwards."""
    from evals import hf_peer

    ids = np.random.default_rng(1).integers(0, cfg.vocab_size, CHECK_TOKENS).tolist()
    model = DeepSeekV4(cfg, ComputeConfig(dtype="float32", backend="xla"), leaves)
    engine = Engine(model, CacheConfig(kv_format="float32"), prefill_chunk=512)
    ours, _ = engine.prefill(engine.start(batch=1, capacity=CHECK_TOKENS), [ids], all_logits=True)
    theirs = hf_peer.logits(hf_peer.build(cfg, leaves), ids)
    gap = np.abs(ours[0] - theirs)
    result = {
        "versions": hf_peer.versions(),
        "tokens": CHECK_TOKENS,
        "max_abs": float(gap.max()),
        "mean_abs": float(gap.mean()),
        "logit_rms": float(np.sqrt(np.mean(theirs**2))),
        "argmax_agreement": float(np.mean(ours[0].argmax(-1) == theirs.argmax(-1))),
    }
    log(f"float32 logits against HF: {result}")
    return result


def measure_peer(cfg: ModelConfig, bench: Bench, repeats: int) -> dict:
    """HF's times on the bfloat16 leaves."""
    from evals import hf_peer

    model = hf_peer.build(cfg, bench.leaves)
    prompt = bench.prompts(1, PREFILL_TOKENS)[0]
    chunks = (PREFILL_TOKENS, CONTEXT)
    return {
        "prefill_seconds": hf_peer.prefill_seconds(model, prompt, chunks, repeats),
        "decode_seconds": {
            b: hf_peer.decode_seconds(model, bench.prompts(b, CONTEXT), 16, repeats)
            for b in BATCHES
        },
    }


def rows(cfg: ModelConfig, bench: Bench, result: dict, peer: dict | None) -> Iterator[str]:
    """The table, a line at a time."""

    def against(times: dict[str, float] | None, ours: float, tokens: int) -> str:
        if not times:
            return ""
        named = [f"{tokens / t:,.0f} tok/s ({n}, {t / ours:.1f}x)" for n, t in times.items()]
        return " | HF " + "; ".join(named)

    seconds = result["prefill_seconds"]
    hf = peer and peer["prefill_seconds"]
    rate = PREFILL_TOKENS / seconds
    yield f"prefill {PREFILL_TOKENS}: {seconds * 1e3:.1f} ms, {rate:,.0f} tok/s" + against(
        hf, seconds, PREFILL_TOKENS
    )
    for b in BATCHES:
        step = result["decode_seconds"][b]
        floor = active_bytes(cfg, bench.leaves, b) / result["read_bandwidth"]
        hf = peer and peer["decode_seconds"][b]
        yield (
            f"decode batch {b}: {step * 1e3:.2f} ms/step, {b / step:,.0f} tok/s, floor "
            f"{floor * 1e3:.2f} ms, {step / floor:.1f}x floor" + against(hf, step, b)
        )


def run(args: argparse.Namespace, log: Callable[[str], None]) -> dict:
    """All measurements, as the JSON has them."""
    cfg = dataclasses.replace(load_config(args.config), num_nextn_predict_layers=0)
    device = jax.devices()[0]
    result: dict = {
        "device": device.device_kind,
        "jax": jax.__version__,
        "config": args.config,
        "parameters": sum(math.prod(s.shape) for s in parameter_table(cfg).values()),
        "read_bandwidth": read_bandwidth(),
    }
    log(f"{result['device']}, JAX {result['jax']}, read {result['read_bandwidth'] / 1e9:,.0f} GB/s")
    leaves = random_leaves(cfg)
    if args.peer:
        result["parity"] = check_peer(cfg, leaves, log)
    bench = Bench(cfg, to_bfloat16(cfg, leaves), chunk=PREFILL_TOKENS)
    result["prefill_seconds"] = bench.prefill(args.repeats)
    result["decode_seconds"] = {b: bench.decode(b, args.repeats) for b in BATCHES}
    warm = bench.engine.compilations
    bench.prefill(1)
    bench.decode(BATCHES[-1], 1)
    result["compile_seconds"] = bench.engine.compile_seconds
    result["compilations_after_warm_up"] = bench.engine.compilations - warm
    log(f"compilations after warm-up: {result['compilations_after_warm_up']}")
    peer = measure_peer(cfg, bench, args.repeats) if args.peer else None
    for line in rows(cfg, bench, result, peer):
        log(line)
    if args.profile:
        result["profile"] = profile(bench, args.profile, log)
    return result | {"peer": peer}


def profile(bench: Bench, directory: Path, log: Callable[[str], None]) -> dict:
    """The ten most expensive kernels of a prefill and of a decode burst."""
    out = {}
    for name, call in (
        ("prefill", lambda: bench.prefill(1)),
        *((f"decode {b}", functools.partial(bench.decode, b, 1)) for b in BATCHES),
    ):
        kernels = kernel_times(call, directory / name.replace(" ", "_"))
        top = sorted(kernels.items(), key=lambda item: -item[1][1])
        total = sum(ms for _, (_, ms) in top)
        log(f"{name}: {sum(n for _, (n, _) in top)} kernels, {total:.1f} ms on the device")
        for kernel, (count, ms) in top[:20]:
            log(f"  {ms:9.2f} ms {count:7d} {kernel[:90]}")
        out[name] = dict(top)
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="bench", help="preset or file (default: bench)")
    parser.add_argument("--peer", action="store_true", help="also time HuggingFace transformers")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", type=Path, metavar="DIR", help="keep profiles in DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(argv)
    begin = time.perf_counter()

    def log(line: str) -> None:
        print(f"[{time.perf_counter() - begin:5.0f} s] {line}", flush=True)

    result = run(args, log)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
