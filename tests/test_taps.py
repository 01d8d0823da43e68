"""What is tapped equals an independent computation in NumPy, and tapping changes no token."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lsa_jax.cache import codec
from lsa_jax.config import ConfigError, KVFormat
from lsa_jax.engine import Engine
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.widening import widen
from lsa_jax.sampling import Greedy
from tests import lsa_models, small_model
from tests.reference.numpy_reference import Reference
from train.traces.recording import Document, Nothing, RecordConfig, Recorder, target_keys
from train.traces.taps import GOLDEN_STEPS, TapConfig, TappedEngine
from train.traces.trace import open_trace
from train.traces.trace_info import E4M3
from train.traces.votes import VoteConfig

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CONFIG = lsa_models.CONFIG  # layers csa, hca, csa; each attends its top 3 entries
RATIO, TARGETS, TOP_K, STEPS = CONFIG.csa_ratio, (0, 1), 5, 25
WINDOW = CONFIG.sliding_window
EPS = 0.03  # of mass, so that some is left out
VOTES = VoteConfig(top_k=TOP_K, top_p=0.6, min_layers=1)
PROMPT = lsa_models.prompt(37)
KEY = jax.random.key(0)
# Float32 against float64: some hundred terms, three layers. Logits and states are of size 1.
ERROR = 2e-5


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the compile time; what these tests check does not depend on XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def new_recorder(kv: KVFormat = "float32", **options):
    config = RecordConfig(targets=TARGETS, votes=VOTES, max_new_tokens=STEPS, mass_eps=EPS)
    model, cache = lsa_models.model(), lsa_models.cache(kv)
    return Recorder(model, cache, config, **{"prefill_chunk": 64, "max_burst": 16, **options})


@pytest.fixture(scope="module")
def recorder(quick_compilation):
    """Shared, so that its programs compile once for all tests."""
    return new_recorder()


@pytest.fixture(scope="module")
def trace(recorder, tmp_path_factory):
    """A recorded document of STEPS tokens, in a burst of 16 and one of 9."""
    document = Document("doc", "a test", PROMPT)
    return open_trace(recorder.record(document, tmp_path_factory.mktemp("set")).path)


@pytest.fixture(scope="module")
def answer(recorder):
    """What the engine itself decodes after the prompt, first token first, and one more."""
    engine, (token, state) = begun(recorder)
    said = [int(token[0])]
    for steps in (16, 9):
        burst, state = engine.decode(state, token, steps=steps, sampler=Greedy(), key=KEY)
        token = burst.last_token(token)
        said += np.asarray(burst.tokens)[0, :steps].tolist()
    return said


def begun(recorder):
    engine = recorder.engine
    logits, state = engine.prefill(engine.start(batch=1, capacity=256), [PROMPT])
    return engine, (jnp.argmax(logits, axis=-1).astype(jnp.int32), state)


class Spy(Reference):
    """The reference, noting what its CSA layers see, by layer."""

    def __init__(self, *args):
        super().__init__(*args)
        self.inputs, self.native, self.shares, self.path = {}, {}, {}, ""

    def attention(self, x, layer_type, path, state):
        self.path = path
        self.inputs[path] = x[0]
        return super().attention(x, layer_type, path, state)

    def index_scores(self, x, latent, keys, positions, path):
        scores = super().index_scores(x, latent, keys, positions, path)
        self.native[self.path] = scores[0]
        return scores

    def _attend(self, query, keys, visible, sink):
        """Probabilities, once more and in their own way: head by head, as ratios of sums."""
        dots = np.einsum("thc,nc->htn", query[0], keys[0]) / np.sqrt(self.cfg.head_dim)
        odds = np.exp(dots) * visible[0]
        self.shares[self.path] = np.mean(
            odds / (odds.sum(-1, keepdims=True) + np.exp(sink)[:, None, None]), axis=0
        )
        return super()._attend(query, keys, visible, sink)


@pytest.fixture(scope="module")
def spy(answer):
    """The reference over prompt and answer, as one chunk."""
    weights = {path: np.asarray(leaf) for path, leaf in small_model.leaves("f32", CONFIG).items()}
    spy = Spy(CONFIG, weights)
    spy.streams(np.array([[*PROMPT, *answer[:STEPS]]]))
    return spy


LAYERS = ("layers.0.attn", "layers.2.attn")
ROWS = range(len(PROMPT), len(PROMPT) + STEPS)


def native(spy):
    """The reference's native logits [T, C, N] at the answer's tokens, and how many entries are."""
    logits = np.stack([spy.native[layer][ROWS] for layer in LAYERS], axis=1)
    return logits, (np.array(ROWS) + 1) // RATIO


def test_tokens_are_those_of_decoding_without_taps(recorder, answer):
    engine, (token, state) = begun(recorder)
    drawn = [int(token[0])]
    for steps in (16, 9):
        burst, _, state = engine.record(state, token, steps=steps)
        token = burst.last_token(token)
        drawn += np.asarray(burst.tokens)[0, :steps].tolist()
    assert drawn == answer
    assert len(set(drawn)) > 10, "a text that repeats itself would show little"


def test_hidden_states_are_the_attention_inputs_at_their_positions(trace, spy):
    np.testing.assert_array_equal(trace.read("positions"), ROWS)
    want = np.stack([spy.inputs[layer][ROWS] for layer in LAYERS], axis=1)
    np.testing.assert_allclose(trace.read("hidden"), want, atol=ERROR)


def test_golden_logits_are_the_native_indexers(trace, spy):
    want, exist = native(spy)
    golden = trace.golden_logits()
    assert golden.shape == (GOLDEN_STEPS, len(TARGETS), exist[GOLDEN_STEPS - 1])
    assert exist[0] < exist[GOLDEN_STEPS - 1], "an entry forms between them"
    for step, (got, n) in enumerate(zip(golden, exist, strict=False)):
        np.testing.assert_allclose(got[:, :n], want[step, :, :n], atol=ERROR)
        assert np.isnan(got[:, n:]).all()


def brute_force_votes(logits, cfg):
    """Spec 4.2 in words, for one token: {entry: votes} from rows of native logits [C, n]."""
    votes = {}
    for row in logits:
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))[: cfg.top_k]
        weights = np.exp([row[j] - row[order[0]] for j in order])
        running, keep = 0.0, 1
        for rank, share in enumerate(weights / weights.sum()):
            running += share
            assert abs(running - cfg.top_p) > 20 * ERROR, "rounding could decide: take a seed"
            keep = max(keep, rank + 1) if running <= cfg.top_p else keep
        for j in order[: keep + 1]:
            votes[j] = votes.get(j, 0) + 1
    return {j: n for j, n in votes.items() if n >= cfg.min_layers}


def test_votes_are_a_brute_force_count_over_all_csa_layers(trace, spy):
    logits, exist = native(spy)
    votes = trace.votes()
    wanted = [brute_force_votes(row[:, :n], VOTES) for row, n in zip(logits, exist, strict=True)]
    for t, want in enumerate(wanted):
        entries, scores = votes.row(t)
        assert dict(zip(entries.tolist(), scores.tolist(), strict=True)) == want
        assert list(scores) == sorted(scores, reverse=True)
    assert {n for want in wanted for n in want.values()} == {1, 2}
    assert max(map(max, wanted)) >= len(PROMPT) // RATIO, "one of the answer's own has votes"


def test_mass_is_the_attention_on_each_entry_summed_over_csa_layers(trace, spy):
    length = len(PROMPT) + STEPS
    want = np.sum([spy.shares[layer][ROWS, length:] for layer in LAYERS], axis=0)
    mass = trace.mass()
    got = np.zeros(want.shape)
    got[mass.row_numbers(), mass.indices] = mass.values
    assert got.shape[1] == trace.entries > CONFIG.index_topk
    assert np.abs(want - EPS).min() > ERROR, "rounding could decide: take another seed"
    np.testing.assert_array_equal(got > 0, want > EPS)
    kept = np.where(want > EPS, want, 0)
    np.testing.assert_allclose(got, kept, atol=ERROR, rtol=2**-11)  # stored as float16
    assert np.any((want > 0) & (want <= EPS)), "what is left out must be tested"
    assert 0.05 < want.sum(axis=1).mean() < len(LAYERS)


def test_keys_of_one_pass_are_those_of_a_second_over_prompt_and_answer(recorder, trace, answer):
    engine = recorder.engine
    whole = [*PROMPT, *answer[:STEPS]]
    _, state = engine.prefill(engine.start(batch=1, capacity=256), [whole])
    again = target_keys(CONFIG, TARGETS, state)
    keys = trace.keys()
    assert len(keys.values) == len(whole) // RATIO == len(again.values)
    np.testing.assert_allclose(keys.values, again.values, atol=ERROR)
    formed = trace.read("formed_at")
    ends = RATIO * np.arange(1, len(formed) + 1) - 1  # the last token of each
    np.testing.assert_array_equal(formed, np.maximum(ends - len(PROMPT), 0))


def test_a_replayed_answer_makes_the_trace_of_having_said_it(recorder, trace, answer, tmp_path):
    document = Document("doc", "a test", PROMPT, answer[:STEPS])
    again = open_trace(recorder.record(document, tmp_path).path)
    assert 2 * recorder.engine.replay_tokens < STEPS, "tokens are fed together, and several times"
    assert again.columns.keys() == trace.columns.keys() and again.info == trace.info
    for name in trace.columns:
        np.testing.assert_allclose(again.read(name), trace.read(name), atol=ERROR, err_msg=name)


def test_a_replay_feeds_the_answer_whatever_the_model_would_say(recorder, answer, tmp_path):
    """EOS within it does not end it either."""
    other = [(id_ + 1) % CONFIG.vocab_size for id_ in answer[:11]]
    other[3] = CONFIG.eos_token_id
    seen = []
    recorded = recorder.record(
        Document("doc", "a test", PROMPT, other), tmp_path, note=lambda *args: seen.append(args)
    )
    assert recorded.answer == tuple(other) and seen == [(other, False)]
    engine = recorder.engine
    _, state = engine.prefill(engine.start(batch=1, capacity=256), [[*PROMPT, *other]])
    again = target_keys(CONFIG, TARGETS, state)
    got = open_trace(recorded.path)
    np.testing.assert_allclose(got.keys().values, again.values, atol=ERROR)
    assert got.tokens == 11


@pytest.mark.slow
def test_an_answer_ends_before_its_stop_token(trace, answer, tmp_path):
    at = next(i for i in itertools.count(5) if answer[i] not in answer[:i])
    stopping = new_recorder(stop=[answer[at]])
    recorded = stopping.record(Document("doc", "a test", PROMPT), tmp_path)
    assert recorded.answer == tuple(answer[:at]) and recorded.stopped
    short = open_trace(recorded.path)
    np.testing.assert_array_equal(short.read("hidden"), trace.read("hidden")[:at])
    silent = new_recorder(stop=[answer[0]])
    with pytest.raises(Nothing, match="answer is empty"):
        silent.record(Document("other", "a test", PROMPT), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["doc"]


def test_a_widened_indexer_scores_the_trace_as_the_native_ones_did(trace):
    """States, positions and keys mean what a memory indexer takes them for."""
    sizes = IndexerConfig.for_model(CONFIG, target_layers=TARGETS, n_heads=40, q_lora_rank=48)
    wide = widen(sizes, CONFIG, small_model.leaves("f32", CONFIG), KEY)
    golden, keys = trace.golden_logits(), trace.keys()
    n = golden.shape[2]
    rows = np.repeat(keys.values[None, :n], GOLDEN_STEPS, axis=0)  # [G, n, L, K]
    planes = [codec.DensePlanes(jnp.asarray(rows[:, :, i])) for i in range(len(TARGETS))]
    hidden = trace.read("hidden")[:GOLDEN_STEPS].swapaxes(0, 1)
    positions = trace.read("positions")[:GOLDEN_STEPS]
    got = np.asarray(nnx.jit(lambda wide, *args: wide(*args))(wide, hidden, positions, planes))
    there = ~np.isnan(golden)
    assert 0 < there.sum() < there.size
    np.testing.assert_allclose(got.swapaxes(0, 1)[there], golden[there], atol=ERROR)


def test_prompts_that_are_too_short_or_too_long_are_named(recorder, tmp_path):
    for length, why in ((3 * RATIO - 1, "2 entries, 3 are wanted"), (8192 - STEPS + 1, "8193")):
        with pytest.raises(Nothing, match=why):
            recorder.record(Document("doc", "a test", [1] * length), tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_options_that_do_not_fit_are_refused(recorder):
    engine, (token, state) = begun(recorder)
    with pytest.raises(ConfigError, match="steps"):
        engine.record(state, token, steps=17)
    with pytest.raises(ConfigError, match=f"tokens must be 1..replay_tokens={WINDOW}, got 0"):
        engine.replay(state, [])
    two = engine.start(batch=2, capacity=256)
    for ask in (lambda: engine.record(two, token, steps=1), lambda: engine.replay(two, [1])):
        with pytest.raises(ConfigError, match="one row, got 2"):
            ask()
    votes = dataclasses.replace(VOTES, min_layers=3)
    config = RecordConfig(targets=TARGETS, votes=votes)
    with pytest.raises(ConfigError, match=r"votes.min_layers must be <= the model's 2 CSA"):
        Recorder(lsa_models.model(), lsa_models.cache(), config)


@pytest.mark.slow
def test_fp8_keys_are_the_codes_and_scales_of_the_cache(tmp_path):
    recorder = new_recorder("fp8")
    recorded = recorder.record(Document("doc", "a test", PROMPT), tmp_path)
    keys = open_trace(recorded.path).keys()
    assert keys.values.dtype == E4M3 and keys.scale is not None
    engine = recorder.engine
    whole = [*PROMPT, *recorded.answer]
    _, state = engine.prefill(engine.start(batch=1, capacity=256), [whole])
    again = target_keys(CONFIG, TARGETS, state)
    assert again.scale is not None
    np.testing.assert_allclose(keys.scale, again.scale, rtol=1e-3)
    same = keys.values.view(np.uint8) == again.values.view(np.uint8)
    assert same.mean() > 0.98, "a rounding that float32 noise decided is rare"
    error = np.abs(keys.dequantised() - again.dequantised())
    assert error.max() < np.abs(again.dequantised()).max() / 8  # a step of e4m3, and no more


@pytest.mark.slow
def test_without_anything_to_leave_out_all_entries_get_their_mass():
    """With room for as many entries as the top-k, a layer asks no indexer; votes still count."""
    wide = dataclasses.replace(CONFIG, index_topk=200)
    model = lsa_models.model(wide)
    taps = TapConfig(targets=TARGETS, top_k=TOP_K)
    engine = TappedEngine(model, lsa_models.cache(), taps, prefill_chunk=64, max_burst=4)
    logits, state = engine.prefill(engine.start(batch=1, capacity=256), [PROMPT])
    token = jnp.argmax(jnp.asarray(logits), axis=-1).astype(jnp.int32)
    burst, seen, _ = engine.record(state, token, steps=4)
    plain = Engine(model, lsa_models.cache(), prefill_chunk=64, max_burst=4)
    _, state = plain.prefill(plain.start(batch=1, capacity=256), [PROMPT])
    same, _ = plain.decode(state, token, steps=4, sampler=Greedy(), key=KEY)
    np.testing.assert_array_equal(burst.tokens, same.tokens)
    weights = {path: np.asarray(leaf) for path, leaf in small_model.leaves("f32", wide).items()}
    spy = Spy(wide, weights)
    fed = [int(token[0]), *np.asarray(burst.tokens)[0, :3].tolist()]
    spy.streams(np.array([[*PROMPT, *fed]]))
    for i, layer in enumerate(LAYERS):
        for step in range(4):
            want = spy.shares[layer][len(PROMPT) + step, len(PROMPT) + 4 :]
            got = np.zeros(64)
            # Places that nothing fills name entry 0, with no mass.
            np.add.at(got, np.asarray(seen.entries)[step, i], np.asarray(seen.mass)[step, i])
            np.testing.assert_allclose(got[: len(want)], want, atol=ERROR)
            assert (got[len(want) :] == 0).all()
