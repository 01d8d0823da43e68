"""Configurations read and written: presets, both HF spellings, TOML, and the parameter census."""

import dataclasses
import json
import logging
import math
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from config_samples import CSA, HCA, changed, flash_0731, released_flash, transformers_tiny, without

from lsa_jax.config import ModelConfig, YarnConfig
from lsa_jax.config_io import load_config, preset_names, read_hf, read_toml, to_json, to_toml
from lsa_jax.parameters import Kind, parameter_table

ROOT = Path(__file__).parents[1]
PRESETS = ("bench", "mini_model", "tiny", "v4_flash", "v4_flash_slice", "v4_pro")


def test_the_presets_are_the_documented_ones() -> None:
    assert preset_names() == list(PRESETS)


def test_the_flash_preset_is_the_released_config() -> None:
    assert load_config("v4_flash") == read_hf(released_flash())


def test_the_pro_preset_is_the_released_config() -> None:
    pro = released_flash() | {
        "hidden_size": 7168,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "q_lora_rank": 1536,
        "o_groups": 16,
        "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
        "index_topk": 1024,
        "moe_intermediate_size": 3072,
        "n_routed_experts": 384,
        "routed_scaling_factor": 2.5,
    }
    cfg = load_config("v4_pro")
    assert cfg == read_hf(pro)
    assert Counter(cfg.layer_types) == {"csa": 30, "hca": 31}


def test_the_tiny_preset_is_what_transformers_saves() -> None:
    cfg = load_config("tiny")
    assert cfg == read_hf(transformers_tiny())
    assert cfg.layer_types == ("sliding", "sliding", "csa", "hca", "csa", "hca")
    assert (cfg.nope_head_dim, cfg.hca_ratio, cfg.kv_quant_group) == (64, 16, 64)


def test_the_bench_preset_has_every_layer_kind_in_16_layers() -> None:
    cfg = load_config("bench")
    assert cfg.layer_types == ("sliding", "sliding", *("csa", "hca") * 7)
    assert cfg.mlp_types == ("hash",) * 3 + ("score",) * 13
    assert (cfg.hidden_size, cfg.n_routed_experts, cfg.vocab_size) == (2048, 64, 32768)


def test_layer_types_of_flash_follow_the_released_schedule() -> None:
    cfg = load_config("v4_flash")
    want = ["sliding"] * 2 + ["csa" if i % 2 == 0 else "hca" for i in range(2, 43)]
    assert list(cfg.layer_types) == want
    assert Counter(cfg.layer_types) == {"sliding": 2, "csa": 21, "hca": 20}


def test_flash_has_the_parameters_of_the_released_model() -> None:
    table = parameter_table(load_config("v4_flash"))
    count = Counter()
    for path, spec in table.items():
        if spec.kind != "table":
            count["mtp" if path.startswith("mtp.") else "backbone"] += math.prod(spec.shape)
    assert count == {"backbone": 284_332_240_471, "mtp": 6_610_048_891}


def stored(kind: Kind, shape: tuple[int, ...]) -> tuple[int, int]:
    """Tensors and bytes of one parameter in the released checkpoint format (spec 9.1)."""
    n = math.prod(shape)
    if kind == "linear":  # a byte per weight, a scale per 128x128 block
        return 2, n + math.prod(-(-dim // 128) for dim in shape)
    if kind == "expert":  # half a byte per weight, a scale per 32; every expert on its own
        return 2 * shape[0], n // 2 + n // 32
    return 1, n * {"matrix": 2, "norm": 2, "f32": 4, "table": 8}[kind]


@pytest.mark.parametrize(
    ("preset", "tensors", "size"),
    [("v4_flash", 69_187, 159_609_485_896), ("v4_pro", 145_116, 864_704_792_696)],
)
def test_the_parameter_table_gives_the_census_of_a_released_checkpoint(
    preset: str, tensors: int, size: int
) -> None:
    parts = [
        stored(spec.kind, spec.shape) for spec in parameter_table(load_config(preset)).values()
    ]
    assert (sum(n for n, _ in parts), sum(b for _, b in parts)) == (tensors, size)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_config_survives_json_and_toml(preset: str) -> None:
    cfg = dataclasses.replace(load_config(preset), kv_quant_group=8, hc_eps=3e-7, eos_token_id=9)
    assert read_hf(json.loads(json.dumps(to_json(cfg)))) == cfg
    assert read_toml(tomllib.loads(to_toml(cfg))) == cfg


def test_a_config_without_yarn_or_mtp_survives_json_and_toml() -> None:
    cfg = dataclasses.replace(load_config("tiny"), yarn=None, num_nextn_predict_layers=0)
    assert read_hf(json.loads(json.dumps(to_json(cfg)))) == cfg
    assert read_toml(tomllib.loads(to_toml(cfg))) == cfg


def test_every_field_of_a_config_is_written_and_read() -> None:
    base = dataclasses.replace(load_config("tiny"), kv_quant_group=16)
    other: dict[str, Any] = {
        "yarn": dataclasses.replace(YarnConfig(), factor=3.0),
        "layer_types": base.layer_types[::-1],
        "mlp_types": base.mlp_types[::-1],
        "head_dim": 144,
        "num_experts_per_tok": 5,
        "kv_quant_group": 32,
        "num_nextn_predict_layers": 0,
        "bos_token_id": 5,
    }
    for field in dataclasses.fields(ModelConfig):
        value = getattr(base, field.name)
        new = other[field.name] if field.name in other else 2 * value
        assert new != value
        cfg = dataclasses.replace(base, **{field.name: new})
        assert read_hf(to_json(cfg)) == cfg
        assert read_toml(tomllib.loads(to_toml(cfg))) == cfg


@pytest.mark.parametrize(("head_dim", "group"), [(80, 64), (144, 64), (64, 16), (48, 32)])
def test_the_fp8_group_of_a_hf_config_divides_its_nope_dims(head_dim: int, group: int) -> None:
    raw = without(to_json(load_config("tiny")), "kv_quant_group") | {"head_dim": head_dim}
    assert read_hf(raw).kv_quant_group == group


def test_the_0731_release_loads_without_its_drafter_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(flash_0731()))
    with caplog.at_level(logging.INFO, logger="lsa_jax"):
        cfg = load_config(tmp_path)
    assert cfg == dataclasses.replace(load_config("v4_flash"), num_nextn_predict_layers=0)
    (message,) = caplog.messages
    assert "drafter" in message
    assert "\n" not in message


def test_other_configs_are_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(released_flash()))
    with caplog.at_level(logging.DEBUG):
        assert load_config(str(tmp_path / "config.json")) == load_config(tmp_path)
        load_config("tiny")
    assert caplog.messages == []


def test_ratios_of_the_backbone_alone_will_do() -> None:
    raw = changed(released_flash(), "compress_ratios", [0, 0, *[4, 128] * 20, 4])
    assert read_hf(raw) == load_config("v4_flash")


def test_both_spellings_of_a_schedule_may_stand_together() -> None:
    cfg = load_config("v4_flash")
    assert read_hf(released_flash() | to_json(cfg)) == cfg


def test_other_ratios_are_read_from_layer_types_and_compress_rates() -> None:
    raw = to_json(load_config("tiny")) | {"compress_rates": {CSA: 8, HCA: 32}}
    cfg = read_hf(raw)
    assert [cfg.ratio(t) for t in cfg.layer_types] == [0, 0, 8, 32, 8, 32]
    assert read_hf(raw | {"compress_ratios": [0, 0, 8, 32, 8, 32, 0]}) == cfg


def test_a_rotary_factor_stands_for_the_rotary_dims() -> None:
    raw = without(released_flash(), "qk_rope_head_dim") | {"partial_rotary_factor": 0.125}
    assert read_hf(raw) == load_config("v4_flash")


def test_absent_optional_keys_mean_what_they_mean_to_transformers() -> None:
    optional = ("hc_mult", "hc_eps", "swiglu_limit", "rope_theta", "bos_token_id", "expert_dtype")
    assert read_hf(without(released_flash(), *optional)) == load_config("v4_flash")


def test_null_rope_scaling_means_no_yarn() -> None:
    assert read_hf(changed(released_flash(), "rope_scaling", None)).yarn is None
    raw = changed(transformers_tiny(), "rope_parameters.compress", {"rope_type": "default"})
    assert read_hf(raw).yarn is None


def test_numbers_come_back_in_the_type_of_their_field() -> None:
    cfg = read_hf(released_flash())
    for field in dataclasses.fields(ModelConfig):
        if field.type in (int, float):
            assert type(getattr(cfg, field.name)) is field.type, field.name


def test_a_preset_name_means_the_preset_and_a_path_means_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    cfg = dataclasses.replace(load_config("tiny"), vocab_size=77)
    (tmp_path / "tiny" / "config.json").write_text(json.dumps(to_json(cfg)))
    monkeypatch.chdir(tmp_path)
    assert load_config("tiny").vocab_size == 131
    assert load_config(Path("tiny")) == load_config("./tiny") == cfg


def test_presets_are_found_from_an_installed_copy_and_no_backend_starts(tmp_path: Path) -> None:
    site = tmp_path / "site"
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "configs", site / "configs", ignore=skip)
    shutil.copytree(ROOT / "lsa_jax", site / "lsa_jax", ignore=skip)
    (tmp_path / "configs").mkdir()  # the user's own package of that name comes first on the path
    (tmp_path / "configs" / "__init__.py").write_text("")
    code = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(site)!r}]\n"
        "import configs\n"
        "from lsa_jax import config_io, parameters\n"
        f"assert config_io.__file__.startswith({str(site)!r}), config_io.__file__\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules\n"
        "for name in config_io.preset_names():\n"
        "    print(name, config_io.load_config(name).num_layers)"
    )
    run = [sys.executable, "-I", "-c", code]
    out = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [
        "bench 16",
        "mini_model 9",
        "tiny 6",
        "v4_flash 43",
        "v4_flash_slice 3",
        "v4_pro 61",
    ]
