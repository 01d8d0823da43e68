"""`lsa_jax.quantise`: the stored forms of a release, exact where these can say a value."""

import dataclasses
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from generate_runs import CONFIG

from lsa_jax import config_io, model_io, quantise, synthesize
from lsa_jax.checkpoint import formats, store
from lsa_jax.checkpoint.leaf import LeafInfo
from lsa_jax.checkpoint.writer import write_checkpoint
from lsa_jax.parameters import parameter_table

WITH_MTP = dataclasses.replace(CONFIG, num_nextn_predict_layers=1)
STORED = {
    "linear": np.dtype(ml_dtypes.float8_e4m3fn),
    "matrix": np.dtype(ml_dtypes.bfloat16),
    "norm": np.dtype(ml_dtypes.bfloat16),
    "f32": np.dtype(np.float32),
    "table": np.dtype(np.int32),
}


def write_source(root: Path, weights: str, experts: str) -> Path:
    """Values that the quantised form of `experts` can say; no size is a multiple of 128."""
    (root / "config.toml").write_text(config_io.to_toml(WITH_MTP))
    options = ["--config", str(root / "config.toml"), "--weights", weights, "--experts", experts]
    src = root / f"{weights}_{experts}"
    assert synthesize.main([*options, str(src)]) == 0
    return src


@pytest.mark.parametrize("weights", ["f32", "bf16"])
@pytest.mark.parametrize("experts", ["fp8", "fp4"])
def test_what_the_forms_can_say_is_kept_exactly(tmp_path, capsys, weights, experts):
    src, dst = write_source(tmp_path, weights, experts), tmp_path / "dst"
    assert quantise.main([str(src), str(dst), "--experts", experts]) == 0
    cfg, got = store.load_checkpoint(dst)
    _, want = store.load_checkpoint(src)
    assert cfg == WITH_MTP
    assert (dst / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
    size = sum(leaf.nbytes for leaf in got.values())
    assert f"{size:,} bytes of weights" in capsys.readouterr().out
    table, scales = parameter_table(WITH_MTP), 0
    for path, spec in table.items():
        leaf = np.asarray(got[path])
        if spec.kind in ("linear", "expert"):
            scales += 1
            scale = np.asarray(got[path.removesuffix("weight") + "scale"])
            fp4 = spec.kind == "expert" and experts == "fp4"
            assert leaf.dtype == (np.uint8 if fp4 else STORED["linear"])
            leaf = (formats.dequantize_fp4 if fp4 else formats.dequantize_fp8)(leaf, scale)
        else:
            assert leaf.dtype == STORED[spec.kind]
        np.testing.assert_array_equal(leaf.astype(np.float32), np.asarray(want[path], np.float32))
    assert got.keys() - table.keys() and len(got) == len(table) + scales


def test_the_drafter_is_left_out_where_asked(tmp_path):
    src, dst = write_source(tmp_path, "f32", "fp8"), tmp_path / "dst"
    assert quantise.main([str(src), str(dst), "--drop-mtp"]) == 0
    assert model_io.read_config(dst).num_nextn_predict_layers == 0
    paths = store.open_store(dst).leaves
    assert paths and not any(path.startswith("mtp.") for path in paths)
    assert any(path.startswith("mtp.") for path in store.open_store(src).leaves)


def one_line(capsys, *arguments: object) -> str:
    capsys.readouterr()
    assert quantise.main([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ")
    return err


def test_what_cannot_be_quantised_is_refused_in_one_line(tmp_path, capsys):
    src = write_source(tmp_path, "keep", "fp4")
    assert "is quantised already: leaf layers.0" in one_line(capsys, src, tmp_path / "a")
    (tmp_path / "b").mkdir()
    floats = write_source(tmp_path, "f32", "fp8")
    assert "exists already" in one_line(capsys, floats, tmp_path / "b")
    assert "no checkpoint directory" in one_line(capsys, tmp_path / "none", tmp_path / "a")
    assert "not a finished checkpoint" in one_line(capsys, tmp_path / "b", tmp_path / "a")
    (floats / "config.json").write_text("{}")
    assert "config.json is missing or damaged" in one_line(capsys, floats, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def write_arrays(dst: Path, arrays: dict[str, np.ndarray]) -> Path:
    infos = {path: LeafInfo(path, array.shape, array.dtype) for path, array in arrays.items()}
    read = lambda path, start, stop: arrays[path][start:stop]  # noqa: E731
    write_checkpoint(dst, CONFIG, infos, read, {}, identity={"source": "test", "weights": "f32"})
    return dst


@pytest.mark.parametrize("path", ["layers.1.attn.wq_a.weight", "norm.weight"])
def test_values_that_are_no_numbers_are_refused_with_their_leaf(tmp_path, capsys, path):
    arrays = {
        name: np.full(spec.shape, 1, np.int32 if spec.kind == "table" else np.float32)
        for name, spec in parameter_table(CONFIG).items()
    }
    arrays[path].flat[7] = np.nan
    src = write_arrays(tmp_path / "src", arrays)
    err = one_line(capsys, src, tmp_path / "dst")
    assert f"leaf {path}: its values must be finite" in err
    del arrays[path]
    err = one_line(capsys, write_arrays(tmp_path / "less", arrays), tmp_path / "dst2")
    assert f"leaf {path} is missing" in err
