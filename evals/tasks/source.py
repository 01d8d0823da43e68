"""Training rows as `train.pretraining.feed` wants them; importable by name in worker processes."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from evals.tasks.config import read_mixture
from evals.tasks.rows import labelled_rows
from train.pretraining.feed import Rows


def source(table: Mapping[str, Any], rng: np.random.Generator, batch: int, tokens: int) -> Rows:
    """Rows of a stage whose `rows` is a mixture's table; groups are indices of `family_names`.

    Raises ConfigError where the table is no mixture, TooShort where it does not fit the tokens.
    """
    made = labelled_rows(read_mixture(table, "rows"), rng, batch, tokens)
    return Rows(made.ids, made.kinds, made.families)
