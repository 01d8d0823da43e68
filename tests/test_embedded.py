"""The weights that come with the package: small enough, intact, and what runs without --ckpt."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infer import embedded, generate
from lsa_jax import model_io
from lsa_jax.checkpoint import manifest
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.lsa.indexer_reader import read_indexer

MOST_BYTES = 16_000_000
TEXT = (
    ". The sky is blue. The sun is yellow. Here we go. There and back again. The code of pasmi is "
    ": 4831. The grass is green. The sky is blue. The number of trega is : 7702. Here we go. There "
    "and back again. The grass is green. The sky is blue. The sun is yellow. Here we go."
)
ASKED = ["--system", TEXT, "--prompt", "What is the code of pasmi?", "--max-new-tokens", "12"]


def own() -> embedded.Weights:
    found = embedded.find()
    assert found is not None
    return found


def test_all_embedded_files_take_at_most_16_million_bytes() -> None:
    sizes = [path.stat().st_size for path in embedded.DIRECTORY.rglob("*") if path.is_file()]
    assert len(sizes) > 100 and sum(sizes) <= MOST_BYTES


def test_every_embedded_file_has_a_digest_that_holds() -> None:
    found = own()
    contents = manifest.read(found.checkpoint)
    manifest.verify(found.checkpoint, contents)
    sums = embedded.read_sums(embedded.DIRECTORY / embedded.SUMS)
    assert sums["indexer.safetensors"] == hashlib.sha256(found.indexer.read_bytes()).hexdigest()
    others = {path.name for path in embedded.DIRECTORY.iterdir()} - {"checkpoint", *sums}
    assert others == {"CARD.md", embedded.SUMS}


def test_the_indexer_is_the_checkpoints() -> None:
    found = own()
    model = model_io.read_config(found.checkpoint)
    assert read_indexer(found.indexer, model).config.hidden_size == model.hidden_size


def test_the_card_says_how_they_were_made() -> None:
    card = (embedded.DIRECTORY / "CARD.md").read_text("utf-8")
    for part in ("training", "indexer"):
        begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
        assert card.index(begin) < card.index(end)
    assert "python -m lsa_jax.quantise" in card and f"{MOST_BYTES:,}" in card


def copy_of(found: embedded.Weights, root: Path) -> Path:
    """The files that `find` reads."""
    (root / "checkpoint").mkdir(parents=True)
    shutil.copy(found.checkpoint / manifest.NAME, root / "checkpoint")
    for name in ("indexer.safetensors", embedded.SUMS):
        shutil.copy(found.indexer.with_name(name), root)
    return root


def test_embedded_weights_are_both_there_or_none(tmp_path) -> None:
    assert embedded.find(tmp_path) is None
    root = copy_of(own(), tmp_path / "weights")
    found = embedded.find(root)
    assert found is not None and found.checkpoint == root / "checkpoint"
    (root / "indexer.safetensors").unlink()
    assert embedded.find(root) is None


@pytest.mark.parametrize("name", ["indexer.safetensors", f"checkpoint/{manifest.NAME}"])
def test_a_flipped_bit_of_the_embedded_files_is_refused_and_named(tmp_path, name) -> None:
    root = copy_of(own(), tmp_path / "weights")
    content = bytearray((root / name).read_bytes())
    content[len(content) // 2] ^= 1
    (root / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is missing or damaged"):
        embedded.find(root)


def test_digests_of_other_files_or_none_are_refused(tmp_path) -> None:
    root = copy_of(own(), tmp_path / "weights")
    (root / embedded.SUMS).write_text("0  indexer.safetensors\n")
    with pytest.raises(CheckpointError, match=r"must list \['checkpoint/MANIFEST.json', 'indexer"):
        embedded.find(root)
    (root / embedded.SUMS).unlink()
    with pytest.raises(CheckpointError, match="SHA256SUMS is missing"):
        embedded.find(root)


@pytest.mark.parametrize("arguments", [["--prompt", "a"], ["--prompt", "a", "--dry-run"]])
def test_damage_is_one_line_of_the_command(tmp_path, capsys, monkeypatch, arguments) -> None:
    root = copy_of(own(), tmp_path / "weights")
    (root / embedded.SUMS).unlink()
    find = embedded.find
    monkeypatch.setattr(embedded, "find", lambda: find(root))
    with pytest.raises(SystemExit) as stop:
        generate.main(arguments)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("error: embedded")


def test_the_embedded_model_answers_without_ckpt(tmp_path, capsys) -> None:
    file = tmp_path / "reply.json"
    assert generate.main([*ASKED, "--prefill-chunk", "128", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "4831" in out and "the weights are the embedded model's" in err
    assert json.loads(file.read_text())["ids"]


def test_a_dry_run_without_ckpt_plans_the_embedded_model_and_its_indexer(capsys) -> None:
    lsa = ["--attention", "lsa", "--page-entries", "4", "--kv-budget", "1.0"]
    assert generate.main([*ASKED, *lsa, "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "lsa attention" in out and "the weights are the embedded model's" in err


def test_without_embedded_weights_a_checkpoint_must_be_named(capsys, monkeypatch) -> None:
    monkeypatch.setattr(embedded, "find", lambda: None)
    for arguments, wanted in (
        (["--prompt", "a"], "--ckpt DIR must be given: no weights are embedded"),
        (["--demo"], "--demo needs --ckpt DIR and --indexer FILE: no weights are embedded"),
    ):
        with pytest.raises(SystemExit) as stop:
            generate.main(arguments)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith(f"error: {wanted}")


@pytest.mark.slow
def test_the_demo_answers_at_8k_from_the_embedded_weights(tmp_path) -> None:
    file = tmp_path / "demo.json"
    command = [sys.executable, "-m", "infer.generate", "--demo", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    assert content["context"] == 8192 and content["full"]["total"] >= 8
    assert content["full"]["correct"] >= content["full"]["total"] - 1
    assert content["lsa"]["correct"] >= content["full"]["correct"] - 1
    assert content["lsa"]["kv_device_bytes"] <= 0.10 * content["full"]["kv_device_bytes"]
