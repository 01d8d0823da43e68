"""How long this process compiled while it did something else."""

import contextlib
import math
from collections.abc import Iterator

import jax

_COMPILED = "/jax/core/compile/backend_compile_duration"
_EVENTS = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _COMPILED,
)


class CompileClock:
    """Seconds spent tracing, lowering and compiling within `listen`, and programs compiled.

    JAX reports spans of time, inner ones first; each moment counts once.
    """

    def __init__(self) -> None:
        self.seconds, self.programs = 0.0, 0
        self._spans: list[tuple[float, float]] = []  # disjoint, ascending

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Counts what is compiled in the body."""
        jax.monitoring.register_event_time_span_listener(self._note)
        try:
            yield
        finally:
            jax.monitoring.unregister_event_time_span_listener(self._note)

    def _note(self, event: str, start_time: float, end_time: float, **_: str | int) -> None:
        if event not in _EVENTS:
            return
        self.programs += event == _COMPILED
        while self._spans and self._spans[-1][0] >= start_time:
            first, last = self._spans.pop()
            self.seconds -= last - first
        start = max(start_time, self._spans[-1][1] if self._spans else -math.inf)
        self._spans.append((start, end_time))
        self.seconds += end_time - start
