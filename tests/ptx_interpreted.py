"""Runs PTX texts without loops on NumPy: every instruction by all threads of a block at once.

It knows the instructions that our kernels' texts have. Asynchronous copies happen at once, so it
shows whether addresses and values are right, not whether they are waited for.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

type Memory = np.ndarray  # uint8
type Values = np.ndarray  # a thread's register each, uint64
GLOBAL = 1 << 40  # addresses: where array i of global memory begins is (i + 1) times this
WIDTHS = {"u8": 1, "b32": 4, "u32": 4, "s32": 4, "f32": 4, "b64": 8, "u64": 8}
IGNORED = ("bar.", "barrier.", "mbarrier.", "fence.")
IGNORED += ("cp.async.mbarrier.", "cp.async.commit_group", "cp.async.wait_group")
MASK32 = np.uint64(0xFFFFFFFF)


def signed(x: Values) -> np.ndarray:
    return x.astype(np.uint32).view(np.int32).astype(np.int64)


def floats(x: Values) -> np.ndarray:
    return x.astype(np.uint32).view(np.float32)


def bits(x: np.ndarray) -> Values:
    return x.astype(np.float32).view(np.uint32).astype(np.uint64)


def halves(x: Values) -> np.ndarray:
    """Two bfloat16 of a register, float32 [threads, 2]."""
    return x.astype(np.uint32).view(np.uint16).reshape(-1, 2).view(ml_dtypes.bfloat16)


def permuted(a: Values, b: Values, order: Values) -> Values:
    both, out = a | (b << np.uint64(32)), np.zeros_like(a)
    for i in range(4):
        which = (order >> np.uint64(4 * i)) & np.uint64(7)
        byte = (both >> (np.uint64(8) * which)) & np.uint64(255)
        out |= byte << np.uint64(8 * i)
    return out


def product(a: Values, b: Values) -> Values:
    pairs = halves(a).astype(np.float32) * halves(b).astype(np.float32)
    return pairs.astype(ml_dtypes.bfloat16).view(np.uint16).view(np.uint32).reshape(-1)


def packed(high: Values, low: Values) -> Values:
    pairs = np.stack([floats(low), floats(high)], axis=1).astype(ml_dtypes.bfloat16)
    return pairs.view(np.uint16).view(np.uint32).reshape(-1)


FLOATS: Mapping[str, Callable[..., np.ndarray]] = {
    "sub": lambda a, b: a - b,
    "add": lambda a, b: a + b,
    "mul": lambda a, b: a * b,
    "max": np.maximum,
    "fma": lambda a, b, c: a * b + c,
    "ex2": np.exp2,
    "rcp": lambda a: 1 / a,
    "mov": lambda a: a,
}
COMPARED: Mapping[str, Callable[..., np.ndarray]] = {
    "ge": np.greater_equal,
    "lt": np.less,
    "eq": np.equal,
    "ne": np.not_equal,
}
INTEGERS: Mapping[str, Callable[..., Values]] = {
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "shl": lambda a, b: a << b,
    "shr": lambda a, b: a >> b,
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "mad": lambda a, b, c: a * b + c,
    "min": np.minimum,
    "mov": lambda a: a,
    "cvt": lambda a: a,
    "prmt": permuted,
}


class Block:
    """Threads `first` to `first + count` of a block, and what they see."""

    def __init__(
        self, shared: Sequence[Memory], arrays: Sequence[Any], first: int, count: int, rank: int = 0
    ):
        self.shared, self.rank = shared, rank  # of each block of the cluster
        self.memory = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in arrays]
        self.threads = np.arange(first, first + count, dtype=np.uint64)
        self.registers: dict[str, Values] = {}

    def run(self, text: str, operands: Sequence[int]) -> None:
        self.registers = {f"${i}": self._all(x) for i, x in enumerate(operands)}
        for statement in re.sub(r"\s+", " ", text).split(";"):
            line = statement.strip()
            if line and not line.startswith((".reg", *IGNORED)):
                with np.errstate(all="ignore"):  # threads that a predicate stops compute anything
                    self._statement(line)

    def _all(self, x: int) -> Values:
        return np.full(self.threads.shape, x % 2**64, np.uint64)

    def _value(self, name: str) -> Values:
        special = {"%tid.x": self.threads, "%cluster_ctarank": self._all(self.rank)}
        if name in special:
            return special[name]
        if name.startswith("0f"):
            return self._all(int(name[2:], 16))
        if re.fullmatch(r"-?(0x)?[0-9a-f]+", name) and name not in self.registers:
            return self._all(int(name, 0) % 2**32)
        return self.registers[name]

    def _statement(self, line: str) -> None:
        active = np.ones(self.threads.shape, bool)
        if line.startswith("@"):
            guard, line = line[1:].split(" ", 1)
            active = self.registers[guard].astype(bool)
        op, rest = line.split(" ", 1)
        names = re.findall(r"\{[^}]*\}|\[[^]]*\]|[^, ]+", rest)
        if op.startswith("cp.async"):
            self._copy(names, active)
        elif op.startswith(("ld.", "st.")):
            self._access(op, names, active)
        else:
            values = [self._value(x) for x in names[1:]]
            self._keep(names[0], self._computed(op, values).astype(np.uint64), active)

    def _keep(self, name: str, value: Values, active: np.ndarray) -> None:
        before = self.registers.get(name, self._all(0xDEADBEEF))
        self.registers[name] = np.where(active, value, before)

    def _computed(self, op: str, x: list[Values]) -> Values:
        name, kind = op.split(".")[0], op.split(".")[-1]
        if name == "setp":
            a, b = (signed(v) if kind == "s32" else v for v in x[:2])
            out = COMPARED[op.split(".")[1]](a, b)
            return out & x[2].astype(bool) if len(x) > 2 else out
        if name == "selp":
            return np.where(x[2].astype(bool), x[0], x[1])
        if name == "mapa":
            return x[0] + ((x[1] + np.uint64(1)) << np.uint64(24))
        if op == "cvt.rn.bf16x2.f32":
            return packed(*x)
        if kind == "bf16x2":
            return product(*x)
        if kind == "f32":
            return bits(FLOATS[name](*map(floats, x)))
        if name == "max" and kind == "s32":
            return np.maximum(signed(x[0]), signed(x[1])).astype(np.uint64) & MASK32
        if op == "mad.wide.s32":
            return (signed(x[0]) * signed(x[1])).astype(np.uint64) + x[2]
        out = INTEGERS[name](*x)
        return out if kind in ("u64", "b64") or "wide" in op else out & MASK32

    def _place(self, name: str) -> Values:
        base, _, offset = name[1:-1].partition("+")
        return self._value(base) + np.uint64(int(offset or 0))

    def _memory(self, at: int, shared: bool) -> tuple[Memory, int]:
        if shared:  # of this block, or of another one where `mapa` said so
            other, at = divmod(at, 1 << 24)
            return self.shared[other - 1 if other else self.rank], at
        return self.memory[at // GLOBAL - 1], at % GLOBAL

    def _copy(self, names: list[str], active: np.ndarray) -> None:
        to, source, size = self._place(names[0]), self._place(names[1]), self._value(names[3])
        for t in np.flatnonzero(active):
            assert int(to[t]) % 16 == int(source[t]) % 16 == 0
            memory, at = self._memory(int(to[t]), True)
            memory[at : at + 16] = 0
            if size[t]:
                origin, begin = self._memory(int(source[t]), False)
                memory[at : at + 16] = origin[begin : begin + 16]

    def _access(self, op: str, names: list[str], active: np.ndarray) -> None:
        loads, shared, width = op.startswith("ld."), "shared" in op, WIDTHS[op.split(".")[-1]]
        place, held = names if not loads else names[::-1]
        registers, where = held.strip("{ }").split(","), self._place(place)
        for i, register in enumerate(r.strip() for r in registers):
            value = self._value(register).copy() if not loads else self._all(0)
            for t in np.flatnonzero(active):
                assert int(where[t]) % (width * len(registers)) == 0
                memory, at = self._memory(int(where[t]) + i * width, shared)
                assert at + width <= memory.size, (op, names, t)
                if loads:
                    value[t] = int.from_bytes(memory[at : at + width].tobytes(), "little")
                else:
                    memory[at : at + width] = list(int(value[t]).to_bytes(8, "little")[:width])
            if loads:
                self._keep(register, value, active)
