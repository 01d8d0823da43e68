"""What is compared: arms of attention, each with a budget and settings of its own."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

from lsa_jax.config import CacheConfig, ModelConfig
from lsa_jax.config_checks import refusal
from lsa_jax.lsa.accounting import fresh_pages
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import Arm, LsaConfig
from lsa_jax.lsa.indexer_config import Ensemble
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.room import Room

SuiteArm = Literal["full", "no_csa"] | Arm
ARMS: tuple[SuiteArm, ...] = ("full", "no_csa", *get_args(Arm))
UNBOUNDED: tuple[SuiteArm, ...] = ("full", "no_csa")  # nothing is chosen for these
LsaPolicy = Literal["budget", "threshold"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to answer. `full` has all KV; `no_csa` decodes without any CSA entry (HCA stays).

    `budget` is as `--kv-budget` is written; None where nothing bounds the bytes. None elsewhere:
    the setting means nothing for this arm, or is the indexer's own.
    """

    arm: SuiteArm
    budget: str | None = None
    lookahead: int | None = None
    page_entries: int | None = None
    policy: LsaPolicy | None = None
    threshold: float | None = None
    recall_gate: float | None = None
    ensemble: Ensemble | None = None
    fallback: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.arm not in ARMS:
            raise refusal("arms", self.arm, f"among {', '.join(ARMS)}")
        if self.budget is not None:
            parse_budget(self.budget)

    @property
    def name(self) -> str:
        """For people: the arm, then what it is told apart by."""
        parts = (f"{name} {value}" for name, value in self.as_dict().items() if name != "arm")
        return ", ".join([self.arm, *parts])

    def as_dict(self) -> dict[str, Any]:
        """The settings that mean something for the arm."""
        settings = dataclasses.asdict(self)
        return {name: value for name, value in settings.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Axes:
    """The settings whose combinations are run."""

    arms: Sequence[SuiteArm]
    budgets: Sequence[str]
    lookaheads: Sequence[int]
    page_entries: Sequence[int]
    policies: Sequence[LsaPolicy] = ("budget",)
    thresholds: Sequence[float | None] = (None,)
    recall_gates: Sequence[float | None] = (None,)
    ensembles: Sequence[Ensemble | None] = (None,)
    fallbacks: Sequence[float | None] = (None,)
    patiences: Sequence[int | None] = (None,)

    def variants(self) -> list[Variant]:
        """Every combination that differs, in the order of the arms.

        Only `lsa` has policies, thresholds, gates and ensembles; the policy `threshold` has no
        budget, and nothing but a fallback is patient.
        """
        made: dict[Variant, None] = {}
        for arm in self.arms:
            for variant in [Variant(arm=arm)] if arm in UNBOUNDED else self._of(arm):
                made[variant] = None
        return list(made)

    def _of(self, arm: SuiteArm) -> list[Variant]:
        lsa = arm == "lsa"
        choices = {
            "budget": self.budgets,
            "lookahead": self.lookaheads,
            "page_entries": self.page_entries,
            "policy": self.policies if lsa else (None,),
            "threshold": self.thresholds if lsa else (None,),
            "recall_gate": self.recall_gates if lsa else (None,),
            "ensemble": self.ensembles if lsa else (None,),
            "fallback": self.fallbacks,
            "patience": self.patiences,
        }
        found = []
        for values in itertools.product(*choices.values()):
            variant = Variant(arm=arm, **dict(zip(choices, values, strict=True)))
            if variant.policy == "threshold":
                variant = dataclasses.replace(variant, budget=None)
            if variant.fallback is None:
                variant = dataclasses.replace(variant, patience=None)
            found.append(variant)
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """What all variants of a run share: the model, the storage of KV, what is always resident.

    `recency` and `sink` are in entries, `window_bytes` of a window's number; `lookback` is the
    memory indexer's.
    """

    cfg: ModelConfig
    cache: CacheConfig
    targets: tuple[int, ...]
    recency: int
    sink: int
    window_bytes: int
    lookback: int = 1

    def cache_of(self, variant: Variant) -> CacheConfig:
        """The cache with the variant's pages."""
        if variant.page_entries is None:
            return self.cache
        return dataclasses.replace(self.cache, page_entries=variant.page_entries)

    def lsa(self, variant: Variant, *, seed: int = 0) -> LsaConfig:
        """The session settings of a variant that chooses pages; `seed` draws for "random".

        Everything is on the device (path "mask"), where one prefill can serve every arm; bytes are
        those of the same sets on the other paths. Raises ConfigError for what cannot be.
        """
        assert variant.arm not in ("full", "no_csa") and variant.lookahead is not None
        policy: dict[str, Any] = {"recency": self.recency, "sink": self.sink}
        given = {name: getattr(variant, name) for name in ("policy", "threshold", "recall_gate")}
        policy |= {name: value for name, value in given.items() if value is not None}
        return LsaConfig(
            targets=self.targets,
            arm=variant.arm,
            lookahead=variant.lookahead,
            lookback=self.lookback,
            policy=PolicyConfig(**policy),
            budget=None if variant.budget is None else parse_budget(variant.budget),
            resident_path="mask",
            fallback=variant.fallback,
            patience=variant.patience,
            seed=seed if variant.arm == "random" else 0,
        )

    def room(self, variant: Variant) -> Room:
        """Pages that a budget has room for."""
        lsa, cache = self.lsa(variant), self.cache_of(variant)
        fresh = fresh_pages(self.cfg.csa_ratio, cache.page_entries, lsa.lookahead)
        return Room(
            cfg=self.cfg,
            cache=cache,
            lsa=lsa,
            fresh_entries=fresh * cache.page_entries,
            window_bytes=self.window_bytes,
        )

    def check(self, variants: Sequence[Variant], lengths: Sequence[int]) -> None:
        """Raises ConfigError where a budget is below the floor of a length, which it names."""
        for variant in variants:
            for tokens in lengths if variant.arm not in UNBOUNDED else ():
                self.room(variant).allowed((tokens,), tokens, strict=True)
