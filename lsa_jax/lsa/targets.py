"""Names of CSA layers: ordinals, as released indexers count, and layers of the transformer.

A *CSA ordinal* counts the CSA layers of a model from 0; released checkpoints call V4-Flash's 10, 12
and 20 what the transformer calls layers 22, 26 and 42 (LSA spec section 2.3). The map comes from
`layer_types`: HCA layers have ordinals of their own, in the same small integers.
"""

from collections.abc import Sequence

from lsa_jax.config import ConfigError, ModelConfig

# The layers for which released indexers exist, and the model they were trained on.
_FLASH_SCHEDULE = ("sliding", "sliding", *("csa", "hca") * 20, "csa")
_FLASH_TARGETS = (10, 12, 20)


def csa_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """Transformer layers that are CSA, by ordinal: entry `o` is the layer of CSA ordinal `o`."""
    return tuple(i for i, kind in enumerate(cfg.layer_types) if kind == "csa")


def hca_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """Transformer layers that are HCA, in order."""
    return tuple(i for i, kind in enumerate(cfg.layer_types) if kind == "hca")


def csa_ordinal(cfg: ModelConfig, layer: int) -> int:
    """The CSA ordinal of a transformer layer; ConfigError where it is not CSA."""
    layers = csa_layers(cfg)
    if layer not in layers:
        raise ConfigError(f"layer must be one of the CSA layers {list(layers)}, got {layer}")
    return layers.index(layer)


def check_targets(cfg: ModelConfig, targets: Sequence[int]) -> tuple[int, ...]:
    """The target layers themselves: CSA ordinals, ascending and distinct; else ConfigError."""
    count = len(csa_layers(cfg))
    if count == 0:
        raise ConfigError("layer_types must have CSA layers for attention lsa, got none")
    ascending = list(targets) == sorted(set(targets))
    if not targets or not ascending or not 0 <= targets[0] <= targets[-1] < count:
        wanted = f"distinct ascending CSA ordinals in 0..{count - 1}"
        raise ConfigError(f"target_layers must be {wanted}, got {list(targets)}")
    return tuple(targets)


def default_target_layers(cfg: ModelConfig) -> tuple[int, ...]:
    """CSA ordinals to score with where nothing names them.

    Those of the released indexers (10, 12, 20) for V4-Flash's layers. Else the first, the middle
    and the last of the upper half of the CSA layers, fewer where these coincide.
    """
    if cfg.layer_types == _FLASH_SCHEDULE:
        return _FLASH_TARGETS
    count = len(csa_layers(cfg))
    first, last = count // 2, count - 1
    return tuple(sorted({first, (first + last) // 2, last})) if count else ()
