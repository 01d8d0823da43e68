"""Accelerators that a plan can be made for: sizes and speeds of a device, and topologies by name.

Plain Python. A *device* is what JAX calls one: a chip, or one of the two cores of a tpu7x chip.
"""

import dataclasses
import math
import re
from typing import Literal

from lsa_jax.config import ConfigError

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """One device. `memory` is what programs may use of it, in bytes; speeds are ceilings a second.

    `link` is what a device sends to its neighbours, all links together, one way.
    """

    name: str
    platform: Literal["tpu", "cuda"]
    kind: str  # as JAX names it
    memory: int
    bandwidth: float  # bytes of device memory
    bf16_flops: float
    link: float  # bytes to other devices
    per_chip: int = 1  # devices of a chip
    dims: int = 1  # numbers in a topology's name


# Memory: what the TPU compiler (libtpu 0.0.52) says a program may use; CUDA: nominal capacity as
# the driver reports it. Bandwidth and FLOP/s: TPUs as JAX's own table of chips has them; H100 and
# H200 copy bandwidth and bf16 rate that large kernels reach, below the data sheets' 3.35 and 4.8
# TB/s and 989 TFLOP/s. Links: the makers' figures, one direction.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            name="v5e",
            platform="tpu",
            kind="TPU v5 lite",
            memory=int(15.75 * GIB),
            bandwidth=0.82e12,
            bf16_flops=197e12,
            link=200e9,
            dims=2,
        ),
        Device(
            name="v5p",
            platform="tpu",
            kind="TPU v5",
            memory=int(95.73 * GIB),
            bandwidth=2.46e12,
            bf16_flops=459e12,
            link=600e9,
            dims=3,
        ),
        Device(
            name="v6e",
            platform="tpu",
            kind="TPU v6 lite",
            memory=int(31.24 * GIB),
            bandwidth=1.64e12,
            bf16_flops=920e12,
            link=400e9,
            dims=2,
        ),
        Device(
            name="tpu7x",
            platform="tpu",
            kind="TPU7x",
            memory=int(94.74 * GIB),
            bandwidth=3.7e12,
            bf16_flops=1155e12,
            link=300e9,
            per_chip=2,
            dims=3,
        ),
        Device(
            name="h100",
            platform="cuda",
            kind="NVIDIA H100 80GB HBM3",
            memory=84_929_347_584,
            bandwidth=3.0e12,
            bf16_flops=798e12,
            link=450e9,
        ),
        Device(
            name="h200",
            platform="cuda",
            kind="NVIDIA H200",
            memory=150_000_000_000,
            bandwidth=4.3e12,
            bf16_flops=790e12,
            link=450e9,
        ),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """So many devices of one kind, connected: "v5p:2x2x1" (chips by axis), "h100:8" (GPUs)."""

    device: Device
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As on the command line."""
        return f"{self.device.name}:{'x'.join(map(str, self.shape))}"

    @property
    def devices(self) -> int:
        """What JAX counts."""
        return math.prod(self.shape) * self.device.per_chip


def parse_topology(text: str) -> Topology:
    """A topology from its name; ConfigError says which there are."""
    match = re.fullmatch(r"([a-z0-9]+):(\d{1,4}(?:x\d{1,3}){0,2})", text, re.ASCII)
    device = DEVICES.get(match[1]) if match else None
    if match is None or device is None:
        known = ", ".join(f"{d.name}:{'x'.join(['N'] * d.dims)}" for d in DEVICES.values())
        raise ConfigError(f"topology must be one of {known}, got {text!r}")
    shape = tuple(map(int, match[2].split("x")))
    if len(shape) != device.dims or min(shape) < 1:
        wanted = f"{device.name}:{'x'.join(['N'] * device.dims)} with sizes from 1"
        raise ConfigError(f"topology must be {wanted}, got {text!r}")
    return Topology(device, shape)


def ladder(device: Device) -> tuple[Topology, ...]:
    """Topologies of a device from small to large, as they are rented: what a search looks at."""
    shapes: tuple[tuple[int, ...], ...] = ((1,), (2,), (4,), (8,))
    if device.dims == 2:
        shapes = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
    elif device.dims == 3:
        shapes = ((1, 1, 1), (2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4), (4, 4, 4), (4, 4, 8))
    return tuple(Topology(device, shape) for shape in shapes)
