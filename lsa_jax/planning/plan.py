"""A plan: a case on a topology, what every program needs there, and whether that fits."""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax

from lsa_jax.planning import fit, roofline
from lsa_jax.planning.aot import Target, make_target
from lsa_jax.planning.case import Case, Memory, MeshShape, choose_mesh
from lsa_jax.planning.hardware import Topology
from lsa_jax.planning.programs import Compiled, Depth, Planner
from lsa_jax.planning.roofline import Step

_OVER = re.compile(r"[Rr]an out of memory.*?\(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is known of a case on a topology. `programs` is empty where nothing was compiled."""

    case: Case
    topology: Topology
    mesh: MeshShape
    memory: Memory
    programs: tuple[Compiled, ...]
    step: Step

    @property
    def peak(self) -> int:
        """Bytes of a device at the worst of its programs."""
        return self.memory.device + max((p.needs for p in self.programs), default=0)

    @property
    def fits(self) -> bool:
        """Whether a device has that."""
        return self.peak <= self.topology.device.memory

    def require_fit(self) -> None:
        """DoesNotFit where a device has less than the worst program needs."""
        if not self.fits:
            spare = self.peak - self.memory.device
            raise fit.refusal(
                self.case, self.topology, self.memory, self.peak, "at its peak", spare
            )


def make_plan(
    case: Case,
    topology: Topology,
    *,
    mesh: MeshShape | None = None,
    depth: Depth | None = "kinds",
    progress: Callable[[Compiled], None] | None = None,
) -> Plan:
    """Checks by arithmetic that a topology can hold a case, then compiles its programs.

    Nothing is compiled with `depth` None. Raises ConfigError where the mesh does not divide the
    model, DoesNotFit (a ConfigError) where a device cannot hold its part or a program's compiler
    says so, and ConfigError where the compiler is not installed.
    """
    shape = mesh or choose_mesh(case, topology.devices)
    memory = fit.check(case, topology, shape)
    programs: list[Compiled] = []
    if depth is not None:
        target = make_target(topology, shape)
        for program in _compiled(case, topology, target, memory, depth):
            programs.append(program)
            if progress is not None:
                progress(program)
    sent = [p.collectives.nbytes for p in programs if p.name == "decode step"]
    step = roofline.decode_step(case, shape, topology.device, sent[0] if sent else None)
    return Plan(
        case=case,
        topology=topology,
        mesh=shape,
        memory=memory,
        programs=tuple(programs),
        step=step,
    )


def _compiled(case: Case, topology: Topology, target: Target, memory: Memory, depth: Depth) -> Any:
    """The programs; a compiler that runs out of the device's memory is a plan that does not fit."""
    try:
        yield from Planner(case, target, depth).compiled()
    except jax.errors.JaxRuntimeError as why:
        found = _OVER.search(str(why))
        if found is None:
            raise
        needed = int(float(found[1]) * _UNITS[found[2]])
        what = "for one program, as its compiler says"
        spare = max(fit.RESERVE, needed - memory.device)
        raise fit.refusal(case, topology, memory, needed, what, spare) from why


def notes(plan: Plan) -> list[str]:
    """What the figures do not say."""
    device, several = plan.topology.device, plan.topology.devices > 1
    if not plan.programs:
        return ["arithmetic only: nothing was compiled, and temporaries are not counted"]
    said = ["compiled, never run: times are rooflines, memory is what compilers reserve"]
    if any(p.layers == "kinds" for p in plan.programs):
        said.append(
            "one layer of each kind computes in programs of all layers (--layers all compiles every"
            " one); weights and state are whole, collectives are scaled, and temporaries of a deep"
            " model may be several times as large"
        )
    if device.platform == "cuda":
        said.append("CUDA: matrix products are not autotuned and library workspaces not counted")
        said.append("CUDA: a compiler without a GPU knows no pinned host memory: copies unchecked")
        if plan.case.lsa is not None and not several:
            said.append("CUDA: with jax-triton recall reads host memory in place, without a slab")
    if several:
        said.append("several devices: definitions run in the place of kernels")
    if several and plan.case.lsa is not None:
        said.append("LSA on several devices: KV, pool and tables are whole on each of them")
    if plan.mesh[1] > 1:
        said.append("an expert axis above 1: every decode step computes all experts it holds")
    return said


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything that `--json` writes; bytes of one device unless a name says otherwise."""
    case, device = plan.case, plan.topology.device
    return {
        "config": case.name,
        "attention": case.attention,
        "context": case.context,
        "batch": case.batch,
        "weights": case.weights,
        "kv_format": case.cache.kv_format,
        "prefill_chunk": case.prefill_chunk,
        "topology": plan.topology.name,
        "devices": plan.topology.devices,
        "mesh": dict(zip(("data", "expert", "tensor"), plan.mesh, strict=True)),
        "jax": jax.__version__,
        "memory": dataclasses.asdict(plan.memory) | {"resident": plan.memory.device},
        "pool_pages": 0 if case.lsa is None else case.pool_slots,
        "programs": [dataclasses.asdict(p) | {"needs": p.needs} for p in plan.programs],
        "peak": plan.peak if plan.programs else None,
        "available": device.memory,
        "fits": plan.fits if plan.programs else None,
        "step": dataclasses.asdict(plan.step) | {"seconds": plan.step.seconds},
        "notes": notes(plan),
    }
