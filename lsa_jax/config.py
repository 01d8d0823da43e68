"""Frozen configurations: the backbone's shape, how it computes, and how its KV cache is stored.

Plain Python: no JAX import, so every tool can read a configuration without starting a backend.
Reading `config.json` and TOML files lives in `lsa_jax.config_io`.
"""

import dataclasses
from typing import Literal

LayerType = Literal["sliding", "csa", "hca"]
MlpType = Literal["hash", "score"]

_LAYER_TYPES = ("sliding", "csa", "hca")
_MLP_TYPES = ("hash", "score")


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names the field, what it is and must be."""


def _require(ok: bool, field: str, got: object, wanted: str) -> None:
    if not ok:
        raise ConfigError(f"{field} must be {wanted}, got {got!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN frequency scaling of the compressed layers (spec section 3.2)."""

    factor: float = 16.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        _require(self.factor >= 1, "rope_scaling.factor", self.factor, ">= 1")
        original = self.original_max_position_embeddings
        _require(original > 0, "rope_scaling.original_max_position_embeddings", original, "> 0")
        _require(
            self.beta_fast > self.beta_slow > 0,
            "rope_scaling.beta_fast",
            (self.beta_fast, self.beta_slow),
            "> beta_slow > 0",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape and constants of one DeepSeek-V4 model (spec section 1). Sizes are in elements.

    `layer_types` and `mlp_types` have one item per backbone layer; an MTP layer, where present, is
    always sliding and score-routed. Field names follow the released `config.json` where one exists.
    """

    vocab_size: int
    hidden_size: int
    layer_types: tuple[LayerType, ...]
    mlp_types: tuple[MlpType, ...]
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    csa_ratio: int = 4
    hca_ratio: int = 128
    routed_scaling_factor: float = 1.0
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    compress_rope_theta: float = 160000.0
    yarn: YarnConfig | None = YarnConfig()
    max_position_embeddings: int = 1048576
    num_nextn_predict_layers: int = 1
    kv_quant_group: int = 64  # nope dims that share one ue8m0 scale (5.4, 10.1)
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        self._check_positive()
        self._check_layers()
        self._check_divisibility()

    def _check_positive(self) -> None:
        optional = {"num_nextn_predict_layers", "bos_token_id", "eos_token_id", "yarn"}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in optional or isinstance(value, tuple):
                continue
            kind = float if field.type in (float, "float") else int
            number = isinstance(value, int | float) if kind is float else isinstance(value, int)
            ok = number and not isinstance(value, bool) and value > 0
            _require(ok, field.name, value, f"a positive {kind.__name__}")

    def _check_layers(self) -> None:
        _require(len(self.layer_types) > 0, "layer_types", self.layer_types, "a non-empty list")
        for name, items, known in (
            ("layer_types", self.layer_types, _LAYER_TYPES),
            ("mlp_types", self.mlp_types, _MLP_TYPES),
        ):
            for i, item in enumerate(items):
                _require(item in known, f"{name}[{i}]", item, f"one of {known}")
        n = len(self.layer_types)
        _require(len(self.mlp_types) == n, "mlp_types", len(self.mlp_types), f"{n} items long")
        mtp = self.num_nextn_predict_layers
        _require(mtp in (0, 1), "num_nextn_predict_layers", mtp, "0 or 1")

    def _check_divisibility(self) -> None:
        rope, nope = self.qk_rope_head_dim, self.nope_head_dim
        _require(rope % 2 == 0, "qk_rope_head_dim", rope, "even")
        _require(nope > 0, "qk_rope_head_dim", rope, f"smaller than head_dim={self.head_dim}")
        wanted = f"a divisor of head_dim - qk_rope_head_dim = {nope}"
        _require(nope % self.kv_quant_group == 0, "kv_quant_group", self.kv_quant_group, wanted)
        wanted = f"a multiple of o_groups={self.o_groups}"
        heads = self.num_attention_heads
        _require(heads % self.o_groups == 0, "num_attention_heads", heads, wanted)
        index_dim = self.index_head_dim
        power_of_two = index_dim & (index_dim - 1) == 0  # the Hadamard rotation needs it (5.2)
        _require(power_of_two, "index_head_dim", index_dim, "a power of two")
        _require(index_dim >= rope, "index_head_dim", index_dim, f">= qk_rope_head_dim={rope}")
        experts, k = self.n_routed_experts, self.num_experts_per_tok
        _require(k <= experts, "num_experts_per_tok", k, f"<= n_routed_experts={experts}")

    @property
    def num_layers(self) -> int:
        """Layers of the backbone; an MTP layer does not count."""
        return len(self.layer_types)

    @property
    def nope_head_dim(self) -> int:
        """Dims of an entry that carry no rotary position; they come first."""
        return self.head_dim - self.qk_rope_head_dim

    def ratio(self, layer_type: LayerType) -> int:
        """Tokens per compressed entry: 0 for sliding layers."""
        return {"sliding": 0, "csa": self.csa_ratio, "hca": self.hca_ratio}[layer_type]


KVFormat = Literal["float32", "bfloat16", "fp8"]
_KV_FORMATS = ("float32", "bfloat16", "fp8")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How compressed entries and index keys are stored while decoding.

    `kv_format` "fp8" keeps entries as e4m3 planes with power-of-two scales (spec 10.1) and index
    keys as e4m3 with one float32 scale (10.2). Entries live in pages of `page_entries`.
    """

    kv_format: KVFormat = "bfloat16"
    page_entries: int = 64

    def __post_init__(self) -> None:
        _require(self.kv_format in _KV_FORMATS, "kv_format", self.kv_format, f"in {_KV_FORMATS}")
        ok = isinstance(self.page_entries, int) and self.page_entries > 0
        _require(ok, "page_entries", self.page_entries, "a positive int")


ComputeDType = Literal["float32", "bfloat16"]
Backend = Literal["auto", "xla", "mosaic_gpu", "mosaic_tpu", "triton"]
_DTYPES = ("float32", "bfloat16")
_BACKENDS = ("auto", "xla", "mosaic_gpu", "mosaic_tpu", "triton")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """Arithmetic of the forward pass; static under jit.

    `dtype` is the activation dtype. `backend` names the kernels of `pallas_kernels` to use: an
    operation that has them runs them or raises, one that has none takes its default; "auto" takes
    the default, the best that is known for the device, everywhere. The three `simulate_*` switches
    round tensors as the released model does in production (spec 5.2, 5.4): window and compressed KV
    to fp8, index queries and keys to fp4, and the inputs of quantised matmuls to fp8.
    `picking` is another backend for choosing entries in prefill (index scores, top-k), which has no
    gradient: so training, whose `backend` must be "xla", may let kernels do it.
    """

    dtype: ComputeDType = "bfloat16"
    backend: Backend = "auto"
    picking: Backend | None = None
    simulate_kv: bool = False
    simulate_index: bool = False
    simulate_activations: bool = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", _DTYPES), ("backend", _BACKENDS)):
            _require(getattr(self, name) in known, name, getattr(self, name), f"one of {known}")
        known = (None, *_BACKENDS)
        _require(self.picking in known, "picking", self.picking, f"one of {known}")

    @property
    def kernel_backend(self) -> str | None:
        """The backend argument of `pallas_kernels` operations."""
        return None if self.backend == "auto" else self.backend

    @property
    def picking_backend(self) -> str | None:
        """The same for choosing entries in prefill."""
        name = self.picking or self.backend
        return None if name == "auto" else name
