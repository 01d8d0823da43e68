"""A small backbone, planted traces of it, and memory indexers for them."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest

from lsa_jax import config_io
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.indexer_io import save_indexer
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from tests import small_model, train_traces
from train.data.labels import ResidentRule
from train.quality.baselines import BASELINES
from train.quality.metrics import MetricsConfig
from train.quality.pareto import DeviceRoom, parse_budgets
from train.quality.study import Protocol
from train.run import checkpoints
from train.run.config import TrainConfig
from train.run.optimizer import OptimizerConfig, init_state
from train.traces.trace_info import fingerprint

# Four CSA layers and index keys as `planted_traces` makes them.
MODEL = dataclasses.replace(
    small_model.CONFIG,
    hidden_size=16,
    layer_types=("csa", "csa", "csa", "csa", "hca"),
    mlp_types=("score",) * 5,
    index_head_dim=8,
    qk_rope_head_dim=4,
    kv_quant_group=20,
    hca_ratio=128,
    compress_rope_theta=1e4,
    yarn=None,
    max_position_embeddings=8192,
)
TARGETS = (0, 2)
PAGE = 8
RULE = ResidentRule(recency=12, sink=3, page_entries=PAGE)
KS = (5, 20)
BUDGETS = parse_budgets("0.20,0.45,0.80")


def indexer(seed: int = 0, targets: tuple[int, ...] = TARGETS, **options) -> MemoryIndexer:
    """A random one."""
    sizes = {"n_heads": 4, "q_lora_rank": 8} | options
    cfg = IndexerConfig.for_model(MODEL, target_layers=targets, **sizes)
    return MemoryIndexer(cfg, random_leaves(cfg, jax.random.key(seed)))


def traces_of_model(root: Path, **options) -> Path:
    """Planted traces that say they are of MODEL."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_traces, "digest", lambda _: fingerprint(MODEL))
        return train_traces.planted_traces(root, **options)


def write_case(root: Path, *, indexers: int = 2, **options) -> Path:
    """`root` with config.json, traces and i0.safetensors, i1.safetensors, .."""
    root.mkdir(exist_ok=True)
    (root / "config.json").write_text(json.dumps(config_io.to_json(MODEL)))
    traces_of_model(root / "traces", **options)
    for seed in range(indexers):
        save_indexer(root / f"i{seed}.safetensors", indexer(seed))
    return root


def write_run(path: Path, module: MemoryIndexer, *, step: int) -> Path:
    """A training run's directory whose only checkpoint has these weights."""
    checkpoints.begin(path, TrainConfig())
    state = init_state(OptimizerConfig(), module.leaves())
    with checkpoints.Checkpoints(path, keep=1) as saved:
        progress = checkpoints.Progress(step=step, data={}, config_digest="")
        saved.save(state, progress, module.cfg, wait=True)
    return path


def device_room(**changes) -> DeviceRoom:
    fields = {"cfg": MODEL, "layout": "bf16", "targets": TARGETS, "page_entries": PAGE}
    return DeviceRoom(**(fields | {"lookahead": 16} | changes))


def protocol(**changes) -> Protocol:
    fields = {
        "metrics": MetricsConfig(threshold=0.55, ks=KS, resident=RULE),
        "budgets": BUDGETS,
        "interval": 16,
        "window": 16,
        "taus": (8, 16, 32),
        "baselines": BASELINES,
    }
    return Protocol(**(fields | changes))
