"""The tiny model's logits are HuggingFace's: prefilled, and decoded token by token.

`tiny_logits.npz` holds what transformers computed in float32 for the first row of the golden case
`tiny` (tests/golden), whose weights every machine can make again.
"""

import importlib.resources
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lsa_jax.cache.state import DecodeState
from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.checks.finding import Finding
from lsa_jax.config import CacheConfig, ComputeConfig
from lsa_jax.config_io import load_config
from lsa_jax.engine import Engine
from lsa_jax.nn.transformer import DeepSeekV4

SEED = 0  # of the golden's weights
PREFILLED = 41  # tokens; the rest is decoded. Ends inside a window of each compressor.
# Logits are of order 1. On a CPU the largest difference is 2e-6; devices that sum in other orders
# get room for an order of magnitude more.
TOLERANCE = 5e-5


def tiny_model() -> DeepSeekV4:
    """The tiny preset with the golden's weights, in float32."""
    cfg = load_config("tiny")
    source = SyntheticModel(cfg, seed=SEED)
    leaves = {
        path: jnp.asarray(source.read(path, 0, info.shape[0], weights="f32"))
        for path, info in source.leaves("f32").items()
    }
    return DeepSeekV4(cfg, ComputeConfig(dtype="float32"), leaves)


def golden() -> tuple[Int[np.ndarray, " S"], Float[np.ndarray, "S V"]]:
    """Token ids, and the logits after each of them."""
    file = importlib.resources.files("lsa_jax.checks") / "tiny_logits.npz"
    with file.open("rb") as opened, np.load(opened) as stored:
        return stored["ids"], stored["logits"]


@jax.jit
def _step(model: DeepSeekV4, state: DecodeState, token: Array) -> tuple[Array, DecodeState]:
    streams, state = model(token[None, None], state, jnp.ones((1,), jnp.int32))
    return model.logits(streams)[0, 0], state


def parity() -> Iterator[Finding]:
    """Prefill, then decode, against the golden logits."""
    ids, want = golden()
    model = tiny_model()
    engine = Engine(model, CacheConfig(kv_format="float32", page_entries=4), prefill_chunk=64)
    state = engine.start(batch=1, capacity=64)
    rows, state = engine.prefill(state, [ids[:PREFILLED].tolist()], all_logits=True)
    assert isinstance(rows, list)
    yield _compare("prefill", rows[0], want[:PREFILLED])
    decoded = []
    for token in ids[PREFILLED:]:
        logits, state = _step(model, state, jnp.int32(token))
        decoded.append(np.asarray(logits))
    yield _compare("decode", np.stack(decoded), want[PREFILLED:])


def _compare(what: str, got: np.ndarray, want: np.ndarray) -> Finding:
    gap = float(np.abs(got - want).max())
    said = f"{what} of {len(want)} tokens: largest difference {gap:.1e} of at most {TOLERANCE:.0e}"
    return Finding(said, gap <= TOLERANCE)
