"""Indexers load from every format there is, and what is wrong with a file is named."""

import dataclasses
import json
import os

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from lsa_jax import convert
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_name, leaf_shapes
from lsa_jax.lsa.indexer_file import IndexerFile, write_indexer
from lsa_jax.lsa.indexer_io import load_indexer, save_indexer
from lsa_jax.lsa.indexer_reader import read_indexer
from tests.golden.indexer_values import FOLDER, LAYERS, joint_values, layer_values
from tests.indexer_files import MODEL, V4, own_file, refused, same, write_archive


@pytest.mark.parametrize("name", ["joint.pt", "training.pt"])
def test_torch_files_of_all_layers_hold_what_torch_saved(name):
    file = read_indexer(FOLDER / name, MODEL)
    same(file.leaves, joint_values())
    cfg = file.config
    assert (cfg.target_layers, cfg.n_heads, cfg.q_lora_rank) == (LAYERS, 2, 4)
    assert (cfg.head_dim, cfg.hidden_size, cfg.ensemble) == (64, 16, "max")
    assert cfg.transformer_layers(MODEL) == (22, 26, 42)  # T1: l10 is CSA ordinal 10
    module = load_indexer(FOLDER / name, MODEL, query_mode="fp8", dtype=jnp.bfloat16)
    assert module.cfg.query_mode == "fp8"
    assert {leaf.dtype for leaf in module.leaves().values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("name", "layer", "dtype"),
    [
        ("single_views.pt", 12, np.float32),  # transposed, at an offset, every second row
        ("single_bfloat16.pt", 10, ml_dtypes.bfloat16),
        ("single_float16.pt", 10, np.float32),
    ],
)
def test_a_single_layer_takes_the_ordinal_it_is_given(name, layer, dtype):
    """T3: a file's name, or the transformer layer in it, says nothing."""
    file = read_indexer(FOLDER / name, MODEL, layer=layer)
    same(file.leaves, {leaf_name(layer, n): v for n, v in layer_values(layer).items()})
    assert {leaf.dtype for leaf in file.leaves.values()} == {np.dtype(dtype)}
    assert "layer (--layer)" in refused(FOLDER / name)
    assert "got 22 (transformer layer 22 is ordinal 10)" in refused(FOLDER / name, MODEL, layer=22)
    assert "CSA ordinal >= 0, got -1" in refused(FOLDER / name, layer=-1)


def test_a_layer_for_a_file_that_names_its_own_is_refused():
    assert "names its own layers" in refused(FOLDER / "joint.pt", layer=10)


def test_formats_that_are_not_read_say_so(tmp_path):
    assert "from before 1.6" in refused(FOLDER / "legacy.pt", layer=10)
    (tmp_path / "text").write_text("hello, world")
    assert "begins with b'hello" in refused(tmp_path / "text")
    (tmp_path / "empty").write_bytes(b"")
    assert "begins with b''" in refused(tmp_path / "empty")
    with pytest.raises(FileNotFoundError):
        read_indexer(tmp_path / "absent.pt")


def test_released_safetensors_load_with_sizes_inferred_and_tables_ignored(tmp_path):
    path = tmp_path / "flashmemory.safetensors"
    tables = {f"retrievers.l{i}.freqs_cis": np.zeros((4, 32), np.float32) for i in LAYERS}
    safetensors.numpy.save_file({**joint_values(), **tables}, path)
    file = read_indexer(path, MODEL)
    same(file.leaves, joint_values())
    assert file.config == read_indexer(FOLDER / "joint.pt", MODEL).config
    assert "the model's 4096, got 16" in refused(path, V4)


def test_eight_released_layers_keep_their_ordinals(tmp_path):
    """T2, T9: l6 is ordinal 6, transformer layer 14; never counted, shifted or halved."""
    layers = tuple(range(6, 21, 2))
    values = {leaf_name(i, n): v for i in layers for n, v in layer_values(i).items()}
    safetensors.numpy.save_file(values, tmp_path / "x.safetensors")
    file = read_indexer(tmp_path / "x.safetensors", MODEL)
    assert file.config.target_layers == layers
    assert file.config.transformer_layers(MODEL) == (14, 18, 22, 26, 30, 34, 38, 42)
    for i in layers:
        got = file.leaves[leaf_name(i, "wq_a.weight")]
        np.testing.assert_array_equal(got, layer_values(i)["wq_a.weight"])


def released_header() -> bytes:
    """The header of the released file: twelve float32 tensors at true shapes."""
    shapes = leaf_shapes(IndexerConfig.for_model(V4, target_layers=LAYERS))
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    assert at == 509_632_512  # spec 2.2: the file has 509,633,992 bytes
    text = json.dumps(header, separators=(",", ":")).encode().ljust(509_633_992 - at - 8)
    return len(text).to_bytes(8, "little") + text


def test_a_file_of_the_released_size_has_the_released_shapes(tmp_path):
    """Sparse, and cut short so that nothing is read: what is missing says that the rest fits."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(released_header())
    os.truncate(path, 509_633_992 - 4)
    assert "l20.weights_proj.weight: data ends at byte 509632512" in refused(path, V4)


@pytest.mark.slow  # reads half a gigabyte
def test_a_released_file_of_zeros_loads_at_true_shapes(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(released_header())
    os.truncate(path, 509_633_992)
    cfg = read_indexer(path, V4).config
    assert cfg == IndexerConfig.for_model(V4, target_layers=LAYERS)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_our_own_files_come_back_whole_and_open_elsewhere(tmp_path, dtype):
    path, module, calibration = own_file(tmp_path, dtype)
    assert os.listdir(tmp_path) == ["own.safetensors"]
    file = read_indexer(path, MODEL)
    assert (file.config, file.calibration) == (module.cfg, calibration)
    back = load_indexer(path, MODEL)
    assert back.cfg == module.cfg
    elsewhere = safetensors.numpy.load_file(path)
    assert elsewhere.keys() == leaf_shapes(module.cfg).keys()
    for name, leaf in module.leaves().items():
        assert back.leaves()[name].dtype == leaf.dtype
        np.testing.assert_array_equal(back.leaves()[name], leaf)
        np.testing.assert_array_equal(elsewhere[name], np.asarray(leaf))


def test_an_existing_file_is_never_overwritten(tmp_path):
    path, module, _ = own_file(tmp_path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="delete it"):
        save_indexer(path, module)
    assert path.read_bytes() == before


def test_a_write_that_fails_leaves_nothing(tmp_path):
    leaves = {n: np.zeros(s, np.float64) for n, s in leaf_shapes(read_golden().config).items()}
    with pytest.raises(CheckpointError, match="dtype must be float32 or bfloat16, got float64"):
        write_indexer(tmp_path / "x", dataclasses.replace(read_golden(), leaves=leaves))
    with pytest.raises(ValueError, match="JSON"):
        write_indexer(
            tmp_path / "x", dataclasses.replace(read_golden(), calibration={"t": float("nan")})
        )
    assert os.listdir(tmp_path) == []


def read_golden() -> IndexerFile:
    return read_indexer(FOLDER / "joint.pt")


def saved(tmp_path, **changes):
    """The joint indexer as safetensors with tensors replaced, or left out where None."""
    values = {**joint_values(), **{k.replace("__", "."): v for k, v in changes.items()}}
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({n: v for n, v in values.items() if v is not None}, path)
    return path


ZERO = np.zeros


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"l12__wq_a__weight": None}, "retrievers.l12.wq_a.weight: missing"),
        ({"l10__wq_a__weight": None}, "retrievers.l10.wq_a.weight must be a matrix, got none"),
        ({"l20__q_norm_weight": ZERO(5, "f4")}, r"l20.q_norm_weight: shape must be (4,), got (5,)"),
        ({"l12__wq_b__weight": ZERO((64, 4), "f4")}, "l12.wq_b.weight: shape must be (128, 4)"),
        ({"l10__wq_b__weight": ZERO((127, 4), "f4")}, "a multiple of 2 heads as rows, got 127"),
        ({"l10__wq_b__weight": ZERO((96, 4), "f4")}, "head_dim must be a power of two, got 48"),
        ({"l10__bias": ZERO(3, "f4")}, "retrievers.l10.bias: no leaf of this indexer"),
        ({"layer10__wq_a__weight": ZERO((4, 16), "f4")}, "retrievers.layer10.wq_a.weight: no leaf"),
        ({"l010__wq_a__weight": ZERO((4, 16), "f4")}, "retrievers.l010.wq_a.weight: no leaf"),
        ({"l12__q_norm_weight": np.full(4, np.nan, "f4")}, "l12.q_norm_weight: has elements"),
        ({"l12__q_norm_weight": ZERO(4, "i4")}, "q_norm_weight: dtype must be float32, bfloat16"),
        ({"l12__q_norm_weight": ZERO(4, "f8")}, "or float16, got float64"),
    ],
)
def test_an_inconsistent_indexer_is_refused_by_key(tmp_path, changes, message):
    path = saved(tmp_path, **{f"retrievers.{name}": value for name, value in changes.items()})
    assert message in refused(path)


def test_other_peoples_tensors_are_no_indexer(tmp_path):
    path = tmp_path / "layer_22.safetensors"  # a backbone's own indexer, by transformer layer (T3)
    names = ("wq_a.weight", "q_norm.weight", "indexer.wq_b.weight", "indexer.weights_proj.weight")
    safetensors.numpy.save_file({n: np.zeros((2, 2), np.float32) for n in names}, path)
    assert "holds no memory indexer" in refused(path, layer=10)
    safetensors.numpy.save_file({f"retriever.l10.{n}": np.zeros(2) for n in names}, path)
    assert "but retriever.l10." in refused(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: "{", "metadata lsa_jax.indexer is damaged"),
        (lambda m: "[]", "a table of keys and values"),
        (lambda m: json.dumps(m | {"schema": 2}), "must have schema 1"),
        (lambda m: json.dumps(m | {"calibration": 3}), "calibration must be a table"),
        (lambda m: json.dumps({"schema": 1}), "with config and calibration"),
        (lambda m: json.dumps(m | {"config": m["config"] | {"n_heads": 3}}), "weights_proj.weight"),
        (lambda m: json.dumps(m | {"config": m["config"] | {"heads": 3}}), "a table of target_lay"),
        (lambda m: json.dumps(m | {"config": m["config"] | {"n_heads": "2"}}), "an int of 64 bits"),
        (lambda m: json.dumps(m | {"config": m["config"] | {"yarn": {"factor": 2}}}), "yarn must"),
    ],
)
def test_damaged_metadata_is_refused(tmp_path, change, message):
    path, _, _ = own_file(tmp_path)
    tensors = safetensors.numpy.load_file(path)
    with safetensors.safe_open(path, "np") as f:
        metadata = f.metadata()
    metadata["lsa_jax.indexer"] = change(json.loads(metadata["lsa_jax.indexer"]))
    safetensors.numpy.save_file(tensors, path, metadata)
    assert message in refused(path)


def run(capsys, *arguments) -> tuple[int, str]:
    code = convert.main([str(argument) for argument in arguments])
    return code, capsys.readouterr().err


def test_the_command_converts_every_kind_of_file(tmp_path, capsys):
    released = saved(tmp_path)
    own = tmp_path / "own.safetensors"
    for i, src in enumerate((FOLDER / "joint.pt", FOLDER / "training.pt", released)):
        assert run(capsys, src, tmp_path / f"{i}.safetensors") == (0, "")
        same(read_indexer(tmp_path / f"{i}.safetensors").leaves, joint_values())
    assert run(capsys, FOLDER / "single_views.pt", own, "--layer", 12, "--weights", "bf16")[0] == 0
    file = read_indexer(own)
    assert file.config.target_layers == (12,)
    assert {leaf.dtype for leaf in file.leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    same(file.leaves, {leaf_name(12, n): v for n, v in layer_values(12).items()})


def test_the_command_refuses_in_one_line_and_writes_nothing(tmp_path, capsys):
    evil = write_archive(tmp_path / "evil.pt", b"cposix\nmkdir\n.")
    (tmp_path / "cut.pt").write_bytes((FOLDER / "joint.pt").read_bytes()[:9000])
    before = sorted(os.listdir(tmp_path))
    dst = tmp_path / "dst.safetensors"
    for arguments, message in (
        ((evil, dst), "names 'posix.mkdir', which is refused"),
        ((tmp_path / "cut.pt", dst), "cut short or damaged"),
        ((FOLDER / "single_views.pt", dst), "(--layer)"),
        ((FOLDER / "legacy.pt", dst), "from before 1.6"),
        ((FOLDER / "joint.pt", evil), "exists already"),
        ((FOLDER / "joint.pt", tmp_path / "none" / "dst"), "No such file"),
        ((tmp_path, dst, "--layer", 3), "layer is for a memory indexer's file"),
        ((tmp_path / "absent.pt", dst), "absent.pt"),
    ):
        code, err = run(capsys, *arguments)
        assert code == 2 and message in err, err
        assert err.startswith("error: ") and err.count("\n") == 1, err
    assert sorted(os.listdir(tmp_path)) == before
