"""What attention code knows of the layer it works for, and which entries a position sees."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lsa_jax.cache import codec
from lsa_jax.cache.state import LayerState
from lsa_jax.config import ComputeConfig, LayerType, ModelConfig
from pallas_kernels import dispatch

IndexQueries = tuple[Float[Array, "B T H K"], Float[Array, "B T H"]]  # queries and head weights


def visible_entries(positions: Int[Array, "B T"], ratio: int, count: int) -> Bool[Array, "B T N"]:
    """Entry j is visible to position p once its last token is: j < (p + 1) // ratio (4.4)."""
    return jnp.arange(count) < ((positions + 1) // ratio)[..., None]


class Site(NamedTuple):
    """What a layer's attention is, besides its inputs and its state."""

    cfg: ModelConfig
    compute: ComputeConfig
    layer_type: LayerType
    sink: Float[Array, " H"]  # logits, float32

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of every operation here."""
        return {"scale": self.cfg.head_dim**-0.5, "group": self.cfg.kv_quant_group}

    def of(self, op: Any) -> str | None:
        """The backend of an operation of `pallas_kernels`, given as its package."""
        return dispatch.of_model(op.IMPLEMENTATIONS, self.compute.kernel_backend)

    def selects(self, state: LayerState) -> bool:
        """Whether the top-k can leave anything out at this capacity."""
        if self.layer_type != "csa":
            return False
        assert state.entries is not None
        return codec.capacity(state.entries) > self.cfg.index_topk

    def seen(self, state: LayerState, positions: Int[Array, "*n"]) -> Int[Array, "*n"]:
        """Stored entries that are complete at a position: j < (p + 1) // ratio (4.4)."""
        assert state.entries is not None
        complete = (positions + 1) // self.cfg.ratio(self.layer_type)
        return jnp.minimum(complete, codec.capacity(state.entries))
