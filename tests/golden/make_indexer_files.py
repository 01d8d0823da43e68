"""Write `tests/golden/indexer/*.pt`: small memory indexers as torch saves them.

torch 2.13 on CPU. From the repository's root: `python -m tests.golden.make_indexer_files`
"""

import argparse
from collections import OrderedDict

import numpy as np
import torch

from tests.golden.indexer_values import FOLDER, LAYERS, layer_values


def state(layer: int) -> "OrderedDict[str, torch.Tensor]":
    return OrderedDict((name, torch.from_numpy(v)) for name, v in layer_values(layer).items())


def joint() -> "OrderedDict[str, torch.Tensor]":
    """As released: every layer with its table of rotations, and a module's metadata."""
    out = OrderedDict()
    for layer in LAYERS:
        angle = torch.outer(torch.arange(8.0), torch.arange(32.0))
        tensors = {**state(layer), "freqs_cis": torch.polar(torch.ones_like(angle), angle)}
        out |= {f"retrievers.l{layer}.{name}": value for name, value in tensors.items()}
    out._metadata = OrderedDict({"": {"version": 1}})
    return out


def views(layer: int) -> "OrderedDict[str, torch.Tensor]":
    """One layer whose tensors are not contiguous: transposed, at an offset, every second row."""
    tensors = state(layer)
    tensors["wq_a.weight"] = tensors["wq_a.weight"].T.contiguous().T
    tensors["q_norm_weight"] = torch.cat([torch.zeros(5), tensors["q_norm_weight"]])[5:]
    wq_b = tensors["wq_b.weight"]
    tensors["wq_b.weight"] = torch.stack([wq_b, wq_b + 1], dim=1)[:, 0]
    tensors["freqs_cis"] = torch.zeros(2, 32, dtype=torch.complex64)
    return tensors


def training(weights: dict[str, torch.Tensor]) -> dict[str, object]:
    """A full training checkpoint: optimizer, NumPy metrics, arguments."""
    parameters = [torch.nn.Parameter(v.clone()) for v in list(weights.values())[:2]]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4)
    sum(p.sum() for p in parameters).backward()
    optimizer.step()
    return {
        "epoch": 3,
        "model_state": weights,
        "optimizer_state": optimizer.state_dict(),
        "best_f1": np.float64(0.25),
        "step": np.int64(7),
        "done": np.bool_(True),
        "args": argparse.Namespace(lr=1e-4, layers=[10, 12, 20], tag=None),
        "rng": torch.zeros(3, dtype=torch.uint8),
    }


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    plain = OrderedDict((k, v) for k, v in joint().items() if "freqs" not in k)
    torch.save(joint(), FOLDER / "joint.pt")
    torch.save(views(12), FOLDER / "single_views.pt")
    torch.save({k: v.bfloat16() for k, v in state(10).items()}, FOLDER / "single_bfloat16.pt")
    torch.save({k: v.half() for k, v in state(10).items()}, FOLDER / "single_float16.pt")
    torch.save(training(plain), FOLDER / "training.pt")
    torch.save(state(10), FOLDER / "legacy.pt", _use_new_zipfile_serialization=False)


if __name__ == "__main__":
    main()
