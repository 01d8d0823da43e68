"""The traces of a split, checked to be of one backbone and one shape."""

import concurrent.futures
import dataclasses
import functools
import math
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from lsa_jax.config_checks import shown
from train.data.labels import Document, SamplingConfig
from train.data.sample_counts import SampleCounts, count_samples
from train.traces.columns import TraceError
from train.traces.trace import Trace, finished_traces, open_trace
from train.traces.trace_info import TraceInfo

_ALIKE = ("model", "weights", "rope", "csa_layers", "csa_ratio", "page_entries", "votes")
_BY_LAYER = ("hidden", "keys", "key_scale")


class Corpus:
    """Traces that can be trained on together, in a fixed order, at some target layers.

    `hard` has the hard negatives of every trace by its name, or nothing.
    """

    def __init__(
        self,
        traces: Sequence[Trace],
        target_layers: Sequence[int] | None = None,
        hard: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Raises TraceError where two traces do not fit together, naming both."""
        if not traces:
            raise TraceError("a corpus must have at least one finished trace, got none")
        self.traces, self.hard = tuple(traces), dict(hard or {})
        self.target_layers = _common_layers(traces, target_layers)
        for trace in traces:
            _check_alike(traces[0], trace)
        check_names(traces)
        self._counts: dict[tuple[SamplingConfig, int], list[SampleCounts]] = {}

    @classmethod
    def open(
        cls,
        dirs: Sequence[str | Path],
        target_layers: Sequence[int] | None = None,
        *,
        hard_negatives: str | Path | None = None,
        verify: bool = False,
    ) -> Self:
        """The finished traces of some trace sets, set by set and by name.

        Args:
          dirs: trace sets; each must have a finished trace.
          target_layers: some of the traces' CSA ordinals; all of them by default.
          hard_negatives: an npz file with entries of every trace by its name.
          verify: reads all arrays to hold them against their digests.
        """
        traces = []
        for directory in map(Path, dirs):
            found = finished_traces(directory)
            if not found:
                what = "finished traces" if directory.is_dir() else "a directory of traces"
                raise TraceError(f"{directory} must have {what}, got none")
            traces += [open_trace(path, verify=verify) for path in found]
        hard = read_hard(Path(hard_negatives), traces) if hard_negatives is not None else None
        return cls(traces, target_layers, hard)

    @functools.cached_property
    def info(self) -> TraceInfo:
        """The first trace's, with the target layers of the corpus: all share what it decides."""
        return dataclasses.replace(self.traces[0].info, target_layers=self.target_layers)

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.traces[0].columns["hidden"].shape[2]

    @property
    def head_dim(self) -> int:
        """K, of index keys."""
        return self.traces[0].columns["keys"].shape[2]

    @functools.cached_property
    def document_bytes(self) -> np.ndarray:
        """About what each document takes in memory, int64 [documents]."""
        used = len(self.target_layers)

        def size(trace: Trace) -> int:
            layers = len(trace.info.target_layers)
            total = 0
            for name, column in trace.columns.items():
                nbytes = math.prod(column.shape) * column.numpy_dtype.itemsize
                total += nbytes * used // layers if name in _BY_LAYER else nbytes
            return total

        return np.array([size(trace) for trace in self.traces], np.int64)

    def counts(self, sampling: SamplingConfig, *, interval: int = 1) -> list[SampleCounts]:
        """The samples of every document; reads the votes of all, once."""
        key = (sampling, interval)
        if key not in self._counts:

            def count(document: int) -> SampleCounts:
                trace = self.traces[document]
                labels = Document(document, trace.votes(), trace.read("formed_at"))
                return count_samples(labels, sampling, interval=interval)

            with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
                self._counts[key] = list(pool.map(count, range(len(self.traces))))
        return self._counts[key]


def check_names(traces: Sequence[Trace]) -> None:
    """TraceError where two traces have one name, by which hard negatives are found; or are one."""
    names: dict[str, Trace] = {}
    for trace in traces:
        first = names.setdefault(trace.info.name, trace)
        if first is trace:
            continue
        if first.path.resolve() == trace.path.resolve():
            raise TraceError(f"traces must be given once, got {trace.path} twice")
        both = f"{first.path.parent} and in {trace.path.parent}"
        cure = "train.dump_traces --start N numbers documents from N"
        raise TraceError(
            f"traces must have different names, got {trace.info.name} in {both} ({cure})"
        )


def _common_layers(traces: Sequence[Trace], target_layers: Sequence[int] | None) -> tuple[int, ...]:
    """The layers asked for, which all traces must have; or those of the first, which all share."""
    first = traces[0]
    if target_layers is not None:
        for trace in traces:
            found = trace.info.target_layers
            if not target_layers or not set(target_layers) <= set(found):
                got = f"{trace.path} has {found}"
                raise TraceError(
                    f"target_layers must be of every trace, got {target_layers}: {got}"
                )
        return tuple(target_layers)
    for trace in traces:
        if trace.info.target_layers != first.info.target_layers:
            raise _differ("target_layers", first, trace, lambda t: t.info.target_layers)
    return first.info.target_layers


def _check_alike(first: Trace, other: Trace) -> None:
    for name in _ALIKE:
        if getattr(first.info, name) != getattr(other.info, name):
            raise _differ(name, first, other, lambda t, name=name: getattr(t.info, name))
    for name in ("hidden", "keys"):

        def kind(trace: Trace, name: str = name) -> str:
            column = trace.columns[name]
            return f"{column.dtype} of {column.shape[2]} channels"

        if kind(first) != kind(other):
            raise _differ(name, first, other, kind)


def _differ(name: str, first: Trace, other: Trace, get: Callable[[Trace], object]) -> TraceError:
    got = f"{shown(get(first))} in {first.path} and {shown(get(other))} in {other.path}"
    return TraceError(f"{name} must be the same in all traces, got {got}")


def read_hard(path: Path, traces: Sequence[Trace]) -> dict[str, np.ndarray]:
    """The hard negatives of every trace, int64 ascending, from a file that may have others too.

    Raises FileNotFoundError where there is no file, TraceError where it does not fit the traces.
    """
    hard = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for trace in traces:
                name = trace.info.name
                if name not in file:
                    raise TraceError(f"{path} must have the hard negatives of {name}, got none")
                entries = file[name]
                integers = np.issubdtype(entries.dtype, np.integer) and entries.ndim == 1
                if not integers or np.any((entries < 0) | (entries >= trace.entries)):
                    wanted = f"entries in 0..{trace.entries - 1}"
                    got = f"{entries.dtype}{list(entries.shape)} {shown(entries)}"
                    raise TraceError(f"{path}: {name} must be {wanted}, got {got}")
                hard[name] = np.unique(entries).astype(np.int64)
    except (ValueError, EOFError, zipfile.BadZipFile) as why:
        if isinstance(why, TraceError):
            raise
        raise TraceError(f"{path} must be an npz file of integer arrays ({why})") from None
    return hard
