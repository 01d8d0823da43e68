"""Initial weights of a backbone that is trained from scratch.

Matrices are normal with standard deviation `scale`, embeddings with `embedding`; gains are 1, those
of what is attended to `gain`; sinks, compressor slot biases and router biases 0. A hyper-connection
starts with all streams feeding the sublayer alike and each stream mostly carrying itself
(`DIAGONAL` on the mixing matrix's diagonal, before its softmax), and what it reads off the streams
counts `mixing` times. Hash-routed tokens get experts at random, each expert as often as any other.
"""

import zlib
from typing import Literal, NamedTuple

import numpy as np

from lsa_jax.config import ModelConfig
from lsa_jax.parameters import ParamSpec, parameter_table

SCALE = 0.02
DIAGONAL = 3.0
SLOT_BIAS = 3.0
_VALUES, _RAW, _BIAS = (
    f"attn.{x}" for x in ("compressor.wkv.weight", "wkv.weight", "compressor.ape")
)
_EMBEDDING = "embed.weight"
_ATTENDED = ("attn.kv_norm.weight", "attn.compressor.norm.weight")

EntriesInit = Literal["random", "average", "slots"]


def _hyper_base(cfg: ModelConfig, size: int) -> np.ndarray:
    """Biases of pre, post and the mixing matrix; of a head's collapse, where there is only pre."""
    n = cfg.hc_mult
    base = np.zeros(size, np.float32)
    if size == (2 + n) * n:
        base[2 * n :] = DIAGONAL * np.eye(n, dtype=np.float32).reshape(-1)
    return base


def _hash_table(rng: np.random.Generator, vocab: int, chosen: int, experts: int) -> np.ndarray:
    """Distinct experts for each token: consecutive ones of a cycle, in one random order."""
    first = rng.permutation(vocab)[:, None] * chosen
    cycle = rng.permutation(experts)
    return cycle[(first + np.arange(chosen)) % experts].astype(np.int32)


class Scales(NamedTuple):
    """How large leaves begin (`plan.RunConfig`, `init_...`)."""

    scale: float = SCALE
    embedding: float = SCALE
    gain: float = 1.0
    mixing: float = 1.0


DEFAULTS = Scales()


def _leaf(cfg: ModelConfig, path: str, spec: ParamSpec, seed: int, scales: Scales) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    name = path.rsplit(".", 1)[-1]
    if spec.kind == "table":
        vocab, chosen = spec.shape
        return _hash_table(rng, vocab, chosen, cfg.n_routed_experts)
    if spec.kind == "norm":
        return np.full(spec.shape, scales.gain if path.endswith(_ATTENDED) else 1.0, np.float32)
    if spec.kind == "f32" and name != "fn":
        if name == "base":
            return _hyper_base(cfg, spec.shape[0])
        return np.full(spec.shape, scales.mixing if name == "scale" else 0.0, np.float32)
    scale = scales.embedding if path == _EMBEDDING else scales.scale
    return (scale * rng.standard_normal(spec.shape)).astype(np.float32)


def _slots(shape: tuple[int, ...], dims: int) -> np.ndarray:
    """Slot biases [ratio, width] of entries of `dims` channels. Each of the 2 * ratio tokens of an
    overlapping window gets channels of its own, by which an entry tells them apart; others none."""
    bias, (ratio, width) = np.zeros(shape, np.float32), shape
    if width == 2 * dims:
        channel = np.arange(dims)
        slot = channel % (2 * ratio)
        # The first half of the channels is read by the next entry, as its tokens 0 to ratio - 1.
        bias[slot % ratio, np.where(slot < ratio, channel, dims + channel)] = SLOT_BIAS
    return bias


def initial_leaves(
    cfg: ModelConfig,
    *,
    seed: int,
    scales: Scales = DEFAULTS,
    entries: EntriesInit = "random",
) -> dict[str, np.ndarray]:
    """Every leaf by path: float32, hash tables int32. A leaf depends on the seed and its path."""
    table = parameter_table(cfg)
    leaves = {path: _leaf(cfg, path, spec, seed, scales) for path, spec in table.items()}
    for path in [path for path in table if path.endswith(_VALUES) and entries != "random"]:
        # What a layer learns to find in its window it then finds further back as well.
        raw = leaves[path.replace(_VALUES, _RAW)]
        leaves[path] = np.tile(raw, (leaves[path].shape[0] // raw.shape[0], 1))
        if entries == "slots":
            bias = path.replace(_VALUES, _BIAS)
            leaves[bias] = _slots(leaves[bias].shape, len(raw))
    return leaves
