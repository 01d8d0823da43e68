"""Holds an indexer against logits that a backbone's own indexers gave: `python -m train.verify`.

    python -m train.verify --indexer FILE --traces DIR [--json F]

DIR has traces with golden logits, or the authors' `doc_*.pkl`, of which only hidden_layer_L,
positions_layer_L, compk_layer_L and logits_layer_L_token_{0,1,2} are read, for the indexer's layers
L; labels need not be there. The logits are those of the *native* indexers, so FILE has to be one of
native weights: what `python -m lsa_jax.widen` makes of the backbone's checkpoint, at any width. A
trained indexer has other logits, and fails.

Everything between a checkpoint and a logit is covered: names, norm, RoPE, rotation, scales, keys.
Exits 1 where a layer's Pearson correlation is below 0.99 at a token, or a logit is off by more than
5e-2; 2 for bad input. Entries that did not exist (NaN) do not count.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np

from lsa_jax import cli
from lsa_jax.lsa.indexer_config import IndexerConfig, QueryMode
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from train import import_docs
from train.export import read_source
from train.outputs import check_file
from train.quality.evaluation import check_trace
from train.quality.scoring import Scorer
from train.traces.columns import TraceError
from train.traces.doc_pickle import read_document
from train.traces.trace import MANIFEST, finished_traces, open_trace
from train.traces.trace_info import Keys

LEAST_PEARSON, MOST_DIFFERENCE = 0.99, 5e-2
SIGN_FLOOR = 5e-3  # a logit within it may have either sign
TOPS = (10, 512)


class Golden(NamedTuple):
    """What a document has of its first G tokens at an indexer's L layers, and all N keys."""

    name: str
    hidden: np.ndarray  # [G, L, D]
    positions: np.ndarray  # [G]
    keys: Keys  # [N, L, K]
    logits: np.ndarray  # float32 [G, L, M], NaN where an entry did not exist


class Row(NamedTuple):
    """How one layer's logits at one token compare.

    `pearson` is NaN where either side is constant; `agreed` of the `signed` entries outside
    SIGN_FLOOR have the golden sign; `overlaps` are shares of the golden top 10 and top 512.
    """

    document: str
    token: int
    layer: int
    entries: int
    pearson: float
    difference: float
    agreed: int
    signed: int
    overlaps: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class LayerResult:
    """One layer over all documents: the worst Pearson and difference, and means of the rest."""

    layer: int
    tokens: int
    pearson: float
    difference: float
    sign_agreement: float
    overlaps: tuple[float, ...]

    @classmethod
    def of(cls, layer: int, rows: Sequence[Row]) -> "LayerResult":
        """Sums up the rows of a layer."""
        signed = sum(row.signed for row in rows)
        return cls(
            layer,
            len(rows),
            float(np.min([row.pearson for row in rows])),  # NaN wins
            max(row.difference for row in rows),
            sum(row.agreed for row in rows) / signed if signed else math.nan,
            tuple(np.mean([row.overlaps for row in rows], axis=0).tolist()),
        )

    @property
    def passes(self) -> bool:
        """Whether both bounds hold; what cannot be compared does not pass."""
        return self.pearson >= LEAST_PEARSON and self.difference <= MOST_DIFFERENCE


def _of_trace(path: Path, cfg: IndexerConfig) -> Golden | None:
    """TraceError where the trace is damaged, or not one for this indexer."""
    trace = open_trace(path, verify=False)
    if "golden_logits" not in trace.columns:
        return None
    trace = open_trace(path, verify=True)
    check_trace(cfg, trace)
    logits, keys = trace.read("golden_logits"), trace.keys()
    at = [trace.info.target_layers.index(layer) for layer in cfg.target_layers]
    first = np.s_[: len(logits)]
    scale = None if keys.scale is None else keys.scale[:, at]
    return Golden(
        trace.info.name,
        trace.read("hidden", first)[:, at],
        trace.read("positions", first),
        Keys(keys.values[:, at], scale),
        logits[:, at],
    )


def _of_document(path: Path, cfg: IndexerConfig) -> Golden | None:
    """TraceError where the document is damaged, or not one for this indexer."""
    document, layers = read_document(path), cfg.target_layers
    if not any(key.startswith("logits_layer_") for key in document.items):
        return None
    hidden, keys = (
        import_docs.read_hidden(document, layers),
        import_docs.read_keys(document, layers),
    )
    for name, array, size in (
        (f"hidden_layer_{layers[0]}", hidden, cfg.hidden_size),
        (f"compk_layer_{layers[0]}", keys.values, cfg.head_dim),
    ):
        if array.shape[2] != size:
            raise document.error(name, f"must have the indexer's {size}, got {array.shape[2]}")
    logits = import_docs.read_golden(document, layers, len(keys.values))
    if logits is None:
        raise document.error(f"logits_layer_{layers[0]}_token_0", "is missing")
    positions = import_docs.read_positions(document, layers, len(hidden))
    first = np.s_[: len(logits)]
    return Golden(path.stem, hidden[first], positions[first], keys, logits)


def find_golden(root: Path, cfg: IndexerConfig) -> Iterator[Golden | None]:
    """What each trace and document of a directory has; None where it has no golden logits.

    `root` may be a single trace or document. TraceError where nothing is there.
    """
    traces = [root] if (root / MANIFEST).exists() else finished_traces(root)
    documents = [root] if root.is_file() else sorted(root.glob("doc_*.pkl"))
    if not traces and not documents:
        raise TraceError(f"{root} must have finished traces or doc_*.pkl, got none")
    for path in traces:
        yield _of_trace(path, cfg)
    for path in documents:
        yield _of_document(path, cfg)


def _entries(golden: Golden) -> np.ndarray:
    """How many entries existed at each token; TraceError where NaNs do not say so."""
    exists = ~np.isnan(golden.logits)
    counts = exists.sum(axis=2)
    first = np.arange(exists.shape[2]) < counts[..., None]
    orderly = np.array_equal(exists, first) and (counts == counts[:, :1]).all()
    if not orderly or not counts.all() or np.isinf(golden.logits).any():
        wanted = "finite for the first entries of each token, alike at all layers, then NaN"
        raise TraceError(f"{golden.name}: golden logits must be {wanted}")
    return counts[:, 0]


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / norm if norm > 0 else math.nan


def _top(logits: np.ndarray, count: int) -> set[int]:
    return set(np.argsort(-logits, kind="stable")[:count].tolist())


def compare_logits(
    got: np.ndarray, want: np.ndarray, *, document: str, token: int, layer: int
) -> Row:
    """Compares the logits [n] of one token and layer with the golden ones."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    outside = np.abs(want) > SIGN_FLOOR
    shared = [len(_top(got, k) & _top(want, k)) / k for k in (min(k, len(want)) for k in TOPS)]
    return Row(
        document,
        token,
        layer,
        len(want),
        _pearson(got, want),
        float(np.abs(got - want).max()),
        int((np.sign(got) == np.sign(want))[outside].sum()),
        int(outside.sum()),
        tuple(shared),
    )


def verify(indexer: MemoryIndexer, golden: Golden) -> list[Row]:
    """Recomputes the golden logits of one document; a row for each token and layer."""
    counts, scorer = _entries(golden), Scorer(indexer.cfg)
    most = int(counts.max())
    logits = scorer.logits(indexer, golden.hidden, golden.positions, golden.keys, most)
    return [
        compare_logits(
            logits[token, i, :count],
            golden.logits[token, i, :count],
            document=golden.name,
            token=token,
            layer=layer,
        )
        for token, count in enumerate(counts)
        for i, layer in enumerate(indexer.cfg.target_layers)
    ]


@dataclasses.dataclass(frozen=True)
class Verification:
    """All rows, and the documents that had no golden logits."""

    rows: list[Row]
    without: int

    @classmethod
    def of(cls, indexer: MemoryIndexer, root: Path) -> "Verification":
        """Verifies everything in `root`; TraceError where it has no golden logits at all."""
        found = [g and verify(indexer, g) for g in find_golden(root, indexer.cfg)]
        rows = [row for rows in found if rows for row in rows]
        if not rows:
            raise TraceError(f"{root}: none of {len(found)} documents has golden logits")
        return cls(rows, sum(rows is None for rows in found))

    def layers(self) -> list[LayerResult]:
        """The result of each layer."""
        numbers = sorted({row.layer for row in self.rows})
        return [LayerResult.of(n, [row for row in self.rows if row.layer == n]) for n in numbers]

    def to_json(self) -> dict[str, Any]:
        """Everything, undefined figures as null."""
        layers = [dataclasses.asdict(x) | {"passes": x.passes} for x in self.layers()]
        parts = {"layers": layers, "rows": [row._asdict() for row in self.rows]}
        for part in [*layers, *parts["rows"]]:
            part |= {k: None for k, v in part.items() if isinstance(v, float) and math.isnan(v)}
            part |= {f"top_{k}": v for k, v in zip(TOPS, part.pop("overlaps"), strict=True)}
        return {"passes": not self.failures(), "without_golden_logits": self.without, **parts}

    def table(self) -> Iterator[str]:
        """The layers' results, a line each under a head."""
        tops = "".join(f" {f'top-{k}':>8}" for k in TOPS)
        yield f"{'layer':>5} {'tokens':>6} {'Pearson':>9} {'max abs':>9} {'signs':>8}{tops}"
        for x in self.layers():
            shares = "".join(f" {share:8.2%}" for share in x.overlaps)
            figures = f"{x.pearson:9.6f} {x.difference:9.2e} {x.sign_agreement:8.2%}"
            yield f"{x.layer:5} {x.tokens:6} {figures}{shares}"

    def failures(self) -> list[str]:
        """A line for each layer that does not pass, with the worst token."""
        lines = []
        for x in (x for x in self.layers() if not x.passes):
            rows = [row for row in self.rows if row.layer == x.layer]
            worst = max(rows, key=lambda row: (not row.pearson >= LEAST_PEARSON, row.difference))
            wanted = f"at least {LEAST_PEARSON} and at most {MOST_DIFFERENCE}"
            got = f"Pearson {x.pearson:.4f} and max abs difference {x.difference:.3g}"
            lines.append(
                f"layer {x.layer}: {got}, wanted {wanted}"
                f" (see {worst.document}, token {worst.token})"
            )
        return lines


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m train.verify", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--indexer", type=Path, required=True, help="file with native weights")
    parser.add_argument("--traces", type=Path, required=True, help="directory with golden logits")
    parser.add_argument("--layer", type=int, help="of a .pt with a single layer: its CSA ordinal")
    parser.add_argument(
        "--query-mode",
        choices=get_args(QueryMode),
        help="rounding of queries (default: the file's)",
    )
    parser.add_argument("--json", type=Path, metavar="F", help="write every figure there")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)
    failures: list[str] = []

    def body() -> None:
        if args.json:
            check_file("--json", args.json)
        source = read_source(args.indexer, layer=args.layer)
        indexer = from_file(source.indexer, query_mode=args.query_mode)
        result = Verification.of(indexer, args.traces)
        if args.json:
            args.json.write_text(json.dumps(result.to_json(), indent=1) + "\n", "utf-8")
        print("\n".join(result.table()))
        if result.without:
            print(f"documents without golden logits, left out: {result.without}")
        failures.extend(result.failures())

    code = cli.exit_code(body, interrupted="interrupted")
    for line in failures:
        print(f"failed: {line}", file=sys.stderr)
    return code or int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
