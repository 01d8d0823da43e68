"""Golden documents, as torch pickled them and from NumPy arrays, and what their traces have."""

import pickle

import numpy as np

from lsa_jax.config_io import load_config
from tests.golden import doc_values
from tests.golden.doc_values import DROPPED, ENTRIES, FOLDER, LAYERS, PROMPT, TOKENS
from train.traces.trace_info import KeyRope

GOLDENS = sorted(FOLDER.glob("doc_*.pkl"))


def write_doc(path, protocol=4, **changes):
    """The golden document from NumPy arrays, with other items; None leaves one out."""
    items = {
        key: value for key, value in (doc_values.items() | changes).items() if value is not None
    }
    path.write_bytes(pickle.dumps(items, protocol))
    return path


def check_golden(trace):
    want = np.stack([doc_values.hidden(i) for i in LAYERS], axis=1)
    np.testing.assert_array_equal(trace.read("hidden").astype(np.float32), want)
    codes, scales = zip(*(doc_values.keys(i) for i in LAYERS), strict=True)
    keys = trace.keys()
    np.testing.assert_array_equal(keys.values.view(np.uint8), np.stack(codes, axis=1))
    np.testing.assert_array_equal(keys.scale, np.stack(scales, axis=1))
    np.testing.assert_array_equal(trace.read("positions"), PROMPT + np.arange(TOKENS))
    formed = [max(0, 4 * j + 3 - PROMPT) for j in range(ENTRIES)]
    np.testing.assert_array_equal(trace.read("formed_at"), formed)
    check_labels(trace.votes())
    for token, logits in enumerate(trace.golden_logits()):
        count = (PROMPT + token + 1) // 4
        want = [doc_values.logits(i, token) for i in LAYERS]
        np.testing.assert_array_equal(logits[:, :count], want)
        assert np.isnan(logits[:, count:]).all()
    assert trace.info.target_layers == LAYERS and trace.mass() is None
    assert (trace.info.prompt_tokens, trace.info.dropped_labels) == (PROMPT, DROPPED)
    assert trace.info.rope == KeyRope.of_model(load_config("v4_flash"))
    assert trace.info.model is None and trace.info.source.startswith(
        f"{trace.path.name}.pkl sha256"
    )


def check_labels(votes):
    indices, scores, pointers = doc_values.labels()
    for token in range(TOKENS):
        span = slice(pointers[token], pointers[token + 1])
        pairs = zip(indices[span].tolist(), scores[span].tolist(), strict=True)
        want = [pair for pair in pairs if pair[0] < ENTRIES]
        got = list(zip(*(part.tolist() for part in votes.row(token)), strict=True))
        assert got == sorted(want, key=lambda pair: (-pair[1], pair[0]))
