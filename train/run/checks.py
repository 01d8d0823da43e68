"""What cannot be trained together, whatever the data are: refused before any is read."""

from typing import Protocol

from lsa_jax.config_checks import refusal
from lsa_jax.lsa.indexer_config import Ensemble, Score
from train.run.losses import ObjectiveConfig


class Scored(Protocol):
    """What a step's checks want to know of an indexer."""

    @property
    def ensemble(self) -> Ensemble:
        """How layers are combined."""
        ...

    @property
    def lookback(self) -> int:
        """Tokens that a fire asks."""
        ...

    @property
    def score(self) -> Score:
        """What logits say."""
        ...


def check_program(indexer: Scored, objective: ObjectiveConfig, log_n_reference: int) -> None:
    """ConfigError where an indexer cannot be trained by an objective, or with scaled logits."""
    kind, shares = indexer.ensemble, indexer.score == "softmax"
    if kind == "learned" and shares:  # its weights take on_ensemble, which shares cannot have
        raise refusal("indexer.ensemble", kind, "max or mean with indexer.score = 'softmax'")
    if objective.on_ensemble and objective.ensemble != kind:
        raise refusal("objective.ensemble", objective.ensemble, f"indexer.ensemble, {kind!r}")
    if kind == "learned" and not objective.on_ensemble:
        wanted = "> 0, as indexer.ensemble is learned"
        raise refusal("objective.on_ensemble", objective.on_ensemble, wanted)
    if objective.on_ensemble and shares:
        wanted = "0 with indexer.score = 'softmax'"
        raise refusal("objective.on_ensemble", objective.on_ensemble, wanted)
    if log_n_reference:
        _check_scaled(indexer, log_n_reference)


def _check_scaled(indexer: Scored, log_n_reference: int) -> None:
    """What is served has logits as they are: scaling them may change no order of entries."""
    if log_n_reference < 2:
        raise refusal("run.log_n_reference", log_n_reference, "0 or >= 2")
    for name, wanted in (
        ("score", ("sigmoid",)),  # scaled logits have other shares
        ("lookback", (1,)),  # nor would tokens weigh as when served
        ("ensemble", ("max", "learned")),  # the mean of other probabilities has another order
    ):
        got = getattr(indexer, name)
        if got not in wanted:
            words = " or ".join(map(str, wanted))
            raise refusal(f"indexer.{name}", got, f"{words} with run.log_n_reference")
