"""`--dry-run`: the bytes of the arrays that a run allocates, on this machine and on others."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from generate_runs import call, write_checkpoint

from infer import dry_run, embedded, generate
from infer.options import parse
from lsa_jax import widen
from lsa_jax.checkpoint import layout, store
from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.config import CacheConfig
from lsa_jax.config_io import load_config
from lsa_jax.planning.hardware import DEVICES, parse_topology
from lsa_jax.planning.plan import make_plan
from tests.plan_cases import case

PROMPT = ("--prompt-ids", " ".join(map(str, range(3, 120))), "--max-new-tokens", "9")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("dry"))


@pytest.fixture(scope="module")
def indexer(ckpt) -> Path:
    path = ckpt.parent / "indexer.safetensors"
    assert widen.main([str(ckpt), str(path)]) == 0
    return path


def found(capsys, ckpt, tmp_path, *arguments):
    file = tmp_path / "dry.json"
    code, out, err = call(capsys, ckpt, *PROMPT, *arguments, "--json", file, "--dry-run")
    assert code == 0, err
    return json.loads(file.read_text()), out


def ran(capsys, ckpt, tmp_path, *arguments):
    file = tmp_path / "ran.json"
    code, _, err = call(capsys, ckpt, *PROMPT, *arguments, "--json", file)
    assert code == 0, err
    return json.loads(file.read_text())


def test_full_attention_takes_the_bytes_that_a_run_allocates(capsys, ckpt, tmp_path):
    plan, text = found(capsys, ckpt, tmp_path)
    run, memory = ran(capsys, ckpt, tmp_path), plan["memory"]
    assert memory["experts"] + memory["weights"] == run["model_bytes"]
    assert plan["capacity"] == run["kv_capacity_tokens"]
    kv = run["kv_bytes"]
    assert memory["csa"] == kv["csa_entries"] and memory["hca"] == kv["hca_entries"]
    assert memory["keys"] == kv["index_keys"]
    assert memory["recurrent"] == kv["window"] + kv["tails"]
    assert memory["pool"] == memory["indexer"] == memory["host"] == 0
    assert "117 prompt tokens and up to 9 new ones" in text and ": fits\n" in text


def test_lsa_takes_the_bytes_that_a_run_allocates(capsys, ckpt, indexer, tmp_path):
    options = ("--attention", "lsa", "--indexer", indexer, "--page-entries", "2")
    options += ("--kv-budget", "0.7", "--lookahead", "4")
    plan, text = found(capsys, ckpt, tmp_path, *options)
    kv, memory = ran(capsys, ckpt, tmp_path, *options)["kv_bytes"], plan["memory"]
    assert memory["pool"] == kv["csa_entries"] + kv["other_keys"] > 0
    assert memory["hca"] == kv["hca_entries"]
    assert memory["csa"] + memory["keys"] == kv["fresh"] + kv["target_keys"]
    assert memory["recurrent"] == kv["window"] + kv["tails"]
    assert memory["indexer"] > 0 and memory["host"] > 0
    assert plan["needed"] == memory["resident"] + memory["host"]  # a CPU's memory is the host's
    half = found(capsys, ckpt, tmp_path, *options, "--indexer-dtype", "bfloat16")[0]
    assert 2 * half["memory"]["indexer"] == memory["indexer"]
    assert f"pool of {plan['pool_pages']} pages" in text


def test_no_weight_is_read(capsys, ckpt, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(ckpt, bare, ignore=shutil.ignore_patterns(layout.PARAMS))
    assert call(capsys, bare, *PROMPT)[0] == 2
    plan, _ = found(capsys, bare, tmp_path)
    assert plan["fits"] and plan["step"] is None


def test_what_this_machine_cannot_hold_exits_with_2_and_says_the_bytes(
    capsys, ckpt, tmp_path, monkeypatch
):
    needed = found(capsys, ckpt, tmp_path)[0]["needed"]
    for memory, code in ((needed, 0), (needed - 1, 2)):
        monkeypatch.setattr(dry_run, "_ram", lambda memory=memory: memory)
        got, out, err = call(capsys, ckpt, *PROMPT, "--dry-run")
        assert got == code and "resident" in out
    assert err.startswith("error: cpu cannot hold") and err.count("\n") == 1
    assert f"needs {needed:,} bytes" in err and f"got {needed - 1:,} available" in err


def test_another_topology_has_its_memory_its_arithmetic_and_its_mesh(capsys, ckpt, tmp_path):
    here, _ = found(capsys, ckpt, tmp_path)
    file = tmp_path / "there.json"
    assert call(capsys, ckpt, *PROMPT, "--json", file, "--dry-run", "h100:2")[0] == 0
    there = json.loads(file.read_text())
    assert there["available"] == DEVICES["h100"].memory
    assert there["kv_format"] == "bfloat16" and here["kv_format"] == "float32"
    assert 2 * there["memory"]["csa"] == here["memory"]["csa"]
    assert there["mesh"] == {"data": 1, "expert": 1, "tensor": 2}
    assert there["memory"]["weights"] < here["memory"]["weights"]
    step = there["step"]
    assert step["memory_seconds"] == sum(step["nbytes"].values()) / DEVICES["h100"].bandwidth
    assert step["nbytes"]["weights"] < there["memory"]["weights"]  # of the embedding, a row


def test_what_would_fit_is_said_in_options_of_this_command(capsys, ckpt, monkeypatch):
    code, _, _ = call(capsys, ckpt, *PROMPT, "--mesh", "1,1,2", "--dry-run", "v5e:2x2")
    assert code == 0
    small = dataclasses.replace(DEVICES["v5e"], memory=100_000)
    monkeypatch.setitem(DEVICES, "v5e", small)
    code, out, err = call(capsys, ckpt, *PROMPT, "--dry-run", "v5e:1x1")
    assert code == 2 and "does not fit" in out
    assert err.count("\n") == 1 and "got 100,000 available" in err
    assert "--topology" not in err and "--context" not in err


def test_a_checkpoint_of_flash_takes_what_a_plan_for_its_configuration_takes(monkeypatch):
    cfg = load_config("v4_flash")
    leaves = SyntheticModel(cfg).leaves("keep")
    monkeypatch.setattr(store, "open_store", lambda path: store.StoreInfo(cfg, leaves))
    given = [
        "--ckpt",
        "flash",
        "--prompt-ids",
        "1",
        "--max-new-tokens",
        "64",
        "--dry-run",
        "h200:4",
    ]
    mine = dry_run.find(parse(given), cfg, None, 2**20 - 64)
    kept = dataclasses.replace(cfg, num_nextn_predict_layers=0)
    asked = case(kept, context=2**20, batch=1, cache=CacheConfig())
    plan = make_plan(asked, parse_topology("h200:4"), depth=None)
    assert (mine.memory, mine.mesh, mine.step) == (plan.memory, plan.mesh, plan.step)
    assert mine.needed == plan.peak


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["--chat", "--dry-run"], "--dry-run cannot be combined with --chat"),
        ([*PROMPT, "--dump-logits", "a.npz", "--dry-run"], "--dump-logits cannot be combined"),
        ([*PROMPT, "--dry-run", "h99:1"], "topology must be one of v5e:NxN"),
        ([*PROMPT, "--mesh", "1,1,4", "--dry-run", "h100:2"], "at most the 2 devices"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(capsys, ckpt, arguments, wanted):
    code, out, err = call(capsys, ckpt, *arguments)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("error: ") and wanted in err


def test_a_checkpoint_need_not_be_named_where_one_is_embedded(capsys, ckpt, indexer, monkeypatch):
    monkeypatch.setattr(embedded, "find", lambda: embedded.Weights(ckpt, indexer))
    options = [*PROMPT, "--attention", "lsa", "--page-entries", "2", "--dry-run"]
    assert generate.main(options) == 0
    assert "dry run of ckpt: lsa attention" in capsys.readouterr().out
    monkeypatch.setattr(embedded, "find", lambda: None)
    with pytest.raises(SystemExit) as stop:
        generate.main(options)
    assert stop.value.code == 2
    assert "--ckpt DIR must be given: no weights are embedded" in capsys.readouterr().err
