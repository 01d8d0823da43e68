"""Arithmetic of one decode token, from the shapes alone: no fitted constant (LSA spec 1.5).

A multiplication and its addition are two operations. What a token costs beside its history:

    experts         routed top-k and the shared one, three matrices each
    attention       wq_a, wq_b, wkv, wo_a, wo_b of every layer
    head            hidden state -> logits
    indexer         the lightning indexers' wq_b and weights_proj
    compressors     wkv and wgate of CSA, HCA and index keys
    router          gate.weight
    hyper           mHC: projections of the streams, their collapse and expansion
    rotation        Hadamard rotation of the index queries, a matrix product
    attend          CSA layers: scores and values of the entries attended, min(top-k, visible)

and what grows with the history: `score` (lightning indexers over the entries they may choose from),
`level1` (the memory indexers over all entries, once per `lookahead` steps) and `hca` (scores and
values of all HCA entries). Left out, as in the published figures: attention over the window,
norms, RoPE, softmax, top-k, the MTP layer.
"""

import dataclasses
import math

from lsa_jax.config import ModelConfig
from lsa_jax.lsa import targets
from lsa_jax.parameters import parameter_table

_TERMS = {
    "experts": (".ffn.experts.", ".ffn.shared_experts."),
    "attention": (".attn.wq_a.", ".attn.wq_b.", ".attn.wkv.", ".attn.wo_a.", ".attn.wo_b."),
    "head": (".head.",),
    "indexer": (".indexer.wq_b.", ".indexer.weights_proj."),
    "compressors": (".compressor.wkv.", ".compressor.wgate."),
    "router": (".ffn.gate.weight",),
    "hyper": (".fn",),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Level1:
    """A memory indexer's sizes: of one target layer, and how often it runs (spec 2.1)."""

    target_layers: int = 3
    heads: int = 128
    rank: int = 2048
    lookahead: int = 64
    lookback: int = 1  # tokens that a fire scores with

    @property
    def fires(self) -> float:
        """Tokens that are scored with, per token that is decoded."""
        return self.lookback / self.lookahead


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """GFLOP of one decode token by three definitions; with full attention the first two agree.

    `published`: a dot product of n dims counts 2n; LSA is charged neither for attending to entries
    nor for relu and head weights. `like_for_like`: the same terms on both sides, all of `base`,
    `attend`, `score` and `level1`. `with_hca`: that, and attention over HCA entries.
    """

    published: float
    like_for_like: float
    with_hca: float


def base_terms(cfg: ModelConfig) -> dict[str, int]:
    """Operations of a token that no history changes, by term; `attend` is not among them."""
    terms = dict.fromkeys(_TERMS, 0)
    for path, spec in parameter_table(cfg).items():
        if path.startswith("mtp."):
            continue
        used = math.prod(spec.shape)
        if spec.kind == "expert":
            used = used * cfg.num_experts_per_tok // cfg.n_routed_experts
        for term, parts in _TERMS.items():
            if any(part in f".{path}" for part in parts):
                terms[term] += 2 * used
    n, d = cfg.hc_mult, cfg.hidden_size
    collapse, expand = 2 * n * d, 2 * n * n * d + 2 * n * d
    terms["hyper"] += 2 * cfg.num_layers * (collapse + expand) + collapse
    heads, dim = cfg.index_n_heads, cfg.index_head_dim
    return terms | {"rotation": 2 * len(targets.csa_layers(cfg)) * heads * dim * dim}


def _attend(cfg: ModelConfig, entries: int) -> int:
    """Operations of one layer's attention over so many entries: scores, then values."""
    return 4 * entries * cfg.num_attention_heads * cfg.head_dim


def _level1(cfg: ModelConfig, entries: int, level1: Level1, per_head: int) -> float:
    """Scoring all entries, per token."""
    return entries * level1.target_layers * level1.heads * per_head * level1.fires


def _level1_projections(cfg: ModelConfig, level1: Level1) -> float:
    """wq_a, wq_b and weights_proj of the target layers, per token."""
    width = level1.heads * cfg.index_head_dim
    d, rank = cfg.hidden_size, level1.rank
    one = 2 * (d * rank + rank * width + d * level1.heads)
    return level1.target_layers * one * level1.fires


def gflop_per_token(
    cfg: ModelConfig, tokens: int, *, kept_entries: int | None = None, level1: Level1 | None = None
) -> TokenFlops:
    """GFLOP of decoding one token after `tokens` others.

    Full attention without `kept_entries`. With it, LSA: level 2 chooses among so many CSA entries,
    and `level1` (default: the released sizes) scores all of them.
    """
    csa, hca = len(targets.csa_layers(cfg)), len(targets.hca_layers(cfg))
    entries = tokens // cfg.csa_ratio
    dot = 2 * cfg.index_head_dim
    base = sum(base_terms(cfg).values())
    over_hca = hca * _attend(cfg, tokens // cfg.hca_ratio)
    visible = entries if kept_entries is None else min(kept_entries, entries)
    attend = csa * _attend(cfg, min(cfg.index_topk, visible))
    scored = visible * csa * cfg.index_n_heads
    fair = base + attend + scored * (dot + 2)  # + 2: relu times the head's weight, summed
    published = fair
    if kept_entries is not None:
        level1 = level1 or Level1()
        published = base + scored * dot + _level1(cfg, entries, level1, dot)
        fair += _level1(cfg, entries, level1, dot + 2) + _level1_projections(cfg, level1)
    return TokenFlops(
        published=published / 1e9, like_for_like=fair / 1e9, with_hca=(fair + over_hca) / 1e9
    )
