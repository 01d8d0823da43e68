"""Whether a case fits, by arithmetic, and what would make it fit."""

import dataclasses
from collections.abc import Iterator

from lsa_jax.config import ConfigError
from lsa_jax.lsa.budget import Budget
from lsa_jax.planning.case import Case, Memory, MeshShape, choose_mesh, memory_of
from lsa_jax.planning.hardware import GIB, Device, Topology, ladder

RESERVE = 2 * GIB  # left for temporaries where no program has been compiled


class DoesNotFit(ConfigError):
    """A topology that cannot hold a case; `needed` and `available` are bytes of one device."""

    def __init__(self, message: str, *, needed: int, available: int) -> None:
        super().__init__(message)
        self.needed, self.available = needed, available


def smallest(case: Case, device: Device, reserve: int = RESERVE) -> Topology | None:
    """The smallest topology of a device that holds a case and `reserve` bytes besides on each
    device, by arithmetic; None where the largest does not."""
    for topology in ladder(device):
        try:
            held = memory_of(case, choose_mesh(case, topology.devices)).device
        except ConfigError:
            continue  # the model does not divide over it
        if held + reserve <= device.memory:
            return topology
    return None


def check(case: Case, topology: Topology, shape: MeshShape) -> Memory:
    """What each device holds. DoesNotFit where that alone is more than it has."""
    memory, available = memory_of(case, shape), topology.device.memory
    if memory.device > available:
        raise refusal(case, topology, memory, memory.device, "without temporaries", RESERVE)
    return memory


def refusal(
    case: Case, topology: Topology, memory: Memory, needed: int, what: str, reserve: int
) -> DoesNotFit:
    """The error that says what a device needs and has, and what would fit."""
    available = topology.device.memory
    hints = (
        "; ".join(would_fit(case, topology, memory, reserve)) or "nothing this command can change"
    )
    return DoesNotFit(
        f"{topology.name} cannot hold {case.name} with {case.batch} x {case.context:,} tokens: a "
        f"device needs {needed:,} bytes {what} ({memory.experts + memory.weights:,} weights, "
        f"{memory.kv:,} KV), got {available:,} available; would fit: {hints}",
        needed=needed,
        available=available,
    )


def would_fit(case: Case, topology: Topology, memory: Memory, reserve: int) -> Iterator[str]:
    """Changes of one thing each that make a case fit by arithmetic, `reserve` bytes left over.
    `memory` is what it needs of a device now."""
    device = topology.device
    larger = smallest(case, device, reserve)
    if larger is not None:
        yield f"--topology {larger.name}"
    if case.weights != "keep" and _holds(
        dataclasses.replace(case, weights="keep"), topology, reserve
    ):
        yield "--weights keep"
    if memory.experts + memory.weights + reserve > device.memory:
        return  # less history would not help
    if case.cache.kv_format != "fp8":
        fp8 = dataclasses.replace(case, cache=dataclasses.replace(case.cache, kv_format="fp8"))
        if _holds(fp8, topology, reserve):
            yield "--kv fp8"
    for name, sizes in (("batch", _halves(case.batch)), ("context", _halves(case.context))):
        for size in sizes:
            if _holds(_resized(case, name, size), topology, reserve):
                yield f"--{name} {size}"
                break


def _resized(case: Case, name: str, size: int) -> Case:
    """Another batch or context. A number of bytes as a budget was meant for the old one."""
    lsa = case.lsa
    if lsa is not None and isinstance(lsa.budget, Budget) and lsa.budget.nbytes is not None:
        lsa = dataclasses.replace(lsa, budget=None)
    return dataclasses.replace(case, lsa=lsa, **{name: size})


def _halves(size: int) -> Iterator[int]:
    while size > 1:
        size //= 2
        yield size


def _holds(case: Case, topology: Topology, reserve: int) -> bool:
    try:
        held = memory_of(case, choose_mesh(case, topology.devices)).device
    except ConfigError:  # a budget below its floor, a batch that the mesh does not divide
        return False
    return held + reserve <= topology.device.memory
