"""Writing a checkpoint that was interrupted goes on where it stopped, or says why it cannot."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import store_cases as cases

from lsa_jax.checkpoint import journal, layout
from lsa_jax.checkpoint.leaf import CheckpointError, LeafInfo
from lsa_jax.checkpoint.leaf_writer import write_leaf
from lsa_jax.checkpoint.store import load_checkpoint
from lsa_jax.checkpoint.writer import partial_path

ARRAYS = cases.arrays()
TOTAL = sum(array.nbytes for array in ARRAYS.values())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    dst = tmp_path_factory.mktemp("store") / "dst"
    cases.write(dst, ARRAYS)
    return dst


class Killed(BaseException):
    """Stands in for SIGKILL: nothing in the package may catch it."""


def killed_after(reads: int):
    """A source that dies at its n-th read, counting from 0."""
    left = [reads]

    def read(path, start, stop):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        return ARRAYS[path][start:stop]

    return read


def all_reads() -> int:
    chunks = (
        (a, layout.chunk_shape(leaf, cases.CHUNK_BYTES))
        for a, leaf in zip(ARRAYS.values(), cases.leaves(ARRAYS).values(), strict=True)
    )
    return sum(-(-len(a) // chunk[0]) for a, chunk in chunks)


def test_a_run_killed_at_any_read_is_finished_by_the_next_to_the_same_bytes(finished, tmp_path):
    assert all_reads() > 10
    for reads in range(all_reads()):
        dst = tmp_path / str(reads)
        with pytest.raises(Killed):
            cases.write(dst, ARRAYS, read=killed_after(reads))
        assert not dst.exists()
        with pytest.raises(CheckpointError, match="not a finished checkpoint"):
            load_checkpoint(partial_path(dst))
        cases.write(dst, ARRAYS)
        assert cases.content(dst) == cases.content(finished)
        assert not partial_path(dst).exists()


def test_finished_leaves_are_not_read_again_unless_they_were_damaged(tmp_path):
    dst = tmp_path / "dst"
    with pytest.raises(Killed):
        cases.write(dst, ARRAYS, read=killed_after(all_reads() - 1))
    chunk = partial_path(dst) / "params/layers.0.attn.wq.weight/c/0/0"
    chunk.write_bytes(chunk.read_bytes()[::-1])
    read, done = [], []

    def note(path, start, stop):
        read.append(path)
        return ARRAYS[path][start:stop]

    cases.write(dst, ARRAYS, read=note, progress=done.append)
    assert set(read) == {"layers.0.attn.wq.weight", "layers.0.zero"}
    assert sum(done) == TOTAL
    cases.assert_same_bits(load_checkpoint(dst)[1], ARRAYS)


def test_a_torn_journal_line_counts_as_not_written(finished, tmp_path):
    whole = tmp_path / "whole"
    with pytest.raises(Killed):
        cases.write(whole, ARRAYS, read=killed_after(all_reads() - 1))
    size = (partial_path(whole) / journal.NAME).stat().st_size
    for cut in np.linspace(0, size - 1, 12).astype(int):
        dst = tmp_path / str(cut)
        shutil.copytree(partial_path(whole), partial_path(dst))
        with (partial_path(dst) / journal.NAME).open("r+b") as file:
            file.truncate(cut)
        cases.write(dst, ARRAYS)
        assert cases.content(dst) == cases.content(finished)


def test_a_run_killed_before_its_rename_only_needs_the_rename(finished, tmp_path, monkeypatch):
    dst = tmp_path / "dst"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(Killed()))
        with pytest.raises(Killed):
            cases.write(dst, ARRAYS)
    assert not dst.exists()
    with pytest.raises(CheckpointError, match="weights = 'keep', now it is 'f32'"):
        cases.write(dst, ARRAYS, identity={**cases.IDENTITY, "weights": "f32"})
    cases.write(dst, ARRAYS, read=killed_after(0))
    assert cases.content(dst) == cases.content(finished)


def test_no_write_goes_on_after_an_error(tmp_path):
    rows = np.arange(1 << 22, dtype=np.float32).reshape(4, -1)  # blocks that take a while to write

    def read(_path: str, start: int, stop: int) -> np.ndarray:
        if start:
            raise Killed
        return rows[start:stop]

    with pytest.raises(Killed):
        info = LeafInfo("big", rows.shape, rows.dtype)
        write_leaf(tmp_path / "big", info, read, lambda _: None, rows[0].nbytes)
    assert (tmp_path / "big/c/0/0").read_bytes() == rows[0].tobytes()


@pytest.mark.parametrize("key", ["source", "weights"])
def test_unfinished_work_of_another_source_or_option_is_refused(tmp_path, key):
    dst = tmp_path / "dst"
    with pytest.raises(Killed):
        cases.write(dst, ARRAYS, read=killed_after(5))
    before = cases.content(partial_path(dst))
    with pytest.raises(CheckpointError, match=f"begun with {key} = .*delete that directory"):
        cases.write(dst, ARRAYS, identity={**cases.IDENTITY, key: "other"})
    more = {**ARRAYS, "norm": np.zeros(3, np.float32)}
    with pytest.raises(CheckpointError, match="begun with leaves = "):
        cases.write(dst, more)
    with pytest.raises(CheckpointError, match=f"begun with {key} = "):  # the cause, not leaves
        cases.write(dst, more, identity={**cases.IDENTITY, key: "other"})
    assert cases.content(partial_path(dst)) == before


def test_two_writers_of_one_checkpoint_are_refused(tmp_path):
    dst = tmp_path / "dst"

    def read(path, start, stop):
        with pytest.raises(CheckpointError, match="another process is writing"):
            cases.write(dst, ARRAYS)
        return ARRAYS[path][start:stop]

    cases.write(dst, ARRAYS, read=read)
