"""Whether validation can tell a better checkpoint from a worse one."""

import numpy as np

from lsa_jax.config_checks import refusal
from train.data.corpus import Corpus
from train.run.config import TrainConfig


def most_candidates(cfg: TrainConfig, corpus: Corpus) -> int:
    """Entries that compete at the decision that has most of them: the last of a document."""
    run, rule, most = cfg.run, cfg.sampling.resident, 0
    for trace in corpus.traces:
        last = (trace.tokens - 1) // run.validate_interval * run.validate_interval
        entries = int(np.searchsorted(trace.read("formed_at"), last, side="right"))
        first, end = rule.evictable_range(entries)
        most = max(most, int(end - first) if run.validate_pool == "evictable" else entries)
    return most


def check_top(cfg: TrainConfig, corpus: Corpus | None) -> None:
    """ConfigError where the `validate_top` best are all there are, at every decision: recall would
    be 1 whatever was learned. Without a corpus nothing is validated."""
    if corpus is None:
        return
    run, most = cfg.run, most_candidates(cfg, corpus)
    if run.validate_top >= most:
        wanted = f"below {most}, which is all that a validation decision has to choose from"
        raise refusal("run.validate_top", run.validate_top, wanted)
