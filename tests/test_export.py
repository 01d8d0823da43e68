"""Whatever train.export writes is the same indexer, bit for bit, to us and to other readers."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from lsa_jax.cache import codec
from lsa_jax.lsa.indexer_config import leaf_shapes
from lsa_jax.lsa.indexer_file import IndexerFile, write_indexer
from lsa_jax.lsa.indexer_io import from_file
from lsa_jax.lsa.indexer_reader import read_indexer
from tests.indexer_cases import SMALL, inputs, random_weights
from tests.indexer_files import write_state
from train import export
from train.export import main, read_orbax, read_source
from train.run import checkpoints
from train.run.checkpoints import Checkpoints, Progress
from train.run.config import TrainConfig
from train.run.optimizer import OptimizerConfig, init_state


def indexer_file(dtype=np.float32, calibration=None) -> IndexerFile:
    leaves = {name: leaf.astype(dtype) for name, leaf in random_weights(SMALL).items()}
    return IndexerFile(SMALL, leaves, calibration)


def same(got: IndexerFile, want: IndexerFile) -> None:
    assert got.config == want.config and got.calibration == want.calibration
    assert list(got.leaves) == list(leaf_shapes(want.config))
    for name, leaf in want.leaves.items():
        np.testing.assert_array_equal(got.leaves[name], leaf, strict=True, err_msg=name)


def logits(indexer: IndexerFile) -> np.ndarray:
    hidden, keys = inputs(SMALL, 2, 30)
    planes = [codec.DensePlanes(jnp.asarray(k)) for k in keys]
    return np.asarray(from_file(indexer)(jnp.asarray(hidden), jnp.array([7, 70]), planes))


def run_directory(path, steps=(3, 5)):
    """A run with a checkpoint after each of `steps`, whose weights differ; the last is newest."""
    cfg = TrainConfig()
    checkpoints.begin(path, cfg)
    weights = {step: random_weights(SMALL, seed=step) for step in steps}
    with Checkpoints(path, keep=len(steps)) as store:
        for step, leaves in weights.items():
            state = init_state(OptimizerConfig(), {n: jnp.asarray(x) for n, x in leaves.items()})
            digest = checkpoints.config_digest(cfg)
            store.save(state, Progress(step=step, data={}, config_digest=digest), SMALL, wait=True)
    return path, weights


def test_a_run_is_exported_to_the_released_names_for_any_safetensors_reader(tmp_path, capsys):
    run, weights = run_directory(tmp_path / "run")
    dst = tmp_path / "out.safetensors"
    assert main([str(run), str(dst)]) == 0
    assert f"CSA layers 0, 2, 5, step 5 of {run}" in capsys.readouterr().out
    found = load_file(dst)
    names = ("wq_a.weight", "q_norm_weight", "wq_b.weight", "weights_proj.weight")
    assert set(found) == {f"retrievers.l{i}.{name}" for i in (0, 2, 5) for name in names}
    for name, leaf in weights[5].items():
        np.testing.assert_array_equal(found[name], leaf, strict=True)
    assert found["retrievers.l2.wq_b.weight"].shape == (SMALL.n_heads * SMALL.head_dim, 20)
    other = tmp_path / "step3.safetensors"
    assert main([str(run), str(other), "--step", "3"]) == 0
    name = "retrievers.l5.wq_a.weight"
    np.testing.assert_array_equal(load_file(other)[name], weights[3][name])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_from_file_to_orbax_and_back_nothing_changes(dtype, tmp_path):
    first, folder, last = (tmp_path / n for n in ("a.safetensors", "orbax", "b.safetensors"))
    write_indexer(first, indexer_file(dtype, {"threshold": [[65536, 0.5]], "note": "µ"}))
    assert main([str(first), str(folder)]) == 0
    assert main([str(folder), str(last)]) == 0
    assert last.read_bytes() == first.read_bytes()
    want = logits(read_indexer(first))
    assert np.sqrt(np.mean(want**2)) > 0.1
    for source in (folder, last):
        same(read_source(source).indexer, read_indexer(first))
        np.testing.assert_array_equal(logits(read_source(source).indexer), want)
    assert sorted(path.name for path in folder.iterdir()) == ["indexer.json", "params"]


def test_a_torch_file_of_one_layer_is_exported_under_the_number_it_is_given(tmp_path, capsys):
    leaves = random_weights(dataclasses.replace(SMALL, head_dim=64, rope_head_dim=64))
    prefix = "retrievers.l2."
    layer = {n.removeprefix(prefix): x for n, x in leaves.items() if n.startswith(prefix)}
    src = write_state(tmp_path / "layer.pt", layer)
    assert main([str(src), str(tmp_path / "x.safetensors")]) == 2
    assert "give its CSA ordinal" in capsys.readouterr().err
    assert main([str(src), str(tmp_path / "x.safetensors"), "--layer", "7"]) == 0
    found = load_file(tmp_path / "x.safetensors")
    np.testing.assert_array_equal(found["retrievers.l7.wq_a.weight"], layer["wq_a.weight"])


def test_what_exists_is_left_alone_and_what_failed_leaves_nothing(tmp_path, capsys, monkeypatch):
    src, folder = tmp_path / "a.safetensors", tmp_path / "orbax"
    write_indexer(src, indexer_file())
    before = src.read_bytes()
    for dst in (src, tmp_path):
        assert main([str(src), str(dst)]) == 2
        assert f"{dst} exists already" in capsys.readouterr().err
    assert src.read_bytes() == before
    (tmp_path / "orbax.partial" / "params").mkdir(parents=True)  # of an export that was killed
    monkeypatch.setattr(export.json, "dump", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main([str(src), str(folder)])
    assert sorted(tmp_path.iterdir()) == [src]
    monkeypatch.undo()
    assert main([str(src), str(folder)]) == 0
    same(read_orbax(folder), indexer_file())


def test_a_damaged_export_is_refused_by_what_is_damaged(tmp_path, capsys):
    folder, dst = tmp_path / "orbax", tmp_path / "b.safetensors"
    export.write(folder, indexer_file())
    manifest = folder / "indexer.json"
    good = json.loads(manifest.read_text())
    name = "retrievers.l2.q_norm_weight"

    def refusal(raw) -> str:
        manifest.write_text(raw if isinstance(raw, str) else json.dumps(raw))
        assert main([str(folder), str(dst)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(folder) in line and not dst.exists()
        return line

    flipped = good["sha256"] | {name: "0" * 64}
    assert f"{name}: not what indexer.json says" in refusal(good | {"sha256": flipped})
    assert "q_lora_rank must be an int" in refusal(
        good | {"config": good["config"] | {"q_lora_rank": "9"}}
    )
    assert "is damaged" in refusal(good | {"config": {}})
    assert "must have schema 1" in refusal(good | {"schema": 2})
    assert "must have schema 1" in refusal({})
    assert "is damaged" in refusal("{")
    assert "is damaged" in refusal("[]")
    manifest.write_text(json.dumps(good))
    shutil.rmtree(folder / "params")
    assert "params cannot be read" in refusal(good)


def test_options_that_do_not_apply_and_sources_that_are_none_are_refused(tmp_path, capsys):
    src, dst = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    write_indexer(src, indexer_file())
    run, _ = run_directory(tmp_path / "run", steps=(1,))
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([src, dst, "--step", "1"], "--step must be left out"),
        ([run, dst, "--layer", "1"], "--layer must be left out"),
        ([run, dst, "--step", "2"], "has no checkpoint of step 2"),
        ([empty, dst], "must have checkpoints/, as a run, or indexer.json"),
        ([tmp_path / "none", dst], "No such file"),
        ([src, tmp_path / "no" / "out.safetensors"], "No such file"),
    ):
        assert main([str(a) for a in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
        assert not dst.exists()
