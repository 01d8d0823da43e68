"""What a compiled program says of itself: the kernels in it, copies, registers and spills."""

import dataclasses
import re
import zlib
from collections.abc import Iterator
from typing import NamedTuple

TRITON_TARGET = "triton_kernel_call"
KERNEL_TARGETS = ("tpu_custom_call", "mosaic_gpu", TRITON_TARGET)
_CALL = re.compile(r'custom_call_target="([^"]*)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONFIG = re.compile(r'backend_config="((?:[^"\\]|\\.)*)"')
_COPY = re.compile(r"= (\S+) (copy|copy-start)\(")
_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")
_STATIC_SHARED = re.compile(r"(\d+) bytes smem")
_SCRATCH = re.compile(r"smem_scratch_bytes=(\d+)")


class KernelCall(NamedTuple):
    """A custom call that is a kernel of ours or of JAX's."""

    target: str
    name: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuKernel:
    """What the assembler says of a kernel; registers of a thread, bytes of shared memory."""

    name: str
    registers: int
    spill_bytes: int
    shared_bytes: int


class TritonKernel(NamedTuple):
    """What a jax-triton call carries."""

    name: str
    ptx: str
    shared_bytes: int


def kernel_calls(text: str) -> tuple[KernelCall, ...]:
    """Kernels in a compiled program's text, with the names that they were given."""
    found = []
    for line in text.splitlines():
        call = _CALL.search(line)
        if call and call[1].startswith(KERNEL_TARGETS):
            if call[1] == TRITON_TARGET:
                found.append(KernelCall(call[1], triton_kernel(line).name))
            else:
                op_name = _OP_NAME.search(line)
                path = op_name[1].split("/") if op_name else []
                # The last part is the primitive, the one before it the kernel's name.
                found.append(KernelCall(call[1], path[-2] if len(path) > 1 else ""))
    return tuple(found)


def copies(text: str) -> tuple[str, ...]:
    """Shapes that the program copies in device memory, as whole operations of their own."""
    return tuple(match[1] for match in map(_COPY.search, text.splitlines()) if match)


def triton_kernels(text: str) -> tuple[TritonKernel, ...]:
    """Kernels that jax-triton put into a program."""
    target = f'custom_call_target="{TRITON_TARGET}"'
    return tuple(triton_kernel(line) for line in text.splitlines() if target in line)


def triton_kernel(line: str) -> TritonKernel:
    """Reads the payload of a call: jaxlib's message TritonAnyKernelCall, compressed."""
    config = _CONFIG.search(line)
    if config is None:
        raise ValueError(f"a {TRITON_TARGET} without a payload: {line[:200]}")
    message = _message(zlib.decompress(_unescaped(config[1])))
    kernel = _message(_message(message[1])[1])
    return TritonKernel(_text(message[4]), _text(kernel[4]), _number(kernel.get(3, 0)))


def _unescaped(text: str) -> bytes:
    """The bytes behind a C string literal."""
    plain = {"n": 10, "t": 9, "r": 13, '"': 34, "'": 39, "\\": 92}
    out = bytearray()
    for octal, letter, literal in re.findall(r"\\([0-7]{3})|\\(.)|([^\\]+)", text, re.DOTALL):
        if octal:
            out.append(int(octal, 8))
        elif letter:
            out.append(plain[letter])
        else:
            out += literal.encode()
    return bytes(out)


def _text(value: int | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _number(value: int | bytes) -> int:
    return value if isinstance(value, int) else 0


def _message(data: int | bytes) -> dict[int, int | bytes]:
    """Fields of a protocol-buffer message by number; of a repeated one the last."""
    fields: dict[int, int | bytes] = {}
    stream = iter(data if isinstance(data, bytes) else b"")
    for tag in _varints(stream):
        if tag & 7 == 0:
            fields[tag >> 3] = next(_varints(stream))
        elif tag & 7 == 2:
            length = next(_varints(stream))
            fields[tag >> 3] = bytes(next(stream) for _ in range(length))
        else:
            raise ValueError(f"a payload's field {tag >> 3} is neither a number nor bytes")
    return fields


def _varints(stream: Iterator[int]) -> Iterator[int]:
    value = shift = 0
    for byte in stream:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            yield value
            value = shift = 0


def assembled(output: str) -> tuple[GpuKernel, ...]:
    """Kernels in what `ptxas -v` and Mosaic's resource dump printed.

    Mosaic prints the shared memory of each kernel as it is lowered, before they are assembled, in
    the same order; the assembler knows only what is declared statically.
    """
    scratch = [int(n) for n in _SCRATCH.findall(output)]
    blocks = _ENTRY.split(output)[1:]
    kernels = []
    for i, (name, block) in enumerate(zip(blocks[::2], blocks[1::2], strict=True)):
        spills, registers = _SPILLS.search(block), _REGISTERS.search(block)
        static = _STATIC_SHARED.search(block)
        kernels.append(
            GpuKernel(
                name=name,
                registers=int(registers[1]) if registers else 0,
                spill_bytes=sum(map(int, spills.groups())) if spills else 0,
                shared_bytes=(int(static[1]) if static else 0)
                + (scratch[i] if len(scratch) == len(blocks) // 2 else 0),
            )
        )
    return tuple(kernels)
