"""Documents in memory: what samples need of a trace, loaded once, the least recently used given up.

Heavy are the hidden states and keys, up to 100 MB a document each; a corpus of thousands does not
fit, so that samples are drawn from few documents at a time (`train.data.dataset`).
"""

import concurrent.futures
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from train.data.labels import Document
from train.traces.trace import Trace


@dataclasses.dataclass(frozen=True)
class LoadedDocument:
    """A document of T tokens and N entries at L target layers."""

    labels: Document
    hidden: np.ndarray  # bfloat16 or float32 [T, L, D]
    positions: np.ndarray  # int32 [T]
    keys: np.ndarray  # e4m3, bfloat16 or float32 [L, N, K]
    scale: np.ndarray | None  # float32 [L, N], with e4m3 only

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        rows = (self.labels.votes, self.labels.mass)
        parts = [self.hidden, self.positions, self.keys, self.labels.formed_at]
        parts += [part for r in rows for part in (r.indices, r.values, r.pointers)]
        return sum(part.nbytes for part in parts) + (0 if self.scale is None else self.scale.nbytes)


def load_document(
    trace: Trace,
    number: int,
    target_layers: Sequence[int],
    *,
    hard: np.ndarray | None = None,
    mass: bool = True,
) -> LoadedDocument:
    """A trace at some of its target layers, with its mass or not; keys are layer by layer."""
    columns = np.array([trace.info.target_layers.index(layer) for layer in target_layers])
    votes, formed_at = trace.votes(), trace.read("formed_at")
    weights = trace.mass() if mass else None
    hidden, keys = trace.read("hidden"), trace.keys()
    if len(columns) < hidden.shape[1]:
        hidden = hidden[:, columns]
    return LoadedDocument(
        Document(number, votes, formed_at, mass=weights, hard=hard),
        hidden,
        trace.read("positions"),
        np.ascontiguousarray(np.moveaxis(keys.values, 1, 0)[columns]),
        None if keys.scale is None else np.ascontiguousarray(keys.scale.T[columns]),
    )


class DocumentCache:
    """The documents of `traces` by number, of at most about `limit_bytes` together.

    Any thread may ask; a document that is being loaded is waited for, not loaded twice. Documents
    in use are kept alive by their users: memory may exceed the limit by these.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        limit_bytes: int,
        *,
        target_layers: Sequence[int],
        hard: Mapping[str, np.ndarray] | None = None,
        mass: bool = True,
    ) -> None:
        """`hard` has hard negatives by trace name; `mass` is whether attention mass is wanted."""
        self._traces, self._limit, self._mass = traces, limit_bytes, mass
        self._target_layers, self._hard = tuple(target_layers), hard or {}
        self._lock = threading.Lock()
        self._held: OrderedDict[int, concurrent.futures.Future[LoadedDocument]] = OrderedDict()
        self.held_bytes = self.loads = 0

    def __getitem__(self, number: int) -> LoadedDocument:
        with self._lock:
            future = self._held.get(number)
            mine = future is None
            if future is None:
                future = self._held[number] = concurrent.futures.Future()
            self._held.move_to_end(number)
        if mine:
            self._load(number, future)
        return future.result()

    def _load(self, number: int, future: "concurrent.futures.Future[LoadedDocument]") -> None:
        trace = self._traces[number]
        try:
            hard = self._hard.get(trace.info.name)
            document = load_document(trace, number, self._target_layers, hard=hard, mass=self._mass)
        except BaseException as why:
            with self._lock:
                del self._held[number]
            future.set_exception(why)
            return
        with self._lock:
            self.loads += 1
            self.held_bytes += document.nbytes
            for other in [n for n in self._held if n != number]:
                if self.held_bytes <= self._limit:
                    break
                if self._held[other].done():
                    self.held_bytes -= self._held.pop(other).result().nbytes
            future.set_result(document)
