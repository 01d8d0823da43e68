"""The command line of `python -m train.dump_traces`."""

import argparse
import dataclasses
from pathlib import Path
from typing import Literal, get_args

import jax

from lsa_jax import cli
from lsa_jax.config import (
    Backend,
    CacheConfig,
    ComputeConfig,
    ComputeDType,
    KVFormat,
    ModelConfig,
)
from lsa_jax.lsa.targets import check_targets, csa_layers, default_target_layers
from train.traces.recording import RecordConfig, check_record
from train.traces.votes import VoteConfig

_KV_FORMATS: dict[str, KVFormat] = {"f32": "float32", "bf16": "bfloat16", "fp8": "fp8"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One field per option, named like it."""

    ckpt: Path
    prompts: Path
    out: Path
    start_idx: int
    end_idx: int | None
    start: int
    thinking: bool
    replay: bool
    max_new_tokens: int
    ignore_eos: bool
    targets: tuple[int, ...] | None
    top_k: int | None
    top_p: float
    min_layers: int
    mass_eps: float
    dtype: Literal["auto", "float32", "bfloat16"]
    kv: Literal["auto", "f32", "bf16", "fp8"]
    simulate_quant: Literal["off", "kv", "all"]
    backend: Backend
    prefill_chunk: int
    page_entries: int
    mesh: tuple[int, int, int] | None

    def compute(self) -> ComputeConfig:
        """Arithmetic on JAX's default backend."""
        auto: ComputeDType = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return ComputeConfig(
            dtype=auto if self.dtype == "auto" else self.dtype,
            backend=self.backend,
            simulate_kv=self.simulate_quant != "off",
            simulate_index=self.simulate_quant != "off",
            simulate_activations=self.simulate_quant == "all",
        )

    def cache(self, compute: ComputeConfig) -> CacheConfig:
        """KV storage beside that arithmetic."""
        kv_format = compute.dtype if self.kv == "auto" else _KV_FORMATS[self.kv]
        return CacheConfig(kv_format=kv_format, page_entries=self.page_entries)

    def record(self, cfg: ModelConfig) -> RecordConfig:
        """What is recorded of a model; ConfigError where the model does not have it."""
        targets = default_target_layers(cfg) if self.targets is None else self.targets
        votes = VoteConfig(
            top_k=cfg.index_topk if self.top_k is None else self.top_k,
            top_p=self.top_p,
            min_layers=self.min_layers,
        )
        config = RecordConfig(
            targets=check_targets(cfg, targets),
            votes=votes,
            max_new_tokens=self.max_new_tokens,
            mass_eps=self.mass_eps,
        )
        check_record(len(csa_layers(cfg)), config)
        return config


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def _natural(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"must be an integer >= 0, got {text!r}")
    return int(text)


def _ordinals(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise argparse.ArgumentTypeError(f"must be CSA ordinals such as 10,12,20, got {text!r}")
    return tuple(map(int, parts))


def _mesh(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or parts[0] != "1" or not all(p.isdecimal() and int(p) for p in parts):
        wanted = "DATA,EXPERT,TENSOR with DATA = 1, as there is one sequence at a time"
        raise argparse.ArgumentTypeError(f"must be {wanted}, got {text!r}")
    return 1, int(parts[1]), int(parts[2])


def parse(argv: list[str] | None, description: str) -> Options:
    """The options; bad ones end the process with one line and exit code 2."""
    parser = cli.Parser(
        prog="python -m train.dump_traces", description=description, allow_abbrev=False
    )
    parser.add_argument("--ckpt", type=Path, required=True, help="directory of the checkpoint")
    parser.add_argument(
        "--prompts",
        type=Path,
        required=True,
        help="a JSON object to a line, with one of prompt, messages, text and ids",
    )
    parser.add_argument("--out", type=Path, required=True, help="trace set; made if not there")
    _add_documents(parser)
    _add_labels(parser)
    _add_machine(parser)
    return Options(**vars(parser.parse_args(argv)))


def _add_documents(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("documents")
    number = {"type": _natural, "metavar": "N"}
    group.add_argument("--start-idx", **number, default=0, help="first prompt, from 0; default 0")
    group.add_argument("--end-idx", **number, help="prompt to end before; default: all")
    group.add_argument(
        "--start", **number, default=0, help="number of prompt 0's document; default 0"
    )
    group.add_argument("--thinking", action="store_true", help="the model reasons, then answers")
    group.add_argument(
        "--replay",
        action="store_true",
        help="feed every prompt's `answer`, as it is, instead of what the model says",
    )
    group.add_argument(
        "--max-new-tokens", type=_positive, default=2048, help="at most; default 2048"
    )
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at EOS")


def _add_labels(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is recorded")
    group.add_argument(
        "--targets", type=_ordinals, help="CSA ordinals; default: 10,12,20 for V4-Flash's layers"
    )
    group.add_argument("--top-k", type=_positive, help="that a layer votes on; default: its own")
    group.add_argument("--top-p", type=float, default=VoteConfig.top_p, help="default 0.6")
    group.add_argument(
        "--min-layers", type=_positive, default=VoteConfig.min_layers, help="default 3"
    )
    group.add_argument(
        "--mass-eps",
        type=float,
        default=RecordConfig.mass_eps,
        help="attention mass, summed over CSA layers, that is not kept; default 1e-4",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how the backbone runs; as infer.generate")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    group.add_argument("--kv", choices=("auto", *_KV_FORMATS), default="auto")
    group.add_argument("--simulate-quant", choices=("off", "kv", "all"), default="off")
    group.add_argument("--backend", choices=get_args(Backend), default="auto")
    group.add_argument("--prefill-chunk", type=_positive, default=1024)
    group.add_argument("--page-entries", type=_positive, default=CacheConfig.page_entries)
    group.add_argument("--mesh", type=_mesh, metavar="DATA,EXPERT,TENSOR")
