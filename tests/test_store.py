import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import store_cases as cases

from lsa_jax.checkpoint import layout, manifest
from lsa_jax.checkpoint.leaf import CheckpointError, LeafInfo
from lsa_jax.checkpoint.leaf_writer import write_leaf
from lsa_jax.checkpoint.store import load_checkpoint, open_store
from lsa_jax.checkpoint.writer import partial_path, write_checkpoint

ARRAYS = cases.arrays()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    dst = tmp_path_factory.mktemp("store") / "dst"
    cases.write(dst, ARRAYS)
    return dst


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def named(file: str) -> str:
    """How an error about a file of the checkpoint must name it."""
    parts = file.split("/")
    return f"leaf {parts[1]} (file {file})" if len(parts) > 2 else file


def test_a_round_trip_keeps_every_bit_of_every_dtype(finished):
    config, loaded = load_checkpoint(finished)
    assert config == cases.CONFIG
    cases.assert_same_bits(loaded, ARRAYS)
    assert {array.dtype.name for array in loaded.values()} == set(layout.DTYPES)
    assert all(len(array.devices()) == 1 for array in loaded.values())


def test_the_inventory_and_configuration_read_without_arrays(finished):
    info = open_store(finished)
    assert info.config == cases.CONFIG and info.leaves == cases.leaves(ARRAYS)


def test_only_wanted_leaves_are_restored(finished):
    _, loaded = load_checkpoint(finished, wanted=lambda path: "attn" in path)
    cases.assert_same_bits(loaded, {path: a for path, a in ARRAYS.items() if "attn" in path})
    with pytest.raises(CheckpointError, match="at least one leaf"):
        load_checkpoint(finished, wanted=lambda path: False)


def test_orbax_itself_restores_the_parameters(finished):
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.restore(finished / "params")
    cases.assert_same_bits(layout.flattened(tree), ARRAYS)


def test_orbax_standard_checkpointer_restores_the_parameters_onto_devices(finished):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    targets = {
        path: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for path, a in ARRAYS.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(finished / "params", layout.nested(targets))
    cases.assert_same_bits(layout.flattened(tree), ARRAYS)


def test_chunks_are_bounded_split_two_axes_and_hold_zeros_too(finished):
    files = manifest.files_below(finished)
    assert {
        f"params/layers.0.ffn.experts.w1.weight/c/{e}/{i}/0" for e in range(4) for i in (0, 1)
    } < files
    assert {f"params/embed.weight/c/{i}/0" for i in range(4)} < files
    assert "params/layers.0.zero/c/0/0" in files
    chunks = [file for file in files if "/c/" in file]
    assert max((finished / file).stat().st_size for file in chunks) <= cases.CHUNK_BYTES


def test_a_flipped_bit_in_any_file_is_refused_and_named(copy):
    rng = np.random.default_rng(3)
    files = sorted(manifest.files_below(copy))
    assert {file.split("/")[-1] for file in files} > {"MANIFEST.json", "config.json", "zarr.json"}
    for file in files:
        intact = (copy / file).read_bytes()
        damaged = bytearray(intact)
        damaged[rng.integers(len(damaged))] ^= 1 << rng.integers(8)
        (copy / file).write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(copy)
        assert named(file) in str(error.value) and "\n" not in str(error.value), file
        (copy / file).write_bytes(intact)
    load_checkpoint(copy)


def test_any_flipped_bit_of_the_manifest_is_refused(copy):
    file = copy / manifest.NAME
    intact = file.read_bytes()
    rng = np.random.default_rng(5)
    for bit in rng.choice(8 * len(intact), 400, replace=False):
        damaged = bytearray(intact)
        damaged[bit // 8] ^= 1 << (bit % 8)
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json is damaged"):
            manifest.read(copy)


@pytest.mark.parametrize("damage", ["truncated", "deleted", "longer"])
def test_truncated_deleted_and_longer_files_are_refused_and_named(copy, damage):
    for file in sorted(manifest.files_below(copy)):
        intact = (copy / file).read_bytes()
        if damage == "deleted":
            (copy / file).unlink()
        else:
            (copy / file).write_bytes(intact[:-1] if damage == "truncated" else intact + b"\0")
        with pytest.raises(CheckpointError) as error:
            load_checkpoint(copy)
        assert named(file) in str(error.value)
        (copy / file).write_bytes(intact)


@pytest.mark.parametrize("file", ["stray", "params/stray", "params/embed.weight/c/9/0"])
def test_an_extra_file_is_refused_and_named(copy, file):
    (copy / file).parent.mkdir(exist_ok=True)
    (copy / file).write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"file {file} does not belong"):
        load_checkpoint(copy)


def test_every_fault_is_listed(copy):
    (copy / "params/embed.weight/c/0/0").unlink()
    (copy / "stray").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:
        load_checkpoint(copy)
    assert "embed.weight" in str(error.value) and "stray" in str(error.value)


def test_a_missing_directory_and_an_unfinished_one_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(
        CheckpointError, match=r"not a finished checkpoint: it has no MANIFEST\.json"
    ):
        load_checkpoint(tmp_path)


EIGHT_DEVICES = """
import sys
from pathlib import Path
import jax
import store_cases as cases
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.checkpoint.leaf_writer import write_leaf
from lsa_jax.checkpoint.store import load_checkpoint

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
mesh = jax.make_mesh((2, 4), ("a", "b"))
P = jax.sharding.PartitionSpec
specs = {
    "layers.0.attn.wq.weight": (P("b", "a"), (4, 4)),
    "layers.0.ffn.experts.w1.weight": (P("b", "a"), (1, 8, 8)),
    "layers.0.ffn.gate.tid2eid": (P(("a", "b")), (1, 2)),
}
place = lambda path, leaf: jax.sharding.NamedSharding(mesh, specs.get(path, (P(),))[0])
_, loaded = load_checkpoint(Path(sys.argv[1]), shardings=place)
cases.assert_same_bits(loaded, cases.arrays())
for path, (spec, shape) in specs.items():
    assert {shard.data.shape for shard in loaded[path].addressable_shards} == {shape}, path
    assert len(loaded[path].sharding.device_set) == 8
try:
    load_checkpoint(Path(sys.argv[1]), shardings=lambda p, leaf: jax.NamedSharding(mesh, P("b")))
except CheckpointError as error:
    assert "leaf embed.weight: shape (21, 8) does not fit" in str(error), error
else:
    raise AssertionError("21 rows over 4 devices must be refused")
"""


def test_a_checkpoint_restores_sharded_onto_eight_devices(finished):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", EIGHT_DEVICES, str(finished)],
        cwd=Path(__file__).parent,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[1]}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_an_existing_destination_is_refused_and_kept(tmp_path):
    (tmp_path / "dst").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        cases.write(tmp_path / "dst", ARRAYS)
    assert not partial_path(tmp_path / "dst").exists()


def test_somebody_elses_partial_directory_is_refused_and_kept(tmp_path):
    other = tmp_path / "dst.partial"
    other.mkdir()
    (other / "thesis.txt").write_text("four years")
    with pytest.raises(CheckpointError, match="no unfinished checkpoint"):
        cases.write(tmp_path / "dst", ARRAYS)
    assert cases.content(other) == {"thesis.txt": b"four years"}


def test_a_source_that_gives_wrong_rows_is_refused_with_the_leaf(tmp_path):
    for wrong in (lambda a: a[:-1], lambda a: a.astype(np.float32)):
        with pytest.raises(CheckpointError, match=r"embed\.weight: rows must be bfloat16 \(6, 8\)"):
            cases.write(tmp_path / "d", ARRAYS, read=lambda p, i, j, w=wrong: w(ARRAYS[p][i:j]))


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "message"),
    [
        ("a/b", (2,), np.uint8, "without slashes"),
        ("a..b", (2,), np.uint8, "non-empty components"),
        ("embed", (2,), np.uint8, "parent of another leaf"),
        ("a", (2,), np.int64, "dtype must be in"),
        ("a", (2, 0), np.uint8, "sizes >= 1"),
        ("a", (), np.uint8, "sizes >= 1"),
    ],
)
def test_leaves_that_cannot_be_stored_are_refused(tmp_path, path, shape, dtype, message):
    leaf = LeafInfo(path, shape, np.dtype(dtype))
    other = LeafInfo("embed.weight", (2,), np.dtype(np.uint8))
    both = {path: leaf, "embed.weight": other}
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "d", cases.CONFIG, both, cases.reader({}), {}, identity={})
    assert not partial_path(tmp_path / "d").exists()


@pytest.mark.parametrize("name", ["config.json", "MANIFEST.json", "params", "a/b", ".."])
def test_extra_files_with_names_of_our_own_are_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="must be plain and unused"):
        write_checkpoint(
            tmp_path / "d",
            cases.CONFIG,
            cases.leaves(ARRAYS),
            cases.reader(ARRAYS),
            {name: b""},
            identity={},
        )


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path):
    leaf = LeafInfo("a", (2**50,), np.dtype(np.uint8))
    with pytest.raises(CheckpointError, match="needs 1,125,899,906,842,624 more bytes of disk"):
        write_checkpoint(
            tmp_path / "d", cases.CONFIG, {"a": leaf}, cases.reader({}), {}, identity={}
        )


@pytest.mark.parametrize("limit", [10, 1000])  # zarr.json does not fit, a chunk does not
def test_a_write_that_fails_is_one_clear_error(tmp_path, limit):
    info = LeafInfo("a", (8000,), np.dtype(np.uint8))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # as good as a full disk
        with pytest.raises(CheckpointError, match=r"leaf a: cannot be written: .*File too large"):
            write_leaf(tmp_path / "a", info, lambda *_: np.ones(8000, np.uint8), print, 8000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
