"""The weights in `tests/golden/indexer/*.pt`: multiples of 1/64, exact in every float format."""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent / "indexer"
LAYERS = (10, 12, 20)
HIDDEN, RANK, HEADS, DIM = 16, 4, 2, 64


def layer_values(layer: int) -> dict[str, np.ndarray]:
    """One retriever's tensors, float32, different in every layer and element order."""
    shapes = {
        "wq_a.weight": (RANK, HIDDEN),
        "q_norm_weight": (RANK,),
        "wq_b.weight": (HEADS * DIM, RANK),
        "weights_proj.weight": (HEADS, HIDDEN),
    }
    out = {}
    for i, (name, shape) in enumerate(shapes.items()):
        ramp = np.arange(np.prod(shape), dtype=np.float32) * 37 + 11 * layer + 5 * i
        out[name] = ((ramp % 101 - 50) / 64).reshape(shape).astype(np.float32)
    return out


def joint_values() -> dict[str, np.ndarray]:
    """All layers under their released names."""
    return {f"retrievers.l{i}.{n}": v for i in LAYERS for n, v in layer_values(i).items()}
