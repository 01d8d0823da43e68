"""bfloat16 activations, module by module: HuggingFace's inputs in, float32's outputs wanted.

End to end, bfloat16 flips routing and top-k choices (spec 12.1, 12.2 item 17); from the same inputs
a module only rounds. Its inputs and its output are rounded once, by up to 2^-9 of a value, and so
are one or two tensors between (weights are exact in bfloat16, sums are float32). The errors of a
sum's terms are independent, so they do not add up: 2^-6 of the largest value covers them all.
"""

import numpy as np
import pytest

from lsa_jax.config import ComputeConfig
from tests.layer_tensors import COMPRESSED, LAYERS, TOKENS, tensors_of

BFLOAT16 = ComputeConfig(dtype="bfloat16")
ERROR = 2**-6
CHOICES = {"chosen experts", "attended", "top indices", "top valid"}
# These follow the attended set and the experts of their token.
AFTER_TOP_K = {"probabilities", "attention", "streams"}
AFTER_ROUTING = {"experts, in rounds", "experts, gathered", "moe", "routing weights", "streams"}


def unchanged_tokens(layer: int, choice: str) -> np.ndarray:
    """Which tokens [T] make the same choice in both dtypes."""
    if choice == "attended" and layer not in COMPRESSED:
        return np.ones(TOKENS, bool)
    ours, exact = (np.asarray(tensors_of(layer, *c)[choice]) for c in ((BFLOAT16,), ()))
    if choice == "chosen experts":
        ours, exact = np.sort(ours), np.sort(exact)
    return (ours == exact).reshape(TOKENS, -1).all(axis=1)


@pytest.mark.parametrize(
    "layer", [pytest.param(i, marks=[pytest.mark.slow] * (i in (2, 4))) for i in LAYERS]
)
def test_every_tensor_of_a_layer_is_float32s_up_to_rounding(layer: int):
    ours, exact = tensors_of(layer, BFLOAT16), tensors_of(layer)
    same_set, same_experts = (unchanged_tokens(layer, c) for c in ("attended", "chosen experts"))
    assert ours.keys() == exact.keys()
    for name in ours.keys() - CHOICES:
        got, want = (np.asarray(t[name], np.float64) for t in (ours, exact))
        token_axis = want.shape.index(TOKENS) if TOKENS in want.shape else None
        if token_axis is not None:  # compressed entries and index keys have none
            kept = np.ones(TOKENS, bool)
            kept &= same_set if name in AFTER_TOP_K else True
            kept &= same_experts if name in AFTER_ROUTING else True
            got, want = (x.compress(kept, axis=token_axis) for x in (got, want))
        error = np.abs(got - want).max() / np.abs(want).max()
        assert error < ERROR, (name, error)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["attended", "chosen experts"])
def test_few_tokens_choose_otherwise(choice: str):
    kept = [unchanged_tokens(layer, choice).mean() for layer in LAYERS]
    assert min(kept) > 0.9  # near ties only: scores differ by 2^-8, their gaps are of O(0.1)


def test_what_must_stay_float32_does():
    ours = tensors_of(4, BFLOAT16)
    dtypes = {name: str(value.dtype) for name, value in ours.items()}
    for name in ("attn pre", "attn post", "attn comb", "router logits", "routing weights"):
        assert dtypes[name] == "float32", name
    for name in ("index scores", "shared expert", "experts, in rounds", "entries"):
        assert dtypes[name] == "float32", name
    for name in ("streams", "attention", "moe", "attn norm", "latent query"):
        assert dtypes[name] == "bfloat16", name
