"""`--dry-run`: what a run needs and whether it fits, by `lsa_jax.planning`; no weight is read.

Shapes come from the checkpoint's inventory and from the session that would be opened: the bytes
here are those of its arrays. Temporaries are not: `python -m lsa_jax.plan` compiles the programs.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from typing import Any

import jax

from infer.lsa_options import Plan
from infer.options import PRESENT, Options
from infer.report import write
from lsa_jax import shardings
from lsa_jax.checkpoint import store
from lsa_jax.config import ConfigError, ModelConfig
from lsa_jax.engine import capacity_for
from lsa_jax.planning import fit, roofline
from lsa_jax.planning.case import (
    Case,
    Memory,
    MeshShape,
    abstract_mesh,
    choose_mesh,
    memory_of,
    shard_bytes,
)
from lsa_jax.planning.hardware import DEVICES, Device, Topology, parse_topology
from lsa_jax.planning.roofline import Step

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """What a run would be on. `memory` is what it may use of each device, in bytes; `ram` the
    host's, None where it is not known. A CPU's device memory is the host's. `speeds` are None for
    devices that `lsa_jax.planning` has no table of."""

    name: str
    devices: int
    memory: int
    ram: int | None
    shared: bool
    speeds: Device | None
    topology: Topology | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """What a dry run found. `needed` are bytes of a device, on a CPU with the host's."""

    prompt: int
    new_tokens: int
    case: Case
    machine: Machine
    mesh: MeshShape
    memory: Memory
    step: Step | None

    @property
    def tokens(self) -> int:
        """Of prompt and reply."""
        return self.prompt + self.new_tokens

    @property
    def needed(self) -> int:
        """Bytes of a device, temporaries not counted."""
        return self.memory.device + (self.memory.host if self.machine.shared else 0)


def _ram() -> int | None:
    """Bytes of this host; None where the system does not say."""
    names = getattr(os, "sysconf_names", {})
    if not {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(names):
        return None
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def present() -> Machine:
    """The devices of this process. ConfigError where neither they nor a table say their size."""
    here, ram = jax.devices()[0], _ram()
    shared = here.platform == "cpu"
    table = next((device for device in DEVICES.values() if device.kind == here.device_kind), None)
    limit = (here.memory_stats() or {}).get("bytes_limit", table.memory if table else None)
    memory = ram if shared else limit
    if memory is None:
        raise ConfigError(
            f"--dry-run does not know how much memory {here.device_kind!r} has: name a topology, "
            "as in --dry-run h100:1"
        )
    return Machine(
        name=here.device_kind,
        devices=jax.device_count(),
        memory=memory,
        ram=ram,
        shared=shared,
        speeds=table,
        topology=None,
    )


def named(text: str) -> Machine:
    """The devices of a topology; ConfigError says which there are."""
    topology = parse_topology(text)
    return Machine(
        name=topology.device.kind,
        devices=topology.devices,
        memory=topology.device.memory,
        ram=None,
        shared=False,
        speeds=topology.device,
        topology=topology,
    )


def backend(options: Options) -> str:
    """The JAX backend that a run would be on."""
    if options.dry_run in (None, PRESENT):
        return jax.default_backend()
    return parse_topology(options.dry_run).device.platform


def find(options: Options, cfg: ModelConfig, plan: Plan | None, prompt: int) -> Found:
    """What a run of so many prompt tokens needs. ConfigError where it cannot be asked for."""
    assert options.dry_run is not None
    machine = present() if options.dry_run == PRESENT else named(options.dry_run)
    case = _case(options, cfg, plan, prompt + options.max_new_tokens)
    mesh = _mesh(options, case, machine)
    stored = _weights(options, case.cfg, mesh)
    memory = dataclasses.replace(
        memory_of(case, mesh),
        experts=stored["experts"],
        weights=stored["embed"] + stored["others"],
        indexer=_indexer(plan),
    )
    found = Found(
        prompt=prompt,
        new_tokens=options.max_new_tokens,
        case=case,
        machine=machine,
        mesh=mesh,
        memory=memory,
        step=None,
    )
    return dataclasses.replace(found, step=_step(found, stored["others"]))


def _case(options: Options, cfg: ModelConfig, plan: Plan | None, tokens: int) -> Case:
    """The room that a session makes for so many tokens."""
    compute = options.compute(backend(options))
    return Case(
        name=options.ckpt.name,
        cfg=dataclasses.replace(cfg, num_nextn_predict_layers=0),  # runs load no drafter
        context=tokens if plan else capacity_for(tokens, cfg.max_position_embeddings),
        batch=1,
        weights="keep",  # `find` counts what is stored in its place
        compute=compute,
        cache=options.cache(compute),
        prefill_chunk=options.prefill_chunk,
        lsa=plan.lsa if plan else None,
        indexer=plan.indexer.config if plan and plan.indexer else None,
    )


def _step(found: Found, read_weights: int) -> Step | None:
    """The roofline of the last step, reading the weights that are stored; None without a table."""
    speeds = found.machine.speeds
    if speeds is None:
        return None
    at_end = dataclasses.replace(found.case, context=found.tokens)
    step = roofline.decode_step(at_end, found.mesh, speeds, None)
    planned = memory_of(at_end, found.mesh).experts
    experts = step.nbytes["experts"] * found.memory.experts // planned
    nbytes = step.nbytes | {"experts": experts, "weights": read_weights}
    seconds = sum(nbytes.values()) / speeds.bandwidth
    return dataclasses.replace(step, nbytes=nbytes, memory_seconds=seconds)


def _mesh(options: Options, case: Case, machine: Machine) -> MeshShape:
    """The mesh asked for; else one device of those present, or all of a topology."""
    if options.mesh is None:
        return (1, 1, 1) if machine.topology is None else choose_mesh(case, machine.devices)
    if math.prod(options.mesh) > machine.devices:
        raise ConfigError(
            f"--mesh must have at most the {machine.devices} devices of {machine.name}, "
            f"got {options.mesh}"
        )
    return options.mesh


def _weights(options: Options, cfg: ModelConfig, mesh: MeshShape) -> dict[str, int]:
    """Bytes of one device's part of what the checkpoint has: experts, embedding, all others."""
    abstract, sizes = abstract_mesh(mesh), {"experts": 0, "embed": 0, "others": 0}
    for path, leaf in store.open_store(options.ckpt).leaves.items():
        if path.startswith("mtp."):
            continue
        part = "experts" if ".experts." in path else "others"
        part = "embed" if path.startswith("embed.") else part
        where = shardings.leaf_sharding(cfg, abstract, path, leaf.shape)
        sizes[part] += shard_bytes(leaf, where)
    return sizes


def _indexer(plan: Plan | None) -> int:
    """Bytes of the memory indexer in the dtype that it will have."""
    if plan is None or plan.indexer is None:
        return 0
    if plan.indexer_dtype is None:
        return plan.indexer.nbytes
    size = jax.numpy.dtype(plan.indexer_dtype).itemsize
    return sum(size * leaf.size for leaf in plan.indexer.leaves.values())


def show(options: Options, found: Found) -> None:
    """Prints it, and writes `--json`. ConfigError where it does not fit."""
    print("\n".join(_lines(found)))
    if options.json is not None:
        text = json.dumps(as_json(found), indent=1).encode()
        write(options.json, lambda file: file.write(text))
    if problem := _problem(found):
        raise ConfigError(problem)


def as_json(found: Found) -> dict[str, Any]:
    """Everything that `--json` writes; bytes of one device unless a name says otherwise."""
    case, machine, step = found.case, found.machine, found.step
    return {
        "checkpoint": case.name,
        "attention": case.attention,
        "prompt_tokens": found.prompt,
        "new_tokens": found.new_tokens,
        "capacity": case.context,
        "kv_format": case.cache.kv_format,
        "device": machine.name,
        "mesh": dict(zip(shardings.MESH_AXES, found.mesh, strict=True)),
        "memory": dataclasses.asdict(found.memory) | {"resident": found.memory.device},
        "pool_pages": 0 if case.lsa is None else case.pool_slots,
        "needed": found.needed,
        "available": machine.memory,
        "fits": _problem(found) is None,
        "step": None if step is None else dataclasses.asdict(step) | {"seconds": step.seconds},
        "jax": jax.__version__,
    }


def _size(nbytes: float) -> str:
    unit, name = next((pair for pair in _UNITS if abs(nbytes) >= pair[0] / 10), _UNITS[-1])
    return f"{nbytes / unit:,.2f} {name}"


def _lines(found: Found) -> Iterator[str]:
    case, machine, parts = found.case, found.machine, dataclasses.asdict(found.memory)
    pool = "" if case.lsa is None else f", pool of {case.pool_slots:,} pages"
    yield (
        f"dry run of {case.name}: {case.attention} attention{pool}, KV {case.cache.kv_format}; "
        f"{found.prompt:,} prompt tokens and up to {found.new_tokens:,} new ones, room for "
        f"{case.context:,}"
    )
    used, axes = math.prod(found.mesh), ",".join(map(str, found.mesh))
    yield f"on {used} of {machine.devices} x {machine.name} (--mesh {axes})"
    yield "memory of one device"
    yield from (f"  {name:<12}{_size(n):>14}" for name, n in parts.items() if name != "host")
    yield f"  {'resident':<12}{_size(found.memory.device):>14}"
    if found.memory.host:
        yield f"host memory {_size(found.memory.host)}, of all devices together"
    verdict = "fits" if _problem(found) is None else "does not fit"
    left = machine.memory - found.needed
    what = "device and host are one here, so " if machine.shared and found.memory.host else ""
    yield f"{what}{_size(found.needed)} of {_size(machine.memory)}: {verdict}"
    yield from _step_lines(found)
    yield "temporaries are not counted: python -m lsa_jax.plan compiles the programs and does"
    if 0 <= left < fit.RESERVE:
        yield f"only {_size(left)} are left for them"


def _step_lines(found: Found) -> Iterator[str]:
    step = found.step
    if step is None:
        yield f"no roofline: the speeds of {found.machine.name!r} are not in the table"
        return
    parts = ", ".join(f"{name} {_size(n)}" for name, n in step.nbytes.items())
    yield (
        f"roofline of a decode step (an estimate): reads {_size(sum(step.nbytes.values()))} "
        f"({parts}), {step.flops / 1e9:,.1f} GFLOP: {1e3 * step.seconds:,.3f} ms"
    )


def _problem(found: Found) -> str | None:
    """One line where a device or the host has less than is needed."""
    case, machine, memory = found.case, found.machine, found.memory
    what = f"{case.name} with {case.context:,} tokens"
    if found.needed > machine.memory:
        hints = "; ".join(_hints(found)) or "nothing that one option changes"
        return (
            f"{machine.name} cannot hold {what}: a device needs {found.needed:,} bytes "
            f"({memory.experts + memory.weights:,} weights, {memory.kv:,} KV) without temporaries, "
            f"got {machine.memory:,} available; would fit: {hints}"
        )
    if machine.ram is not None and memory.host > machine.ram:
        return f"the host needs {memory.host:,} bytes for pages of {what}, got {machine.ram:,}"
    return None


def _hints(found: Found) -> Iterator[str]:
    """What would make it fit, in this command's words."""
    table = found.machine.speeds
    if table is None:
        return
    if found.needed <= table.memory:  # a part of the device's memory that JAX leaves alone
        yield f"XLA_PYTHON_CLIENT_MEM_FRACTION, {found.machine.name} has {table.memory:,}"
    topology = found.machine.topology or Topology(table, (1,) * table.dims)
    for hint in fit.would_fit(found.case, topology, found.memory, fit.RESERVE):
        option, _, value = hint.partition(" ")
        if option == "--topology":
            shape = choose_mesh(found.case, parse_topology(value).devices)
            yield f"{value} with --mesh {','.join(map(str, shape))}"
        elif option == "--context":
            yield f"{value} tokens in all"
        else:
            yield hint
