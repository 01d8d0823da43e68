"""What training starts from: random weights, the backbone's own indexers widened, or a file."""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lsa_jax import model_io
from lsa_jax.checkpoint import store
from lsa_jax.config import ConfigError
from lsa_jax.config_checks import refusal
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, IndexerConfig, leaf_shapes
from lsa_jax.lsa.indexer_file import IndexerFile
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.widening import widen
from train.data.corpus import Corpus
from train.run.checkpoints import CHECKPOINTS, load_params
from train.run.config import TrainConfig
from train.run.optimizer import TrainState
from train.run.step import Step, StepConfig
from train.traces.trace_info import fingerprint, indexer_fields, weights_digest

Leaves = dict[str, np.ndarray]

_SERVED = ("query_mode", "dilation", "falloff")  # what training does not look at
_NATIVE = ("wq_a.", "q_norm.", "indexer.wq_b.", "indexer.weights_proj.")  # all that widening reads


def indexer_config(cfg: TrainConfig, corpus: Corpus) -> IndexerConfig:
    """The indexer that the traces and the configuration's [indexer] describe."""
    fields = indexer_fields(corpus.info, hidden_size=corpus.hidden_size, head_dim=corpus.head_dim)
    return IndexerConfig(**fields, **dataclasses.asdict(cfg.indexer))


def random_leaves(cfg: IndexerConfig, seed: int) -> Leaves:
    """Float32 weights as torch's Linear begins: uniform in +-1/sqrt(inputs); norms of one.

    A learned ensemble begins even. Leaf by leaf from NumPy's PCG64, the same on every machine.
    """
    leaves: Leaves = {}
    for i, (name, shape) in enumerate(leaf_shapes(cfg).items()):
        if name == ENSEMBLE_LEAF:
            leaves[name] = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            leaves[name] = np.ones(shape, np.float32)
        else:
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(i,)))
            bound = np.float32(shape[-1] ** -0.5)
            leaves[name] = bound * (2 * rng.random(shape, np.float32) - 1)
    return leaves


def _check_size(cfg: IndexerConfig) -> None:
    """ConfigError where float32 leaves alone, of which training has several, exceed the memory."""
    needed = 4 * sum(math.prod(shape) for shape in leaf_shapes(cfg).values())
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        got = f"{cfg.n_heads} and {cfg.q_lora_rank}, {needed:,} bytes of parameters"
        wanted = f"below this machine's {there:,} bytes of memory"
        raise ConfigError(f"indexer.n_heads and q_lora_rank must be {wanted}, got {got}")


def native_leaves(
    cfg: IndexerConfig, checkpoint: Path, corpus: Corpus, seed: int
) -> tuple[IndexerConfig, Leaves]:
    """The lightning indexers of a converted checkpoint, widened; only their leaves are read.

    The configuration's epsilon is the widened one. ConfigError where the traces are of another
    model, or of other weights.
    """
    model = model_io.read_config(checkpoint)
    traced = corpus.info.model
    if traced is not None and traced != fingerprint(model):
        raise ConfigError(f"init.path must be of the model of the traces, got {str(checkpoint)!r}")
    known = corpus.info.weights
    if known is not None and known != (got := weights_digest(checkpoint)):
        wanted = f"of the weights of the traces, {known[:12]}.. (trace.json's weights)"
        raise ConfigError(f"init.path must be {wanted}, got {str(checkpoint)!r} of {got[:12]}..")
    prefixes = [f"layers.{layer}.attn." for layer in cfg.transformer_layers(model)]
    wanted = tuple(prefix + name for prefix in prefixes for name in _NATIVE)
    _, leaves = store.load_checkpoint(checkpoint, wanted=lambda path: path.startswith(wanted))
    indexer = widen(cfg, model, leaves, jax.random.key(seed))
    return indexer.cfg, {name: np.asarray(leaf) for name, leaf in indexer.leaves().items()}


def _read(path: Path) -> IndexerFile:
    """An indexer file, or the best checkpoint of a run's directory."""
    if not (path / CHECKPOINTS).is_dir():
        return read_indexer(path)
    config, leaves, _ = load_params(path)
    return IndexerFile(config, leaves)


def file_leaves(cfg: IndexerConfig, path: Path) -> tuple[IndexerConfig, Leaves]:
    """The weights of an indexer file or a run, of the shape, ensemble and RoPE asked for.

    The norm's epsilon is the file's own: a widened indexer's is not its model's. Query mode,
    dilation and falloff, which training does not look at, are those asked for.
    """
    file = _read(path)
    own: dict[str, Any] = {name: getattr(file.config, name) for name in ("norm_eps", *_SERVED)}
    wanted = dataclasses.replace(cfg, **own)
    for field in dataclasses.fields(IndexerConfig):
        got, want = getattr(file.config, field.name), getattr(wanted, field.name)
        if got != want:
            raise refusal(f"init.path: indexer.{field.name} of {path}", got, f"{want!r}")
    leaves = {name: leaf.astype(np.float32) for name, leaf in file.leaves.items()}
    served: dict[str, Any] = {name: getattr(cfg, name) for name in _SERVED}
    return dataclasses.replace(wanted, **served), leaves


def initial_indexer(cfg: TrainConfig, corpus: Corpus) -> tuple[IndexerConfig, Leaves]:
    """The configuration and float32 leaves, by released names, that a run begins with."""
    wanted = indexer_config(cfg, corpus)
    _check_size(wanted)
    if cfg.init.kind == "native":
        return native_leaves(wanted, Path(cfg.init.path), corpus, cfg.run.seed)
    if cfg.init.kind == "indexer":
        return file_leaves(wanted, Path(cfg.init.path))
    return wanted, random_leaves(wanted, cfg.run.seed)


class Start(NamedTuple):
    """What a run has before its first step."""

    indexer: IndexerConfig
    step: Step
    state: TrainState  # which the first step takes over


def step_of(cfg: TrainConfig, indexer: IndexerConfig, total: int, mesh: Mesh) -> Step:
    """The step of a run of `total` steps; ConfigError where it cannot be meant."""
    parts = {"objective": cfg.objective, "optimizer": cfg.optimizer, "total": total}
    run = cfg.run
    options = {"compute_dtype": run.compute_dtype, "log_n_reference": run.log_n_reference}
    return Step(StepConfig(indexer=indexer, **parts, **options), mesh)


def begin_with(cfg: TrainConfig, corpus: Corpus, total: int, mesh: Mesh) -> Start:
    """What a run begins with, on the devices; writes nothing."""
    indexer, leaves = initial_indexer(cfg, corpus)
    step = step_of(cfg, indexer, total, mesh)
    return Start(indexer, step, step.init(leaves))
