"""What samples need of a trace, read when it is needed and kept while there is room.

A document has three parts. Labels are light, and all that drawing samples takes. Hidden states are
heavy; a step gets those of its tokens. Index keys are heaviest: the devices hold them, and the host
only while they are on their way there (`train.run.key_pool`).
"""

import concurrent.futures
import dataclasses
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np

from train.data.labels import Document
from train.traces.trace import Trace
from train.traces.trace_info import Keys


@dataclasses.dataclass(frozen=True)
class LabelledDocument:
    """What samples of a document of T tokens are drawn from."""

    labels: Document
    positions: np.ndarray  # int32 [T]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.labels.nbytes + self.positions.nbytes


def load_labels(
    trace: Trace, number: int, *, hard: np.ndarray | None = None, mass: bool = True
) -> LabelledDocument:
    """A trace's votes and, if wanted, attention mass."""
    weights = trace.mass() if mass else None
    labels = Document(number, trace.votes(), trace.read("formed_at"), mass=weights, hard=hard)
    return LabelledDocument(labels, trace.read("positions"))


def _columns(trace: Trace, target_layers: Sequence[int]) -> np.ndarray | slice:
    """Where some of a trace's target layers are in its arrays."""
    if tuple(target_layers) == trace.info.target_layers:
        return slice(None)
    return np.array([trace.info.target_layers.index(layer) for layer in target_layers])


def load_hidden(trace: Trace, target_layers: Sequence[int]) -> np.ndarray:
    """Hidden states [T, L, D] at some of a trace's target layers."""
    return np.ascontiguousarray(trace.read("hidden")[:, _columns(trace, target_layers)])


def load_keys(trace: Trace, target_layers: Sequence[int]) -> Keys:
    """Index keys [N, L, K], with their scale [N, L] if any, at some of a trace's target layers."""
    keys, columns = trace.keys(), _columns(trace, target_layers)
    scale = None if keys.scale is None else np.ascontiguousarray(keys.scale[:, columns])
    return Keys(np.ascontiguousarray(keys.values[:, columns]), scale)


class Cache[T]:
    """Parts of documents by their number, of at most about `limit_bytes` together.

    Any thread may ask; a part that is being loaded is waited for, not loaded twice. The least
    recently used are given up. Parts in use are kept alive by their users: memory may exceed the
    limit by these.
    """

    def __init__(self, load: Callable[[int], T], limit_bytes: int) -> None:
        """`load` gives the part of a document, which must have `nbytes`."""
        self._load, self._limit = load, limit_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[int, concurrent.futures.Future[T]] = OrderedDict()
        self.held_bytes = self.loads = 0

    def __getitem__(self, number: int) -> T:
        with self._lock:
            future = self._held.get(number)
            mine = future is None
            if future is None:
                future = self._held[number] = concurrent.futures.Future()
            self._held.move_to_end(number)
        if mine:
            self._fill(number, future)
        return future.result()

    def _fill(self, number: int, future: "concurrent.futures.Future[T]") -> None:
        try:
            part = self._load(number)
        except BaseException as why:
            with self._lock:
                del self._held[number]
            future.set_exception(why)
            return
        with self._lock:
            self.loads += 1
            self.held_bytes += _nbytes(part)
            for other in [n for n in self._held if n != number]:
                if self.held_bytes <= self._limit:
                    break
                if self._held[other].done():
                    self.held_bytes -= _nbytes(self._held.pop(other).result())
            future.set_result(part)


def _nbytes(part: object) -> int:
    return part.nbytes  # pyright: ignore[reportAttributeAccessIssue]
