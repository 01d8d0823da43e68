"""How a request is decoded with part of its KV elsewhere: which arm, and its settings."""

import dataclasses
from typing import Literal, get_args

from lsa_jax.config_checks import number, refusal
from lsa_jax.lsa.budget import Budget
from lsa_jax.lsa.policy import MAX_COUNT, PolicyConfig

Arm = Literal["lsa", "recency", "random", "lagged", "quest", "snapkv", "oracle"]
ResidentPath = Literal["paged", "gathered", "mask"]
SIMULATED: tuple[Arm, ...] = ("lagged", "oracle")  # arms that score all history of every layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class LsaConfig:
    """Settings of two-level decoding. Plain Python; static under jit.

    `arm` says where page scores come from:
      - "lsa": the memory indexer.
      - "recency", "random": the newest pages, a random choice that stays as it is.
      - "quest": upper bounds of the target layers' own index scores by page extrema, no training.
      - "snapkv": what the prompt's last tokens looked at, chosen once.
      - "lagged": what the native indexers picked in the last cycle; "oracle": what they will pick
        in the next one, found by running it twice. Both score all of the history in every layer, so
        their device bytes are simulated: resident_path must be "mask".

    `targets` are CSA ordinals whose index keys stay on the device. A resident set serves
    `lookahead` steps, and is chosen by what the last `lookback` tokens ask for, as the indexer
    wants it (`IndexerConfig`). `budget` bounds KV bytes on the device; without one,
    `policy.recall_pages` bounds the pages of each row, by default as many as released settings
    recall (3 of 32). `resident_path` is how level 2 is confined: "paged" (a pool of pages that
    changes by what is new), "gathered" (the set copied to one place, whole, at each boundary) or
    "mask" (everything on the device; bytes are simulated). `fallback` is the missed attention mass,
    as estimated, from which on a request's budget grows, up to everything; None never grows it. It
    is judged at boundaries, an admission's too; with a `patience`, after every token that is fed
    instead, and the budget grows, at once and not at the cycle's end, where so many in a row missed
    more.
    `host_limit` bounds the bytes of host memory; `seed` draws for "random".
    """

    targets: tuple[int, ...]
    arm: Arm = "lsa"
    lookahead: int = 64
    lookback: int = 1
    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    budget: Budget | None = None
    resident_path: ResidentPath = "paged"
    fallback: float | None = None
    patience: int | None = None
    host_limit: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.arm not in get_args(Arm):
            raise refusal("attention", self.arm, f"one of {get_args(Arm)}")
        if self.resident_path not in get_args(ResidentPath):
            raise refusal("resident_path", self.resident_path, f"one of {get_args(ResidentPath)}")
        if self.arm in SIMULATED and self.resident_path != "mask":
            raise refusal("resident_path", self.resident_path, f"mask with attention {self.arm}")
        for name in ("lookahead", "lookback"):
            if number(name, getattr(self, name), int) < 1:
                raise refusal(name, getattr(self, name), ">= 1")
        if self.fallback is not None and not 0 < number("fallback", self.fallback, float) < 1:
            raise refusal("fallback", self.fallback, "in (0, 1), a share of attention mass")
        self._check_patience()
        if self.host_limit is not None and number("host_limit", self.host_limit, int) < 1:
            raise refusal("host_limit", self.host_limit, "at least 1 byte")

    def _check_patience(self) -> None:
        if self.patience is None:
            return
        if not 1 <= number("patience", self.patience, int) <= MAX_COUNT:
            raise refusal("patience", self.patience, "an int in [1, 2^31), tokens")
        if self.fallback is None:
            raise refusal("patience", self.patience, "given with a fallback only")
        if self.arm == "oracle":  # its set is chosen twice, by what nobody has read yet
            raise refusal("patience", self.patience, "not given with attention oracle")

    @property
    def simulated(self) -> bool:
        """Whether device bytes are what they would be, not what they are."""
        return self.resident_path == "mask"
