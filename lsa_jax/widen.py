"""A memory indexer from a checkpoint's own lightning indexers: `python -m lsa_jax.widen CKPT DST`.

Its logits are those of the model's own selectors, which need no training. It is where training
starts from, and something to decode with until then.
"""

import argparse
import sys
from pathlib import Path
from typing import get_args

import jax

from lsa_jax import cli, model_io
from lsa_jax.checkpoint import store
from lsa_jax.lsa.indexer_config import IndexerConfig, Score
from lsa_jax.lsa.indexer_io import save_indexer
from lsa_jax.lsa.targets import default_target_layers
from lsa_jax.lsa.widening import widen

_LEAVES = ("wq_a.", "q_norm.", "indexer.wq_b.", "indexer.weights_proj.")


def widen_checkpoint(args: argparse.Namespace) -> int:
    """Writes what the parsed command line asks for. Returns the bytes of its weights."""
    model = model_io.read_config(args.ckpt)
    cfg = IndexerConfig.for_model(
        model,
        target_layers=args.target_layers or default_target_layers(model),
        n_heads=args.heads or model.index_n_heads,
        q_lora_rank=args.rank or model.q_lora_rank,
        ensemble=args.ensemble,
        lookback=args.lookback,
        score=args.score,
        dilation=args.dilation,
        falloff=args.falloff,
    )
    attention = [f"layers.{layer}.attn." for layer in cfg.transformer_layers(model)]
    wanted = tuple(prefix + name for prefix in attention for name in _LEAVES)
    _, leaves = store.load_checkpoint(args.ckpt, wanted=lambda path: path.startswith(wanted))
    indexer = widen(cfg, model, leaves, jax.random.key(args.seed))
    save_indexer(args.dst, indexer)
    return sum(leaf.nbytes for leaf in indexer.leaves().values())


def _ordinals(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"must be CSA ordinals such as 10,12,20, got {text!r}")
    return tuple(map(int, parts))


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.Parser(prog="python -m lsa_jax.widen", description=__doc__, allow_abbrev=False)
    parser.add_argument("ckpt", type=Path, help="directory of a converted checkpoint")
    parser.add_argument("dst", type=Path, help="safetensors file to create")
    parser.add_argument(
        "--target-layers", type=_ordinals, help="CSA ordinals (default: three of the upper half)"
    )
    parser.add_argument("--heads", type=int, help="at least the model's index heads (default)")
    parser.add_argument("--rank", type=int, help="at least the model's query rank (default)")
    parser.add_argument("--ensemble", choices=("max", "mean", "learned"), default="max")
    help_ = "last tokens that say what is needed; default 1"
    parser.add_argument("--lookback", type=int, default=1, help=help_)
    help_ = "entries on both sides of one that its logit counts for too; default 0"
    parser.add_argument("--dilation", type=int, default=0, help=help_)
    help_ = "what it is less by there, times the square of the distance; default 0"
    parser.add_argument("--falloff", type=float, default=0.0, help=help_)
    help_ = "of an entry: its probability (default), or its share of the attention to come"
    parser.add_argument("--score", choices=get_args(Score), default="sigmoid", help=help_)
    parser.add_argument("--seed", type=int, default=0, help="of weights without effect yet")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    args = _parse(argv)

    def body() -> None:
        print(f"{args.dst}: {widen_checkpoint(args):,} bytes of weights")

    return cli.exit_code(body, interrupted="interrupted; run it again to write the indexer")


if __name__ == "__main__":
    sys.exit(main())
