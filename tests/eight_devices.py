"""What a mesh of eight devices computes: run by test_sharding.py in a process of its own.

Usage: eight_devices.py DIRECTORY, which receives report.json and logits.npz
"""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
from jax import monitoring

from lsa_jax import shardings
from lsa_jax.checkpoint.store import load_checkpoint
from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.checkpoint.writer import write_checkpoint
from lsa_jax.config import CacheConfig, ComputeConfig, ConfigError
from lsa_jax.engine import Engine
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Greedy
from tests import small_model

CONFIG = small_model.CONFIG
LENGTHS = (21, 3, 40, 16)
OTHER_LENGTHS = (1, 30, 0, 35)
STEPS = 6
CACHE = CacheConfig(kv_format="float32", page_entries=4)
KEY = jax.random.key(0)
PROGRAMS = ("jit(extend)", "jit(sample)", "jit(decode)")  # of the engine, as XLA names them


def new_engine(leaves, mesh=None, cache=CACHE):
    model = DeepSeekV4(CONFIG, ComputeConfig(dtype="float32"), leaves)
    return Engine(model, cache, prefill_chunk=16, max_burst=8, mesh=mesh)


def run(engine, lengths):
    """Prefill and a few steps of four rows: logits of both [4, V], [4, STEPS, V], and the state."""
    rng = np.random.default_rng(1)
    prompts = [rng.integers(2, CONFIG.vocab_size, n).tolist() for n in lengths]
    state = engine.start(batch=4, capacity=64)
    prefill, state = engine.prefill(state, prompts)
    token = engine.sample(prefill, Greedy(), KEY, state)
    burst, state = engine.decode(
        state, token, steps=STEPS, sampler=Greedy(), key=KEY, keep_logits=True
    )
    return {"prefill": np.asarray(prefill), "decode": np.asarray(burst.logits)[:, :STEPS]}, state


def measure(mesh, leaves):
    """Logits on a mesh; what compiled, and how leaves and, at the end, the state are split."""
    engine, compiled = new_engine(leaves, mesh), []

    def listen(event, seconds, **details):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(details["fun_name"])

    monitoring.register_event_duration_secs_listener(listen)
    logits, state = run(engine, LENGTHS)
    report = {"programs": engine.compilations, "xla": sum(map(compiled.count, PROGRAMS))}
    compiled.clear()
    _, state = run(engine, OTHER_LENGTHS)
    report |= {"programs_later": engine.compilations, "xla_later": list(compiled)}
    monitoring.unregister_event_duration_listener(listen)
    report["state"] = [shard_shapes(x) for x in jax.tree.leaves(state)]
    report["leaves"] = {path: shard_shapes(x) for path, x in leaves.items()}
    return report, logits


def shard_shapes(x):
    """The whole shape, and that of the parts that devices really hold."""
    (part,) = {shard.data.shape for shard in x.addressable_shards}
    return [list(x.shape), list(part)]


def placement(mesh):
    return lambda path, leaf: shardings.leaf_sharding(CONFIG, mesh, path, leaf.shape)


def save(directory):
    model = SyntheticModel(CONFIG, seed=3)
    read = functools.partial(model.read, weights="keep")
    write_checkpoint(directory, CONFIG, model.leaves("keep"), read, {}, identity={"source": "test"})


def refusal(call):
    try:
        call()
    except ConfigError as why:
        return str(why)
    return "accepted"


def compare_restored(report, directory, mesh):
    """Restores a quantised checkpoint onto two meshes. Returns the leaves on the first."""
    save(directory)
    _, restored = load_checkpoint(directory, shardings=placement(mesh))
    other = placement(shardings.make_mesh(data=1, expert=4, tensor=2))
    _, elsewhere = load_checkpoint(directory, shardings=other)
    report["elsewhere"] = {path: shard_shapes(x) for path, x in elsewhere.items()}
    report["same_bits"] = all(
        np.asarray(elsewhere[path]).tobytes() == np.asarray(x).tobytes()
        and np.asarray(restored[path]).tobytes() == np.asarray(x).tobytes()
        for path, x in small_model.leaves("keep").items()
    )
    return restored


def main(directory):
    mesh = shardings.make_mesh(data=2, expert=2, tensor=2)
    place, report, logits = placement(mesh), {}, {}
    dense = small_model.leaves("f32")
    logits["one"], _ = run(new_engine(dense), LENGTHS)
    on_mesh = {path: jax.device_put(x, place(path, x)) for path, x in dense.items()}
    restored = compare_restored(report, directory / "checkpoint", mesh)
    for weights, leaves in (("f32", on_mesh), ("keep", restored)):
        report[weights], logits[weights] = measure(mesh, leaves)

    fp8 = CacheConfig(kv_format="fp8", page_entries=4)
    state = new_engine(on_mesh, mesh, fp8).start(batch=4, capacity=64)
    report["fp8_state"] = [shard_shapes(x) for x in jax.tree.leaves(state)]
    report["batch_of_3"] = refusal(lambda: new_engine(dense, mesh).start(batch=3, capacity=64))
    report["mesh_of_16"] = refusal(lambda: shardings.make_mesh(data=2, expert=2, tensor=4))
    (directory / "report.json").write_text(json.dumps(report))
    flat = {f"{run}.{phase}": x for run, both in logits.items() for phase, x in both.items()}
    np.savez(directory / "logits.npz", **flat)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
