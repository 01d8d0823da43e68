"""What `tests/golden/docs/doc_*.pkl` hold: small numbers, exact in every float format."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "docs"
LAYERS = (10, 12, 20)
TOKENS, HIDDEN, ENTRIES, KEY_DIM, PROMPT = 70, 8, 27, 128, 40
DROPPED = 2  # labels of entries that there are not

Items = dict[str, np.ndarray]


def _ramp(shape: tuple[int, ...], step: int, start: int) -> np.ndarray:
    ramp = np.arange(np.prod(shape), dtype=np.float32) * step + start
    return ((ramp % 101 - 50) / 64).reshape(shape).astype(np.float32)


def hidden(layer: int) -> np.ndarray:
    """[T, D] float32, which bfloat16 holds too."""
    return _ramp((TOKENS, HIDDEN), 37, 11 * layer)


def keys(layer: int) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of e4m3 codes [N, K], and scales float32 [N]."""
    codes = (np.arange(ENTRIES * KEY_DIM) * 7 + layer) % 126  # 127 and 255 are NaN
    scale = (np.arange(ENTRIES, dtype=np.float32) + layer) / 256
    return codes.astype(np.uint8).reshape(ENTRIES, KEY_DIM), scale


def key_rows(layer: int) -> np.ndarray:
    """uint8 [N, 132], as dumped."""
    codes, scale = keys(layer)
    return np.concatenate([codes, scale[:, None].view(np.uint8)], axis=1)


def labels() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Indices, votes and row pointers; most votes first; some rows empty, two labels too high."""
    indices, votes, pointers = [], [], [0]
    for token in range(TOKENS):
        count = token % 4
        indices += [(3 * token + 7 * i) % 11 for i in range(count)]
        votes += [21 - 2 * i - token % 3 for i in range(count)]
        if token in (5, 69):  # beyond the keys, as when the prompt is tokenised once more
            indices.append(ENTRIES + token)
            votes.append(3)
        pointers.append(len(indices))
    return tuple(np.array(part, np.int32) for part in (indices, votes, pointers))


def logits(layer: int, token: int) -> np.ndarray:
    """Native logits of the entries at one of the first tokens."""
    return _ramp(((PROMPT + token + 1) // 4,), 13, layer + token)


def items() -> Items:
    """Every array of the document but q and weights, in float32 where the dump has bfloat16."""
    out: Items = {}
    for layer in LAYERS:
        out[f"hidden_layer_{layer}"] = hidden(layer)
        out[f"compk_layer_{layer}"] = key_rows(layer)
        out[f"positions_layer_{layer}"] = np.arange(PROMPT, PROMPT + TOKENS)
        for token in range(3):
            out[f"logits_layer_{layer}_token_{token}"] = logits(layer, token)
    out["label_indices"], out["label_scores"], out["label_pointers"] = labels()
    return out
