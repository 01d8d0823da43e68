"""A backbone's pre-training: schedules, rows, what a run leaves, and going on with one."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsa_jax import model_io
from lsa_jax.checkpoint.leaf import CheckpointError
from lsa_jax.config import ComputeConfig, ConfigError
from lsa_jax.config_io import load_config
from tests import pretrain_rows, small_model
from train import tables
from train.backbone import main
from train.pretraining import feed, loop
from train.pretraining.plan import OptimizerConfig, PretrainConfig, learning_rate, make_optimizer
from train.run.progress import read_metrics

MODEL = dataclasses.replace(
    small_model.CONFIG, layer_types=("sliding", "csa"), mlp_types=("hash", "score")
)
ROWS = {"vocab": MODEL.vocab_size}


def plan(**run: Any) -> PretrainConfig:
    """Two stages of three and two steps."""
    stages = [
        {"tokens": 24, "batch": 2, "steps": 3, "taught": 4, "rows": ROWS},
        {"tokens": 32, "batch": 1, "steps": 2, "top_k": 2, "rate": [1.0, 0.5], "rows": ROWS},
    ]
    raw = {"model": "small", "stages": stages, "optimizer": {"warmup_steps": 2}}
    run = {"workers": 0, "compute_dtype": "float32", "log_every": 1, "checkpoint_every": 2} | run
    return tables.build(PretrainConfig, {**raw, "run": run})


def train(cfg: PretrainConfig, run: Path, **options: Any) -> loop.Outcome:
    run.mkdir(exist_ok=True)
    model = options.pop("model", MODEL)
    files = {"note.txt": b"about it"}
    return loop.pretrain(cfg, model, run, pretrain_rows.source, ("a", "b"), files=files, **options)


def leaves(run: Path) -> dict[str, np.ndarray]:
    model = model_io.load_model(run / "backbone", compute=ComputeConfig(dtype="float32"))
    paths = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in paths}


def test_the_rate_rises_over_the_warmup_and_follows_each_stages_line():
    cfg = plan()
    rates = [learning_rate(cfg, step) for step in range(5)]
    np.testing.assert_allclose(rates, [5e-4, 1e-3, 1e-3, 1e-3, 5e-4])


def test_a_stages_window_is_the_models_unless_it_says_otherwise():
    first, second = plan().stages
    wide = dataclasses.replace(first, window=24)
    assert second.model(MODEL).sliding_window == MODEL.sliding_window != 24
    assert wide.model(MODEL) == dataclasses.replace(first.model(MODEL), sliding_window=24)


def test_rows_and_taught_positions_are_functions_of_seed_and_step():
    cfg = plan()
    with feed.Feed(pretrain_rows.source, cfg, 0) as rows:
        every = list(rows)
    with feed.Feed(pretrain_rows.source, cfg, 3) as rows:
        late = list(rows)
    assert [made.ids.shape for made in every] == [(2, 24)] * 3 + [(1, 32)] * 2
    for a, b in zip(every[3:], late, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
    assert not np.array_equal(every[0].ids, every[1].ids)
    other = feed.make_rows(pretrain_rows.source, plan(seed=1), 0)
    assert not np.array_equal(every[0].ids, other.ids)
    at = feed.taught_positions(cfg, 1)
    assert at is not None and len(set(at.tolist())) == 4 and (np.diff(at) > 0).all()
    assert at.min() >= 0 and at.max() < 23
    np.testing.assert_array_equal(at, feed.taught_positions(cfg, 1))
    assert feed.taught_positions(cfg, 3) is None


@pytest.mark.slow
def test_worker_processes_make_the_same_rows_in_order():
    with feed.Feed(pretrain_rows.source, plan(workers=2), 1) as rows:
        got = list(rows)
    want = [feed.make_rows(pretrain_rows.source, plan(), step) for step in range(1, 5)]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(a.kinds, b.kinds)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stages": []}, "stages must be at least one stage, got ()"),
        ({"stages": [{"tokens": 8, "batch": 1}]}, "stages[0].steps must be given, got none"),
        ({"optimizer": {"name": "sgd"}}, "optimizer.name must be one of adamw, muon, got 'sgd'"),
        ({"optimizer": {"beta1": 1.0}}, "optimizer.beta1 must be in [0, 1), got 1.0"),
        ({"run": {"workers": -1}}, "run.workers must be >= 0, got -1"),
        ({"loss": {"mtp": float("nan")}}, "loss.mtp must be finite, got nan"),
        (
            {"lr": 1},
            "field of the configuration must be one of model, stages, loss, opti",
        ),
    ],
)
def test_a_bad_plan_names_the_field(change, message):
    raw = tables.to_json(plan()) | change
    with pytest.raises(ConfigError) as refused:
        tables.build(PretrainConfig, raw)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"tokens": 1}, "stages.tokens must be >= 2, got 1"),
        ({"taught": 24}, "stages.taught must be below the stage's 24 tokens, got 24"),
        ({"rate": [1.0]}, "stages[0].rate must be a list of 2, got [1.0]"),
        ({"window": -1}, "stages.window must be >= 0, got -1"),
        ({"rate": [1.0, -0.5]}, "stages.rate must be two factors from 0 on, got (1.0, -0.5)"),
    ],
)
def test_a_bad_stage_names_the_field(stage, message):
    raw = tables.to_json(plan())
    raw["stages"][0] |= stage
    with pytest.raises(ConfigError) as refused:
        tables.build(PretrainConfig, raw)
    assert str(refused.value) == message


def test_muon_takes_hidden_matrices_and_adamw_the_rest():
    shapes = {"embed.weight": (9, 8), "head.weight": (9, 8), "layers.0.attn.wq_a.weight": (6, 8)}
    shapes |= {"layers.0.ffn.gate.weight": (4, 8), "layers.0.hc_attn.fn": (4, 8)}
    shapes |= {"layers.0.attn_norm.weight": (8,), "layers.0.ffn.experts.w1.weight": (4, 6, 8)}
    params = {path: jnp.ones(shape) for path, shape in shapes.items()}
    opt = make_optimizer(OptimizerConfig(name="muon", weight_decay=0.0))
    updates, _ = jax.jit(lambda p: opt.update(p, opt.init(p), p))(params)
    # AdamW's first update of constant gradients is -1 everywhere; Muon's has rank one and rms .2.
    muon = updates.pop("layers.0.attn.wq_a.weight")
    for path, update in updates.items():
        np.testing.assert_allclose(update, -1, atol=1e-3, err_msg=path)
    assert 0.05 < float(jnp.sqrt(jnp.mean(muon**2))) < 0.4


@pytest.mark.slow
def test_a_stopped_run_goes_on_to_the_same_bits_and_its_backbone_loads(tmp_path):
    whole, parts, stop = tmp_path / "whole", tmp_path / "parts", tmp_path / "stop"
    assert train(plan(), whole) == loop.Outcome(5, 5, None)
    stop.touch()

    def stopping(table, rng, batch, tokens):
        return pretrain_rows.source({**table, "stop_at": str(stop)}, rng, batch, tokens)

    first = loop.pretrain(plan(), MODEL, _made(parts), stopping, ("a", "b"), files={})
    assert first.step == 1 and first.signal is not None
    assert not (parts / "backbone").exists()
    assert train(plan(), parts).signal is None
    lines = [[line for line in read_metrics(run)] for run in (whole, parts)]
    for a, b in zip(*lines, strict=True):
        assert {k: v for k, v in a.items() if "second" not in k and k != "wait_share"} == {
            k: v for k, v in b.items() if "second" not in k and k != "wait_share"
        }
    assert [line["step"] for line in lines[0]] == [1, 2, 3, 4, 5]
    assert {"captured", "index"} <= lines[0][0].keys() and "index" not in lines[0][4]
    a, b = leaves(whole), leaves(parts)
    assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert (whole / "backbone" / "note.txt").read_text() == "about it"
    _other_plans_and_damage_are_refused(parts)


def _made(run: Path) -> Path:
    run.mkdir()
    return run


def _other_plans_and_damage_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match=r"begun with run.seed = 0, now 1: choose another --out"):
        train(plan(seed=1), run)
    with pytest.raises(ConfigError, match="begun with rms_norm_eps"):
        train(plan(), run, model=dataclasses.replace(MODEL, rms_norm_eps=1e-5))
    newest = max((run / "checkpoints").iterdir(), key=lambda path: int(path.name))
    for file in (newest / "state").rglob("*"):
        if file.is_file() and file.stat().st_size > 4096:
            data = bytearray(file.read_bytes())
            data[len(data) // 2] ^= 1
            file.write_bytes(data)
    with pytest.raises(CheckpointError, match="is damaged"):
        train(plan(), run)


def test_the_shipped_recipe_is_a_plan_for_the_shipped_model():
    cfg = tables.load(PretrainConfig, "mini", ["run.seed=3"], preset="mini")
    assert cfg.run.seed == 3 and load_config(cfg.model).num_layers == 9
    assert cfg.stages[-1].top_k == load_config(cfg.model).index_topk


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stages = 1", "stages must be a list, got 1"),
        ('model = "nowhere"\n[[stages]]\ntokens = 512\nbatch = 1\nsteps = 1', "config must be"),
        (
            'model = "mini_model"\n[[stages]]\ntokens = 512\nbatch = 1\nsteps = 1\n'
            "rows = { weights = { chess = 1 } }",
            "mixture.weights must be one of recall",
        ),
        (
            'model = "mini_model"\n[[stages]]\ntokens = 512\nbatch = 1\nsteps = 1\n'
            "rows = { weight = { recall = 1 } }",
            "stages[0].rows.weight is unknown",
        ),
        (
            'model = "mini_model"\n[[stages]]\ntokens = 200000\nbatch = 1\nsteps = 1',
            "stages[0].tokens must be at most the model's 131072 positions, got 200000",
        ),
    ],
)
def test_a_bad_recipe_is_one_line_and_exit_code_2(tmp_path, capsys, text, message):
    file, run = tmp_path / "bad.toml", tmp_path / "run"
    file.write_text(text)
    assert main(["--config", str(file), "--out", str(run)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert not (run / "config.json").exists()
