"""Model shapes and command runs that the tests of the accounting share."""

import dataclasses
import json
from typing import Any

from lsa_jax import footprint
from lsa_jax.config import ModelConfig
from lsa_jax.config_io import load_config, preset_names
from lsa_jax.lsa.accounting import Offload, Placement

FLASH = load_config("v4_flash")


def varied() -> dict[str, ModelConfig]:
    """The presets, and four models that share no ratio, size or schedule with them."""
    tiny, bench = load_config("tiny"), load_config("bench")
    others = {
        "wide": dataclasses.replace(tiny, csa_ratio=8, hca_ratio=24, sliding_window=24),
        "groups": dataclasses.replace(tiny, kv_quant_group=16, index_head_dim=64, head_dim=144),
        "csa_only": dataclasses.replace(tiny, layer_types=("csa",) * 6),
        "late": dataclasses.replace(bench, layer_types=("hca",) * 9 + ("sliding", *("csa",) * 6)),
    }
    return {name: load_config(name) for name in preset_names()} | others


CONFIGS = varied()


def run(capsys, *args) -> dict[str, Any]:
    """What the command prints with `--json`."""
    assert footprint.main([*map(str, args), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def flash(capsys, context, *args) -> dict[str, Any]:
    return run(capsys, "--config", "v4_flash", "--context", context, *args)


def placed(tokens: int, **offload: Any) -> Placement:
    """One row of V4-Flash; with LSA where `offload` says anything."""
    at = Placement(lengths=(tokens,), targets=(10, 12, 20))
    return dataclasses.replace(at, offload=Offload(**offload)) if offload else at
