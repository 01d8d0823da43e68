"""Devices that programs are compiled for where there are none: TPU generations, Hopper.

TPU programs need the package libtpu (extra `tpu`); Hopper programs need JAX's CUDA plugin and
NVIDIA's compiler wheels (extra `aot`). Neither needs the device. `pallas_kernels.aot` sets what the
compilers read from the environment, in a process of its own.
"""

import contextlib
import dataclasses
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, SingleDeviceSharding

from pallas_kernels import programs


class Chip(NamedTuple):
    """A device as JAX sees one. Sizes of TPUs are jaxlib's own table (jax._src.tpu_info), the
    GPU's are what CUDA reports on an H100 80GB HBM3."""

    platform: str
    kind: str
    cores: int
    topology: str
    memory_bytes: int
    fast_bytes: int  # VMEM of a core; shared memory that a block may have


CHIPS = {
    "v5e": Chip("tpu", "TPU v5 lite", 1, "v5e:2x2", 17_200_000_000, 128 << 20),
    "v5p": Chip("tpu", "TPU v5", 2, "v5p:2x2x1", 103_000_000_000, 64 << 20),
    "v6e": Chip("tpu", "TPU v6 lite", 1, "v6e:2x2", 34_400_000_000, 128 << 20),
    # Two devices a chip, each with half of its memory.
    "tpu7x": Chip("tpu", "TPU7x", 1, "tpu7x:2x2x1", 103_000_000_000, 64 << 20),
    "h100": Chip("gpu", "NVIDIA H100 80GB HBM3", 132, "1x1x1", 84_929_347_584, 232_448),
}
# libtpu asks where it is and takes a lock that one process may hold; a process that only compiles
# has no use for either.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
_HOPPER = """gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132
  fpus_per_core: 128 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {bandwidth} l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: {memory} shared_memory_per_block_optin: 232448
  cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 }}
  platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 }}
  runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "{kind}"
"""


class Missing(Exception):
    """The compiler for a device is not installed; the message says what to install."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program's figures."""

    temp_bytes: int
    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    calls: tuple[programs.KernelCall, ...]
    copies: tuple[str, ...]
    kernels: tuple[programs.GpuKernel, ...] = ()  # registers and so on: on GPUs
    text: str = dataclasses.field(repr=False, default="")

    @property
    def resident_bytes(self) -> int:
        """Device memory that a run holds at its peak."""
        held = self.argument_bytes + self.output_bytes + self.temp_bytes
        return held - self.alias_bytes


def missing(chip: Chip) -> str | None:
    """Why programs for a chip cannot be compiled here; None where they can."""
    if chip.platform == "tpu":
        found = importlib.util.find_spec("libtpu")
        return None if found else "compiling for TPUs needs the package libtpu (extra `tpu`)"
    plugin = importlib.util.find_spec("jax_cuda13_plugin")
    if plugin and cuda_folder():
        return None
    return "compiling for Hopper needs jax-cuda13-plugin and NVIDIA's compiler wheels (extra `aot`)"


def cuda_folder() -> Path | None:
    """Where the wheels put CUDA's compilers; None where they are not."""
    for folder in map(Path, sys.path):
        if (folder / "nvidia/cu13/bin/ptxas").is_file():
            return folder / "nvidia/cu13"
    return None


def environment(chip: Chip) -> dict[str, str]:
    """What the compilers need in the environment of a process before it starts JAX."""
    common = {"JAX_PLATFORMS": "cpu"}  # the default device; the compilers start no other
    if chip.platform == "tpu":
        return common | LIBTPU_ENVIRONMENT
    cuda = str(cuda_folder())
    flags = f"--xla_gpu_cuda_data_dir={cuda} --xla_gpu_autotune_level=0"
    return common | {
        "PATH": os.pathsep.join([f"{cuda}/bin", os.environ.get("PATH", "")]),
        "CUDA_ROOT": cuda,
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {flags}",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
        "MOSAIC_GPU_DUMP_RESOURCES": "1",
    }


def compile_for(
    chip: Chip, run: Callable[..., Any], args: Sequence[Any], donate: Sequence[int] = ()
) -> Program:
    """Compiles `run` at abstract arguments (pytrees of ShapeDtypeStruct) for a chip."""
    why = missing(chip)
    if why:
        raise Missing(why)
    sharding = SingleDeviceSharding(_device(chip))

    def placed(x: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    abstract = AbstractDevice(device_kind=chip.kind, num_cores=chip.cores, platform=chip.platform)
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=abstract)
    platform = "cuda" if chip.platform == "gpu" else chip.platform
    with jax.sharding.use_abstract_mesh(mesh), triton_compiles_for_hopper(), _said() as said:
        traced = jax.jit(run, donate_argnums=tuple(donate)).trace(*jax.tree.map(placed, args))
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    memory: Any = compiled.memory_analysis()
    text = compiled.as_text() or ""
    kernels = programs.assembled(said()) + tuple(
        _assemble(k) for k in programs.triton_kernels(text)
    )
    return Program(
        temp_bytes=memory.temp_size_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        calls=programs.kernel_calls(text),
        copies=programs.copies(text),
        kernels=kernels,
        text=text,
    )


def describe_hopper(kind: str, memory: int, bandwidth: int) -> str:
    """What XLA must know of a Hopper GPU to compile for it (GpuTargetConfigProto): name, bytes,
    bytes/s. An H200 is an H100 with another memory; bandwidth only steers fusion decisions."""
    return _HOPPER.format(kind=kind, memory=memory, bandwidth=bandwidth)


def _device(chip: Chip) -> Any:
    if chip.platform == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    config = describe_hopper(chip.kind, chip.memory_bytes, 3_352_320_000_000)
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=config, topology=chip.topology
    )
    return topology.devices[0]


@contextlib.contextmanager
def triton_compiles_for_hopper() -> Iterator[None]:
    """jax-triton asks the driver which GPU there is; here there is none to ask."""
    if importlib.util.find_spec("jax_triton") is None:
        yield
        return
    from jax_triton import triton_lib  # pyright: ignore[reportMissingImports]

    lib = triton_lib.triton_kernel_call_lib
    asks = lib.get_compute_capability
    lib.get_compute_capability = lambda _device: 90
    try:
        yield
    finally:
        lib.get_compute_capability = asks


@contextlib.contextmanager
def _said() -> Iterator[Callable[[], str]]:
    """What compilers write to this process's output meanwhile, which is where Mosaic's go."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        text = ""
        try:
            yield lambda: text
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, number)
                os.close(copy)
            file.seek(0)
            text = file.read().decode(errors="replace")


def _assemble(kernel: programs.TritonKernel) -> programs.GpuKernel:
    """Runs the assembler on a Triton kernel: jax-triton leaves that to the first call."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.ptx)
        command = [f"{cuda_folder()}/bin/ptxas", "-arch=sm_90a", "-v", str(source), "-o"]
        ran = subprocess.run(
            [*command, f"{folder}/cubin"], capture_output=True, text=True, check=True
        )
    (found,) = programs.assembled(ran.stderr + ran.stdout)
    return dataclasses.replace(found, name=kernel.name, shared_bytes=kernel.shared_bytes)
