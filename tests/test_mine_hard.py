"""Hard negatives are the best scored entries that are never golden, by brute force."""

import dataclasses
import json

import numpy as np
import pytest

from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_shapes
from lsa_jax.lsa.indexer_file import IndexerFile, write_indexer
from tests.indexer_cases import expected, random_weights
from tests.train_traces import planted_traces
from train.data.dataset import Corpus, DataConfig, batches
from train.data.labels import SamplingConfig
from train.mine_hard import main
from train.traces.trace import finished_traces, open_trace
from train.traces.trace_info import indexer_fields

TOKENS, PROMPT_ENTRIES, HIDDEN, HEAD_DIM = 22, 60, 16, 8
INTERVAL, TOP = 4, 9


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    root = tmp_path_factory.mktemp("traces") / "set"
    sizes = {"hidden": HIDDEN, "head_dim": HEAD_DIM}
    return planted_traces(root, documents=2, tokens=TOKENS, prompt_entries=PROMPT_ENTRIES, **sizes)


def config(traces, layers=(0, 2)) -> IndexerConfig:
    info = open_trace(finished_traces(traces)[0]).info
    fields = indexer_fields(info, hidden_size=HIDDEN, head_dim=HEAD_DIM)
    return IndexerConfig(**{**fields, "target_layers": layers}, n_heads=3, q_lora_rank=10)


def write(path, cfg, seed):
    weights = random_weights(cfg, seed)
    write_indexer(path, IndexerFile(cfg, weights))
    return path, weights


def run(out, traces, indexers, *options):
    arguments = [text for path in indexers for text in ("--indexer", str(path))]
    return main([*arguments, "--traces", str(traces), "--out", str(out), *map(str, options)])


def brute_force(path, indexers, interval, top):
    """From the reference's logits, entry by entry."""
    trace = open_trace(path)
    hidden, keys = trace.read("hidden").astype(np.float64), trace.keys().dequantised()
    formed, votes, positions = trace.read("formed_at"), trace.votes(), trace.read("positions")
    scores: dict[int, float] = {}
    for cfg, weights in indexers:
        for layer in cfg.target_layers:
            at = trace.info.target_layers.index(layer)
            for t in range(0, trace.tokens, interval):
                row = expected(cfg, weights, layer, hidden[t, at], int(positions[t]), keys[:, at])
                for n in np.flatnonzero(formed <= t):
                    scores[n] = max(scores.get(n, -np.inf), row[n])
    for n in set(votes.indices.tolist()):
        scores.pop(n, None)
    return sorted(scores, key=lambda n: -scores[n])[:top], len(scores)


def test_the_best_entries_over_tokens_layers_and_indexers_are_kept(traces, tmp_path, capsys):
    both, one = config(traces), config(traces, layers=(2,))
    made = [
        (cfg, *write(tmp_path / f"{i}.safetensors", cfg, i)) for i, cfg in enumerate((both, one))
    ]
    out = tmp_path / "hard.npz"
    options = ("--interval", INTERVAL, "--top-k", TOP)
    assert run(out, traces, [path for _, path, _ in made], *options) == 0
    assert "18 hard negatives of 2 documents" in capsys.readouterr().out
    file = np.load(out, allow_pickle=False)
    assert sorted(file.files) == ["_metadata", "doc-0-0", "doc-0-1"]
    alone = 0
    for path in finished_traces(traces):
        want, pool = brute_force(path, [(cfg, w) for cfg, _, w in made], INTERVAL, TOP)
        assert file[path.name].dtype == np.int64 and pool > 2 * TOP
        np.testing.assert_array_equal(file[path.name], want)
        alone += want != brute_force(path, [(both, made[0][2])], INTERVAL, TOP)[0]
    assert alone  # the second indexer has a say
    metadata = json.loads(str(file["_metadata"]))
    assert (metadata["interval"], metadata["top_k"]) == (INTERVAL, TOP)
    assert len(set(metadata["indexers"])) == 2 and all(len(d) == 64 for d in metadata["indexers"])


def test_a_dilation_makes_no_entry_beside_a_golden_one_a_hard_negative(traces, tmp_path):
    found = []
    for dilation in (0, 2):
        cfg = dataclasses.replace(config(traces), dilation=dilation)
        path, _ = write(tmp_path / f"{dilation}.safetensors", cfg, 1)
        out = tmp_path / f"{dilation}.npz"
        assert run(out, traces, [path], "--interval", INTERVAL, "--top-k", TOP) == 0
        with np.load(out) as file:
            found.append({n: file[n].tolist() for n in file.files if not n.startswith("_")})
    assert found[0] == found[1] and any(found[0].values())


def test_entries_that_existed_at_no_scored_token_are_never_taken(traces, tmp_path):
    indexer, weights = write(tmp_path / "a.safetensors", config(traces), 0)
    out = tmp_path / "all.npz"
    assert run(out, traces, [indexer], "--interval", 8) == 0  # the last scored token is 16
    for path in finished_traces(traces):
        found, trace = np.load(out)[path.name], open_trace(path)
        want, pool = brute_force(path, [(config(traces), weights)], 8, 300)
        np.testing.assert_array_equal(found, want)
        assert len(found) == pool < 300
        last = trace.read("formed_at")[found].max()
        assert last <= 16 < trace.read("formed_at").max()
        assert not set(found.tolist()) & set(trace.votes().indices.tolist())


def test_the_same_input_gives_the_same_file_and_none_is_overwritten(traces, tmp_path, capsys):
    indexer, _ = write(tmp_path / "a.safetensors", config(traces), 0)
    first, second = tmp_path / "1.npz", tmp_path / "2.npz"
    assert run(first, traces, [indexer]) == run(second, traces, [indexer]) == 0
    assert first.read_bytes() == second.read_bytes()
    assert run(first, traces, [indexer], "--top-k", 3) == 2
    assert f"{first} exists already" in capsys.readouterr().err
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.npz", "2.npz", "a.safetensors"]


def test_the_data_pipeline_draws_them(traces, tmp_path):
    indexer, _ = write(tmp_path / "a.safetensors", config(traces), 0)
    out = tmp_path / "hard.npz"
    assert run(out, traces, [indexer], "--top-k", 5) == 0
    corpus = Corpus.open([traces], hard_negatives=out)
    for number, path in enumerate(finished_traces(traces)):
        np.testing.assert_array_equal(corpus.hard[path.name], np.sort(np.load(out)[path.name]))
        assert corpus.traces[number].path == path
    data = DataConfig(batch_size=4, hard_negatives=str(out))
    sampling = SamplingConfig(hard_share=1.0, neg_ratio=4, fake_positive=False)
    stream = batches(corpus, data, sampling)
    batch = next(stream)
    stream.close()
    for b, (number, _) in enumerate(batch.sample):
        trace = corpus.traces[number]
        negative = batch.targets.valid[b] & (batch.targets.labels[b] == 0)
        found = batch.drawn.index[b][negative].tolist()
        assert set(corpus.hard[trace.info.name].tolist()) <= set(found)


def test_indexers_whose_scores_are_of_two_scales_are_refused(traces, tmp_path, capsys):
    cfg, out = config(traces), tmp_path / "hard.npz"
    shares = [dataclasses.replace(cfg, score="softmax", ensemble=kind) for kind in ("max", "mean")]
    paths = [write(tmp_path / f"{i}.safetensors", c, i)[0] for i, c in enumerate((cfg, *shares))]
    assert run(out, traces, paths) == 2
    assert capsys.readouterr().err == (
        "error: indexer.score must be one for all --indexer, got 'sigmoid' of"
        f" {paths[0]}, 'softmax' of {paths[1]}\n"
    )
    assert not out.exists()
    assert run(out, traces, paths[1:], "--top-k", 3) == 0


def test_bad_input_is_refused_in_one_line(traces, tmp_path, capsys):
    indexer, _ = write(tmp_path / "a.safetensors", config(traces), 0)
    narrow = IndexerConfig(target_layers=(0,), hidden_size=9, head_dim=8, rope_head_dim=4)
    other = tmp_path / "narrow.safetensors"
    zeros = {name: np.zeros(shape, np.float32) for name, shape in leaf_shapes(narrow).items()}
    write_indexer(other, IndexerFile(narrow, zeros))
    out = tmp_path / "hard.npz"
    for indexers, sets, options, message in (
        ([indexer], [traces], ["--interval", "0"], "--interval must be >= 1, got 0"),
        ([indexer], [traces], ["--top-k", "0"], "--top-k must be >= 1, got 0"),
        ([indexer], [tmp_path], [], "must have finished traces, got none"),
        ([indexer, other], [traces], [], "hidden_size must be the indexer's"),
        ([tmp_path / "none"], [traces], [], "--indexer must be a run's directory, an indexer"),
    ):
        arguments = [text for path in indexers for text in ("--indexer", str(path))]
        arguments += ["--traces", *map(str, sets), "--out", str(out), *options]
        assert main(arguments) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("mine:")]
        assert line.startswith("error: ") and message in line and not out.exists()
    assert main(["--indexer", str(indexer), "--traces", str(traces), "--out", "hard.txt"]) == 2
    assert "a name that ends in .npz" in capsys.readouterr().err
    nowhere = str(tmp_path / "no" / "hard.npz")
    assert main(["--indexer", str(indexer), "--traces", str(traces), "--out", nowhere]) == 2
    assert "--out must be in a directory that is there" in capsys.readouterr().err
