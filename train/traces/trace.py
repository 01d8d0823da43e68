"""Traces: what a memory indexer is trained on, one directory to a document.

T decode tokens were recorded, over N entries in the end, at L target layers (CSA ordinals):
  hidden          bfloat16 or float32 [T, L, D]: the layer's attention input
  positions       int32 [T], ascending
  keys            [N, L, K] index keys: e4m3 codes (uint8) with key_scale, bfloat16, or float32
  key_scale       float32 [N, L], with e4m3 codes only
  formed_at       int32 [N], ascending: the token that completed it
  vote_*          golden sets by token, `SparseRows` with votes as uint8 (LSA spec 4.2)
  mass_*          attention mass by token over all CSA layers, `SparseRows` in float16; optional
  golden_logits   float32 [G, L, M]: the native indexers' logits at the first G tokens, NaN where an
                  entry did not exist; optional
`trace.json` is written last, and the directory gets its name last: a document whose recording was
killed is `NAME.partial`, which is never opened, and begun again by its next writer.
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import tensorstore as ts

from lsa_jax.config import ConfigError
from train.traces import columns
from train.traces.columns import Column, ColumnWriter, SparseWriter, TraceError
from train.traces.trace_info import (
    E4M3,
    PARTIAL,
    Keys,
    TraceInfo,
    digest,
    finite,
    formation_steps,
)
from train.traces.votes import SparseRows

SCHEMA = 2
_READ = (1, SCHEMA)  # 1 says nothing of the backbone's weights
MANIFEST = "trace.json"
VOTES = ("vote_indices", "vote_scores", "vote_pointers")
MASS = ("mass_indices", "mass_values", "mass_pointers")

_DTYPES = {
    "hidden": ("bfloat16", "float32"),
    "positions": ("int32",),
    "keys": ("uint8", "bfloat16", "float32"),
    "key_scale": ("float32",),
    "formed_at": ("int32",),
    **dict(zip(VOTES, (("int32",), ("uint8",), ("int64",)), strict=True)),
    **dict(zip(MASS, (("int32",), ("float16",), ("int64",)), strict=True)),
    "golden_logits": ("float32",),
}


class TraceWriter:
    """Records one document: `append` tokens as they are decoded, then `finish`.

    At most a shard of each array waits in memory, 16 MiB. As a context manager it removes what it
    wrote unless it was finished; where it could not, the next writer of the document does. There
    must be one writer to a document at a time.
    """

    def __init__(
        self, root: Path, info: TraceInfo, *, hidden_size: int, hidden_dtype: Any, mass: bool
    ) -> None:
        """Begins `root / info.name`; FileExistsError where that is finished already.

        Args:
          root: the trace set; made if it is not there.
          info: what is recorded.
          hidden_size: D.
          hidden_dtype: bfloat16 or float32.
          mass: whether every token comes with its attention mass, or none does.
        """
        self.info, self.path = info, Path(root) / info.name
        if os.path.lexists(self.path):
            raise FileExistsError(f"{self.path} exists already: delete it or choose another name")
        if np.dtype(hidden_dtype).name not in _DTYPES["hidden"]:
            raise TraceError(f"hidden must be bfloat16 or float32, got {np.dtype(hidden_dtype)}")
        self._partial = self.path.with_name(info.name + PARTIAL)
        if self._partial.exists():
            shutil.rmtree(self._partial)
        self._partial.mkdir(parents=True)
        shape = (len(info.target_layers), hidden_size)
        self._hidden = ColumnWriter(self._partial / "hidden", hidden_dtype, shape)
        self._positions: list[np.ndarray] = []
        self._votes = SparseWriter(self._partial, {n: _DTYPES[n][0] for n in VOTES})
        weights = {n: _DTYPES[n][0] for n in MASS}
        self._mass = SparseWriter(self._partial, weights) if mass else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()

    def discard(self) -> None:
        """Removes what was written, unless it was finished."""
        shutil.rmtree(self._partial, ignore_errors=True)

    def append(
        self,
        hidden: np.ndarray,
        positions: np.ndarray,
        votes: SparseRows,
        mass: SparseRows | None = None,
    ) -> None:
        """Adds t tokens: hidden [t, L, D], positions [t], and a row each of votes and of mass.

        Mass is rounded to float16. Raises TraceError where these do not fit together, or positions
        do not ascend; the trace is as it was then.
        """
        positions = np.asarray(positions)
        before = self._positions[-1][-1:] if self._positions else np.full(1, -1)
        path = np.concatenate([before, positions])
        if np.any(path[1:] <= path[:-1]) or path[-1] >= 2**31:
            raise TraceError(f"positions must ascend from {before[0]} to below 2^31")
        if (mass is None) != (self._mass is None):
            raise TraceError("mass must come with all tokens or with none")
        given = [len(hidden), len(votes), *([] if mass is None else [len(mass)])]
        if positions.ndim != 1 or any(n != len(positions) for n in given) or not len(positions):
            wanted = f"one row each for {positions.shape} positions"
            raise TraceError(f"hidden, votes and mass must have {wanted}, got {given}")
        if not finite(np.asarray(hidden)):
            raise TraceError(f"hidden must be finite, got NaN or infinity after {before[0]}")
        self._check_sparse("votes", votes, np.integer, 1, self.info.csa_layers)
        if mass is not None:
            self._check_sparse("mass", mass, np.floating, 0, float(np.finfo(np.float16).max))
        self._hidden.append(hidden)
        self._positions.append(positions.astype(np.int32))
        self._votes.append(votes)
        if self._mass is not None and mass is not None:
            self._mass.append(mass)

    def _check_sparse(
        self, name: str, rows: SparseRows, kind: type, least: float, most: float
    ) -> None:
        values = rows.values
        if not np.issubdtype(values.dtype, kind) or not np.all(
            (values >= least) & (values <= most)
        ):
            got = f"{values.dtype} up to {values.max(initial=0)}"
            raise TraceError(f"{name} must be {kind.__name__} in [{least}, {most}], got {got}")
        if rows.indices.min(initial=0) < 0:
            raise TraceError(f"{name} must be of entries >= 0, got {rows.indices.min()}")

    def finish(self, keys: Keys, golden_logits: np.ndarray | None = None) -> Path:
        """Adds the keys of all entries, and golden logits [G, L, M] if any; names the trace.

        Returns its directory. TraceError where nothing was appended, a vote or mass is of an entry
        without a key, or shapes do not fit; nothing is finished then.
        """
        if not self._positions:
            raise TraceError(f"{self.path}: must have at least one token, got none")
        keys.check()
        positions = np.concatenate(self._positions)
        entries = len(keys.values)
        last = max(self._votes.last, self._mass.last if self._mass else -1)
        if last >= entries:
            raise TraceError(f"{self.path}: an entry {last} has votes or mass, of {entries} keys")
        arrays = {
            "positions": positions,
            "keys": keys.values.view(np.uint8) if keys.values.dtype == E4M3 else keys.values,
            "formed_at": formation_steps(positions, entries, self.info.csa_ratio),
        }
        optional = {"key_scale": keys.scale, "golden_logits": golden_logits}
        arrays |= {name: array for name, array in optional.items() if array is not None}
        finished = {"hidden": self._hidden.close(), **self._votes.close()}
        finished |= self._mass.close() if self._mass else {}
        for name, array in arrays.items():
            column = ColumnWriter(self._partial / name, array.dtype, array.shape[1:])
            column.append(array)
            finished[name] = column.close()
        _check_columns(self.path, self.info, finished)
        _write_manifest(self._partial / MANIFEST, self.info, finished)
        self._partial.rename(self.path)
        _sync(self.path.parent)
        return self.path


def _write_manifest(path: Path, info: TraceInfo, finished: Mapping[str, Column]) -> None:
    parts = {name: dataclasses.asdict(column) for name, column in finished.items()}
    contents = {"schema": SCHEMA, "info": dataclasses.asdict(info), "columns": parts}
    with path.open("w", encoding="utf-8") as file:
        json.dump({**contents, "sha256": digest(contents)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_columns(path: Path, info: TraceInfo, found: Mapping[str, Column]) -> None:
    """TraceError where arrays are missing, unknown, or do not fit each other."""
    needed = {"hidden", "positions", "keys", "formed_at", *VOTES}
    needed |= (
        {"key_scale"} if found.get("keys", Column("uint8", (0,), "")).dtype == "uint8" else set()
    )
    needed |= set(MASS) if found.keys() & set(MASS) else set()
    if found.keys() - {"golden_logits"} != needed:
        raise TraceError(f"{path} must have the arrays {sorted(needed)}, got {sorted(found)}")
    shapes = {name: column.shape for name, column in found.items()}
    layers = len(info.target_layers)
    tokens, entries = shapes["positions"][0], shapes["formed_at"][0]
    wanted: dict[str, tuple[int, ...]] = {
        "hidden": (tokens, layers, *shapes["hidden"][2:3]),
        "positions": (tokens,),
        "keys": (entries, layers, *shapes["keys"][2:3]),
        "key_scale": (entries, layers),
        "formed_at": (entries,),
    }
    for names in (VOTES, MASS):
        count = shapes.get(names[0], (0,))[:1]
        wanted |= dict(zip(names, (count, count, (tokens + 1,)), strict=True))
    golden = shapes.get("golden_logits", (0, layers, 0))
    wanted["golden_logits"] = (min(golden[0], tokens), layers, min(golden[-1], entries))
    for name, column in found.items():
        if column.shape != wanted[name] or column.dtype not in _DTYPES[name]:
            want = f"{' or '.join(_DTYPES[name])}{list(wanted[name])}"
            raise TraceError(
                f"{path}: {name} must be {want}, got {column.dtype}{list(column.shape)}"
            )


@dataclasses.dataclass(frozen=True)
class Trace:
    """A finished trace. Arrays are opened and read when asked for."""

    path: Path
    info: TraceInfo
    columns: Mapping[str, Column]

    @property
    def tokens(self) -> int:
        """T, recorded decode tokens."""
        return self.columns["positions"].shape[0]

    @property
    def entries(self) -> int:
        """N, entries in the end."""
        return self.columns["formed_at"].shape[0]

    def store(self, name: str) -> ts.TensorStore:
        """An array, open for reading; e4m3 keys are uint8."""
        return columns.open_column(self.path / name, self.columns[name])

    def read(self, name: str, rows: slice | np.ndarray = np.s_[:]) -> np.ndarray:
        """An array, or the rows of a slice or of some numbers, in their order; checked for NaN
        where it is of no use with them."""
        found = columns.read(self.path / name, self.store(name), rows)
        if name in ("hidden", "mass_values") and not finite(found):
            raise TraceError(f"{self.path}: {name} must be finite, got NaN or infinity")
        return found

    def keys(self, rows: slice | np.ndarray = np.s_[:]) -> Keys:
        """The index keys of all entries, or of some."""
        values, scale = self.read("keys", rows), None
        if "key_scale" in self.columns:
            values, scale = values.view(E4M3), self.read("key_scale", rows)
        found = Keys(values, scale)
        try:
            found.check()
        except TraceError as why:
            raise TraceError(f"{self.path}: {why}") from None
        return found

    def votes(self) -> SparseRows:
        """Golden sets by token, with votes."""
        return self._sparse(VOTES)

    def mass(self) -> SparseRows | None:
        """Attention mass by token, where it was recorded."""
        return self._sparse(MASS) if MASS[0] in self.columns else None

    def _sparse(self, names: tuple[str, str, str]) -> SparseRows:
        try:
            rows = SparseRows(*map(self.read, names))
        except ConfigError as why:
            raise TraceError(f"{self.path}: {names[0]} is damaged: {why}") from None
        found = rows.indices
        if found.size and not 0 <= found.min() <= found.max() < self.entries:
            got = f"{found.min()}..{found.max()}"
            raise TraceError(f"{self.path}: {names[0]} must be in 0..{self.entries - 1}, got {got}")
        return rows

    def golden_logits(self) -> np.ndarray | None:
        """Native logits [G, L, M] at the first G tokens, where they were recorded."""
        return self.read("golden_logits") if "golden_logits" in self.columns else None


def open_trace(path: Path, *, verify: bool = True) -> Trace:
    """A finished trace; with `verify`, every array is read and held against its digest.

    Raises FileNotFoundError where there is none, TraceError where it is unfinished, of another
    schema, or damaged, naming each damaged array.
    """
    path = Path(path)
    if path.name.endswith(PARTIAL):
        raise TraceError(f"{path} is unfinished: its recording was stopped")
    try:
        raw = json.loads((path / MANIFEST).read_text("utf-8"))
        contents = {key: raw[key] for key in ("schema", "info", "columns")}
        if contents["schema"] not in _READ:
            raise TraceError(f"{path} must be of schema {_READ}, got {contents['schema']!r}")
        if raw["sha256"] != digest(contents):
            raise TraceError(f"{path}: {MANIFEST} is damaged: it has another digest than it says")
        info = TraceInfo.from_json(raw["info"])
        parts = {
            name: Column(part["dtype"], tuple(part["shape"]), part["sha256"])
            for name, part in raw["columns"].items()
        }
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ConfigError) as why:
        reason = " ".join(str(why).split())
        raise TraceError(
            f"{path}: {MANIFEST} is damaged ({type(why).__name__}: {reason})"
        ) from None
    _check_columns(path, info, parts)
    if verify:
        faults = (columns.damage(path / name, column) for name, column in parts.items())
        problems = [fault for fault in faults if fault]
        if problems:
            raise TraceError(f"{path}: {len(problems)} damaged", problems)
    return Trace(path, info, parts)


def finished_traces(root: Path) -> list[Path]:
    """Directories of the finished traces in a set, by name; empty where there is no such set."""
    found = (manifest.parent for manifest in Path(root).glob(f"*/{MANIFEST}"))
    return sorted(path for path in found if not path.name.endswith(PARTIAL))
