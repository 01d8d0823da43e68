"""Cases to plan for: the tiny preset, and a smaller model that compilers are done with sooner."""

import dataclasses
from typing import Any

from lsa_jax.config import CacheConfig, ComputeConfig, ModelConfig
from lsa_jax.config_io import load_config
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.targets import default_target_layers
from lsa_jax.planning.case import Case

TINY = dataclasses.replace(load_config("tiny"), num_nextn_predict_layers=0, vocab_size=128)


def case(
    cfg: ModelConfig = TINY,
    *,
    lsa: bool = False,
    budget: str = "0.8",
    context: int = 512,
    batch: int = 2,
    **changes: Any,
) -> Case:
    targets = default_target_layers(cfg)
    settings = LsaConfig(
        targets=targets,
        lookahead=8,
        budget=parse_budget(budget),
        policy=PolicyConfig(recency=4),
    )
    sizes = IndexerConfig.for_model(cfg, target_layers=targets, n_heads=4, q_lora_rank=16)
    common: dict[str, Any] = {
        "name": "small",
        "cfg": cfg,
        "context": context,
        "batch": batch,
        "weights": "keep",
        "compute": ComputeConfig(),
        "cache": CacheConfig(page_entries=8),
        "prefill_chunk": 32,
        "lsa": settings if lsa else None,
        "indexer": sizes if lsa else None,
    }
    return Case(**common | changes)
