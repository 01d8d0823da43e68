"""One case timed on every backend that runs here: rows of `pallas_kernels.bench`."""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from pallas_kernels import casebook, dispatch, timing
from pallas_kernels.casebook import Case
from pallas_kernels.timing import Arguments, Ceilings, Measurement, Runner

# What stands in the place of a backend where something else failed.
ARGUMENTS, PEERS = "arguments", "peers"


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
    case: Case,
    ceilings: Ceilings,
    backends: Sequence[str] = (),
    tunings: str | None = None,
    peers: str | None = None,
    earlier: Mapping[str, Mapping[str, Any]] | None = None,
    begin: Callable[[str], None] = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """The definition's row, then the others' with their ratio to it, then those of tunings whose
    name contains `tunings`.

    `earlier` are rows by backend that an earlier run made: they are not made again. `begin` is told
    what comes next, so that whoever finds this process dead knows what killed it.
    """
    known, names = dict(earlier or {}), runnable(case, backends, tunings)
    compared = bool(peers) and known.keys() <= {*names, ARGUMENTS}
    if ARGUMENTS in known or (known.keys() >= set(names) and not compared):
        return
    work = case.work()
    floor, bound = ceilings.floor(work)
    head = {"op": case.op, "case": str(case), "shape": dict(case.shape), **work._asdict()}
    head |= {"floor": floor, "bound": bound}
    begin(ARGUMENTS)
    try:
        arguments = Arguments.of(case)
    except Exception as error:  # too large for this device, say
        yield {**head, "backend": ARGUMENTS, "failed": casebook.error_line(error)}
        return
    head["buffers"] = len(arguments.sets)
    yield from _backend_rows(case, arguments, head, names, known, begin)
    if peers and compared:
        begin(PEERS)
        xla = known.get(dispatch.XLA, {}).get("seconds")
        found = importlib.import_module(peers).peers(case)
        yield from _peer_rows(case, found, arguments, head, xla)


def runnable(case: Case, backends: Sequence[str], tunings: str | None = None) -> list[str]:
    """Backends (of these, if any) that run here, and their tunings whose names contain `tunings`.
    The definition goes first, also where it was not asked for: others are checked against it."""
    names = [name for name in casebook.backends(case.op) if dispatch.refusal(name) is None]
    names = [name for name in names if not backends or name in (*backends, dispatch.XLA)]
    tuned = {} if tunings is None else casebook.tunings(case.op)
    more = [name for name, (of, _) in tuned.items() if of in names and str(tunings) in name]
    return [*sorted(names, key=lambda name: name != dispatch.XLA), *more]


def called(case: Case, name: str) -> tuple[Case, str]:
    """What a name of `runnable` calls: a case and a backend."""
    if name in casebook.backends(case.op):
        return case, name
    backend, tuning = casebook.tunings(case.op)[name]
    return case.tuned(tuning), backend


def _backend_rows(
    case: Case,
    arguments: Arguments,
    head: dict[str, Any],
    names: Sequence[str],
    known: dict[str, Mapping[str, Any]],
    begin: Callable[[str], None],
) -> Iterator[dict[str, Any]]:
    """Rows of the backends that `known` has not; it gets them."""
    want: Any = None
    for turn, backend in enumerate(names):
        before = known.get(backend)
        if before is not None and (backend != dispatch.XLA or "failed" in before):
            continue
        begin(backend)
        row = {**head, "backend": backend}
        # Each backend goes on in the rotation: what the one before it read last is in the cache.
        first = turn * (2 * timing.REPEATS + 2)
        try:
            runner = Runner(*called(case, backend), arguments)
            got = case.view(arguments.sets[0], runner(0))
            got = jax.tree.map(jnp.copy, got) if case.in_place else got  # the next call takes it
            if backend == dispatch.XLA:
                want = jax.block_until_ready(got)
            else:
                row |= _right(case, runner, got, want)
            if before is None:
                xla = known.get(dispatch.XLA, {}).get("seconds")
                took = timing.measure(lambda i, run=runner, first=first: run(first + i))
                row |= _timed(took, head["floor"], xla)
        except dispatch.Unsupported as why:
            row["failed"] = f"Unsupported: {why}"
        except Exception as error:  # the next backend is timed all the same
            row["failed"] = casebook.error_line(error)
        if before is None or "failed" in row:
            known[backend] = row
            yield row


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
