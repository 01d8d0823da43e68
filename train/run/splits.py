"""The traces that a run is given: opened, checked against each other, and made into batches."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from lsa_jax.config_checks import refusal
from train.data.corpus import Corpus
from train.data.dataset import Batches, batches
from train.data.labels import SamplingConfig
from train.run.config import TrainConfig
from train.run.losses import OF_MASS
from train.traces.trace import Trace
from train.traces.trace_info import check_consecutive


def open_corpora(cfg: TrainConfig) -> dict[str, Corpus]:
    """The splits that the configuration names, "train" first; checked to fit one another.

    Raises ConfigError where there is nothing to train on, or a loss needs what was not recorded;
    TraceError where traces do not fit together.
    """
    data = cfg.data
    if not data.train:
        raise refusal("data.train", list(data.train), "at least one trace set (--data DIR)")
    train = Corpus.open(data.train, data.target_layers, hard_negatives=data.hard_negatives)
    corpora = {"train": train}
    for name, dirs in (("validation", data.validation), ("test", data.test)):
        if dirs:
            corpora[name] = Corpus.open(dirs, train.target_layers)
            # Refuses, naming both, what differs in what an indexer depends on.
            first = _renamed(corpora[name].traces[0])
            Corpus([train.traces[0], first], train.target_layers)
            for trace in corpora[name].traces if cfg.indexer.lookback > 1 else ():
                check_consecutive(trace.path, trace.read("positions"))
    if cfg.sampling.vote_weighting:
        _check_votes(cfg.sampling, train.traces)
    for name in OF_MASS:
        for trace in train.traces if getattr(cfg.objective, name) else ():
            if "mass_values" not in trace.columns:
                wanted = f"0, as {trace.path} has no attention mass"
                raise refusal(f"objective.{name}", getattr(cfg.objective, name), wanted)
    return corpora


def _check_votes(sampling: SamplingConfig, traces: Sequence[Trace]) -> None:
    """Refuses bounds that votes can lie outside of: weights would leave [0.5, 2], even be < 0."""
    for trace in traces:
        least, most = trace.info.votes.min_layers, trace.info.csa_layers
        if sampling.least_votes > least or sampling.most_votes < most:
            got = (sampling.least_votes, sampling.most_votes)
            wanted = f"around {least}..{most}, the votes of {trace.path}"
            raise refusal("sampling.least_votes and most_votes", got, wanted)


def _renamed(trace: Trace) -> Trace:
    """The trace under another name: splits may use the same ones."""
    return dataclasses.replace(
        trace, info=dataclasses.replace(trace.info, name=f"{trace.info.name}.other")
    )


def total_steps(cfg: TrainConfig, per_epoch: int) -> tuple[int, int]:
    """Steps of a run, and the epochs that they take."""
    if not cfg.run.steps:
        return cfg.run.epochs * per_epoch, cfg.run.epochs
    return cfg.run.steps, -(-cfg.run.steps // per_epoch)


def open_batches(cfg: TrainConfig, corpus: Corpus) -> tuple[Batches, int]:
    """This process's batches, and the number of steps; with mass only where a loss needs it."""
    process = (jax.process_index(), jax.process_count())
    needed = any(getattr(cfg.objective, name) for name in OF_MASS)
    data = dataclasses.replace(cfg.data, mass=cfg.data.mass and needed)
    options: dict[str, Any] = {"process": process, "lookback": cfg.indexer.lookback}
    first = batches(corpus, data, cfg.sampling, **options)
    total, epochs = total_steps(cfg, first.steps_per_epoch)
    if epochs == 1:
        return first, total
    first.close()
    return batches(corpus, data, cfg.sampling, epochs=epochs, **options), total
