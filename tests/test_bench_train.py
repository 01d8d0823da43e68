"""The training benchmark runs, and its floor is what a step moves and computes."""

import json

import pytest

from evals import bench_train
from evals.train_workload import SMOKE, Ceilings, Floor, Sizes, random_inputs, write_traces
from train.data.dataset import Corpus, DataConfig, batches


def test_the_floor_at_true_shapes_is_the_optimisers_traffic_and_more():
    sizes = Sizes()
    floor = Floor.of(sizes, Ceilings(3.0e12, 800e12))
    layer = 2048 * 4096 + 2048 + 16384 * 2048 + 128 * 4096
    keys = 3 * 64 * 2048 * 132
    assert floor.bytes == 36 * 3 * layer + keys + 3 * 64 * 4096 * 2
    assert floor.optimizer_bytes / 3.0e12 == pytest.approx(1.2e-3, rel=0.02)
    products = 3 * 64 * 2 * (2 * (layer - 2048) + 16384 * 2048)
    assert floor.flops == products + 3 * 64 * 2048 * 128 * 128 * 2 * 2
    assert floor.seconds == floor.bytes / 3.0e12 > floor.flops / 800e12
    slow = Floor.of(sizes, Ceilings(3.0e12, 1e12))
    assert slow.seconds == floor.flops / 1e12


def test_synthetic_traces_give_full_batches_of_the_synthetic_batchs_shape(tmp_path):
    corpus = Corpus.open([write_traces(SMOKE, tmp_path)], verify=True)
    stream = batches(
        corpus, DataConfig(batch_size=SMOKE.batch, prefetch=0, sizes=1), SMOKE.sampling
    )
    found = list(stream)
    stream.close()
    assert len(found) == SMOKE.documents * SMOKE.tokens // SMOKE.batch
    like = random_inputs(SMOKE, seed=0)
    checked = 0
    for batch in found:
        assert batch.hidden.shape == like.hidden.shape and batch.hidden.dtype == like.hidden.dtype
        assert batch.drawn.mass.shape == (SMOKE.batch, SMOKE.candidates)
        for got, want in zip(batch.drawn[:-1], like.drawn[:-1], strict=True):
            assert got.shape == want.shape and got.dtype == want.dtype
        whole = batch.sample[:, 1] <= SMOKE.tokens - SMOKE.max_pos  # enough tokens for new entries
        assert batch.targets.valid[whole].all() and (batch.sample >= 0).all()
        assert (batch.targets.labels[whole].sum(axis=1) == SMOKE.max_pos).all()
        checked += whole.sum()
    assert checked > 0.8 * SMOKE.documents * SMOKE.tokens


@pytest.mark.slow
def test_a_smoke_run_measures_everything_and_a_peer_that_is_not_there_is_an_error(tmp_path, capsys):
    out = tmp_path / "F.json"
    assert bench_train.main(["--smoke", "--steps", "4", "--workers", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["parameters"] == sum(x.size for x in _leaves())
    assert result["step"]["seconds"] > 0 and result["floor"]["seconds"] > 0
    pipeline = result["pipeline"]
    assert pipeline["mean_candidates"] == SMOKE.candidates == 64
    assert pipeline["workers"] == 2 and pipeline["loop"]["dispatch_seconds"] > 0
    assert min(pipeline["drawing_seconds"], pipeline["sending_seconds"]) > 0
    assert min(pipeline["batches_per_second"], pipeline["loop"]["seconds"]) > 0
    assert 0 <= pipeline["waiting_share"] < 1
    printed = capsys.readouterr().out
    assert "pipeline alone, 2 workers" in printed and "% of the time (at most 5)" in printed
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho no torch here >&2\nexit 1\n")
    fake.chmod(0o755)
    assert (
        bench_train.main(["--smoke", "--workers", "0", "--peer", "--peer-python", str(fake)]) == 1
    )
    assert "no torch here" in capsys.readouterr().err


def _leaves():
    return bench_train.random_leaves(SMOKE.indexer, bench_train.jax.random.key(0)).values()
