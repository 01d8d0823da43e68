"""The memory indexer's configuration, and the names and shapes of its leaves.

Plain Python, like `lsa_jax.config`. Target layers are CSA ordinals (`lsa_jax.lsa.targets`).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from lsa_jax.config import ConfigError, ModelConfig, YarnConfig
from lsa_jax.config_checks import number, numbers, refusal, table
from lsa_jax.lsa.targets import csa_layers

QueryMode = Literal["float32", "bfloat16", "fp8"]
"""How queries are rounded before they meet the keys (LSA spec 2.1). `float32`: not at all, and
projections are float32 too. `bfloat16`: before and after RoPE. `fp8`: e4m3 with a float32 scale per
head, which the head's weight absorbs."""

Ensemble = Literal["max", "mean", "learned"]
"""How target layers are combined. `max` and `mean` of their probabilities or shares; `learned`: the
sigmoid of a convex combination of their logits, or that combination of their shares; the weights
are the softmax of a leaf."""

Score = Literal["sigmoid", "softmax"]
"""What an entry's logits say of it. `sigmoid` (released): the probability that it will be read, by
the highest logit of the tokens asked. `softmax`: its share of the attention to come, the mean of
these tokens' softmax over the entries that exist. Lightning indexers say logarithms of attention up
to a constant that is each token's own, so only a softmax compares what several tokens say."""

ENSEMBLE_LEAF = "ensemble.weight"

MAX_LOOKBACK = 512
"""More tokens than a question has. Every request keeps their hidden states on the device, and every
sample of training has them: without a bound a slip of the keyboard is out of memory."""

MAX_DILATION = 64
"""As many entries as a page of V4-Flash has."""

_SIZES = ("hidden_size", "n_heads", "q_lora_rank", "head_dim", "rope_head_dim")
_LAYER_LEAVES = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class IndexerConfig:
    """Shape and arithmetic of a memory indexer (LSA spec 2.1). Sizes are in elements.

    `target_layers` are CSA ordinals, ascending. Head dim, RoPE and YaRN are those of the backbone's
    index keys. A widened indexer has its own `norm_eps` (see `lsa_jax.lsa.widening`). Entries are
    scored by what the last `lookback` tokens ask for (released: 1, the last token alone), for a
    question says what it needs before its last token is read, and as `score` says.

    An entry's logit, less `falloff` times the square of the distance, counts for the entries up to
    `dilation` away too, where theirs are lower (released: 0). What is needed lies together: a fact
    is longer than an entry, a fire names the part of it that is asked for next, and an answer goes
    on through the rest. And CSA entries overlap: each is made of its own tokens and of those of the
    entry before (DeepSeek-V4 spec 4.3), which may be of another page.
    """

    target_layers: tuple[int, ...]
    hidden_size: int
    n_heads: int = 128
    q_lora_rank: int = 2048
    head_dim: int = 128
    rope_head_dim: int = 64
    rope_theta: float = 160000.0
    yarn: YarnConfig | None = dataclasses.field(default_factory=YarnConfig)
    norm_eps: float = 1e-6
    ensemble: Ensemble = "max"
    query_mode: QueryMode = "float32"
    lookback: int = 1
    score: Score = "sigmoid"
    dilation: int = 0
    falloff: float = 0.0

    def __post_init__(self) -> None:
        for name in (*_SIZES, "lookback"):
            if number(f"indexer.{name}", getattr(self, name), int) < 1:
                raise refusal(f"indexer.{name}", getattr(self, name), ">= 1")
        check_lookback(self.lookback)
        check_dilation(self.dilation, self.falloff)
        for name in ("rope_theta", "norm_eps"):
            if number(f"indexer.{name}", getattr(self, name), float) <= 0:
                raise refusal(f"indexer.{name}", getattr(self, name), "> 0")
        self._check_layers()
        if self.head_dim & (self.head_dim - 1):  # the Hadamard rotation needs it
            raise refusal("indexer.head_dim", self.head_dim, "a power of two")
        if self.rope_head_dim % 2 or self.rope_head_dim > self.head_dim:
            wanted = f"even and <= head_dim={self.head_dim}"
            raise refusal("indexer.rope_head_dim", self.rope_head_dim, wanted)
        choices = (("ensemble", Ensemble), ("query_mode", QueryMode), ("score", Score))
        for name, known in choices:
            if getattr(self, name) not in get_args(known):
                wanted = f"one of {', '.join(get_args(known))}"
                raise refusal(f"indexer.{name}", getattr(self, name), wanted)

    def _check_layers(self) -> None:
        layers = self.target_layers
        valid = isinstance(layers, tuple) and len(layers) > 0
        valid = valid and all(type(i) is int and i >= 0 for i in layers)
        if not valid or list(layers) != sorted(set(layers)):
            raise refusal("indexer.target_layers", layers, "ascending CSA ordinals, at least one")

    @classmethod
    def for_model(
        cls, model: ModelConfig, *, target_layers: tuple[int, ...], **options: Any
    ) -> Self:
        """An indexer for the index keys of `model`; `options` are further fields of this class.

        Raises ConfigError as `check_model` does.
        """
        fields = {"norm_eps": model.rms_norm_eps, **_of_model(model), **options}
        config = cls(target_layers=target_layers, **fields)
        config.check_model(model)
        return config

    def check_model(self, model: ModelConfig) -> None:
        """Raises ConfigError where this indexer cannot score the index keys of `model`."""
        for name, wanted in _of_model(model).items():
            if getattr(self, name) != wanted:
                raise refusal(f"indexer.{name}", getattr(self, name), f"the model's {wanted!r}")
        self.transformer_layers(model)

    def transformer_layers(self, model: ModelConfig) -> tuple[int, ...]:
        """Transformer layer of each target layer. Raises ConfigError for ordinals out of range."""
        layers = csa_layers(model)
        for ordinal in self.target_layers:
            if ordinal >= len(layers):
                wanted = f"CSA ordinals in 0..{len(layers) - 1}, as the model has"
                hint = ""
                if ordinal in layers:
                    hint = f" (transformer layer {ordinal} is ordinal {layers.index(ordinal)})"
                raise ConfigError(
                    f"indexer.target_layers must be {wanted} {len(layers)} CSA layers,"
                    f" got {ordinal}{hint}"
                )
        return tuple(layers[ordinal] for ordinal in self.target_layers)


def check_lookback(tokens: int) -> None:
    """Raises ConfigError where a fire would ask more than `MAX_LOOKBACK` tokens."""
    if tokens > MAX_LOOKBACK:
        raise refusal("indexer.lookback", tokens, f"<= {MAX_LOOKBACK}")


def check_dilation(entries: object, falloff: object) -> None:
    """Raises ConfigError where a logit would count for no number of entries, or too many, or for
    its neighbours more than for its own."""
    if not 0 <= number("indexer.dilation", entries, int) <= MAX_DILATION:
        raise refusal("indexer.dilation", entries, f"in 0..{MAX_DILATION}")
    if not 0 <= number("indexer.falloff", falloff, float) < math.inf:
        raise refusal("indexer.falloff", falloff, "a finite number >= 0")


def _of_model(model: ModelConfig) -> dict[str, Any]:
    """The fields that the backbone decides."""
    return {
        "hidden_size": model.hidden_size,
        "head_dim": model.index_head_dim,
        "rope_head_dim": model.qk_rope_head_dim,
        "rope_theta": model.compress_rope_theta,
        "yarn": model.yarn,
    }


def leaf_name(ordinal: int, name: str) -> str:
    """Released name of one target layer's leaf: "retrievers.l10.wq_a.weight"."""
    return f"retrievers.l{ordinal}.{name}"


def layer_leaf_shapes(cfg: IndexerConfig) -> dict[str, tuple[int, ...]]:
    """Leaves of one target layer, matrices [out, in], by their names within the layer."""
    rank, heads = cfg.q_lora_rank, cfg.n_heads
    shapes = ((rank, cfg.hidden_size), (rank,), (heads * cfg.head_dim, rank))
    return dict(zip(_LAYER_LEAVES, (*shapes, (heads, cfg.hidden_size)), strict=True))


def leaf_shapes(cfg: IndexerConfig) -> dict[str, tuple[int, ...]]:
    """Every leaf of the indexer by its released name, in order; then the ensemble's, if learned."""
    layer = layer_leaf_shapes(cfg)
    shapes = {leaf_name(i, name): layer[name] for i in cfg.target_layers for name in layer}
    if cfg.ensemble == "learned":
        shapes[ENSEMBLE_LEAF] = (len(cfg.target_layers),)
    return shapes


def to_json(cfg: IndexerConfig) -> dict[str, Any]:
    """A JSON object that `from_json` reads back to an equal configuration."""
    return {**dataclasses.asdict(cfg), "target_layers": list(cfg.target_layers)}


def from_json(raw: Mapping[str, Any]) -> IndexerConfig:
    """The configuration that `to_json` wrote, perhaps before there were lookbacks, scores,
    dilations and their falloff. Raises ConfigError."""
    fields = [field.name for field in dataclasses.fields(IndexerConfig)]
    if raw.keys() | {"lookback", "score", "dilation", "falloff"} != set(fields):
        raise refusal("indexer", sorted(raw), f"a table of {', '.join(fields)}")
    layers = raw["target_layers"]
    if not isinstance(layers, list):
        raise refusal("indexer.target_layers", layers, "a list")
    yarn = raw["yarn"]
    return IndexerConfig(**{**raw, "target_layers": tuple(layers), "yarn": yarn and _yarn(yarn)})


def _yarn(raw: object) -> YarnConfig:
    values = table("indexer.yarn", raw)
    kinds = {field.name: field.type for field in dataclasses.fields(YarnConfig)}
    if values.keys() != kinds.keys():
        raise refusal("indexer.yarn", sorted(values), f"a table of {', '.join(kinds)}")
    checked: dict[str, Any] = numbers("indexer.yarn.", values, kinds)
    return YarnConfig(**checked)
