"""Options of `infer.generate` for decoding with part of the KV cache on the host.

None is "not given": what then holds depends on the model and on the other options, and `make_plan`
decides it.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Literal, get_args

from infer import arguments
from infer.arguments import flag
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import CacheConfig, ConfigError, ModelConfig
from lsa_jax.lsa.budget import Budget, Calibration
from lsa_jax.lsa.config import SIMULATED, Arm, LsaConfig, ResidentPath
from lsa_jax.lsa.indexer_config import QueryMode
from lsa_jax.lsa.indexer_file import IndexerFile
from lsa_jax.lsa.indexer_reader import read_indexer
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.room import Room
from lsa_jax.lsa.targets import check_targets, default_target_layers

# These mean nothing where no indexer gives probabilities.
_TRAINED = ("indexer", "indexer_dtype", "query_mode", "threshold", "recall_gate", "policy")
_POLICIES = ("budget", "published", "threshold")

IndexerDType = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LsaOptions:
    """One field per option, named like it; ConfigError where two of them contradict."""

    attention: Literal["full"] | Arm
    indexer: Path | None
    indexer_dtype: IndexerDType | None
    query_mode: QueryMode | None
    target_layers: tuple[int, ...] | None
    lookahead: int | None
    threshold: float | None
    recall_gate: float | None
    recency: int | None
    sink: int | None
    policy: Literal["budget", "published", "threshold"] | None
    recall_pages: int | None
    kv_budget: Budget | None
    resident_path: ResidentPath | None
    host_limit: int | None
    fallback: float | None
    patience: int | None
    report: Path | None
    plot: Path | None

    def __post_init__(self) -> None:
        given = [f.name for f in dataclasses.fields(self)[1:] if getattr(self, f.name) is not None]
        if self.attention == "full" and given:
            got = "got --attention full"
            raise ConfigError(f"{flag(given[0])} needs --attention lsa or another arm, {got}")
        for name in _TRAINED if self.attention != "lsa" else ():
            if name in given:
                raise ConfigError(f"{flag(name)} needs --attention lsa, got {self.attention}")
        if self.attention == "lsa":
            if self.indexer is None:
                raise ConfigError("--attention lsa needs --indexer FILE, got none")
            if self.target_layers is not None:
                raise ConfigError("--target-layers cannot be given: the --indexer names its layers")
        path = self.path
        if self.attention in SIMULATED and path != "mask":
            raise ConfigError(
                f"--attention {self.attention} needs --resident-path mask, got {path}"
            )
        if path == "mask" and self.host_limit is not None:
            raise ConfigError("--host-limit needs pages on the host, --resident-path mask has none")

    @property
    def path(self) -> ResidentPath:
        """How level 2 is confined."""
        default = "mask" if self.attention in SIMULATED else "paged"
        return self.resident_path or default


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Two-level decoding as it was asked for, held to a model; nothing is on a device yet.

    `indexer_dtype` and `query_mode` replace what the indexer's file says; None does not.
    """

    lsa: LsaConfig
    indexer: IndexerFile | None
    calibration: Calibration | None
    indexer_dtype: IndexerDType | None = None
    query_mode: QueryMode | None = None

    def check_room(self, cfg: ModelConfig, cache: CacheConfig, tokens: int) -> None:
        """Raises ConfigError where a request of so many tokens has a floor above the budget, or
        needs more host memory than it may."""
        level2 = Level2(
            cfg,
            cache,
            targets=self.lsa.targets,
            lookahead=self.lsa.lookahead,
            path=self.lsa.resident_path,
        )
        fresh = level2.fresh_pages * cache.page_entries
        # A budget does not count windows, so their width, which is the model's, is not needed here.
        room = Room(cfg=cfg, cache=cache, lsa=self.lsa, fresh_entries=fresh)
        room.allowed((tokens,), tokens, strict=True)
        needed, limit = (
            max(1, room.complete_pages(tokens)) * level2.layout.nbytes,
            self.lsa.host_limit,
        )
        if limit is not None and needed > limit:
            raise ConfigError(
                f"--host-limit must be at least {needed} bytes for {tokens} tokens, got {limit}"
            )


def make_plan(options: LsaOptions, cfg: ModelConfig, cache: CacheConfig, *, seed: int) -> Plan:
    """The settings that the options come to; reads the indexer's file.

    Thresholds that the file brings hold for the policy "budget", unless --threshold is given.
    Raises ConfigError, FileNotFoundError or CheckpointError.
    """
    file = None if options.indexer is None else _read(options.indexer, cfg)
    targets = options.target_layers or default_target_layers(cfg)
    targets = check_targets(cfg, file.config.target_layers if file else targets)
    policy = _policy(options, cache)
    calibrated = options.threshold is None and policy.policy == "budget"
    calibration = _calibration(options.indexer, file) if file and calibrated else None
    assert options.attention != "full"  # nothing to plan there
    defaults = {"lookahead": options.lookahead} if options.lookahead is not None else {}
    lsa = LsaConfig(
        targets=targets,
        arm=options.attention,
        policy=policy,
        budget=options.kv_budget,
        resident_path=options.path,
        fallback=options.fallback,
        patience=options.patience,
        host_limit=options.host_limit,
        seed=seed,
        lookback=file.config.lookback if file else 1,
        **defaults,
    )
    return Plan(
        lsa=lsa,
        indexer=file,
        calibration=calibration,
        indexer_dtype=options.indexer_dtype,
        query_mode=options.query_mode,
    )


def _read(path: Path, cfg: ModelConfig) -> IndexerFile:
    try:
        return read_indexer(path, cfg)
    except IsADirectoryError:
        raise ConfigError(f"--indexer must be a file, got the directory {path}") from None


def _policy(options: LsaOptions, cache: CacheConfig) -> PolicyConfig:
    """Published rules with published numbers; else a page of recency, so that budgets can be small:
    all that forms while decoding is readable anyway until the next boundary."""
    name = options.policy or "budget"
    recency = cache.page_entries if name == "budget" else PolicyConfig().recency
    given = {
        field: getattr(options, field)
        for field in ("threshold", "recall_gate", "recency", "sink", "recall_pages")
        if getattr(options, field) is not None
    }
    return PolicyConfig(**{"policy": name, "recency": recency, **given})


def _calibration(path: Path | None, file: IndexerFile) -> Calibration | None:
    """The thresholds that an indexer's file brings, if it does."""
    if file.calibration is None:
        return None
    try:
        return Calibration.from_json(json.dumps(file.calibration))
    except ConfigError as why:
        how = "--threshold goes without it"
        raise CheckpointError(f"indexer {path}: {why} ({how})") from None


def add_lsa(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    group = parser.add_argument_group("attention (all but the first need an arm other than full)")
    add = group.add_argument
    add(
        "--attention",
        choices=("full", *get_args(Arm)),
        default="full",
        help="full (default): all KV is on the device. Else part of it, and pages come from the "
        "host as chosen by: lsa, a trained indexer; recency; random; quest, extrema of the pages' "
        "index keys; snapkv, the prompt's last tokens; lagged and oracle, the native indexers in "
        "the last and the next cycle (these keep everything: their bytes are simulated)",
    )
    add("--indexer", type=Path, metavar="FILE", help="memory indexer, for lsa: .safetensors or .pt")
    add(
        "--indexer-dtype",
        choices=get_args(IndexerDType),
        help="of the indexer's weights; default: the file's (released ones: float32)",
    )
    add(
        "--query-mode",
        choices=get_args(QueryMode),
        help="arithmetic of the indexer's queries; default: the file's, else float32",
    )
    add(
        "--target-layers",
        type=arguments.ordinals,
        metavar="A,B,..",
        help="CSA ordinals of layers whose index keys stay on the device; default: 10,12,20 for "
        "V4-Flash, else of the upper half. lsa takes the indexer's",
    )
    add("--lookahead", type=arguments.positive_count, help="steps between recalls; default 64")
    add(
        "--kv-budget",
        type=arguments.budget,
        metavar="BYTES|SHARE",
        help="bound of entries and index keys on the device: 0.10 (of all), 400MB, 1.5GiB",
    )
    add(
        "--recall-pages",
        type=arguments.positive_count,
        help="bound in pages; default without --kv-budget: 3/32 of all",
    )
    add(
        "--policy",
        choices=_POLICIES,
        help="from scores to pages; default budget: worthiest first. published: densest first; "
        "threshold: every page with an entry above it",
    )
    add(
        "--threshold",
        type=arguments.inner,
        help="score above which an entry is wanted; default: as calibrated in the indexer's "
        "file, for the policy budget, else 0.5 of probabilities, an even share of shares",
    )
    add(
        "--recall-gate",
        type=arguments.positive_number,
        metavar="RATIO",
        help="recall nothing where the best entries, as many as --recency and --sink keep, score "
        "no more than this many times what these do; default: recall in any case",
    )
    add(
        "--recency",
        type=arguments.count,
        help="last entries that are always wanted; default: a page, 2048 for published, threshold",
    )
    add("--sink", type=arguments.count, help="first entries that are always wanted; default 0")
    add("--resident-path", choices=get_args(ResidentPath), help="default paged; mask simulates")
    add("--host-limit", type=arguments.size, metavar="BYTES", help="of pages on the host: 64GiB")
    add(
        "--fallback",
        type=arguments.bound,
        metavar="off|BOUND",
        help="estimated share of attention mass missed from which on the budget grows; default off",
    )
    add(
        "--patience",
        type=arguments.positive_count,
        metavar="TOKENS",
        help="that must miss more than --fallback in a row before the budget grows, judged after "
        "each; default: judged at boundaries only, the last token there",
    )
    add("--report", type=Path, metavar="FILE.json", help="bytes by component, cycles, misses")
    add("--plot", type=Path, metavar="FILE.png", help="resident pages over time; needs matplotlib")
