"""`python -m train.indexer` refuses what cannot work before it works: one line, exit code 2."""

import dataclasses
import sys
from pathlib import Path

import pytest

from lsa_jax.config import ConfigError
from tests import train_runs
from tests.train_runs import config
from tests.train_traces import planted_traces
from train.data.corpus import Corpus
from train.indexer import main
from train.indexer_command import _config, _parse
from train.run import initial
from train.run.splits import open_corpora
from train.run.validation import check_top
from train.traces.columns import TraceError


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return train_runs.traces(tmp_path_factory.mktemp("traces"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("run.stepz=1", "--set run.stepz: field of run must be one of epochs, steps, "),
        ("runs.steps=1", "--set runs.steps: field of the configuration must be one of data, "),
        ("run.steps.x=1", "--set run.steps.x: field of run.steps must be no further field"),
        ("run.steps", "--set must be table.field=value, got 'run.steps'"),
        ("run=1", "--set must be a field of the table run, not all of it"),
        ("sampling.resident=1", "--set must be a field of the table sampling.resident, not all"),
        ("run.steps=many", "run.steps must be a TOML value, got 'many'"),
        ("run.steps=1.5", "run.steps must be an int of 64 bits, got 1.5"),
        ("run.steps=true", "run.steps must be an int of 64 bits, got True"),
        ("run.keep=0", "run.keep must be >= 1, got 0"),
        ("data.train=DIR", "data.train must be a list, got 'DIR'"),
        ("data.train=[DIR]", "data.train must be a list, got '[DIR]'"),
        ("sampling.causal=1", "sampling.causal must be true or false, got 1"),
        ("init.kind=nativ", "init.kind must be one of random, native, indexer, got 'nativ'"),
        ("init.kind=native", "init.path must be given, as init.kind is 'native', got ''"),
        ("init.path=x", "init.path must be empty, got 'x'"),
        ("objective.focal=nan", "objective.focal must be finite, got nan"),
        ("objective.page_entries=4", "objective.page_entries must be 1, or sampling.resident.page"),
        ("run.steps=1\nseed=2", "run.steps must be a single TOML value, got '1\\nseed=2'"),
        ("run.steps=1\n[run]\nseed=2", "run.steps must be a single TOML value, got '1\\n[run]"),
        ("indexer.ensemble=learned", "objective.on_ensemble must be > 0, as indexer.ensemble is"),
        ("indexer.lookback=1000000", "indexer.lookback must be <= 512, got 1000000"),
        ("run.log_n_reference=1", "run.log_n_reference must be 0 or >= 2, got 1"),
        ("run.compute_dtype=fp8", "run.compute_dtype must be one of bfloat16, float32, got 'fp8'"),
    ],
)
def test_a_bad_override_is_one_line_and_exit_code_2(tmp_path, capsys, override, message):
    arguments = ["--config", "indexer", "--out", str(tmp_path / "run"), "--set", override]
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            ["data.mass=false", "objective.missed=1"],
            "data.mass must be true with objective.missed, got False",
        ),
        (
            ["data.mass=false", "objective.focal=0", "objective.share=1"],
            "data.mass must be true with objective.share, got False",
        ),
        (
            ["indexer.score=softmax", "run.log_n_reference=9"],
            "indexer.score must be sigmoid with run.log_n_reference, got 'softmax'",
        ),
        (
            ["indexer.lookback=2", "run.log_n_reference=9"],
            "indexer.lookback must be 1 with run.log_n_reference, got 2",
        ),
        (
            ["indexer.score=softmax", "indexer.ensemble=learned"],
            "indexer.ensemble must be max or mean with indexer.score = 'softmax', got 'learned'",
        ),
        (
            ["indexer.score=softmax", "objective.on_ensemble=1"],
            "objective.on_ensemble must be 0 with indexer.score = 'softmax', got 1.0",
        ),
        (
            ["run.steps=4", "optimizer.warmup_steps=4"],
            "optimizer.warmup_steps must be below the run's 4 steps, got 4",
        ),
    ],
)
def test_fields_that_do_not_go_together_are_refused_before_data_are_read(
    tmp_path, capsys, sets, message
):
    words = [word for text in sets for word in ("--set", text)]
    given = ["--config", "indexer", "--data", "nowhere", "--out", str(tmp_path / "run")]
    assert main([*given, *words]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": {"kind": "indexer", "path": "no.safetensors"}}, "No such file"),
        ({"indexer": {"n_heads": 10**12}}, "n_heads and q_lora_rank must be below"),
        ({"data": {"batch_size": 3}, "optimizer": {"accumulate": 2}}, "data.batch_size must be"),
        (
            {"run": {"steps": 0, "epochs": 1}, "optimizer": {"warmup_steps": 99}},
            "optimizer.warmup_steps must be below the run's",
        ),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_directory(root, tmp_path, changes, message):
    cfg = config(root, **changes)
    with pytest.raises((ConfigError, OSError), match=message):
        train_runs.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "tiny"], "error: config must be a TOML file, or indexer, got 'tiny'"),
        (["--config", "nowhere"], "error: config must be a TOML file, or indexer, got 'nowhere'"),
        (["--config", "indexer"], "error: data.train must be at least one trace set (--data DIR)"),
        (["--config", "indexer", "--data", "nowhere"], "error: nowhere must have a directory"),
        (["--config", "indexer", "--tensorboard"], "error: --tensorboard needs tensorboardX: pip"),
        (["--config", "indexer", "--plot", "x"], "error: --plot needs matplotlib: pip install"),
        (["--config", "indexer", "--out", "file"], "error: --out must be a directory to write to"),
        (["--config", "indexer", "--out", "file/run"], "error: --out must be a directory to write"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    for module in ("tensorboardX", "matplotlib"):
        monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / "file").touch()
    assert main(["--out", "run", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(message) and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_processes_are_described_completely_or_not_at_all(capsys):
    for arguments in (["--processes", "2"], ["--coordinator", "h:1", "--processes", "2"]):
        with pytest.raises(SystemExit) as caught:
            main(["--config", "indexer", "--out", "run", *arguments])
        assert caught.value.code == 2
        assert "must be given together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "message"),
    [
        ("h:1", "0", "0", "error: --processes must be >= 1, got 0"),
        ("h:1", "2", "2", "error: --process-id must be in 0..1, got 2"),
        *(
            (bad, "1", "0", f"error: argument --coordinator: must be HOST:PORT, got {bad!r}")
            for bad in ("nonsense", ":1", "h:", "h:x", "h:0", "h:65536", "h:1000000")
        ),
    ],
)
def test_a_meeting_place_that_is_none_is_refused(capsys, coordinator, processes, process, message):
    given = ["--coordinator", coordinator, "--processes", processes, "--process-id", process]
    with pytest.raises(SystemExit) as caught:
        main(["--config", "indexer", "--out", "run", *given])
    assert caught.value.code == 2
    assert capsys.readouterr().err == f"{message}\n"


def test_a_meeting_that_fails_is_one_line(root, tmp_path, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("DEADLINE_EXCEEDED:\nBarrier timed out")

    monkeypatch.setattr("jax.distributed.initialize", fail)
    file = train_runs.toml(config(root), tmp_path / "c.toml")
    given = ["--coordinator", "h:1", "--processes", "2", "--process-id", "1"]
    assert main(["--config", str(file), "--out", str(tmp_path / "run"), *given]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --coordinator must be where 2 processes meet, got h:1 (DEADLINE")
    assert err.count("\n") == 1


@pytest.mark.parametrize("plot", ["nowhere/curves.png", "curves.tiff2", "."])
def test_a_picture_that_cannot_be_written_is_refused_before_training(
    root, tmp_path, capsys, monkeypatch, plot
):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    file = train_runs.toml(config(root), tmp_path / "c.toml")
    assert main(["--config", str(file), "--out", "run", "--plot", plot]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --plot must be ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_indexer_beyond_any_memory_is_refused_by_its_size(root, tmp_path):
    for sizes in ({"n_heads": 10**12}, {"q_lora_rank": 2**60}):
        cfg = config(root, indexer=sizes)
        with pytest.raises(ConfigError, match=r"n_heads and q_lora_rank must be below this mach"):
            initial.initial_indexer(cfg, open_corpora(cfg)["train"])


@pytest.mark.parametrize(("pool", "most"), [("all", 66), ("evictable", 48)])
def test_a_validation_that_finds_everything_is_refused(root, tmp_path, pool, most):
    """60 entries and 32 tokens: 66 exist at token 24, two pages of 8 and the ragged are recent."""
    for top in (most, 512):
        options = {"validate_top": top, "validate_pool": pool}
        cfg = config(root, data={"validation": [str(root / "validation")]}, run=options)
        with pytest.raises(
            ConfigError, match=f"run.validate_top must be below {most}, .* got {top}"
        ):
            train_runs.train(cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fewer = dataclasses.replace(cfg.run, validate_top=most - 1)
    check_top(dataclasses.replace(cfg, run=fewer), open_corpora(cfg)["validation"])


def test_options_that_are_given_again_add_to_what_was_given():
    given = ["--config", "indexer", "--out", "run", "--data", "a", "b", "--data", "c"]
    args = _parse([*given, "--validation", "d", "--validation", "e"])
    assert _config(args).data.train == ("a", "b", "c")
    assert _config(args).data.validation == ("d", "e")


def test_documents_of_one_name_are_refused_with_the_cure(root, tmp_path):
    twice = {"train": [str(root / "train"), f"{root}/validation/../train"]}
    with pytest.raises(TraceError, match=r"^traces must be given once, got .*doc-0-0 twice$"):
        open_corpora(config(root, data=twice))
    planted_traces(tmp_path / "more", documents=1, tokens=32, prompt_entries=60)
    both = {"train": [str(root / "train"), str(tmp_path / "more")]}
    with pytest.raises(TraceError) as caught:
        open_corpora(config(root, data=both))
    assert str(caught.value) == (
        f"traces must have different names, got doc-0-0 in {root / 'train'} and in"
        f" {tmp_path / 'more'} (train.dump_traces --start N numbers documents from N)"
    )


def test_traces_of_other_weights_are_not_mixed(root):
    first, second, *_ = open_corpora(config(root))["train"].traces
    info = dataclasses.replace(second.info, weights="1" * 64)
    other = dataclasses.replace(second, info=info)
    with pytest.raises(TraceError, match=r"weights must be the same in all traces, got None in"):
        Corpus([first, other])
    first = dataclasses.replace(first, info=dataclasses.replace(first.info, weights="1" * 64))
    assert Corpus([first, other]).info.weights == "1" * 64


def test_splits_that_do_not_fit_one_another_are_refused(root, tmp_path):
    planted_traces(tmp_path / "other", documents=1, tokens=32, prompt_entries=60, csa_layers=5)
    cfg = config(root, data={"validation": [str(tmp_path / "other")]})
    with pytest.raises(ValueError, match=r"csa_layers must be the same .* 4 in .* and 5 in "):
        open_corpora(cfg)
    planted_traces(tmp_path / "bare", documents=1, tokens=32, prompt_entries=60, mass=False)
    cfg = config(root, data={"train": [str(tmp_path / "bare")]}, objective={"mass": 0.5})
    with pytest.raises(ConfigError, match=r"objective.mass must be 0, as .* has no attention mass"):
        open_corpora(cfg)
    fits = {"vote_weighting": True, "least_votes": 3, "most_votes": 4}  # of four layers
    open_corpora(config(root, sampling=fits))
    for bounds in ({"least_votes": 4, "most_votes": 5}, {"least_votes": 2, "most_votes": 3}):
        with pytest.raises(ConfigError, match=r"most_votes must be around 3\.\.4, the votes of"):
            open_corpora(config(root, sampling={**fits, **bounds}))
