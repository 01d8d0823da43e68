"""Golden logits are those that the reference computes; anything else fails, and says where."""

import dataclasses
import json
import math
import pickle

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lsa_jax.config import YarnConfig
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.indexer_file import IndexerFile, write_indexer
from lsa_jax.lsa.indexer_io import save_indexer
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from lsa_jax.lsa.widening import widen
from tests import small_model
from tests.indexer_cases import SMALL, expected, random_weights
from tests.test_widening import MODEL, native_logits
from train.traces.trace import TraceWriter
from train.traces.trace_info import E4M3, KeyRope, Keys, TraceInfo
from train.traces.votes import SparseRows, VoteConfig
from train.verify import compare_logits, main

CFG = dataclasses.replace(SMALL, target_layers=(0, 5))  # of the three that documents have
LAYERS, ENTRIES, PROMPT, TOKENS = (0, 2, 5), 60, 230, 5
WEIGHTS = random_weights(SMALL)
ROPE = KeyRope(rope_head_dim=16, rope_theta=160000.0, yarn=YarnConfig(), norm_eps=1e-6)


def document(seed: int):
    """Hidden states, positions, keys, and the reference's logits at three tokens [3][L][n]."""
    rng = np.random.default_rng(seed)
    hidden = rng.standard_normal((TOKENS, 3, SMALL.hidden_size)).astype(ml_dtypes.bfloat16)
    keys = rng.standard_normal((ENTRIES, 3, SMALL.head_dim), dtype=np.float32)
    scale = np.abs(keys).max(axis=-1) / np.float32(448)
    keys = Keys((keys / scale[..., None]).astype(E4M3), scale)
    positions = PROMPT + np.arange(TOKENS)
    logits = []
    for token, position in enumerate(positions[:3]):
        count, dense = (int(position) + 1) // 4, keys.dequantised()
        args = [(layer, hidden[token, i].astype(np.float64)) for i, layer in enumerate(LAYERS)]
        logits.append(
            [
                expected(SMALL, WEIGHTS, layer, x, int(position), dense[:count, i])
                for i, (layer, x) in enumerate(args)
            ]
        )
    return hidden, positions, keys, logits


def write_trace(root, name="doc-0", seed=0, change=lambda logits: logits, golden=True):
    hidden, positions, keys, logits = document(seed)
    padded = np.full((3, 3, ENTRIES), np.nan, np.float32)
    for token, layers in enumerate(logits):
        padded[token, :, : len(layers[0])] = layers
    info = TraceInfo(
        name=name,
        source="test",
        model=None,
        target_layers=LAYERS,
        csa_layers=8,
        csa_ratio=4,
        page_entries=8,
        prompt_tokens=PROMPT,
        rope=ROPE,
        votes=VoteConfig(),
    )
    none = SparseRows(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(TOKENS + 1, np.int64))
    options = {"hidden_size": SMALL.hidden_size, "hidden_dtype": hidden.dtype, "mass": False}
    with TraceWriter(root, info, **options) as writer:
        writer.append(hidden, positions, none)
        writer.finish(keys, change(padded) if golden else None)
    return root


def document_items(seed: int = 0, **changes):
    """Only what is required of an authors' document; None leaves a key out."""
    hidden, positions, keys, logits = document(seed)
    items = {}
    for i, layer in enumerate(LAYERS):
        rows = np.concatenate(
            [keys.values[:, i].view(np.uint8), keys.scale[:, i, None].view(np.uint8)], axis=1
        )
        items[f"hidden_layer_{layer}"] = hidden[:, i].astype(np.float32)
        items[f"positions_layer_{layer}"] = positions
        items[f"compk_layer_{layer}"] = rows
        for token, parts in enumerate(logits):
            items[f"logits_layer_{layer}_token_{token}"] = parts[i].astype(np.float32)
    return {key: value for key, value in (items | changes).items() if value is not None}


def write_document(root, name="doc_00000", **changes):
    root.mkdir(exist_ok=True)
    (root / f"{name}.pkl").write_bytes(pickle.dumps(document_items(**changes), 4))
    return root


def write_weights(path, change=lambda name, leaf: leaf, **fields):
    cfg = dataclasses.replace(CFG, **fields)
    leaves = {n: change(n, x) for n, x in WEIGHTS.items() if ".l2." not in n}
    write_indexer(path, IndexerFile(cfg, leaves))
    return path


def run(indexer, traces, *options):
    return main(["--indexer", str(indexer), "--traces", str(traces), *map(str, options)])


def test_logits_of_traces_and_documents_are_recomputed_and_pass(tmp_path, capsys):
    """57 entries exist at the first token, and one more at the others."""
    indexer, out = write_weights(tmp_path / "native.safetensors"), tmp_path / "F.json"
    write_trace(tmp_path / "set", "doc-0", seed=0)
    write_trace(tmp_path / "set", "doc-1", seed=1)
    write_trace(tmp_path / "set", "doc-2", seed=2, golden=False)
    write_document(tmp_path / "set", seed=3)
    assert run(indexer, tmp_path / "set", "--json", out) == 0
    text, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "documents without golden logits, left out: 1" in text
    assert [line.split()[:2] for line in text.splitlines()[1:3]] == [["0", "9"], ["5", "9"]]
    assert result["passes"] and result["without_golden_logits"] == 1
    for layer in result["layers"]:
        # Float32 against float64: 2e-5 of logits of about 1.
        assert layer["pearson"] > 1 - 1e-8 and layer["difference"] < 1e-4
        assert layer["sign_agreement"] == layer["top_10"] == layer["top_512"] == 1
    counts = {(row["document"], row["token"]): row["entries"] for row in result["rows"]}
    assert set(counts) == {(d, t) for d in ("doc-0", "doc-1", "doc_00000") for t in range(3)}
    assert [counts["doc-0", t] for t in range(3)] == [57, 58, 58]
    assert all(row["signed"] > 40 for row in result["rows"]) and len(result["rows"]) == 18


def swapped(name, leaf):
    """Layer 5 with its heads' weights in another order."""
    return leaf[::-1].copy() if name == "retrievers.l5.weights_proj.weight" else leaf


def louder(name, leaf):
    """Layer 0 with logits 20 % larger: they correlate perfectly."""
    return leaf * np.float32(1.2) if name == "retrievers.l0.weights_proj.weight" else leaf


@pytest.mark.parametrize(("change", "layer"), [(swapped, 5), (louder, 0)])
def test_another_indexer_fails_by_the_layer_that_is_wrong(change, layer, tmp_path, capsys):
    indexer, out = write_weights(tmp_path / "x.safetensors", change), tmp_path / "F.json"
    assert run(indexer, write_document(tmp_path / "docs"), "--json", out) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith(f"failed: layer {layer}: Pearson ") and "see doc_00000, token" in line
    assert "wanted at least 0.99 and at most 0.05" in line
    result = json.loads(out.read_text())
    assert [x["layer"] for x in result["layers"] if not x["passes"]] == [layer]
    found = next(x for x in result["layers"] if x["layer"] == layer)
    assert (found["pearson"] > 0.9999) == (change is louder) and found["difference"] > 0.05
    assert captured.out.splitlines()[0].split()[:2] == ["layer", "tokens"]


def test_other_constants_of_rope_fail(tmp_path):
    """As if positions meant something else: documents do not say what theirs mean."""
    for field, value in (("rope_theta", 10000.0), ("rope_head_dim", 8)):
        indexer = write_weights(tmp_path / f"{field}.safetensors", **{field: value})
        assert run(indexer, write_document(tmp_path / "docs")) == 1


def test_one_bad_logit_fails_and_is_within_bounds_below_them(tmp_path, capsys):
    indexer = write_weights(tmp_path / "x.safetensors")
    for shift, code in ((0.04, 0), (0.06, 1)):
        root = tmp_path / str(shift)

        def change(logits, shift=shift):
            logits[2, 2, 7] += shift
            return logits

        assert run(indexer, write_trace(root, change=change)) == code
    assert "see doc-0, token 2" in capsys.readouterr().err


def test_figures_equal_plain_formulas():
    rng = np.random.default_rng(0)
    want = rng.normal(size=700)
    want[:50] = rng.uniform(-4e-3, 4e-3, 50)  # may have either sign
    got = want + rng.normal(size=700) / 4
    row = compare_logits(got, want, document="d", token=1, layer=2)
    assert row[:4] == ("d", 1, 2, 700)
    assert row.pearson == pytest.approx(np.corrcoef(got, want)[0, 1], abs=1e-12)
    assert row.difference == np.abs(got - want).max()
    large = [(g, w) for g, w in zip(got, want, strict=True) if abs(w) > 5e-3]
    assert row.signed == len(large) <= 650
    assert row.agreed == sum((g > 0) == (w > 0) for g, w in large) < row.signed
    for share, k in zip(row.overlaps, (10, 512), strict=True):
        best = [set(sorted(range(700), key=lambda n: -x[n])[:k]) for x in (got, want)]
        assert share == len(best[0] & best[1]) / k < 1
    few = compare_logits(want[:5], want[:5], document="d", token=0, layer=0)
    assert few.overlaps == (1, 1) and few.signed == 0 and few.pearson == pytest.approx(1)


def test_what_cannot_be_compared_does_not_pass(tmp_path, capsys):
    def constant(logits):
        logits[0, 0, :57] = 0.25
        return logits

    row = compare_logits(np.ones(4), np.ones(4), document="d", token=0, layer=0)
    assert math.isnan(row.pearson) and row.difference == 0
    indexer, out = write_weights(tmp_path / "x.safetensors"), tmp_path / "F.json"
    assert run(indexer, write_trace(tmp_path / "set", change=constant), "--json", out) == 1
    assert "failed: layer 0: Pearson nan" in capsys.readouterr().err
    layers = json.loads(out.read_text(), parse_constant=pytest.fail)["layers"]
    assert layers[0]["pearson"] is None and not layers[0]["passes"] and layers[1]["passes"]


def with_value(index, value):
    def change(logits):
        logits[index] = value
        return logits

    return change


def test_bad_input_exits_with_2_and_one_line_that_says_why(tmp_path, capsys):
    good = write_weights(tmp_path / "good.safetensors")
    docs = write_document(tmp_path / "docs")
    (tmp_path / "empty").mkdir()
    cut = write_document(tmp_path / "cut") / "doc_00000.pkl"
    cut.write_bytes(cut.read_bytes()[:-500])
    none = {f"logits_layer_{i}_token_{t}": None for i in LAYERS for t in range(3)}
    short = {f"hidden_layer_{i}": np.zeros((TOKENS, 9), np.float32) for i in LAYERS}
    wide = tmp_path / "layers.safetensors"
    fields = dataclasses.replace(SMALL, target_layers=(0, 5, 7))
    renamed = {n.replace(".l2.", ".l7."): x for n, x in WEIGHTS.items()}
    write_indexer(wide, IndexerFile(fields, {n: renamed[n] for n in sorted(renamed)}))
    cases = (
        (good, tmp_path / "empty", "must have finished traces or doc_*.pkl, got none"),
        (good, tmp_path / "absent", "must have finished traces or doc_*.pkl, got none"),
        (good, write_document(tmp_path / "a", **none), "none of 1 documents has golden logits"),
        (good, write_trace(tmp_path / "b", golden=False), "none of 1 documents has golden logits"),
        (good, tmp_path / "cut", "doc_00000.pkl"),
        (good, write_document(tmp_path / "c", compk_layer_5=None), "compk_layer_5 is missing"),
        (
            good,
            write_document(tmp_path / "d", logits_layer_5_token_1=None),
            "logits_layer_5_token_1 is missing",
        ),
        (
            good,
            write_document(tmp_path / "e", **short),
            "hidden_layer_0 must have the indexer's 24",
        ),
        (wide, docs, "hidden_layer_7 is missing"),
        (wide, write_trace(tmp_path / "f"), "must have the indexer's layers [7]"),
        (
            write_weights(tmp_path / "rope.safetensors", rope_theta=1e4),
            tmp_path / "f",
            "rope_theta must be the indexer's",
        ),
        (
            good,
            write_trace(tmp_path / "g", change=with_value((1, slice(None), 3), np.nan)),
            "golden logits must be finite for the first entries",
        ),
        (good, write_trace(tmp_path / "h", change=with_value((0, 0, 3), np.inf)), "must be finite"),
        (good, write_trace(tmp_path / "i", change=with_value(1, np.nan)), "must be finite"),
        (good, write_trace(tmp_path / "j", change=with_value((0, 0, 56), np.nan)), "alike at all"),
        (tmp_path / "no.safetensors", docs, "No such file"),
    )
    for indexer, traces, message in cases:
        assert run(indexer, traces) == 2, message
        captured = capsys.readouterr()
        (line,) = captured.err.splitlines()
        assert line.startswith("error: ") and message in line
        assert captured.out == ""


def test_a_place_for_figures_that_cannot_be_written_is_refused_first(tmp_path, capsys):
    for path, message in (
        (tmp_path / "no" / "f.json", "in a directory that is there"),
        (tmp_path, "a file, not a directory"),
    ):
        assert run(tmp_path / "no.safetensors", tmp_path, "--json", str(path)) == 2
        assert f"--json must be {message}" in capsys.readouterr().err


def test_a_damaged_array_is_bad_input_rather_than_a_failure(tmp_path, capsys):
    root = write_trace(tmp_path / "set")
    files = [path for path in (root / "doc-0" / "keys").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    largest.write_bytes(data)
    assert run(write_weights(tmp_path / "x.safetensors"), root) == 2
    assert "keys" in capsys.readouterr().err


@pytest.mark.slow
def test_a_widened_indexer_passes_on_its_backbones_logits_and_a_random_one_fails(tmp_path, capsys):
    """Ordinal 1 is layer 4 of the backbone."""
    leaves, rng = small_model.leaves("f32", MODEL), np.random.default_rng(0)
    hidden = rng.standard_normal((3, 2, MODEL.hidden_size), dtype=np.float32)
    keys = rng.standard_normal((60, 2, MODEL.index_head_dim), dtype=np.float32)
    positions = 240 + np.arange(3)
    logits = np.full((3, 2, 60), np.nan, np.float32)
    for i, layer in enumerate((1, 4)):
        every = jnp.broadcast_to(keys[:, i], (3, 60, keys.shape[2]))
        logits[:, i] = native_logits(leaves, layer, hidden[:, i], jnp.asarray(positions), every)
    info = TraceInfo(
        name="doc",
        source="test",
        model=None,
        target_layers=(0, 1),
        csa_layers=2,
        csa_ratio=4,
        page_entries=8,
        prompt_tokens=240,
        rope=KeyRope.of_model(MODEL),
        votes=VoteConfig(min_layers=2),
    )
    none = SparseRows(np.zeros(0, np.int32), np.zeros(0, np.uint8), np.zeros(4, np.int64))
    options = {"hidden_size": MODEL.hidden_size, "hidden_dtype": np.float32, "mass": False}
    with TraceWriter(tmp_path / "set", info, **options) as writer:
        writer.append(hidden, positions, none)
        writer.finish(Keys(keys, None), logits)
    cfg = IndexerConfig.for_model(MODEL, target_layers=(0, 1), n_heads=64, q_lora_rank=48)
    wide, other = (tmp_path / name for name in ("wide.safetensors", "random.safetensors"))
    save_indexer(wide, widen(cfg, MODEL, leaves, jax.random.key(0)))
    save_indexer(other, MemoryIndexer(cfg, random_leaves(cfg, jax.random.key(0))))
    assert run(wide, tmp_path / "set") == 0
    assert run(other, tmp_path / "set") == 1
    failed = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1] for line in failed] == [" layer 0", " layer 1"]
