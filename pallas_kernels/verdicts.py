"""What must hold of a program that was compiled ahead of time."""

import math
import re
from collections.abc import Iterator
from typing import Any

import jax

from pallas_kernels.casebook import Case
from pallas_kernels.targets import Chip, Program

LARGE = 1 << 20  # bytes of an argument whose copy would cost something
MOST_REGISTERS = 255


def problems(chip: Chip, case: Case, args: Any, program: Program) -> Iterator[str]:
    """What is wrong with a program that holds a kernel, for this chip."""
    names = [call.name for call in program.calls]
    if not any(case.kernel_name in name for name in names):
        yield f"no kernel named {case.kernel_name} in the program, which has {names}"
    if program.resident_bytes > chip.memory_bytes:
        yield f"needs {program.resident_bytes} bytes of {chip.memory_bytes}"
    if case.zero_copy:
        yield from _copied_pools(args, program)
    if chip.platform == "gpu" and not program.kernels:
        yield "the assembler said nothing"
    for kernel in program.kernels:
        if not 0 < kernel.registers <= MOST_REGISTERS:
            yield f"{kernel.name} has {kernel.registers} registers"
        if kernel.shared_bytes > chip.fast_bytes:
            yield (
                f"{kernel.name} needs {kernel.shared_bytes} bytes of shared memory, and a block "
                f"may have {chip.fast_bytes}"
            )


def _copied_pools(args: Any, program: Program) -> Iterator[str]:
    """A copy of a large argument gives it another layout; a temporary as large may hold one."""
    leaves = [x for x in jax.tree.leaves(args) if x.size * x.dtype.itemsize >= LARGE]
    sizes = {x.size for x in leaves}
    largest = max((x.size * x.dtype.itemsize for x in leaves), default=0)
    for shape in program.copies:
        if elements(shape) in sizes:
            yield f"a pool is copied: {shape}"
    if program.temp_bytes > largest // 4:
        yield f"temporaries of {program.temp_bytes} bytes beside a pool of {largest}"


def elements(shape: str) -> int:
    """Elements of an array as a program's text has it: u8[64,4,128]{2,1,0}."""
    dims = re.search(r"\[([\d,]*)\]", shape)
    return math.prod(int(n) for n in dims[1].split(",") if n) if dims else 0
