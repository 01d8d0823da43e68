"""`python -m train.indexer`: its configuration, what it starts from, what it learns and leaves."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax import synthesize
from lsa_jax.cache import codec
from lsa_jax.checkpoint import store
from lsa_jax.config import ConfigError
from lsa_jax.config_io import load_config
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.indexer_io import load_indexer
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.widening import widen
from tests import train_runs
from tests.train_runs import config, train
from tests.train_traces import planted_traces
from train import tables
from train.data.batch import Drawn
from train.data.corpus import Corpus
from train.quality.evaluation import evaluate_traces
from train.quality.metrics import MetricsConfig, add_tallies
from train.run import forward, initial
from train.run.checkpoints import load_params
from train.run.config import InitConfig, TrainConfig, load_train_config
from train.run.progress import TensorBoard, read_metrics
from train.run.splits import open_corpora
from train.traces.trace_info import KeyRope, fingerprint, weights_digest

ROOT = Path(__file__).parents[1]
SMALL = IndexerConfig(
    target_layers=(0, 3), hidden_size=40, n_heads=3, q_lora_rank=25, head_dim=8, rope_head_dim=4
)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return train_runs.traces(tmp_path_factory.mktemp("traces"))


@pytest.fixture(scope="module", autouse=True)
def _compiled_once(tmp_path_factory) -> Iterator[None]:
    with train_runs.compiled_once(tmp_path_factory.mktemp("programs")):
        yield


def test_the_preset_is_the_authors_recipe():
    by_name, by_path = (
        load_train_config("indexer"),
        load_train_config(ROOT / "configs/indexer.toml"),
    )
    assert by_name == by_path
    recipe = by_name
    assert (recipe.indexer.n_heads, recipe.indexer.q_lora_rank) == (128, 2048)
    assert (recipe.sampling.neg_ratio, recipe.sampling.max_pos, recipe.sampling.window) == (
        *(3.0, 512, 64),
    )
    assert (recipe.objective.focal, recipe.objective.gamma, recipe.objective.bce) == (1.0, 2.0, 0.0)
    assert (recipe.optimizer.learning_rate, recipe.optimizer.weight_decay) == (1e-4, 1e-2)
    assert (recipe.data.batch_size, recipe.run.epochs, recipe.optimizer.clip) == (64, 3, 1.0)
    assert recipe.run.compute_dtype == "bfloat16" and recipe.init.kind == "random"


def test_overrides_are_read_as_their_fields_type_says(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[run]\nsteps = 7\nseed = 1\n[sampling.resident]\nsink = 2\n")
    overrides = ["run.steps=9", "data.train=['a b', \"c\"]", "init.kind=indexer", "init.path=x y"]
    overrides += ["optimizer.learning_rate=1", "sampling.resident.recency=0"]
    overrides += ["data.target_layers=[1, 2]", "objective.kept_shares=[0.1, 0.3]"]
    cfg = load_train_config(file, [*overrides, "sampling.causal=true", "data.hard_negatives=h.npz"])
    assert (cfg.run.steps, cfg.run.seed) == (9, 1)
    assert cfg.data.train == ("a b", "c") and cfg.data.hard_negatives == "h.npz"
    assert cfg.init == InitConfig(kind="indexer", path="x y")
    assert cfg.optimizer.learning_rate == 1.0 and type(cfg.optimizer.learning_rate) is float
    assert (cfg.sampling.resident.recency, cfg.sampling.resident.sink) == (0, 2)
    assert cfg.data.target_layers == (1, 2) and cfg.objective.kept_shares == (0.1, 0.3)
    assert load_train_config(file, ["data.target_layers=false"]).data.target_layers is None
    assert cfg.sampling.causal is True
    assert tables.build(TrainConfig, tables.to_json(cfg)) == cfg
    copy = train_runs.toml(cfg, tmp_path / "copy.toml")
    assert load_train_config(copy) == cfg


def test_random_weights_begin_as_torchs_linear_does():
    leaves = initial.random_leaves(SMALL, seed=3)
    for name, leaf in leaves.items():
        assert leaf.dtype == np.float32
        if leaf.ndim == 1:
            assert (leaf == 1).all()
            continue
        bound = leaf.shape[1] ** -0.5
        assert 0.9 * bound < np.abs(leaf).max() <= bound * (1 + 1e-6), name
        # The variance of a uniform one, give or take four standard errors of its estimate.
        assert np.var(leaf) == pytest.approx(bound**2 / 3, rel=4 * (0.8 / leaf.size) ** 0.5), name
    again, other = initial.random_leaves(SMALL, seed=3), initial.random_leaves(SMALL, seed=4)
    first = next(iter(leaves))
    np.testing.assert_array_equal(again[first], leaves[first])
    assert (other[first] != leaves[first]).any()
    assert (leaves["retrievers.l0.wq_a.weight"] != leaves["retrievers.l3.wq_a.weight"]).any()


@pytest.fixture(scope="module")
def of_tiny(tmp_path_factory) -> tuple[Path, Corpus]:
    """A checkpoint of the tiny model, and traces that could be of it."""
    at, model = tmp_path_factory.mktemp("tiny"), load_config("tiny")
    assert synthesize.main(["--config", "tiny", "--seed", "1", str(at / "checkpoint")]) == 0
    sizes = {"hidden": 64, "head_dim": 32, "csa_layers": 2, "tokens": 16, "prompt_entries": 40}
    planted_traces(at / "traces", documents=1, target_layers=(0, 1), **sizes)
    trace = Corpus.open([at / "traces"]).traces[0]
    info = dataclasses.replace(trace.info, rope=KeyRope.of_model(model), model=fingerprint(model))
    return at / "checkpoint", Corpus([dataclasses.replace(trace, info=info)])


def native(corpus: Corpus, path: Path, **indexer) -> tuple[IndexerConfig, dict[str, np.ndarray]]:
    raw = {"indexer": indexer, "init": {"kind": "native", "path": str(path)}}
    return initial.initial_indexer(tables.build(TrainConfig, raw), corpus)


@pytest.mark.slow
def test_a_run_from_the_native_indexers_begins_with_their_logits(of_tiny, monkeypatch):
    checkpoint, corpus = of_tiny
    model, load, read = load_config("tiny"), store.load_checkpoint, []

    def spy(path, *, wanted):
        found = load(path, wanted=wanted)
        read.extend(found[1])
        return found

    monkeypatch.setattr(initial.store, "load_checkpoint", spy)
    cfg, leaves = native(corpus, checkpoint, n_heads=48, q_lora_rank=56)
    assert cfg.norm_eps == pytest.approx(model.rms_norm_eps * model.q_lora_rank / 56)
    assert read and all(name.startswith(("layers.2.attn.", "layers.4.attn.")) for name in read)
    assert not any("wkv" in name or "wo_" in name for name in read)

    size = {"n_heads": model.index_n_heads, "q_lora_rank": model.q_lora_rank}
    own = IndexerConfig.for_model(model, target_layers=(0, 1), **size)

    source = widen(own, model, load(checkpoint)[1], jax.random.key(0))
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 3, 64), dtype=np.float32)
    keys = rng.standard_normal((2, 3, 20, 32), dtype=np.float32)
    positions = np.array([3, 100, 900], np.int32)
    planes = [codec.DensePlanes(jnp.asarray(k)) for k in keys]
    want = jax.jit(lambda m: MemoryIndexer(own, m)(hidden, positions, planes))(source.leaves())
    drawn = Drawn(
        np.stack([positions * 0, positions * 0, positions, positions], axis=1),
        np.ones((3, 1, 3), np.float32),
        np.tile(np.arange(20, dtype=np.int32), (3, 1)),
        np.zeros((3, 20), np.uint8),
        np.zeros((3, 0), np.float32),
    )
    of = jnp.asarray(hidden[:, :, None]), drawn, jnp.asarray(keys), None
    got = jax.jit(lambda p: forward.indexer_logits(cfg, p, *of))(leaves)
    rms = np.sqrt(np.mean(np.asarray(want) ** 2))
    # Float32 sums of the same terms, and zeros, in other orders.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * rms)


@pytest.mark.slow
def test_native_indexers_of_another_model_are_refused(of_tiny):
    checkpoint, corpus = of_tiny
    trace = corpus.traces[0]
    other = dataclasses.replace(trace, info=dataclasses.replace(trace.info, model="0" * 64))
    with pytest.raises(ConfigError, match=r"init.path must be of the model of the traces"):
        native(Corpus([other]), checkpoint, n_heads=48, q_lora_rank=56)
    with pytest.raises(ConfigError, match=r"indexer.n_heads must be >= the model's 32, got 16"):
        native(corpus, checkpoint, n_heads=16, q_lora_rank=56)


def test_native_indexers_of_other_weights_of_the_model_are_refused(of_tiny, tmp_path, monkeypatch):
    """Before they are loaded; where either digest is not known they cannot be told apart."""
    checkpoint, corpus = of_tiny
    known = weights_digest(checkpoint)
    monkeypatch.setattr(initial.store, "load_checkpoint", lambda *_, **__: pytest.fail("loaded"))
    other = of_weights(corpus, "0" * 64)
    with pytest.raises(
        ConfigError, match=r"of the weights of the traces, 0{12}.. .* of " + known[:9]
    ):
        native(other, checkpoint, n_heads=48, q_lora_rank=56)
    for same in (of_weights(corpus, known), corpus):
        with pytest.raises(pytest.fail.Exception, match="loaded"):
            native(same, checkpoint, n_heads=48, q_lora_rank=56)


def of_weights(corpus: Corpus, weights: str | None) -> Corpus:
    trace = corpus.traces[0]
    info = dataclasses.replace(trace.info, weights=weights)
    return Corpus([dataclasses.replace(trace, info=info)])


@pytest.mark.slow
def test_training_finds_the_planted_entries_and_the_file_has_what_was_learned(root, tmp_path):
    run = tmp_path / "run"
    options = {"steps": 240, "checkpoint_every": 100, "validate_every": 80, "validate_interval": 4}
    cfg = config(
        root,
        data={"validation": [str(root / "train")], "batch_size": 16},  # it is to overfit
        indexer={"n_heads": 16, "q_lora_rank": 32},
        sampling={"neg_ratio": 3.0, "causal": True},
        run=options,
    )
    outcome = train(cfg, run)
    corpus = open_corpora(cfg)["train"]

    def recall(indexer: MemoryIndexer) -> float:
        metrics = MetricsConfig(ks=(8,), resident=cfg.sampling.resident)
        tally = add_tallies(evaluate_traces(indexer, corpus.traces, metrics, interval=4, window=8))
        hits, positives = tally["ensemble.max/all/recall@8"]
        return hits / positives

    trained = recall(load_indexer(run / "indexer.safetensors"))
    chance = 8 / 64  # of some 64 entries
    before = recall(MemoryIndexer(*initial.initial_indexer(cfg, corpus)))
    print(f"recall@8 {trained:.3f}, before {before:.3f}, by chance {chance:.3f}")
    assert trained > max(3 * chance, 1.5 * before)
    assert outcome.best > 0 and outcome.score == pytest.approx(trained)
    assert load_params(run)[2] == outcome.best
    kinds = [(line["kind"], line["step"]) for line in read_metrics(run)]
    assert [step for kind, step in kinds if kind == "validation"] == [0, 80, 160, 240]


@pytest.mark.slow
def test_validations_without_a_better_one_end_the_run_and_the_best_is_kept(root, tmp_path):
    run = tmp_path / "run"
    options = {"steps": 40, "checkpoint_every": 3, "keep": 1, "validate_every": 4, "patience": 2}
    cfg = config(
        root,
        data={"validation": [str(root / "validation")]},
        optimizer={"learning_rate": 1e-30, "weight_decay": 0.0},  # nothing changes
        run=options,
    )
    outcome = train(cfg, run)
    # The first is the best there is: the next two are not better.
    assert (outcome.step, outcome.total, outcome.best) == (12, 40, 4)
    assert load_params(run)[2] == 4 and load_params(run, 12)[2] == 12
    assert train(cfg, run).step == 12


def test_tensorboard_gets_every_number_of_a_line(tmp_path):
    pytest.importorskip("tensorboardX")
    board = TensorBoard(tmp_path, step=0)
    line = {"kind": "train", "step": 3, "loss": 0.5, "terms": {"focal": [1.0, 2.0]}, "x": None}
    board.write(json.loads(json.dumps(line)))
    board.close()
    (file,) = (tmp_path / "tensorboard").iterdir()
    data = file.read_bytes()
    assert all(name in data for name in (b"train/loss", b"train/terms/focal/0", b"focal/1"))
    assert b"train/step" not in data and b"train/x" not in data
