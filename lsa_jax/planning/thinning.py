"""One layer of each kind in the place of all: what makes a deep model cheap to compile."""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from lsa_jax.cache.resident import Resident
from lsa_jax.cache.state import LayerState
from lsa_jax.nn.transformer import Block
from lsa_jax.planning.case import Case


class Skipped(nnx.Module):
    """A layer whose weights are there and which computes nothing."""

    def __init__(self, block: Block):
        self.block = block

    def attend(
        self,
        streams: Array,
        state: LayerState,
        start: Array,
        count: Array,
        resident: Resident | None = None,
    ) -> tuple[Array, LayerState, Array]:
        """The streams, the state, and the first stream in the place of the attention input."""
        if resident is not None:
            nothing = jnp.zeros((*streams.shape[:2], 1), jnp.int32)
            resident.picked.append((nothing, nothing > 0))
        return streams, state, streams[:, :, 0]

    def mix(self, streams: Array, ids: Array) -> Array:
        """The streams."""
        return streams

    def __call__(
        self, streams: Array, ids: Array, state: LayerState, start: Array, count: Array
    ) -> tuple[Array, LayerState]:
        """The streams and the state."""
        return streams, state


def kinds(case: Case) -> dict[int, int]:
    """Layers that stand for their kind -> how many there are of it."""
    cfg, first, count = case.cfg, dict[Any, int](), dict[int, int]()
    targets = case.level2.target_layers if case.lsa is not None else ()
    for i, kind in enumerate(zip(cfg.layer_types, cfg.mlp_types, strict=True)):
        stands = first.setdefault((*kind, i in targets), i)
        count[stands] = count.get(stands, 0) + 1
    return count
