"""How long a decode step takes at least: bytes and operations of one device against its ceilings.

An estimate from shapes, not a measurement: no launch takes time, everything overlaps, work divides
evenly, and each byte is read once. Per step of all rows at the end of their context:

    experts    those that the tokens of a step choose, were choice uniform and independent; all of
               them where the program computes all: with an expert axis, and for many tokens
    weights    all other weights but the embedding table, of which rows are read
    entries    windows, HCA entries, and of CSA entries what is attended: min(top-k, visible)
    keys       index keys that level 2 scores: all of them, with LSA those of resident entries
    level1     target layers' index keys and the memory indexer, once per lookahead

Operations are those of `lsa.flops`, HCA attention too.
"""

import dataclasses
import math

from lsa_jax import shardings
from lsa_jax.cache import codec
from lsa_jax.lsa import flops, targets
from lsa_jax.planning.case import Case, MeshShape, abstract_mesh, memory_of, shard_bytes
from lsa_jax.planning.hardware import Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One decode step on one device. Bytes by part; `seconds` is the larger of `memory_seconds` and
    `compute_seconds`, and what `link_seconds` (collectives, None where not compiled) adds to it is
    not in there."""

    nbytes: dict[str, int]
    flops: float
    memory_seconds: float
    compute_seconds: float
    link_seconds: float | None

    @property
    def seconds(self) -> float:
        """The roofline."""
        return max(self.memory_seconds, self.compute_seconds)


def decode_step(case: Case, shape: MeshShape, device: Device, sent: int | None) -> Step:
    """The roofline of a step; `sent` are bytes of collectives, of one device."""
    nbytes = _weight_bytes(case, shape) | _history_bytes(case, shape)
    visible = resident_entries(case)
    level1 = None
    if case.lsa is not None and case.indexer is not None:
        level1 = flops.Level1(
            target_layers=len(case.lsa.targets),
            heads=case.indexer.n_heads,
            rank=case.indexer.q_lora_rank,
            lookahead=case.lsa.lookahead,
            lookback=case.lsa.lookback,
        )
    kept = None if case.lsa is None else visible
    one = flops.gflop_per_token(case.cfg, case.context, kept_entries=kept, level1=level1)
    operations = one.with_hca * 1e9 * case.batch / math.prod(shape)
    return Step(
        nbytes=nbytes,
        flops=operations,
        memory_seconds=sum(nbytes.values()) / device.bandwidth,
        compute_seconds=operations / device.bf16_flops,
        link_seconds=None if sent is None else sent / device.link,
    )


def resident_entries(case: Case) -> int:
    """CSA entries that a layer may choose from, of one row: all, or its even share of the pool."""
    formed = case.context // case.cfg.csa_ratio
    if case.lsa is None:
        return formed
    share = case.pool_slots * case.cache.page_entries // case.batch
    return min(formed, share + case.level2.fresh_pages * case.cache.page_entries)


def _weight_bytes(case: Case, shape: MeshShape) -> dict[str, int]:
    cfg, memory = case.cfg, memory_of(case, shape)
    embedding = case.leaves["embed.weight"]
    where = shardings.leaf_sharding(cfg, abstract_mesh(shape), "embed.weight", embedding.shape)
    rows = case.batch / shape[0]  # tokens whose experts one device computes
    every = shape[1] > 1 or case.batch * cfg.num_experts_per_tok > cfg.n_routed_experts
    missed = (1 - cfg.num_experts_per_tok / cfg.n_routed_experts) ** rows
    return {
        "experts": memory.experts if every else int(memory.experts * (1 - missed)),
        "weights": memory.weights - shard_bytes(embedding, where),
    }


def _history_bytes(case: Case, shape: MeshShape) -> dict[str, int]:
    """KV that a step reads; one KV head is read whole by every device of a row."""
    cfg, rows = case.cfg, case.batch // shape[0]
    entry = codec.entry_bytes(cfg, case.cache.kv_format)
    key = codec.key_bytes(cfg, case.cache.kv_format)
    csa, hca = len(targets.csa_layers(cfg)), len(targets.hca_layers(cfg))
    visible = resident_entries(case)
    window = cfg.num_layers * cfg.sliding_window * case.compute_bytes * cfg.head_dim
    picked = csa * min(cfg.index_topk, visible) * entry
    found = {
        "entries": rows * (window + picked + hca * (case.context // cfg.hca_ratio) * entry),
        "keys": rows * csa * visible * key,
    }
    if case.lsa is not None:
        scored = rows * len(case.lsa.targets) * (case.context // cfg.csa_ratio) * key
        found["level1"] = (scored + case.indexer_bytes) // case.lsa.lookahead
    return found
