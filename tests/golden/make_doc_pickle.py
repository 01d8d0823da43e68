"""Write `tests/golden/docs/doc_*.pkl`: dumped documents with torch tensors, small.

torch 2.13 on CPU. From the repository's root: `python -m tests.golden.make_doc_pickle`
"""

import pickle

import torch

from tests.golden.doc_values import FOLDER, LAYERS, items

FLOATS = ("hidden_layer_", "logits_layer_")


def document() -> dict[str, torch.Tensor]:
    """The authors' keys: states, logits, queries and weights in bfloat16, the rest as it is."""
    out = {}
    for key, value in items().items():
        tensor = torch.from_numpy(value)
        out[key] = tensor.bfloat16() if key.startswith(FLOATS) else tensor
    for layer in LAYERS:
        for token in range(3):
            out[f"q_layer_{layer}_token_{token}"] = torch.ones(1, 16).bfloat16()
            out[f"weights_layer_{layer}_token_{token}"] = torch.ones(1, 4).bfloat16()
    return out


def mixed() -> dict[str, object]:
    """The same with views into larger storages, NumPy labels, and plain values beside them."""
    out: dict[str, object] = dict(document())
    first = out["hidden_layer_10"]
    assert isinstance(first, torch.Tensor)
    out["hidden_layer_10"] = torch.cat([torch.zeros(3, first.shape[1]).bfloat16(), first])[3:]
    out["hidden_layer_12"] = out["hidden_layer_12"].T.contiguous().T
    out |= {key: value for key, value in items().items() if key.startswith("label_")}
    out |= {"rid": "a-1", "finished": True, "n": 27, "mean": items()["label_scores"].mean()}
    return out


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with (FOLDER / "doc_00000.pkl").open("wb") as file:
        pickle.dump(document(), file)
    with (FOLDER / "doc_00001.pkl").open("wb") as file:
        pickle.dump(mixed(), file, protocol=2)


if __name__ == "__main__":
    main()
