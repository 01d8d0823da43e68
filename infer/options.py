"""The command line of `python -m infer.generate`: parsed and checked before anything is loaded."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args

from infer import arguments, embedded
from infer.arguments import flag
from infer.lsa_options import LsaOptions, add_lsa
from lsa_jax import cli
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import Backend, CacheConfig, ComputeConfig, ComputeDType, ConfigError, KVFormat

DESCRIPTION = """\
Generates text with a converted or synthesized DeepSeek-V4 checkpoint. Text goes to stdout,
everything else to stderr. Exit codes: 0, 2 after an error (one line), 130 after Ctrl-C, which
keeps what was generated."""

_KV_FORMATS: dict[str, KVFormat] = {"f32": "float32", "bf16": "bfloat16", "fp8": "fp8"}
_SOURCES = ("prompt", "prompt_file", "prompt_ids", "chat")
PRESENT = "present"  # of --dry-run without a topology


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """One field per option, named like it; ConfigError where two of them contradict."""

    ckpt: Path
    prompt: str | None
    prompt_file: Path | None
    prompt_ids: str | None
    chat: bool
    raw: bool
    system: str | None
    thinking: bool
    hide_thinking: bool
    max_new_tokens: int
    ignore_eos: bool
    temperature: float
    top_p: float
    top_k: int
    seed: int
    prefill_chunk: int
    page_entries: int
    kv: Literal["auto", "f32", "bf16", "fp8"]
    dtype: Literal["auto", "float32", "bfloat16"]
    simulate_quant: Literal["off", "kv", "all"]
    backend: Backend
    mesh: tuple[int, int, int] | None
    dump_logits: Path | None
    json: Path | None
    dry_run: str | None
    lsa: LsaOptions

    def __post_init__(self) -> None:
        given = [flag(name) for name in _SOURCES if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            wanted = "exactly one of " + ", ".join(map(flag, _SOURCES))
            raise ConfigError(f"the prompt must be {wanted}, got {' and '.join(given) or 'none'}")
        plain = "--raw" if self.raw else "--prompt-ids" if self.prompt_ids is not None else None
        for name in ("chat", "raw", "system", "thinking"):
            if plain and plain != flag(name) and getattr(self, name) not in (None, False):
                raise ConfigError(f"{flag(name)} needs the message format, {plain} goes without")
        if self.hide_thinking and not self.thinking:
            raise ConfigError("--hide-thinking needs --thinking")
        if self.temperature == 0 and (self.top_k != 0 or self.top_p != 1):
            raise ConfigError("--top-k and --top-p need --temperature > 0: 0 is greedy decoding")
        if self.dump_logits is not None and self.chat:
            raise ConfigError("--dump-logits cannot be combined with --chat")
        self._check_dry_run()
        files: dict[Path, str] = {}
        for name, path in self.outputs():
            if path in files:
                raise ConfigError(f"{name} cannot be combined with {files[path]} of the same file")
            files[path] = name

    def _check_dry_run(self) -> None:
        if self.dry_run is None:
            return
        if self.chat:
            raise ConfigError("--dry-run cannot be combined with --chat: a prompt has a length")
        for name, _ in self.outputs():
            if name != "--json":
                raise ConfigError(f"{name} cannot be combined with --dry-run: nothing is run")

    def outputs(self) -> list[tuple[str, Path]]:
        """Options that name files to write, and the files."""
        named = {
            "--json": self.json,
            "--dump-logits": self.dump_logits,
            "--report": self.lsa.report,
            "--plot": self.lsa.plot,
        }
        return [(name, path) for name, path in named.items() if path is not None]

    def compute(self, backend: str) -> ComputeConfig:
        """Arithmetic on a JAX backend ("cpu", "gpu", "tpu")."""
        auto: ComputeDType = "float32" if backend == "cpu" else "bfloat16"
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


def parse(argv: list[str] | None) -> Options:
    """The options; bad ones end the process with one line and exit code 2."""
    parser = cli.Parser(
        prog="python -m infer.generate", description=DESCRIPTION, allow_abbrev=False
    )
    ckpt = "directory of the checkpoint; default: the embedded one, with its indexer"
    parser.add_argument("--ckpt", type=Path, help=ckpt)
    _add_prompt(parser)
    _add_sampling(parser)
    _add_machine(parser)
    add_lsa(parser)
    _add_output(parser)
    given = vars(parser.parse_args(argv))
    try:
        _complete(given)
        lsa = LsaOptions(**{f.name: given.pop(f.name) for f in dataclasses.fields(LsaOptions)})
        return Options(**given, lsa=lsa)
    except (CheckpointError, ConfigError) as why:
        parser.error(str(why))


def _complete(given: dict[str, Any]) -> None:
    """Without --ckpt: the embedded weights, with their indexer where one is wanted."""
    if given["ckpt"] is not None:
        return
    own = embedded.find()
    if own is None:
        raise ConfigError("--ckpt DIR must be given: no weights are embedded in this package")
    given["ckpt"] = own.checkpoint
    if given["attention"] == "lsa" and given["indexer"] is None:
        given["indexer"] = own.indexer


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompt (one of the first four)")
    group.add_argument("--prompt", help="a user message")
    group.add_argument("--prompt-file", type=Path, help="a UTF-8 file with the user message")
    group.add_argument("--prompt-ids", help='token ids ("1 2 3"), or a file of them; used as is')
    group.add_argument(
        "--chat",
        action="store_true",
        help="a conversation, a line per message; /exit or end of input ends it. The decode state "
        "is kept, so the reasoning of earlier turns stays in the context",
    )
    group.add_argument("--system", help="a system message before the first user message")
    group.add_argument("--thinking", action="store_true", help="the model reasons, then answers")
    group.add_argument("--hide-thinking", action="store_true", help="show the answer only")
    group.add_argument(
        "--raw",
        action="store_true",
        help="the prompt is plain text to go on from, not a message; BOS is put before it unless "
        "it begins with one",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-new-tokens", type=arguments.natural, default=256, help="default 256")
    group.add_argument("--ignore-eos", action="store_true", help="do not stop at EOS")
    group.add_argument(
        "--temperature", type=arguments.temperature, default=0.0, help="default 0: greedy"
    )
    group.add_argument("--top-p", type=arguments.probability, default=1.0, help="default 1: off")
    group.add_argument("--top-k", type=arguments.natural, default=0, help="default 0: off")
    group.add_argument("--seed", type=arguments.seed, default=0, help="default 0")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how it runs")
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of activations; auto (default): bfloat16 on accelerators, float32 on CPU",
    )
    group.add_argument(
        "--kv",
        choices=("auto", *_KV_FORMATS),
        default="auto",
        help="storage of compressed entries and index keys; auto (default): as --dtype",
    )
    group.add_argument(
        "--simulate-quant",
        choices=("off", "kv", "all"),
        default="off",
        help="round as the released model does in production: kv: KV, index queries and keys; "
        "all: inputs of quantised matmuls too",
    )
    group.add_argument(
        "--backend",
        choices=get_args(Backend),
        default="auto",
        help="kernels; auto (default): the best for the device, else the one named or an error",
    )
    group.add_argument(
        "--prefill-chunk",
        type=arguments.positive,
        default=1024,
        help="tokens per prefill step, rounded up to a power of two; default 1024",
    )
    group.add_argument(
        "--page-entries",
        type=arguments.positive,
        default=CacheConfig.page_entries,
        help="default 64",
    )
    group.add_argument(
        "--mesh",
        type=arguments.mesh,
        metavar="DATA,EXPERT,TENSOR",
        help="spread over devices; DATA is 1",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="ids, text, times, bytes, device")
    group.add_argument(
        "--dry-run",
        nargs="?",
        const=PRESENT,
        metavar="TOPOLOGY",
        help="run nothing: bytes by component, whether they fit (else exit code 2), and the "
        "roofline of a step, here or on h100:4, v5p:2x2x1, ..",
    )
    group.add_argument(
        "--dump-logits",
        type=Path,
        metavar="FILE.npz",
        help="ids int32 [S+T], prompt then generated; logits float32 [S+T-1, V], row i the output "
        "at position i (the last generated token is not fed; with T = 0 there are S rows)",
    )
