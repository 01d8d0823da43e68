"""Logits of many tokens at once are those of the memory indexer, one token at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.config import ConfigError
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from train.quality import scoring
from train.quality.scoring import TOKENS, Scorer, padded_size
from train.traces.trace_info import E4M3, Keys

CFG = IndexerConfig(
    target_layers=(0, 2),
    hidden_size=16,
    n_heads=6,
    q_lora_rank=12,
    head_dim=32,
    rope_head_dim=16,
)
# Float32 sums of 32 products and 6 heads, in other orders, of logits about 1.
ROUNDING = 2e-5


def indexer(cfg: IndexerConfig, seed: int = 0) -> MemoryIndexer:
    return MemoryIndexer(cfg, random_leaves(cfg, jax.random.key(seed)))


def case(tokens: int, entries: int, key_format: str = "fp8"):
    """Hidden states, positions and keys."""
    rng = np.random.default_rng(entries)
    hidden = rng.standard_normal((tokens, 2, 16)).astype(ml_dtypes.bfloat16)
    positions = np.sort(rng.choice(5000, tokens, replace=False)).astype(np.int32)
    values = rng.standard_normal((entries, 2, 32)).astype(np.float32)
    if key_format == "fp8":
        scale = rng.uniform(0.5, 2, (entries, 2)).astype(np.float32)
        return hidden, positions, Keys(values.astype(E4M3), scale)
    return hidden, positions, Keys(values.astype(np.dtype(key_format)), None)


def one_by_one(module: MemoryIndexer, hidden, positions, keys: Keys) -> np.ndarray:
    """[T, L, N] by the indexer itself, without padding, from keys in float32."""
    values = keys.dequantised()
    planes = [codec.DensePlanes(jnp.asarray(values[None, :, i])) for i in range(2)]
    score = jax.jit(lambda x, at: module(x, at, planes))
    inputs = zip(jnp.asarray(hidden)[:, :, None], jnp.asarray(positions)[:, None], strict=True)
    rows = [score(x, at) for x, at in inputs]
    return np.stack([np.asarray(row)[:, 0] for row in rows])


def test_padded_sizes_are_few_and_waste_at_most_a_third() -> None:
    assert [padded_size(n) for n in (0, 1, 512, 513, 768, 769, 1024, 1025, 65536)] == [
        *(512, 512, 512, 768, 768, 1024, 1024, 1536, 65536)
    ]
    assert all(n <= padded_size(n) <= 1.5 * n for n in range(512, 9000))


@pytest.mark.parametrize(  # three padded sizes, one of them filled
    ("entries", "key_format"), [(512, "fp8"), (700, "bfloat16"), (1000, "float32")]
)
def test_logits_equal_the_indexers_at_every_padded_size(entries: int, key_format: str) -> None:
    module = indexer(CFG)
    hidden, positions, keys = case(TOKENS + 3, entries, key_format)
    got = Scorer(CFG).logits(module, hidden, positions, keys, entries)
    want = one_by_one(module, hidden, positions, keys)
    assert got.shape == want.shape and got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=ROUNDING, atol=ROUNDING)


def test_logits_in_blocks_of_keys_equal_those_of_all_at_once(monkeypatch) -> None:
    module = indexer(CFG)
    hidden, positions, keys = case(3, 1000)
    want = Scorer(CFG).logits(module, hidden, positions, keys, 1000)
    monkeypatch.setattr(scoring, "SCORE_BLOCK_BYTES", TOKENS * 4 * CFG.n_heads * 300)
    scoring._logits.clear_cache()
    got = Scorer(CFG).logits(module, hidden, positions, keys, 1000)
    scoring._logits.clear_cache()
    np.testing.assert_allclose(got, want, rtol=ROUNDING, atol=ROUNDING)


def test_keys_that_were_not_asked_for_are_never_read() -> None:
    module = indexer(CFG)
    hidden, positions, keys = case(4, 600)
    want = Scorer(CFG).logits(module, hidden, positions, keys, 530)
    values, scale = keys.values.copy(), keys.scale.copy()
    values.view(np.uint8)[530:] = 0x7F  # NaN
    scale[530:] = np.inf
    got = Scorer(CFG).logits(module, hidden, positions, Keys(values, scale), 530)
    np.testing.assert_array_equal(got, want)
    # A NaN among the entries stays where it is: one that exists later harms no earlier token.
    values.view(np.uint8)[:530] = keys.values.view(np.uint8)[:530]
    late = Scorer(CFG).logits(module, hidden, positions, Keys(values, scale), 540)
    np.testing.assert_array_equal(late[..., :530], want)
    assert np.isnan(late[..., 530:]).all()


def test_no_program_is_compiled_anew_for_other_parameters_or_lengths() -> None:
    scoring._logits.clear_cache()
    hidden, positions, keys = case(9, 500)
    first = Scorer(CFG).logits(indexer(CFG), hidden, positions, keys, 500)
    second = Scorer(CFG).logits(indexer(CFG, 1), hidden[:2], positions[:2], keys, 430)
    assert scoring._logits._cache_size() == 1
    assert not np.array_equal(first[:2, :, :430], second)


def test_no_tokens_have_no_logits() -> None:
    hidden, positions, keys = case(1, 40)
    got = Scorer(CFG).logits(indexer(CFG), hidden[:0], positions[:0], keys, 40)
    assert got.shape == (0, 2, 40)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.zeros((4, 1, 16), np.float32)}, r"hidden must be \[4, 2, 16\]"),
        ({"keys": Keys(np.zeros((9, 2, 8), np.float32), None)}, r"keys must be \[N, 2, 32\]"),
        ({"most_entries": 41}, r"most_entries must be in 0\.\.40, got 41"),
        ({"indexer": indexer(dataclasses.replace(CFG, n_heads=2))}, "the scorer's"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    hidden, positions, keys = case(4, 40)
    args = {"indexer": indexer(CFG), "hidden": hidden, "positions": positions, "keys": keys}
    with pytest.raises(ConfigError, match=message):
        Scorer(CFG).logits(**(args | {"most_entries": 40} | change))
