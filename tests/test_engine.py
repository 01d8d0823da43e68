"""The engine around a small model: what compiles, what a row depends on, where decoding stops."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from lsa_jax.cache.state import DecodeState, token_room
from lsa_jax.config import CacheConfig, ConfigError
from lsa_jax.engine import Engine, capacity_for
from lsa_jax.sampling import Greedy, Sampling
from tests import small_model

CACHE = CacheConfig(kv_format="float32", page_entries=4)
CAPACITY = 64
KEY = jax.random.key(5)
SAMPLING = Sampling(temperature=1.2, top_k=20, top_p=0.9)
# Float32 sums in another order: logits are of size 1, and a handful of layers of a few hundred
# terms each move them by some 1e-6.
TOLERANCE = 2e-5


def prompt(length, seed=0):
    return np.random.default_rng(seed).integers(2, 94, length).tolist()


PROMPTS = [prompt(21, 1), prompt(3, 2), prompt(34, 3)]


def new_engine(**options):
    return Engine(small_model.build(), CACHE, **{"prefill_chunk": 16, "max_burst": 8, **options})


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Half the compile time; what these tests check does not depend on XLA's optimisations."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def engine(quick_compilation):
    """Shared, so that its programs compile once for all tests."""
    return new_engine()


def generate(engine, prompts, steps, *, sampler=SAMPLING, stop=(), decoder=None):
    """Prefill and up to `steps` tokens a row, the first of them from the prefill."""
    state = engine.start(batch=len(prompts), capacity=CAPACITY)
    logits, state = engine.prefill(state, prompts)
    token = engine.sample(logits, sampler, KEY, state)
    rows = [[int(t)] for t in token]
    for burst, _ in (decoder or engine).stream(
        state, token, max_new_tokens=steps, sampler=sampler, key=KEY, stop=stop
    ):
        for row, tokens, count in zip(rows, burst.tokens, burst.count, strict=True):
            row += np.asarray(tokens)[: int(count)].tolist()
    return rows


def row(state: DecodeState, b: int):
    return jax.tree.map(lambda x: np.asarray(x[b]), state)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    def check(x, y):
        np.testing.assert_allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE)

    jax.tree.map(check, a, b)


@pytest.fixture
def xla_compilations():
    """Names of the functions that XLA compiles while a test runs, as JAX itself reports them."""
    names = []

    def listen(event, seconds, **details):
        del seconds
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(details["fun_name"])

    monitoring.register_event_duration_secs_listener(listen)
    yield names
    monitoring.unregister_event_duration_listener(listen)


def engine_programs(names: list[str]) -> list[str]:
    """The engine's own among what XLA compiled, by what they do."""
    return sorted(
        name for name in ("decode", "extend", "sample") for n in names if n == f"jit({name})"
    )


def test_prompts_and_lengths_share_programs_and_the_counter_counts_them(xla_compilations):
    engine = new_engine(prefill_chunk=32)
    generate(engine, [prompt(40), prompt(3)], 9)  # chunks of 32 and 16, sample, decode
    assert engine.compilations == 4
    assert engine_programs(xla_compilations) == ["decode", "extend", "extend", "sample"]
    assert engine.compile_seconds > 0

    xla_compilations.clear()
    for lengths, steps in (((33, 1), 2), ((48, 47), 5), ((7, 32), 9), ((16, 0), 30)):
        generate(engine, [prompt(n, seed=9) for n in lengths], steps)
    assert xla_compilations == []
    assert engine.compilations == 4


def test_a_new_capacity_or_batch_compiles_anew(engine, xla_compilations):
    base = engine.compilations
    state = engine.start(batch=1, capacity=2 * CAPACITY)
    logits, state = engine.prefill(state, PROMPTS[:1])
    assert engine.compilations == base + 1
    engine.sample(logits, SAMPLING, KEY, state)
    assert engine.compilations == base + 2
    state = engine.start(batch=2, capacity=2 * CAPACITY)
    engine.sample(np.zeros((2, 94), np.float32), SAMPLING, KEY, state)
    assert engine.compilations == base + 3
    assert engine_programs(xla_compilations) == ["extend", "sample", "sample"]


def test_rows_of_mixed_lengths_equal_the_rows_alone(engine):
    state = engine.start(batch=3, capacity=CAPACITY)
    logits, state = engine.prefill(state, PROMPTS)
    token = jnp.array([5, 6, 7], jnp.int32)
    burst, state = engine.decode(state, token, steps=8, sampler=Greedy(), key=KEY, keep_logits=True)
    for b, text in enumerate(PROMPTS):
        alone = engine.start(batch=1, capacity=CAPACITY)
        want, alone = engine.prefill(alone, [text])
        assert_close(logits[b], want[0])
        want, alone = engine.decode(
            alone, token[b : b + 1], steps=8, sampler=Greedy(), key=KEY, keep_logits=True
        )
        assert burst.tokens[b].tolist() == want.tokens[0].tolist()
        assert_close(burst.logits[b], want.logits[0])
        assert_close(row(state, b), row(alone, 0))


@pytest.mark.slow
def test_the_chunk_size_changes_no_logit_and_no_state(engine):
    text = prompt(61)
    start = engine.start(batch=1, capacity=CAPACITY)
    (in_chunks,), state = engine.prefill(start, [text], all_logits=True)
    assert in_chunks.shape == (61, 94) and in_chunks.dtype == np.float32
    one_shot = new_engine(prefill_chunk=64)
    start = one_shot.start(batch=1, capacity=CAPACITY)
    (want,), want_state = one_shot.prefill(start, [text], all_logits=True)
    assert_close(in_chunks, want)
    assert_close(state, want_state)

    parts = []  # several prefills, at offsets that divide nothing
    state = engine.start(batch=1, capacity=CAPACITY)
    for begin, end in ((0, 1), (1, 8), (8, 31), (31, 61)):
        (part,), state = engine.prefill(state, [text[begin:end]], all_logits=True)
        parts.append(part)
    assert_close(np.concatenate(parts), want)
    assert_close(state, want_state)


def test_prefill_gives_each_rows_last_logits_and_leaves_empty_rows_alone(engine):
    state = engine.start(batch=3, capacity=CAPACITY)
    _, state = engine.prefill(state, PROMPTS)
    before = row(state, 1)
    texts = [prompt(20, 8), [], prompt(5, 9)]
    done = []
    copy = jax.tree.map(jnp.copy, state)
    last, state = engine.prefill(state, texts, progress=done.append)
    rows, _ = engine.prefill(copy, texts, all_logits=True)
    assert done == [16, 20]
    assert [len(r) for r in rows] == [20, 0, 5]
    assert_close(last[0], rows[0][-1])
    assert_close(last[2], rows[2][-1])
    assert not np.any(last[1])
    assert_same(row(state, 1), before)
    assert state.lengths.tolist() == [41, 3, 39]


def test_kept_logits_are_those_of_a_forward_over_the_generated_text(engine):
    state = engine.start(batch=3, capacity=CAPACITY)
    logits, state = engine.prefill(state, PROMPTS)
    token = engine.sample(logits, Greedy(), KEY, state)
    assert token.tolist() == np.argmax(logits, -1).tolist()
    burst, _ = engine.decode(state, token, steps=8, sampler=Greedy(), key=KEY, keep_logits=True)
    assert burst.logits.dtype == jnp.float32
    fed = np.concatenate([np.asarray(token)[:, None], burst.tokens[:, :-1]], axis=1)
    state = engine.start(batch=3, capacity=CAPACITY)
    texts = [text + ids.tolist() for text, ids in zip(PROMPTS, fed, strict=True)]
    forced, _ = engine.prefill(state, texts, all_logits=True)
    for b in range(3):
        assert_close(burst.logits[b], forced[b][-8:])
        assert np.argmax(burst.logits[b], -1).tolist() == burst.tokens[b].tolist()


def test_done_rows_produce_nothing_and_keep_their_state(engine):
    state = engine.start(batch=3, capacity=CAPACITY)
    _, state = engine.prefill(state, PROMPTS)
    token, before = jnp.array([5, 6, 7], jnp.int32), row(state, 1)
    copy = jax.tree.map(jnp.copy, state)
    done = jnp.array([False, True, False])
    burst, after = engine.decode(state, token, steps=8, sampler=Greedy(), key=KEY, done=done)
    assert burst.count.tolist() == [8, 0, 8]
    assert burst.done.tolist() == [False, True, False]
    assert burst.logits is None
    assert_same(row(after, 1), before)
    assert burst.last_token(token).tolist() == [burst.tokens[0, 7], 6, burst.tokens[2, 7]]
    free, _ = engine.decode(copy, token, steps=8, sampler=Greedy(), key=KEY)
    assert burst.tokens[::2].tolist() == free.tokens[::2].tolist()


def test_a_stop_token_is_a_rows_last_and_its_state_stops_there(engine):
    state = engine.start(batch=3, capacity=CAPACITY)
    _, state = engine.prefill(state, PROMPTS)
    token = jnp.array([5, 6, 7], jnp.int32)
    copies = [jax.tree.map(jnp.copy, state) for _ in range(2)]
    free, _ = engine.decode(state, token, steps=8, sampler=Greedy(), key=KEY)
    stop = (int(free.tokens[1, 2]), 1)
    # Where each row first meets a stop token; 8 where it does not.
    meets = [next((i for i, t in enumerate(r) if int(t) in stop), 8) for r in free.tokens]
    assert meets[1] <= 2 < max(meets)
    burst, after = engine.decode(copies[0], token, steps=8, sampler=Greedy(), key=KEY, stop=stop)
    counts = [min(m + 1, 8) for m in meets]
    assert burst.count.tolist() == counts
    assert burst.done.tolist() == [m < 8 for m in meets]
    for b, n in enumerate(counts):
        assert burst.tokens[b, :n].tolist() == free.tokens[b, :n].tolist()
    _, cut = engine.decode(copies[1], token, steps=counts[1], sampler=Greedy(), key=KEY)
    assert_same(row(after, 1), row(cut, 1))  # the stop token itself has not been fed


def test_streaming_ends_with_max_new_tokens_or_once_every_row_has_stopped(engine):
    for wanted in (1, 2, 20):
        rows = generate(engine, PROMPTS, wanted, sampler=Greedy())
        assert [len(r) for r in rows] == [wanted] * 3
    full = generate(engine, PROMPTS[:1], 20, sampler=Greedy())[0]
    first = {token: full.index(token) for token in full}
    stop = max(first, key=first.__getitem__)  # the token that shows up last
    assert first[stop] > 8  # several bursts in
    assert generate(engine, PROMPTS[:1], 20, sampler=Greedy(), stop=(stop,)) == [
        full[: first[stop] + 1]
    ]
    assert generate(engine, PROMPTS[:1], 20, sampler=Greedy(), stop=(full[0],)) == [full[:1]]


def test_the_old_state_is_donated(engine):
    state = engine.start(batch=3, capacity=CAPACITY)
    logits, prefilled = engine.prefill(state, PROMPTS)
    assert all(x.is_deleted() for x in jax.tree.leaves(state))
    token = engine.sample(logits, Greedy(), KEY, prefilled)
    assert not any(x.is_deleted() for x in jax.tree.leaves(prefilled))
    engine.decode(prefilled, token, steps=8, sampler=Greedy(), key=KEY)
    assert all(x.is_deleted() for x in jax.tree.leaves(prefilled))


def test_growing_half_way_continues_as_if_there_had_been_room_from_the_start(engine):
    text = prompt(90, 4)
    state = engine.start(batch=1, capacity=CAPACITY)
    _, state = engine.prefill(state, [text[:50]])
    state = engine.grow(state, 4 * CAPACITY)
    (got,), state = engine.prefill(state, [text[50:]], all_logits=True)
    roomy = engine.start(batch=1, capacity=4 * CAPACITY)
    (want,), roomy = engine.prefill(roomy, [text], all_logits=True)
    assert_close(got, want[50:])
    assert_close(state, roomy)


@pytest.fixture(scope="module")
def sampled(engine):
    """What the shared engine samples, in bursts of at most 8 steps."""
    return generate(engine, PROMPTS, 14)


@pytest.mark.parametrize("max_burst", [1, 3, 64])
def test_burst_sizes_do_not_change_what_is_sampled(engine, sampled, max_burst):
    decoder = new_engine(max_burst=max_burst)
    assert generate(engine, PROMPTS, 14, decoder=decoder) == sampled


def test_a_rows_draws_do_not_depend_on_the_rows_around_it(engine, sampled):
    others = generate(engine, [prompt(30, 11), PROMPTS[1], prompt(2, 12)], 14)
    assert others[1] == sampled[1]
    assert others[0] != sampled[0] and others[2] != sampled[2]
    assert generate(engine, PROMPTS[:1], 14) == sampled[:1]


def test_equal_prompts_in_one_batch_draw_differently(engine):
    first, second, third = generate(engine, [PROMPTS[0]] * 3, 14)
    assert first != second and second != third and first != third


def test_prompts_that_do_not_fit_the_state_are_refused(engine):
    state = engine.start(batch=2, capacity=CAPACITY)
    for prompts in ([[1]], [[], []], [[1], [2], [3]]):
        with pytest.raises(ConfigError, match="prompts must be 2 rows with at least one token"):
            engine.prefill(state, prompts)


def test_tokens_past_the_states_last_page_are_refused_not_dropped(engine):
    empty = engine.start(batch=1, capacity=CAPACITY)
    room = token_room(engine.cfg, empty)
    assert room >= CAPACITY

    def holding(tokens: int) -> DecodeState:
        return dataclasses.replace(empty, lengths=jnp.array([tokens], jnp.int32))

    wanted = f"capacity for {room + 1} tokens, it holds {room}"
    with pytest.raises(ConfigError, match=wanted):
        engine.prefill(holding(room - 1), [[1, 2]])
    with pytest.raises(ConfigError, match=wanted):
        engine.decode(holding(room), jnp.array([1]), steps=1, sampler=SAMPLING, key=KEY)
    _, state = engine.prefill(holding(room - 2), [[1, 2]])
    assert state.lengths.tolist() == [room]


@pytest.mark.parametrize("steps", [0, 9])
def test_steps_beyond_one_burst_are_refused(engine, steps):
    state = engine.start(batch=1, capacity=CAPACITY)
    token = jnp.array([1], jnp.int32)
    with pytest.raises(ConfigError, match=rf"steps must be in 1\.\.max_burst=8, got {steps}"):
        engine.decode(state, token, steps=steps, sampler=Greedy(), key=KEY)


@pytest.mark.parametrize("options", [{"prefill_chunk": 0}, {"max_burst": 0}])
def test_an_engine_of_no_chunk_or_burst_is_refused(options):
    with pytest.raises(ConfigError, match="prefill_chunk and max_burst must be positive"):
        new_engine(**options)


def test_capacities_are_powers_of_two_up_to_the_models_limit():
    got = [capacity_for(n, 5000) for n in (1, 256, 257, 4096, 4097, 5000)]
    assert got == [256, 256, 512, 4096, 5000, 5000]
    with pytest.raises(ConfigError, match="max_position_embeddings=5000, got 5001"):
        capacity_for(5001, 5000)
