"""Devices that are not here, as a compiler sees them.

TPU programs need the package libtpu, CUDA programs JAX's CUDA plugin with its compilers; neither
needs the hardware; `lsa_jax.plan` sets what libtpu reads from its process's environment. What these
compilers say of memory is what they say on the hardware.
"""

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from lsa_jax import shardings
from lsa_jax.config import ConfigError
from lsa_jax.planning.case import MeshShape
from lsa_jax.planning.hardware import Device, Topology
from pallas_kernels.targets import describe_hopper, triton_compiles_for_hopper


@dataclasses.dataclass(frozen=True)
class Target:
    """Devices to compile for, as a mesh, and how JAX names their platform."""

    mesh: Mesh
    platform: str

    def compile(self, traced: Callable[[], Any]) -> Any:
        """Compiles what `traced` traces, with this mesh in use."""
        # Autotuning runs kernels, which needs a GPU.
        cuda = self.platform == "cuda"
        options = {"xla_gpu_autotune_level": 0} if cuda else None
        triton = triton_compiles_for_hopper if cuda else contextlib.nullcontext
        with jax.set_mesh(self.mesh), triton():
            lowered = traced().lower(lowering_platforms=(self.platform,))
            return lowered.compile(compiler_options=options)


def make_target(topology: Topology, shape: MeshShape) -> Target:
    """The devices of a topology, as a mesh of that shape.

    ConfigError where the compiler for them is not installed, or refuses the topology's name.
    """
    device = topology.device
    missing = _missing(device)
    if missing:
        raise ConfigError(f"topology {topology.name} needs {missing} to be compiled for")
    try:
        devices = _tpu(topology) if device.platform == "tpu" else _cuda(topology)
    except jax.errors.JaxRuntimeError as why:
        line = str(why).partition("\n")[0]
        raise ConfigError(f"topology {topology.name} was refused by its compiler: {line}") from why
    if len(devices) != topology.devices:
        got = f"got {len(devices)}"
        raise ConfigError(f"topology {topology.name} must have {topology.devices} devices, {got}")
    grid = np.array(devices).reshape(shape)
    mesh = Mesh(grid, shardings.MESH_AXES, axis_types=(AxisType.Auto,) * 3)
    return Target(mesh, device.platform)


def has_compiler(device: Device) -> bool:
    """Whether programs for such devices can be compiled here."""
    return _missing(device) is None


def _missing(device: Device) -> str | None:
    """What is to be installed for a device's compiler; None where it is there."""
    package, extra = ("libtpu", "tpu") if device.platform == "tpu" else ("jax_cuda13_plugin", "aot")
    if importlib.util.find_spec(package) is not None:
        return None
    return f"the package {package.replace('_', '-')} (pip install 'lsa_jax[{extra}]')"


def _tpu(topology: Topology) -> list[Any]:
    return topologies.get_topology_desc(platform="tpu", topology_name=topology.name).devices


def _cuda(topology: Topology) -> list[Any]:
    device = topology.device
    config = describe_hopper(device.kind, device.memory, int(device.bandwidth))
    described = topologies.get_topology_desc(
        platform="cuda",
        target_config=config,
        topology=f"1x1x{topology.devices}",
    )
    return described.devices
