"""Parameters and state over data, expert and tensor axes: eight CPU devices against one."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from lsa_jax import shardings
from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.config import ConfigError
from lsa_jax.config_io import load_config
from lsa_jax.parameters import parameter_table
from tests import small_model

ROOT = Path(__file__).parents[1]
WEIGHTS = ("f32", "keep")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Report and logits of `eight_devices.py` on eight fake devices: data 2, expert 2, tensor 2."""
    directory = tmp_path_factory.mktemp("eight")
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of XLA's: most of the time is its compilation
    command = [sys.executable, "-W", "error", str(ROOT / "tests/eight_devices.py"), str(directory)]
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    with np.load(directory / "logits.npz") as file:
        logits = dict(file)
    return json.loads((directory / "report.json").read_text()), logits


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_eight_devices_give_the_logits_of_one(results, weights, phase):
    """Dense and quantised leaves have the same values, so one run on one device serves both."""
    _, logits = results
    want, got = logits[f"one.{phase}"], logits[f"{weights}.{phase}"]
    assert np.abs(want).max() > 0.1
    assert np.abs(want[0] - want[1]).max() > 0.1  # the rows are different texts
    # Float32 sums in another order, split over devices.
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_program_compiles_once_for_all_lengths(results, weights):
    report = results[0][weights]
    assert report["programs"] == report["xla"] == 3  # prefill chunk, sample, decode
    assert report["programs_later"] == 3
    assert report["xla_later"] == []


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_state_array_stays_split_by_rows_over_data(results, weights):
    report, _ = results
    for whole, part in report[weights]["state"] + report["fp8_state"]:
        assert whole[0] == 4
        assert part == [2, *whole[1:]]


SPLIT = {
    "embed.weight": ([94, 64], [47, 64]),
    "head.weight": ([94, 64], [47, 64]),
    "layers.0.attn.sink_logit": ([4], [2]),
    "layers.0.attn.wq_a.weight": ([32, 64], [32, 64]),
    "layers.0.attn.wq_b.weight": ([256, 32], [128, 32]),
    "layers.0.attn.wkv.weight": ([64, 64], [64, 64]),
    "layers.0.attn.wo_a.weight": ([32, 128], [16, 128]),
    "layers.0.attn.wo_b.weight": ([64, 32], [64, 16]),
    "layers.1.attn.indexer.wq_b.weight": ([1024, 32], [512, 32]),
    "layers.1.attn.indexer.weights_proj.weight": ([32, 64], [16, 64]),
    "layers.1.ffn.shared_experts.w1.weight": ([64, 64], [32, 64]),
    "layers.1.ffn.shared_experts.w2.weight": ([64, 64], [64, 32]),
    "layers.1.ffn.gate.weight": ([8, 64], [8, 64]),
    "layers.1.ffn_norm.weight": ([64], [64]),
}
SPLIT_EXPERTS = {
    "f32": {
        "layers.1.ffn.experts.w1.weight": ([8, 64, 64], [4, 32, 64]),
        "layers.1.ffn.experts.w2.weight": ([8, 64, 64], [4, 64, 32]),
    },
    "keep": {
        "layers.1.ffn.experts.w1.weight": ([8, 64, 32], [4, 32, 32]),  # two codes a byte
        "layers.1.ffn.experts.w1.scale": ([8, 64, 2], [4, 32, 2]),
        "layers.1.ffn.experts.w2.weight": ([8, 64, 32], [4, 64, 16]),
        "layers.1.ffn.experts.w2.scale": ([8, 64, 2], [4, 64, 1]),
        "layers.0.attn.wq_b.scale": ([2, 1], [1, 1]),
        "layers.0.attn.wo_a.scale": ([1, 1], [1, 1]),  # a single tile: replicated
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_each_device_holds_its_half_or_quarter_of_a_weight(results, weights):
    leaves = results[0][weights]["leaves"]
    for path, (whole, part) in (SPLIT | SPLIT_EXPERTS[weights]).items():
        assert leaves[path] == [whole, part], path


@pytest.mark.slow
@pytest.mark.parametrize("weights", WEIGHTS)
def test_a_device_holds_less_than_half_of_all_weights(results, weights):
    leaves = results[0][weights]["leaves"].values()
    whole, part = (sum(math.prod(pair[i]) for pair in leaves) for i in (0, 1))
    assert part < whole / 2


@pytest.mark.slow
def test_a_checkpoint_restores_onto_another_mesh_bit_for_bit(results):
    report, _ = results
    assert report["same_bits"]
    path = "layers.1.ffn.experts.w1.weight"
    assert report["keep"]["leaves"][path] == [[8, 64, 32], [4, 32, 32]]
    assert report["elsewhere"][path] == [[8, 64, 32], [2, 32, 32]]  # expert 4, tensor 2


@pytest.mark.slow
def test_a_batch_or_mesh_that_does_not_fit_is_refused(results):
    report, _ = results
    assert report["batch_of_3"] == "batch must be a multiple of the data axis 2, got [3]"
    assert report["mesh_of_16"] == "mesh (2, 2, 4) needs 16 devices, 8 present"


def mesh(data, expert, tensor):
    return AbstractMesh((data, expert, tensor), shardings.MESH_AXES)


def test_a_weight_that_does_not_divide_is_refused_by_name():
    cfg = small_model.CONFIG
    with pytest.raises(
        ConfigError, match=r"embed\.weight of shape \(94, 64\) must divide .*tensor"
    ):
        shardings.leaf_sharding(cfg, mesh(1, 2, 4), "embed.weight", (94, 64))
    path = "layers.2.ffn.experts.w1.weight"
    with pytest.raises(ConfigError, match=rf"{path} of shape \(8, 64, 64\) must divide .*expert"):
        shardings.leaf_sharding(cfg, mesh(1, 3, 1), path, (8, 64, 64))


@pytest.mark.parametrize("name", ["v4_flash", "v4_pro"])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 8), (1, 16, 8), (1, 1, 1)])
def test_every_leaf_of_the_released_models_divides(name, shape):
    cfg = load_config(name)
    for path, leaf in SyntheticModel(cfg).leaves("keep").items():
        sharding = shardings.leaf_sharding(cfg, mesh(*shape), path, leaf.shape)
        part = math.prod(sharding.shard_shape(leaf.shape))
        if ".experts." in path:  # scales too: no device holds more than its part
            assert part == math.prod(leaf.shape) // (shape[1] * shape[2]), path
        else:
            assert part in (math.prod(leaf.shape), math.prod(leaf.shape) // shape[2]), path


def test_no_parameter_has_two_axes_on_one_mesh_axis():
    cfg = dataclasses.replace(load_config("tiny"), num_nextn_predict_layers=1)
    for spec in parameter_table(cfg).values():
        assert len(shardings.partition(spec.axes)) == len(spec.shape)
    assert shardings.partition(("experts", None, "mlp")) == PartitionSpec("expert", None, "tensor")
    with pytest.raises(ValueError, match=r"\('heads', 'mlp'\) collide on a mesh axis"):
        shardings.partition(("heads", "mlp"))


def test_a_mesh_axis_of_no_devices_is_refused():
    with pytest.raises(ConfigError, match=r"mesh \(0, 1, 1\)"):
        shardings.make_mesh(data=0)
