"""Initial weights of a backbone that is trained from scratch.

Matrices are normal with standard deviation `scale`; gains are 1; sinks, compressor slot biases and
router biases 0. A hyper-connection starts with all streams feeding the sublayer alike and each
stream mostly carrying itself (`diagonal` on the mixing matrix's diagonal, before its softmax).
Hash-routed tokens get experts at random, each expert as often as any other.
"""

import zlib

import numpy as np

from lsa_jax.config import ModelConfig
from lsa_jax.parameters import ParamSpec, parameter_table

SCALE = 0.02
DIAGONAL = 3.0


def _hyper_base(cfg: ModelConfig, size: int, diagonal: float) -> np.ndarray:
    """Biases of pre, post and the mixing matrix; of a head's collapse, where there is only pre."""
    n = cfg.hc_mult
    base = np.zeros(size, np.float32)
    if size == (2 + n) * n:
        base[2 * n :] = diagonal * np.eye(n, dtype=np.float32).reshape(-1)
    return base


def _hash_table(rng: np.random.Generator, vocab: int, chosen: int, experts: int) -> np.ndarray:
    """Distinct experts for each token: consecutive ones of a cycle, in one random order."""
    first = rng.permutation(vocab)[:, None] * chosen
    cycle = rng.permutation(experts)
    return cycle[(first + np.arange(chosen)) % experts].astype(np.int32)


def _leaf(
    cfg: ModelConfig, path: str, spec: ParamSpec, seed: int, scale: float, diagonal: float
) -> np.ndarray:
    rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
    name = path.rsplit(".", 1)[-1]
    if spec.kind == "table":
        vocab, chosen = spec.shape
        return _hash_table(rng, vocab, chosen, cfg.n_routed_experts)
    if spec.kind == "norm":
        return np.ones(spec.shape, np.float32)
    if spec.kind == "f32" and name != "fn":
        if name == "base":
            return _hyper_base(cfg, spec.shape[0], diagonal)
        return np.full(spec.shape, float(name == "scale"), np.float32)
    return (scale * rng.standard_normal(spec.shape)).astype(np.float32)


def initial_leaves(
    cfg: ModelConfig, *, seed: int, scale: float = SCALE, diagonal: float = DIAGONAL
) -> dict[str, np.ndarray]:
    """Every leaf by path: float32, hash tables int32. A leaf depends on the seed and its path."""
    table = parameter_table(cfg)
    return {path: _leaf(cfg, path, spec, seed, scale, diagonal) for path, spec in table.items()}
