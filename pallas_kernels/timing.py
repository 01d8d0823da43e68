"""Times calls on the present device, and measures what the device can do at most.

On GPUs a time is the sum of a call's kernels by CUPTI, so launches do not count; elsewhere it is
the wall time of a call that is waited for. Every measurement says which.
"""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import programs
from pallas_kernels.casebook import Case, Tolerance, Work

REPEATS, LEAST_BUFFERS, MOST_BUFFERS = 50, 4, 2048
ROTATED_BYTES = 200e6  # several times the largest cache, so that no call finds its inputs there
HELD_BYTES = 24e9  # of arguments at most
LONGEST = 1.0  # seconds of calls in one measurement, from which there are fewer of them
CUPTI, WALL = "device", "wall"


class Ceilings(NamedTuple):
    """What the device can do: bytes/s of memory, FLOP/s of bfloat16 products, bytes/s from host."""

    copy: float
    read: float
    matmul: float
    host: float

    @property
    def bandwidth(self) -> float:
        """The better of copying and reading."""
        return max(self.copy, self.read)

    def floor(self, work: Work) -> tuple[float, str]:
        """Seconds that work takes at least, and what binds it."""
        times = {
            "memory": work.bytes / self.bandwidth,
            "compute": work.flops / self.matmul,
            "host": work.host_bytes / self.host,
        }
        bound = max(times, key=lambda name: times[name])
        return times[bound], bound


def measure_ceilings(elements: int, width: int) -> Ceilings:
    """Updates and sums of `elements` random float32, a square product, and a quarter put from host.

    Best of ten: 2^30 elements and a width of 8192 suit an accelerator. Random, since some devices
    run faster on zeros.
    """
    key = jax.random.key(0)
    x = jax.random.uniform(key, (elements,), jnp.float32)
    a = jax.random.normal(key, (width, width), jnp.bfloat16)
    update, read, product = jax.jit(lambda x: x * 0.5 + 1), jax.jit(jnp.sum), jax.jit(jnp.matmul)
    copy = 2 * x.nbytes / _best(lambda: update(x))
    reading = x.nbytes / _best(lambda: read(x))
    matmul = 2 * width**3 / _best(lambda: product(a, a))
    quarter = jax.device_put(x[: elements // 4], x.sharding.with_memory_kind("pinned_host"))
    put = functools.partial(jax.device_put, quarter, x.sharding, may_alias=False)
    return Ceilings(copy, reading, matmul, quarter.nbytes / _best(put))


def _best(run: Callable[[], Any], repeats: int = 10) -> float:
    jax.block_until_ready(run())
    return min(_wall(run) for _ in range(repeats))


def _wall(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


class Measurement(NamedTuple):
    """A call's median time in seconds, by which clock, of how many calls, and kernels in each."""

    seconds: float
    clock: str
    repeats: int
    kernels: float


class _Calls:
    """Looks to JAX's profiler like a compiled function: a number of calls, one after another.

    It goes on where it ended: small inputs that the profiler warmed up with are in the cache.
    """

    def __init__(self, call: Callable[[int], Any], repeats: int):
        self.call, self.repeats, self.made = call, repeats, 0

    def __call__(self) -> Any:
        out = None
        for _ in range(self.repeats):
            out = self.call(self.made)
            self.made += 1
        return out

    def trace(self, *_args: Any, **_kwargs: Any) -> Any:
        """Part of the protocol, not used."""
        raise NotImplementedError

    def lower(self, *_args: Any, **_kwargs: Any) -> Any:
        """Part of the protocol, not used."""
        raise NotImplementedError


def measure(
    call: Callable[[int], Any], finish: Callable[[Any], Any] = jax.block_until_ready
) -> Measurement:
    """The median time of `call(i)`; `finish` waits for its result (another library's, perhaps)."""
    finish(call(0))
    start = time.perf_counter()
    finish(call(1))
    once = time.perf_counter() - start
    if once > LONGEST:
        return Measurement(once, WALL, 1, math.nan)
    repeats = max(3, min(REPEATS, int(LONGEST / max(once, 1e-9))))
    if jax.default_backend() != "gpu":
        walls = []
        for i in range(repeats):
            start = time.perf_counter()
            finish(call(i))
            walls.append(time.perf_counter() - start)
        return Measurement(statistics.median(walls), WALL, repeats, math.nan)
    from jax.experimental.mosaic.gpu import profiler

    def one_of_a_batch(i: int) -> Any:
        out = call(i)
        return finish(out) if (i + 1) % repeats == 0 else out

    calls = _Calls(one_of_a_batch, repeats)
    kernels: Any = None
    try:
        kernels = profiler.Cupti(finalize=False).measure(calls, aggregate=False)()[1]
    except jax.errors.JaxRuntimeError:
        raise  # the calls' own
    except RuntimeError:  # no CUPTI here, or not for us; an error of the calls comes again below
        pass
    if not kernels:
        return _queued(calls)
    times = [ms / 1e3 for _, ms in kernels]
    each = len(times) / repeats
    if each.is_integer():
        count = int(each)
        per_call = [sum(times[i * count : (i + 1) * count]) for i in range(repeats)]
        return Measurement(statistics.median(per_call), CUPTI, repeats, each)
    return Measurement(sum(times) / repeats, CUPTI, repeats, each)  # the mean: calls differ


def _queued(calls: _Calls) -> Measurement:
    """Wall time of calls behind one another, waited for once: long kernels hide the launches."""
    start = time.perf_counter()
    calls()
    return Measurement((time.perf_counter() - start) / calls.repeats, WALL, calls.repeats, math.nan)


def alive() -> bool:
    """Whether this process still has its device: an illegal address takes it away."""
    try:
        return int(jnp.arange(3).sum()) == 3
    except RuntimeError:
        return False


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Argument tuples in rotation."""

    sets: Sequence[tuple[Any, ...]]

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> "Arguments":
        """So many that their rotation reads 200 MB, and no fewer than four."""
        first = case.arguments(jax.random.key(seed))
        own = {i for i in range(len(first)) if i not in case.shared}
        size = sum(x.nbytes for i in own for x in jax.tree.leaves(first[i]))
        count = math.ceil(ROTATED_BYTES / max(1, case.work().bytes))
        count = min(max(LEAST_BUFFERS, count), MOST_BUFFERS, max(2, int(HELD_BYTES / max(1, size))))

        @jax.jit
        def another(key: jax.Array) -> tuple[Any, ...]:
            args = case.make(key, **case.shape)
            return tuple(arg if i in own else None for i, arg in enumerate(args))

        sets = [first]
        for i in range(1, count):
            drawn = another(jax.random.key(seed + i))
            pairs = enumerate(zip(drawn, first, strict=True))
            sets.append(tuple(d if n in own else f for n, (d, f) in pairs))
        return cls(sets)

    def in_host_memory(self, positions: Sequence[int]) -> "Arguments":
        """The same with arguments at these positions in pinned host memory, shared ones once."""
        moved: dict[int, Any] = {}

        def put(x: Any) -> Any:
            if id(x) not in moved:
                moved[id(x)] = jax.device_put(x, x.sharding.with_memory_kind("pinned_host"))
            return moved[id(x)]

        return Arguments(
            [
                tuple(jax.tree.map(put, a) if i in positions else a for i, a in enumerate(args))
                for args in self.sets
            ]
        )


class Runner:
    """One backend's compiled call of a case."""

    def __init__(self, case: Case, backend: str, arguments: Arguments):
        if backend != "xla" and jax.default_backend() == "gpu":
            arguments = arguments.in_host_memory(case.host)
        self.case, self.arguments = case, arguments
        run = jax.jit(lambda *args: case.run(args, backend), donate_argnums=case.in_place)
        self.compiled = run.lower(*arguments.sets[0]).compile()
        self.state: dict[int, Any] = {}
        self.restore()

    def restore(self) -> None:
        """Gives donated arguments their first values again."""
        first = self.arguments.sets[0]
        self.state = {i: jax.tree.map(jnp.copy, first[i]) for i in self.case.in_place}

    @property
    def kernels(self) -> tuple[programs.KernelCall, ...]:
        """Kernels in the compiled program."""
        return programs.kernel_calls(self.compiled.as_text() or "")

    def __call__(self, i: int) -> Any:
        """Runs the i-th arguments in rotation; donated ones carry on from call to call."""
        args = list(self.arguments.sets[i % len(self.arguments.sets)])
        for position, value in self.state.items():
            args[position] = value
        out = self.compiled(*args)
        whole = len(self.state) == 1
        for n, position in enumerate(self.state):
            same = jax.tree.structure(out) == jax.tree.structure(self.state[position])
            self.state[position] = out if whole and same else out[n]
        return out


@functools.partial(jax.jit, static_argnums=0)
def agree(tolerance: Tolerance, got: Any, want: Any) -> tuple[jax.Array, jax.Array]:
    """`casebook.compare` on the device, for large results: whether within it, largest error."""
    fine, worst = jnp.bool_(True), jnp.float32(0)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if not a.size:
            continue
        x, y = a.astype(jnp.float32), b.astype(jnp.float32)
        finite = jnp.isfinite(y)
        other = jnp.where(finite, True, (x == y) | (jnp.isnan(x) & jnp.isnan(y)))
        gap = jnp.where(finite, jnp.abs(x - y), 0)
        size = jnp.where(finite, jnp.abs(y), 0)
        room = tolerance.absolute + tolerance.relative * jnp.max(size) + tolerance.each * size
        fine &= jnp.all(other) & jnp.all(gap <= room)
        worst = jnp.maximum(worst, jnp.max(gap))
    return fine, worst
