"""Cases of every operation: what tests check, `aot` compiles and `bench` times, written once.

An operation's folder may hold `cases.py` with two tuples of `Case`:

    CASES   small, for correctness: ragged sizes, padding poisoned with NaN, empty rows, ties, all
            fp8 codes; whatever could go wrong
    BENCH   true DeepSeek-V4-Flash shapes, most important first; those with `aot=True` are compiled
            ahead of time by tests (the distinct kernels of an operation, not every batch size)

    def make(key, *, batch, entries):   # traceable: it also runs under eval_shape and on the device
        keys = jax.random.split(key, 2)
        return jax.random.normal(keys[0], (batch, 64, 512), jnp.bfloat16), ...

    def floor(*, batch, entries):
        return Work(bytes=..., flops=...)

    def case(**shape):
        return Case(op="sparse_decode", call=sparse_decode, shape=shape, make=make, floor=floor,
                    static={"scale": 512**-0.5}, tolerance=Tolerance(reason="...", relative=2**-8))

    CASES = (case(batch=3, entries=130), case(batch=1, entries=0))
    BENCH = (case(batch=32, entries=1 << 18).named("1M", aot=True), ...)

`call` is the public function: it gets what `make` returned as positional arguments, `static` as
keywords, and `backend=NAME`. Where an argument has no array (None, a number), put it in `static`.
`TUNINGS`, name -> (backend, tuning), lists what `bench --tunings` times beside the defaults; it
calls the backend's function itself, so that `static` must have all that the public one adds.
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from pallas_kernels.rows import LANES, Fp8Rows


class Work(NamedTuple):
    """The least that a call must do: bytes of device memory, operations, bytes from host memory.

    Count what must be read or written once, however it is computed: entries that a row selected or
    sees (not padding), queries, weights, results. A multiply and an add are two operations.
    """

    bytes: int
    flops: int = 0
    host_bytes: int = 0


class Tolerance(NamedTuple):
    """|got - want| <= absolute + relative * max|want of that output| + each * |want|, and why."""

    reason: str
    relative: float = 0.0
    absolute: float = 0.0
    each: float = 0.0


def error_line(error: Exception) -> str:
    """An error in a report: its type and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:300]}"


EXACT = Tolerance("copies, integers and comparisons leave no room for rounding")


def everything(_args: tuple[Any, ...], result: Any) -> Any:
    """The default of `Case.view`."""
    return result


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call of one operation."""

    op: str  # the folder's name
    call: Callable[..., Any]  # call(*args, backend=NAME, **static)
    make: Callable[..., tuple[Any, ...]]  # make(key, **shape) -> args; traceable
    floor: Callable[..., Work]  # floor(**shape)
    shape: Mapping[str, Any]
    tolerance: Tolerance
    name: str = ""  # said in front of the shape
    static: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # view(args, result): what the definition promises of a result, where that is not everything:
    # values that fp8 planes decode to, results without rows that are unspecified.
    view: Callable[[tuple[Any, ...], Any], Any] = everything
    kernel: str = ""  # a kernel's name in the compiled program contains this; default: `op`
    declined: tuple[str, ...] = ()  # backends that must raise Unsupported here; others must not
    aot: bool = False  # compile ahead of time in tests
    # Takes a KV pool: must compile to no copy of it, and to no temporary a quarter as large.
    zero_copy: bool = False
    # Positions of arguments, for timing:
    shared: tuple[int, ...] = ()  # pools too large to have many of: one for all buffers in rotation
    in_place: tuple[int, ...] = ()  # donated; the results, in order, are their next values
    host: tuple[int, ...] = ()  # in pinned host memory for kernels that read it there

    def named(self, name: str, **changes: Any) -> "Case":
        """The same case with a name, and whatever else is given."""
        return dataclasses.replace(self, name=name, **changes)

    def __str__(self) -> str:
        shape = " ".join(f"{key}={value}" for key, value in self.shape.items())
        return " ".join(filter(None, (self.op, self.name, shape)))

    @property
    def kernel_name(self) -> str:
        """What a kernel's name contains."""
        return self.kernel or self.op

    def arguments(self, key: Array) -> tuple[Any, ...]:
        """Random arguments, made in one program on the default device."""
        return jax.jit(functools.partial(self.make, **self.shape))(key)

    def abstract(self) -> tuple[Any, ...]:
        """The arguments' shapes and dtypes."""
        return jax.eval_shape(functools.partial(self.make, **self.shape), jax.random.key(0))

    def run(self, args: tuple[Any, ...], backend: str | None) -> Any:
        """The call."""
        return self.call(*args, backend=backend, **self.static)

    def tuned(self, tuning: Any) -> "Case":
        """The same call of a backend's function itself, in a tuning of its own."""

        def call(*args: Any, backend: str, **options: Any) -> Any:
            made = importlib.import_module(f"pallas_kernels.{self.op}").IMPLEMENTATIONS[backend]
            return made(*args, tuning=tuning, **options)

        return dataclasses.replace(self, call=call)

    def work(self) -> Work:
        """The floor's figures."""
        return self.floor(**self.shape)


def operations() -> tuple[str, ...]:
    """Folders that have cases."""
    return tuple(sorted(file.parent.name for file in Path(__file__).parent.glob("*/cases.py")))


def backends(op: str) -> tuple[str, ...]:
    """Backends that an operation has."""
    return tuple(importlib.import_module(f"pallas_kernels.{op}").IMPLEMENTATIONS)


def correctness(op: str) -> tuple[Case, ...]:
    """An operation's small cases."""
    return importlib.import_module(f"pallas_kernels.{op}.cases").CASES


def benchmarks(op: str) -> tuple[Case, ...]:
    """An operation's true shapes."""
    return importlib.import_module(f"pallas_kernels.{op}.cases").BENCH


def tunings(op: str) -> Mapping[str, tuple[str, Any]]:
    """Tunings that are worth timing: name -> (backend, tuning). `TUNINGS` of an operation's cases;
    a name begins with that of its backend."""
    return getattr(importlib.import_module(f"pallas_kernels.{op}.cases"), "TUNINGS", {})


class Comparison(NamedTuple):
    """Whether a result is right, its largest error, and what is wrong if it is not."""

    ok: bool
    error: float  # largest |got - want|
    why: str = ""


def compare(tolerance: Tolerance, got: Any, want: Any) -> Comparison:
    """Compares two results of a call, output by output. NaN and infinities must be equal."""
    pairs, worst = _leaves(got, want), 0.0
    if pairs is None:
        return Comparison(False, math.inf, f"result is {jax.tree.structure(got)}")
    for i, (a, b) in enumerate(pairs):
        if a.shape != b.shape or a.dtype != b.dtype:
            wanted = f"{b.dtype} {list(b.shape)}"
            why = f"output {i} must be {wanted}, got {a.dtype} {list(a.shape)}"
            return Comparison(False, math.inf, why)
        x, y = (v.astype(np.float64) for v in (a, b))
        finite = np.isfinite(y)
        if not np.array_equal(x[~finite], y[~finite], equal_nan=True):
            return Comparison(False, math.inf, f"output {i}: other values where NaN or infinite")
        gap, size = np.abs(x[finite] - y[finite]), np.abs(y[finite])
        largest = float(np.max(gap, initial=0.0))  # NaN if any is
        room = tolerance.absolute + tolerance.relative * np.max(size, initial=0.0)
        beyond = ~(gap <= room + tolerance.each * size)
        if beyond.any():
            at = tuple(int(axis[np.argmax(beyond)]) for axis in np.nonzero(finite))
            why = f"output {i}: {int(beyond.sum())} of {beyond.size} differ, the first at {at}: "
            why += f"got {x[at]:.7g}, want {y[at]:.7g}"
            return Comparison(False, largest, why)
        worst = max(worst, largest)
    return Comparison(True, worst)


def _leaves(got: Any, want: Any) -> list[tuple[np.ndarray, np.ndarray]] | None:
    if jax.tree.structure(got) != jax.tree.structure(want):
        return None
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    return [(np.asarray(a), np.asarray(b)) for a, b in pairs]


def fp8_rows(key: Array, lead: tuple[int, ...], *, nope: int = 448, rope: int = 64) -> Fp8Rows:
    """Random fp8 entries [*lead, nope + rope]: every finite code, values of about 1, groups of 64.

    Scales are 2^-8 to 2^-5 and codes uniform over their 254 finite values, so the largest value is
    448 * 2^-5 = 14.
    """
    keys, used = jax.random.split(key, 3), nope + nope // 64
    codes = jax.random.bits(keys[0], (*lead, nope), jnp.uint8)
    codes = jnp.where(codes & 0x7F == 0x7F, jnp.uint8(0), codes)
    scales = jax.random.randint(keys[1], (*lead, nope // 64), 119, 123).astype(jnp.uint8)
    pad = jnp.zeros((*lead, -used % LANES), jnp.uint8)
    row = jnp.concatenate([codes, scales, pad], axis=-1)
    plane = row.reshape(*lead, -1, LANES)
    return Fp8Rows(plane, jax.random.normal(keys[2], (*lead, rope)).astype(jnp.bfloat16))


def poisoned(rows: Any, padding: Array) -> Any:
    """Entries (a pytree of arrays [*lead, ...]) with NaN, or the NaN code 0xFF, where `padding`."""

    def one(x: Array) -> Array:
        bad = jnp.uint8(0xFF) if x.dtype == jnp.uint8 else jnp.asarray(jnp.nan, x.dtype)
        mask = padding.reshape(*padding.shape, *(1,) * (x.ndim - padding.ndim))
        return jnp.where(mask, bad, x)

    return jax.tree.map(one, rows)
