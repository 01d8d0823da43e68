"""Makes traces of the authors' dumps: `python -m train.import_docs SRC... DST`.

SRC are `doc_*.pkl` files (LSA spec 4.3), or directories of them; DST is a trace set, which gets a
directory for each. Documents that DST has already are left as they are, so an import that was
stopped goes on when it is started again. Nothing in a document is executed.
"""

import argparse
import dataclasses
import hashlib
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from lsa_jax import cli
from lsa_jax.config import ConfigError, YarnConfig
from train.outputs import check_directory
from train.traces.columns import TraceError
from train.traces.doc_pickle import Document, read_document
from train.traces.trace import TraceWriter, open_trace
from train.traces.trace_info import E4M3, KeyRope, Keys, TraceInfo
from train.traces.votes import SparseRows, VoteConfig

GOLDEN_TOKENS = 3
V4_FLASH_ROPE = KeyRope(rope_head_dim=64, rope_theta=160000.0, yarn=YarnConfig(), norm_eps=1e-6)
_SCALE_BYTES = 4  # of a key, after its codes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backbone:
    """What the dumps do not say of the model and the votes; the defaults are V4-Flash's."""

    csa_layers: int = 21
    csa_ratio: int = 4
    page_entries: int = 64
    rope: KeyRope = V4_FLASH_ROPE
    votes: VoteConfig = dataclasses.field(default_factory=VoteConfig)


@dataclasses.dataclass(frozen=True)
class Imported:
    """What became of one document. `labels` are used, `dropped` are of entries beyond its keys."""

    path: Path
    tokens: int
    entries: int
    labels: int
    dropped: int


def target_layers(document: Document) -> tuple[int, ...]:
    """The CSA ordinals that a document has hidden states of."""
    found = (re.fullmatch(r"hidden_layer_(\d+)", key) for key in document.items)
    layers = tuple(sorted(int(match[1]) for match in found if match))
    if not layers:
        raise document.error("hidden_layer_*", "is missing for every layer")
    return layers


def _shaped(document: Document, key: str, wanted: Sequence[int | None], kind: str) -> np.ndarray:
    """An array of a shape, of integers ("i"), bytes ("b") or floats ("f"); None is any size."""
    array = document.array(key)
    kinds = {
        "i": np.issubdtype(array.dtype, np.integer),
        "b": array.dtype == np.uint8,
        "f": array.dtype.name in ("bfloat16", "float32"),
    }
    shape = array.shape
    fits = len(shape) == len(wanted)
    fits = fits and all(w in (None, n) for n, w in zip(shape, wanted, strict=True))
    if not kinds[kind] or not fits:
        dtype = {"i": "integers", "b": "uint8", "f": "bfloat16 or float32"}[kind]
        sizes = ", ".join("any" if size is None else str(size) for size in wanted)
        raise document.error(key, f"must be {dtype} [{sizes}], got {array.dtype}{list(shape)}")
    return array


def read_hidden(document: Document, layers: Sequence[int]) -> np.ndarray:
    """Hidden states [T, L, D], bfloat16 or float32 as dumped."""
    first = _shaped(document, f"hidden_layer_{layers[0]}", (None, None), "f")
    if not first.size:
        raise document.error(f"hidden_layer_{layers[0]}", f"is empty: {list(first.shape)}")
    states = [_shaped(document, f"hidden_layer_{i}", first.shape, "f") for i in layers]
    for layer, state in zip(layers, states, strict=True):
        key = f"hidden_layer_{layer}"
        if state.dtype != first.dtype:
            raise document.error(key, f"must be {first.dtype}, as the first, got {state.dtype}")
        if not np.isfinite(state.astype(np.float32, copy=False)).all():
            raise document.error(key, "must be finite")
    return np.stack(states, axis=1)


def read_positions(document: Document, layers: Sequence[int], tokens: int) -> np.ndarray:
    """Absolute positions int32 [T], the same at every layer."""
    first = _shaped(document, f"positions_layer_{layers[0]}", (tokens,), "i")
    for layer in layers:
        key = f"positions_layer_{layer}"
        if not np.array_equal(_shaped(document, key, (tokens,), "i"), first):
            raise document.error(key, f"must equal positions_layer_{layers[0]}")
    if first[0] < 0 or first.max() >= 2**31 or np.any(first[1:] <= first[:-1]):
        raise document.error(f"positions_layer_{layers[0]}", "must ascend within [0, 2^31)")
    return first.astype(np.int32)


def read_keys(document: Document, layers: Sequence[int]) -> Keys:
    """Index keys [N, L, K]: rows of K e4m3 codes and a little-endian float32 scale."""
    first = _shaped(document, f"compk_layer_{layers[0]}", (None, None), "b")
    if first.shape[1] <= _SCALE_BYTES:
        what = f"must have rows of codes and {_SCALE_BYTES} bytes of scale"
        raise document.error(f"compk_layer_{layers[0]}", f"{what}, got {first.shape[1]} bytes")
    keys = []
    for layer in layers:
        key = f"compk_layer_{layer}"
        rows = _shaped(document, key, first.shape, "b")
        codes = np.ascontiguousarray(rows[:, :-_SCALE_BYTES]).view(E4M3)
        scale = np.ascontiguousarray(rows[:, -_SCALE_BYTES:]).view("<f4")
        keys.append(Keys(codes[:, None], scale))
        try:
            keys[-1].check()
        except TraceError as why:
            raise document.error(key, f"is no table of keys: {why}") from None
    values = np.concatenate([part.values.view(np.uint8) for part in keys], axis=1)
    scales = [part.scale for part in keys if part.scale is not None]
    return Keys(values.view(E4M3), np.concatenate(scales, axis=1))


def read_labels(
    document: Document, tokens: int, entries: int, backbone: Backbone
) -> tuple[SparseRows, int]:
    """Golden sets by token with their votes, and how many labels are of entries without a key.

    Those are dropped: the prompt was tokenised once more for the keys, and may have come out
    shorter.
    """
    indices = _shaped(document, "label_indices", (None,), "i")
    scores = _shaped(document, "label_scores", indices.shape, "i")
    pointers = _shaped(document, "label_pointers", (tokens + 1,), "i")
    least, most = backbone.votes.min_layers, backbone.csa_layers
    if scores.size and not least <= scores.min() <= scores.max() <= most:
        got = f"{scores.min()}..{scores.max()}"
        raise document.error("label_scores", f"must be votes in [{least}, {most}], got {got}")
    if indices.size and not 0 <= indices.min() <= indices.max() < 2**31:
        got = f"{indices.min()}..{indices.max()}"
        raise document.error("label_indices", f"must be in [0, 2^31), got {got}")
    try:
        parts = (indices.astype(np.int32), scores.astype(np.uint8), pointers.astype(np.int64))
        rows = SparseRows(*parts)
    except ConfigError as why:
        raise document.error("label_pointers", f"does not fit the labels: {why}") from None
    if rows.repeats():
        raise document.error("label_indices", "has an entry twice at one token")
    kept = rows.where(rows.indices < entries).by_value()
    return kept, len(rows.indices) - len(kept.indices)


def read_golden(document: Document, layers: Sequence[int], entries: int) -> np.ndarray | None:
    """Native logits float32 [G, L, M] of the first G <= 3 tokens, NaN where there was no entry."""
    tokens = []
    for token in range(GOLDEN_TOKENS):
        names = [f"logits_layer_{layer}_token_{token}" for layer in layers]
        if not document.items.keys() & set(names):
            break
        first = _shaped(document, names[0], (None,), "f")
        if len(first) > entries:
            what = f"must be of at most {entries} entries, as there are keys"
            raise document.error(names[0], f"{what}, got {len(first)}")
        rows = [_shaped(document, name, first.shape, "f") for name in names]
        tokens.append(np.stack(rows).astype(np.float32))
    if not tokens:
        return None
    most = max(token.shape[1] for token in tokens)
    fill = ((0, 0), (0, most))
    padded = [np.pad(t, fill, constant_values=np.nan)[:, :most] for t in tokens]
    return np.stack(padded)


def import_document(path: Path, dst: Path, backbone: Backbone) -> Imported:
    """Writes the trace `dst / path.stem`, or finds that it is there, of the same file.

    Raises TraceError where the document is refused, naming file, key and reason, or where `dst` has
    another document of its name. What is at `dst` is complete or not there.
    """
    with path.open("rb") as file:
        source = f"{path.name} sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
    if (dst / path.stem).exists():
        return _imported_before(path, dst / path.stem, source)
    document = read_document(path)
    layers = target_layers(document)
    hidden, keys = read_hidden(document, layers), read_keys(document, layers)
    positions = read_positions(document, layers, len(hidden))
    entries = len(keys.values)
    labels, dropped = read_labels(document, len(hidden), entries, backbone)
    golden = read_golden(document, layers, entries)
    try:
        info = TraceInfo(
            name=path.stem,
            source=source,
            model=None,
            target_layers=layers,
            csa_layers=backbone.csa_layers,
            csa_ratio=backbone.csa_ratio,
            page_entries=backbone.page_entries,
            prompt_tokens=int(positions[0]),
            rope=backbone.rope,
            votes=backbone.votes,
            dropped_labels=dropped,
        )
    except ConfigError as why:
        raise TraceError(f"{path}: {why}") from None
    size, dtype = hidden.shape[2], hidden.dtype
    with TraceWriter(dst, info, hidden_size=size, hidden_dtype=dtype, mass=False) as writer:
        writer.append(hidden, positions, labels)
        writer.finish(keys, golden)
    return Imported(dst / path.stem, len(hidden), entries, len(labels.indices), dropped)


def _imported_before(path: Path, trace_path: Path, source: str) -> Imported:
    trace = open_trace(trace_path, verify=False)
    if trace.info.source != source:
        found = f"it is there already, from {trace.info.source!r}"
        raise TraceError(f"{path} cannot become {trace_path}: {found}")
    labels = trace.columns["vote_indices"].shape[0]
    return Imported(trace_path, trace.tokens, trace.entries, labels, trace.info.dropped_labels)


def document_files(sources: Sequence[Path]) -> list[Path]:
    """The documents among files and directories; TraceError for none, or two of one name."""
    files: list[Path] = []
    for source in sources:
        found = sorted(source.glob("doc_*.pkl")) if source.is_dir() else [source]
        if not found:
            raise TraceError(f"{source} must have documents named doc_*.pkl, got none")
        files += found
    names: dict[str, Path] = {}
    for file in files:
        if names.setdefault(file.stem, file) != file:
            raise TraceError(f"documents must have different names: {names[file.stem]}, {file}")
    return files


def import_all(
    sources: Sequence[Path],
    dst: Path,
    backbone: Backbone,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Imported]:
    """Imports every document that can be; `progress` gets the bytes of each when it is done.

    Raises TraceError at the end, with a line for each document that was refused.
    """
    done, problems = [], []
    files = document_files(sources)
    for file in files:
        try:
            done.append(import_document(file, dst, backbone))
            progress(file.stat().st_size)
        except TraceError as why:
            problems.append(str(why))
    if problems:
        there = f"; {dst} has the others" if done else f"; {dst} has none of them"
        wanted = f"{len(problems)} of {len(files)} documents were refused"
        raise TraceError(wanted + there, problems)
    return done


def _parse(argv: list[str] | None) -> argparse.Namespace:
    default = Backbone()
    parser = cli.Parser(prog="python -m train.import_docs", description=__doc__, allow_abbrev=False)
    parser.add_argument("src", type=Path, nargs="+", help="doc_*.pkl files, or directories of them")
    parser.add_argument("dst", type=Path, help="trace set, made if it is not there")
    numbers: tuple[tuple[str, type, float, str], ...] = (
        ("--min-layers", int, default.votes.min_layers, "votes that made an entry a label"),
        ("--top-p", float, default.votes.top_p, "the share that each layer's votes were to reach"),
        ("--csa-layers", int, default.csa_layers, "layers that voted"),
        ("--csa-ratio", int, default.csa_ratio, "tokens to an entry"),
        ("--page-entries", int, default.page_entries, "entries to a page"),
    )
    for name, kind, value, meaning in numbers:
        parser.add_argument(name, type=kind, default=value, help=f"{meaning} (default: {value})")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        backbone = Backbone(
            csa_layers=args.csa_layers,
            csa_ratio=args.csa_ratio,
            page_entries=args.page_entries,
            votes=VoteConfig(min_layers=args.min_layers, top_p=args.top_p),
        )
        files = document_files(args.src)
        check_directory("DST", args.dst)
        with cli.byte_progress(sum(file.stat().st_size for file in files), "import") as progress:
            done = import_all(files, args.dst, backbone, progress)
        tokens, labels = sum(d.tokens for d in done), sum(d.labels for d in done)
        counts = f"{len(done)} documents, {tokens:,} tokens, {labels:,} labels"
        dropped = [d for d in done if d.dropped]
        total = sum(d.dropped for d in dropped)
        print(f"{args.dst}: {counts}; {total:,} labels out of range left out")
        for document in dropped:
            span = f"{document.entries:,} entries"
            print(f"{document.path}: {document.dropped:,} labels were of entries beyond its {span}")

    return cli.exit_code(body, interrupted="interrupted; run it again to go on")


if __name__ == "__main__":
    sys.exit(main())
