"""Triton kernels on numbers, without a GPU: `python tests/triton_interpreted.py OP [OP ...]`.

Runs each operation's small cases through Triton's own interpreter and compares them with the
definition. Triton decides to interpret when it is imported, so this has a process of its own.
`jax_triton.triton_call` is replaced: kernels run at once, on copies of their operands.
"""

import os
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ |= {"TRITON_INTERPRET": "1", "JAX_PLATFORMS": "cpu"}
    sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import numpy as np

POISON = 0xA5  # what outputs hold before the kernel writes them


class Memory(np.ndarray):
    """An array that Triton takes for a tensor."""

    def data_ptr(self) -> int:
        return self.ctypes.data


def triton_call(
    *operands: Any,
    kernel: Any,
    out_shape: Any,
    grid: tuple[int, ...],
    input_output_aliases: Mapping[int, int] | None = None,
    name: str = "",
    num_warps: int = 4,
    num_stages: int = 1,
    **constants: Any,
) -> Any:
    """Stands in for jax-triton's function of this name."""
    shapes: Sequence[Any] = out_shape if isinstance(out_shape, list | tuple) else [out_shape]
    sources = {out: i for i, out in (input_output_aliases or {}).items()}
    args = [np.array(x, order="C").view(Memory) for x in operands]
    outs = []
    for i, shape in enumerate(shapes):
        fresh = np.full(shape.size * shape.dtype.itemsize, POISON, np.uint8)
        fresh = fresh.view(shape.dtype).reshape(shape.shape).view(Memory)
        outs.append(args[sources[i]] if i in sources else fresh)
    kernel[tuple(grid)](*args, *outs, **constants)
    results = [jax.numpy.asarray(np.asarray(out)) for out in outs]
    return results if isinstance(out_shape, list | tuple) else results[0]


def inline_asm(asm: str, words: np.ndarray) -> np.ndarray:
    """Assembly of one operand and one result, on uint32: and, or, shr, mul."""
    operations = {
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "shr.u32": np.right_shift,
        "mul.lo.u32": np.multiply,
    }
    values: dict[str, Any] = {"$1": words}
    for line in filter(None, map(str.strip, asm.strip(" {}").split(";"))):
        operation, to, *names = line.replace(",", " ").split()
        if operation != ".reg":
            a, b = (values[n] if n in values else np.uint32(int(n, 0)) for n in names)
            values[to] = operations[operation](a, b)
    return values["$0"]


def complete(interpreter: Any) -> None:
    """What Triton's interpreter lacks: assembly, and arithmetic of bfloat16, which it takes for the
    integers that hold it."""
    import triton.language as tl  # pyright: ignore[reportMissingImports]

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    multiply, dot = builder.create_fmul, builder.create_dot

    def numbers(x: Any) -> np.ndarray:
        return x.data.view(jax.numpy.bfloat16).astype(np.float32)

    def create_inline_asm(
        _: Any, asm: str, constraints: str, operands: Any, kinds: Any, pure: bool, pack: int
    ) -> Any:
        (operand,), (result,) = operands, kinds
        assert constraints == "=r,r" and pure and operand.data.itemsize * pack == 4
        words = np.ascontiguousarray(operand.data).view(np.uint32)
        out = handle(inline_asm(asm, words).view(np.uint16), result.scalar)
        return types.SimpleNamespace(get_result=lambda _: out)

    def create_fmul(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return multiply(self, a, b)
        product = (numbers(a) * numbers(b)).astype(jax.numpy.bfloat16)
        return handle(product.view(np.uint16), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        if a.dtype.scalar == tl.bfloat16:
            a, b = (handle(numbers(x), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *rest)

    builder.create_inline_asm = create_inline_asm
    builder.create_fmul, builder.create_dot = create_fmul, create_dot


def install() -> None:
    """Lets this process run Triton kernels on NumPy arrays."""
    from triton.runtime import interpreter  # pyright: ignore[reportMissingImports]

    complete(interpreter)
    module: Any = types.ModuleType("jax_triton")
    module.triton_call = triton_call
    sys.modules["jax_triton"] = module
    interpreter.GridExecutor._init_args_hst = lambda self, args, kwargs: (args, kwargs)
    interpreter.GridExecutor._restore_args_dev = lambda self, *args: None


def failures(op: str) -> list[str]:
    """What is wrong in an operation's cases."""
    from pallas_kernels import casebook, dispatch

    dispatch.refusal = lambda backend, at=None: None
    dispatch.target = lambda: dispatch.Target("gpu", "NVIDIA H100", 9.0)
    found = []
    for case in casebook.correctness(op):
        if dispatch.TRITON in case.declined:
            continue
        args = case.arguments(jax.random.key(0))
        want = case.view(args, case.run(jax.tree.map(jax.numpy.copy, args), dispatch.XLA))
        with jax.disable_jit():
            got = case.view(args, case.run(args, dispatch.TRITON))
        result = casebook.compare(case.tolerance, got, want)
        print("ok  " if result.ok else "FAIL", case, result.error, result.why, flush=True)
        found += [] if result.ok else [f"{case}: {result.why}"]
    return found


def main(ops: Sequence[str]) -> int:
    """Command line."""
    install()
    return 1 if any([failures(op) for op in ops]) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
