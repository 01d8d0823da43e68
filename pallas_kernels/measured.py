"""One case timed on every backend that runs here: rows of `pallas_kernels.bench`."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import casebook, dispatch, timing
from pallas_kernels.casebook import Case
from pallas_kernels.timing import Arguments, Ceilings, Measurement, Runner


class Peer(Protocol):
    """Another library's version of a case."""

    name: str

    def take(self, args: tuple[Any, ...]) -> Any:
        """Its own view of JAX arguments, made before anything is timed."""
        ...

    def call(self, taken: Any) -> Any:
        """The operation."""
        ...

    def finish(self) -> None:
        """Waits for the device."""
        ...


def rows(
    case: Case, ceilings: Ceilings, backends: Sequence[str] = (), peers: str | None = None
) -> Iterator[dict[str, Any]]:
    """The definition's row, then the others' with their ratio to it."""
    work = case.work()
    floor, bound = ceilings.floor(work)
    head = {"op": case.op, "case": str(case), "shape": dict(case.shape), **work._asdict()}
    head |= {"floor": floor, "bound": bound}
    try:
        arguments = Arguments.of(case)
    except Exception as error:  # too large for this device, say
        yield {**head, "backend": dispatch.XLA, "failed": casebook.error_line(error)}
        return
    head["buffers"] = len(arguments.sets)
    want: Any = None
    xla: float | None = None
    # The definition goes first, also where it was not asked for: the others are checked against it.
    names = [name for name in casebook.backends(case.op) if dispatch.refusal(name) is None]
    names.sort(key=lambda name: name != dispatch.XLA)
    for backend in names:
        if backends and backend not in (*backends, dispatch.XLA):
            continue
        row = {**head, "backend": backend}
        try:
            runner = Runner(case, backend, arguments)
            got = case.view(arguments.sets[0], runner(0))
            got = jax.tree.map(jnp.copy, got) if case.in_place else got  # the next call takes it
            if backend == dispatch.XLA:
                want = got
            else:
                row |= _right(case, runner, got, want)
            row |= _timed(timing.measure(runner), floor, xla)
        except dispatch.Unsupported as why:
            row["failed"] = f"Unsupported: {why}"
        except Exception as error:  # the next backend is timed all the same
            row["failed"] = casebook.error_line(error)
        if backend == dispatch.XLA:
            xla = row.get("seconds")
        yield row
    if peers:
        yield from _peer_rows(
            case, importlib.import_module(peers).peers(case), arguments, head, xla
        )


def _right(case: Case, runner: Runner, got: Any, want: Any) -> dict[str, Any]:
    """Whether the kernel is in the program and right. None where there is nothing to compare."""
    present = any(case.kernel_name in call.name for call in runner.kernels)
    if want is None:
        return {"kernel_in_program": present, "right": None}
    ok, error = timing.agree(case.tolerance, got, want)
    return {"kernel_in_program": present, "right": bool(ok), "error": float(error)}


def _timed(measurement: Measurement, floor: float, xla: float | None) -> dict[str, Any]:
    seconds = measurement.seconds
    ratio = xla / seconds if xla else None
    return {**measurement._asdict(), "share": floor / seconds, "times_faster_than_xla": ratio}


def _peer_rows(
    case: Case,
    found: Sequence[Callable[[], Peer]],
    arguments: Arguments,
    head: dict[str, Any],
    xla: float | None,
) -> Iterator[dict[str, Any]]:
    for make in found:
        row = {**head, "backend": "peer"}
        try:
            peer = make()
            row["backend"] = peer.name
            taken = [peer.take(args) for args in arguments.sets]

            def call(i: int, peer: Peer = peer, taken: list[Any] = taken) -> Any:
                return peer.call(taken[i % len(taken)])

            for i in range(3):  # compilation
                call(i)
            row |= _timed(
                timing.measure(call, lambda _, peer=peer: peer.finish()), head["floor"], xla
            )
        except Exception as error:  # the next peer is timed all the same
            row["failed"] = casebook.error_line(error)
        yield row


def line(row: dict[str, Any]) -> str:
    """A row for people."""
    head = f"{row['backend']:10} {row['case']}: floor {row['floor'] * 1e6:,.1f} us ({row['bound']})"
    if "failed" in row:
        return f"{head}, FAILED: {row['failed']}"
    parts = [head, f"{row['seconds'] * 1e6:,.1f} us {row['clock']}", f"{row['share']:.0%} of floor"]
    if row["times_faster_than_xla"] and row["backend"] != dispatch.XLA:
        parts.append(f"{row['times_faster_than_xla']:.2f}x the definition")
    if row["kernels"] == row["kernels"]:
        parts.append(f"{row['kernels']:g} kernels")
    if row.get("right") is False:
        parts.append(f"WRONG by {row['error']:.3g}")
    if row.get("kernel_in_program") is False:
        parts.append("THE KERNEL IS NOT IN THE PROGRAM")
    return ", ".join(parts)
