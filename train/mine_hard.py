"""Finds negatives that indexers take for positives: `python -m train.mine_hard`.

    python -m train.mine_hard --indexer FILE [--indexer ..] --traces DIR --out F.npz

Scores every fourth token with each indexer. An entry's score in a document is the highest logit
that any indexer's layer gives it at any of these tokens at which it exists (of indexers with the
score "softmax": the highest share, which is one scale for all of them); of the entries that are
golden at no token of the document, the best 300 are kept (LSA spec 5.2). F.npz has them by trace
name, best first, and under `_metadata` what made them, as JSON; `data.hard_negatives` of a training
configuration names the file. The same input gives the same file.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lsa_jax import cli
from lsa_jax.config import ConfigError
from lsa_jax.config_checks import refusal
from lsa_jax.lsa import indexer_config
from lsa_jax.lsa.indexer_file import IndexerFile
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from train.data.corpus import check_names
from train.export import leaf_digests
from train.outputs import check_file
from train.quality.evaluation import Recording, decisions, open_traces
from train.study_options import read_indexer
from train.traces.trace import Trace
from train.traces.trace_info import digest

SCHEMA = 1
METADATA = "_metadata"  # no trace's name begins like this


def highest_logits(
    indexers: Sequence[MemoryIndexer], trace: Trace, recording: Recording, *, interval: int
) -> np.ndarray:
    """Each entry's highest logit, float32 [N]; -inf where it existed at no scored token.

    Its own, as losses see it: dilated, entries beside a golden one could be as high.
    """
    best = np.full(trace.entries, -np.inf, np.float32)
    tokens = recording.decisions(interval)
    for served in indexers:
        cfg = dataclasses.replace(served.cfg, dilation=0)
        indexer = MemoryIndexer(cfg, served.leaves())
        for decision in decisions(indexer, trace, recording, tokens):
            found = best[: decision.entries]
            np.maximum(found, decision.logits.max(axis=0), out=found)
    return best


def hard_negatives(
    indexers: Sequence[MemoryIndexer], trace: Trace, *, interval: int, top_k: int
) -> np.ndarray:
    """The `top_k` best scored entries that are never golden, int64, best first.

    Fewer where there are not as many; the lower entry first among equals.
    """
    recording = Recording.of(trace)
    best = highest_logits(indexers, trace, recording, interval=interval)
    best[recording.document.votes.indices] = -np.inf
    order = np.argsort(-best, kind="stable")[:top_k]
    return order[best[order] > -np.inf].astype(np.int64)


def check_scores(files: Mapping[Path, IndexerFile]) -> None:
    """ConfigError where some say logits and others logarithms of shares: the highest of both would
    be the logits' whatever the entries are."""
    first, *others = files
    for path in others:
        if files[path].config.score != files[first].config.score:
            got = ", ".join(f"{files[p].config.score!r} of {p}" for p in (first, path))
            raise ConfigError(f"indexer.score must be one for all --indexer, got {got}")


def write_hard(dst: Path, found: dict[str, np.ndarray], metadata: dict[str, Any]) -> None:
    """Writes the file; it appears complete or not at all."""
    partial = dst.with_name(dst.name + ".partial")
    try:
        with partial.open("wb") as file:
            text = json.dumps(metadata, sort_keys=True)
            np.savez(file, allow_pickle=False, **{METADATA: np.array(text), **found})
        partial.rename(dst)
    finally:
        partial.unlink(missing_ok=True)


def indexer_digest(indexer: IndexerFile) -> str:
    """Digest of an indexer, whatever file it is in."""
    return digest([indexer_config.to_json(indexer.config), leaf_digests(indexer.leaves)])


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m train.mine_hard", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    indexer = "runs, indexer files, exported directories; may be given several times"
    several = {"type": Path, "nargs": "+", "action": "extend", "required": True}
    parser.add_argument("--indexer", **several, help=indexer)
    parser.add_argument("--traces", **several, help="trace sets; may be given several times")
    parser.add_argument("--out", type=Path, required=True, metavar="F.npz")
    parser.add_argument("--interval", type=int, default=4, help="tokens (default: 4)")
    parser.add_argument("--top-k", type=int, default=300, help="of a document (default: 300)")
    return parser.parse_args(argv)


def mine(args: argparse.Namespace) -> tuple[int, int]:
    """Does what the command line asks for; returns the numbers of documents and of entries."""
    for option in ("interval", "top_k"):
        if getattr(args, option) < 1:
            raise refusal(f"--{option.replace('_', '-')}", getattr(args, option), ">= 1")
    if args.out.suffix != ".npz":
        raise refusal("--out", str(args.out), "a name that ends in .npz")
    if args.out.exists():
        raise FileExistsError(f"{args.out} exists already: delete it or choose another name")
    check_file("--out", args.out)
    files = [read_indexer(path).indexer for path in args.indexer]
    check_scores(dict(zip(args.indexer, files, strict=True)))
    indexers, traces = [from_file(file) for file in files], open_traces(args.traces)
    check_names(traces)
    found: dict[str, np.ndarray] = {}
    with cli.token_progress(sum(trace.tokens for trace in traces), "mine") as progress:
        for trace in traces:
            options = {"interval": args.interval, "top_k": args.top_k}
            found[trace.info.name] = hard_negatives(indexers, trace, **options)
            progress(trace.tokens)
    metadata = {"schema": SCHEMA, "interval": args.interval, "top_k": args.top_k}
    metadata |= {"indexers": [indexer_digest(file) for file in files]}
    write_hard(args.out, found, metadata)
    return len(found), sum(len(entries) for entries in found.values())


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        documents, entries = mine(args)
        print(f"{args.out}: {entries:,} hard negatives of {documents:,} documents")

    return cli.exit_code(body, interrupted="interrupted; nothing was written")


if __name__ == "__main__":
    sys.exit(main())
