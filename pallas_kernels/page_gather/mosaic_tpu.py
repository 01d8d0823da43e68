"""TPU kernels: one DMA per record, from memory to memory, some of them in flight at a time."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int, UInt8

from pallas_kernels.dispatch import Unsupported

IN_FLIGHT = 16
MAX_ENTRIES = 1 << 15  # their slots are in scalar memory


def _decline(pool: Array, slots: Array) -> None:
    rows = pool.shape[1]
    if rows != 4 and rows % 8:  # the compiler would copy the whole pool to another layout first
        raise Unsupported(f"records must have 4 rows or a multiple of 8, got {rows}")
    if not pool.size or not 0 < slots.shape[0] <= MAX_ENTRIES:
        wanted = f"pages and 1 to {MAX_ENTRIES} slots"
        raise Unsupported(f"needs {wanted}, got pool {list(pool.shape)}, slots {slots.shape[0]}")


def pipeline(
    entries: int, in_flight: int, start: Callable[[Array], None], wait: Callable[[Array], None]
) -> None:
    """Starts every copy, each `in_flight` copies before it waits for it."""

    def step(i: Array, nothing: None) -> None:
        @pl.when(i >= in_flight)
        def _() -> None:
            wait(i - in_flight)

        @pl.when(i < entries)
        def _() -> None:
            start(i)

        return nothing

    jax.lax.fori_loop(0, entries + in_flight, step, None)


def _gather(slots_ref: Any, pool_ref: Any, nothing_ref: Any, out_ref: Any, done: Any) -> None:
    """[M] in scalar memory; [S, R, 128], [1, R, 128] zeros -> [M, R, 128], wherever they are."""
    count, in_flight = pool_ref.shape[0], done.shape[0]

    def copy(source: Any, i: Array) -> Any:
        return pltpu.make_async_copy(source, out_ref.at[i], done.at[i % in_flight])

    def start(i: Array) -> None:
        slot = slots_ref[i]
        exists = (slot >= 0) & (slot < count)

        @pl.when(exists)
        def _() -> None:
            copy(pool_ref.at[slot], i).start()

        @pl.when(jnp.logical_not(exists))
        def _() -> None:
            copy(nothing_ref.at[0], i).start()

    pipeline(out_ref.shape[0], in_flight, start, lambda i: copy(nothing_ref.at[0], i).wait())


def _scatter(slots_ref: Any, records_ref: Any, _pool_in: Any, pool_ref: Any, done: Any) -> None:
    """[M] in scalar memory; [M, R, 128] -> [S, R, 128], in place."""
    count, in_flight = pool_ref.shape[0], done.shape[0]

    def act(i: Array, then: Callable[[Any], None]) -> None:
        slot = slots_ref[i]

        @pl.when((slot >= 0) & (slot < count))
        def _() -> None:
            sem = done.at[i % in_flight]
            then(pltpu.make_async_copy(records_ref.at[i], pool_ref.at[slot], sem))

    pipeline(
        records_ref.shape[0],
        in_flight,
        lambda i: act(i, lambda copy: copy.start()),
        lambda i: act(i, lambda copy: copy.wait()),
    )


def _call(
    kernel: Callable[..., None],
    out: tuple[int, ...],
    operands: tuple[Array, ...],
    in_flight: int,
    interpret: Any,
    aliases: Mapping[int, int] | None = None,
) -> Array:
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(),
            in_specs=[anywhere] * (len(operands) - 1),
            out_specs=anywhere,
            scratch_shapes=[pltpu.SemaphoreType.DMA((in_flight,))],
        ),
        out_shape=jax.ShapeDtypeStruct(out, jnp.uint8),
        input_output_aliases=dict(aliases or {}),
        name=f"page{kernel.__name__}",
        interpret=interpret,
    )(*operands)


@functools.partial(jax.jit, static_argnames=("in_flight", "interpret"))
def page_gather(
    pool: UInt8[Array, "S R 128"],
    slots: Int[Array, " M"],
    *,
    in_flight: int = IN_FLIGHT,
    interpret: Any = False,
) -> UInt8[Array, "M R 128"]:
    """See the package's `page_gather`."""
    _decline(pool, slots)
    nothing = jnp.zeros((1, *pool.shape[1:]), pool.dtype)
    shape = (*slots.shape, *pool.shape[1:])
    return _call(_gather, shape, (slots, pool, nothing), in_flight, interpret)


@functools.partial(jax.jit, static_argnames=("in_flight", "interpret"))
def page_scatter(
    pool: UInt8[Array, "S R 128"],
    records: UInt8[Array, "M R 128"],
    slots: Int[Array, " M"],
    *,
    in_flight: int = IN_FLIGHT,
    interpret: Any = False,
) -> UInt8[Array, "S R 128"]:
    """See the package's `page_scatter`."""
    _decline(pool, slots)
    operands = (slots, records, pool)
    return _call(_scatter, pool.shape, operands, in_flight, interpret, aliases={2: 0})
