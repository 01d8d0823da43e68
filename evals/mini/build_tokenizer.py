"""Writes the mini model's `tokenizer.json`: python -m evals.mini.build_tokenizer --out FILE."""

import json
import sys
from pathlib import Path
from typing import Any

from evals.mini.vocabulary import (
    SPLIT,
    byte_level,
    merges,
    vocabulary,
)
from lsa_jax import cli
from lsa_jax.text.byte_level import byte_characters
from lsa_jax.text.special import BOS, EOS, PAD, SPECIAL_IDS


def tokenizer_json() -> str:
    """The file's text; the same at every call.

    A piece of text that is a token whole becomes that token (`ignore_merges`), any other falls into
    syllables and bytes. Only BOS, EOS and pad are special, as in the released tokenizer.
    """
    table = vocabulary()
    first_byte = len(SPECIAL_IDS)
    character = byte_characters()
    vocab = {token: id_ for id_, token in enumerate(SPECIAL_IDS)}
    vocab |= {character[byte]: first_byte + byte for byte in range(256)}
    for id_, text in enumerate(table.texts):
        if text is None and id_ >= first_byte + 256:
            vocab[f"<placeholder {id_}>"] = id_
        elif text is not None and id_ >= first_byte + 256:
            vocab[byte_level(text)] = id_
    return json.dumps(_layout(vocab), ensure_ascii=False, indent=0) + "\n"


def _layout(vocab: dict[str, int]) -> dict[str, Any]:
    """The structure of `tokenizer.json` for HuggingFace `tokenizers`."""
    flags = {"normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    added = [
        {"id": vocab[token], "content": token, "special": token in (BOS, EOS, PAD), **flags}
        for token in SPECIAL_IDS
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    level["use_regex"] = False
    split = {"type": "Split", "pattern": {"Regex": SPLIT}, "behavior": "Isolated"}
    split["invert"] = False
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocab,
        "merges": merges(),
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, level]},
        "post_processor": None,
        "decoder": level,
        "model": model,
    }


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = cli.Parser(prog="python -m evals.mini.build_tokenizer", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    out: Path = parser.parse_args(argv).out
    return cli.exit_code(
        lambda: print(f"{out}: {out.write_text(tokenizer_json(), encoding='utf-8')} characters"),
        interrupted="interrupted",
    )


if __name__ == "__main__":
    sys.exit(main())
