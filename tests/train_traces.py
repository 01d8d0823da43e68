"""Small trace sets with planted structure: which entries become golden can be told from hidden.

Every entry has a content vector c; those of a page resemble each other. A document's topic z, a
unit vector, drifts with its tokens, and the entries with the highest z . c are golden and have most
attention mass. Hidden states are a noisy linear map of z, index keys a rotation of c within the
channels that RoPE leaves alone, Hadamard-transformed as a backbone's are: a memory indexer can
learn to score z . c. The maps are the same in all sets, topics and contents differ by seed.
"""

from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from train.traces.trace import TraceWriter
from train.traces.trace_info import E4M3, KeyRope, Keys, TraceInfo, digest
from train.traces.votes import SparseRows, VoteConfig

RATIO = 4  # tokens to an entry
PAGE = 8  # entries to a page
GOLDEN_SHARE = 0.04
NOISE, DRIFT = 0.1, 0.04
_MAPS = 20_260


class Planted(NamedTuple):
    """What a document is made of: contents [N, R], topics [T, R], entries that exist [T]."""

    contents: np.ndarray
    topics: np.ndarray
    exist: np.ndarray


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def planted(rng: np.random.Generator, tokens: int, prompt_entries: int, rank: int) -> Planted:
    """The entries and topics of a document whose prompt fills `prompt_entries` exactly."""
    entries = prompt_entries + tokens // RATIO
    pages = rng.normal(size=(-(-entries // PAGE), rank))
    contents = np.repeat(pages, PAGE, axis=0)[:entries] + 0.6 * rng.normal(size=(entries, rank))
    topic, topics = _unit(rng.normal(size=rank)), []
    for _ in range(tokens):
        topic = _unit(topic + DRIFT * rng.normal(size=rank))
        topics.append(topic)
    exist = prompt_entries + (np.arange(tokens) + 1) // RATIO
    return Planted(_unit(contents), np.stack(topics), exist)


def _rows(rows: list[tuple[np.ndarray, np.ndarray]]) -> SparseRows:
    indices, values = (np.concatenate(part) for part in zip(*rows, strict=True))
    return SparseRows(indices.astype(np.int32), values, np.cumsum([0, *(len(i) for i, _ in rows)]))


def votes_and_mass(doc: Planted, csa_layers: int) -> tuple[SparseRows, SparseRows]:
    """The best 4 % of entries, the first half with all votes, and the mass of twice as many."""
    votes, mass = [], []
    for topic, exist in zip(doc.topics, doc.exist, strict=True):
        match = doc.contents[:exist] @ topic
        order = np.argsort(-match, kind="stable")
        count = max(2, round(GOLDEN_SHARE * exist))
        least = min(3, csa_layers)
        level = np.where(np.arange(count) < count // 2, csa_layers, least)
        votes.append((order[:count], level.astype(np.uint8)))
        weight = np.exp(8 * match)
        weight *= csa_layers / weight.sum()
        mass.append((order[: 2 * count], weight[order[: 2 * count]].astype(np.float32)))
    return _rows(votes), _rows(mass)


def _hadamard(size: int) -> np.ndarray:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.sqrt(size)


def index_keys(doc: Planted, layers: int, head_dim: int, key_format: str) -> Keys:
    """Keys [N, layers, head_dim] of the contents, other at each layer."""
    rank, maps = doc.contents.shape[1], np.random.default_rng(_MAPS)
    parts = []
    for _ in range(layers):
        turn = np.linalg.qr(maps.normal(size=(rank, rank)))[0]
        content = np.pad(doc.contents @ turn, ((0, 0), (0, head_dim - rank)))
        parts.append(content @ _hadamard(head_dim))
    keys = np.stack(parts, axis=1).astype(np.float32)
    if key_format != "fp8":
        dtype = {"bfloat16": ml_dtypes.bfloat16, "float32": np.float32}[key_format]
        return Keys(keys.astype(dtype), None)
    scale = np.abs(keys).max(axis=-1) / np.float32(448)
    return Keys((keys / scale[..., None]).astype(E4M3), scale)


def hidden_states(
    rng: np.random.Generator, doc: Planted, layers: int, hidden: int, noise: float
) -> np.ndarray:
    """Hidden states bfloat16 [T, layers, hidden] of the topics, by another map at each layer."""
    maps = np.random.default_rng(_MAPS + 1)
    maps = [maps.normal(size=(doc.topics.shape[1], hidden)) for _ in range(layers)]
    states = np.stack([doc.topics @ weight for weight in maps], axis=1)
    return (states + noise * rng.normal(size=states.shape)).astype(ml_dtypes.bfloat16)


def planted_traces(
    root: Path,
    *,
    documents: int = 4,
    tokens: int = 96,
    prompt_entries: int = 200,
    hidden: int = 16,
    head_dim: int = 8,
    target_layers: tuple[int, ...] = (0, 2),
    csa_layers: int = 4,
    key_format: str = "fp8",
    seed: int = 0,
    mass: bool = True,
    page_entries: int = PAGE,
) -> Path:
    """Writes `root` with traces `doc-SEED-0` .. and returns it; sets of other seeds can be added.

    A document has prompt_entries + tokens // 4 entries. Half of a key's channels are rotated, by
    no YaRN, and hold nothing.
    """
    rope_dim = head_dim // 2
    for number in range(documents):
        rng = np.random.default_rng([seed, number])
        doc = planted(rng, tokens, prompt_entries, head_dim - rope_dim)
        info = TraceInfo(
            name=f"doc-{seed}-{number}",
            source=f"planted, seed {seed}, document {number}",
            model=digest("planted"),
            target_layers=target_layers,
            csa_layers=csa_layers,
            csa_ratio=RATIO,
            page_entries=page_entries,
            prompt_tokens=prompt_entries * RATIO,
            rope=KeyRope(rope_head_dim=rope_dim, rope_theta=1e4, yarn=None, norm_eps=1e-6),
            votes=VoteConfig(min_layers=min(3, csa_layers)),
        )
        states = hidden_states(rng, doc, len(target_layers), hidden, NOISE)
        positions = prompt_entries * RATIO + np.arange(tokens)
        votes, weights = votes_and_mass(doc, csa_layers)
        options = {"hidden_size": hidden, "hidden_dtype": states.dtype, "mass": mass}
        with TraceWriter(Path(root), info, **options) as writer:
            writer.append(states, positions, votes, weights if mass else None)
            writer.finish(index_keys(doc, len(target_layers), head_dim, key_format))
    return Path(root)
