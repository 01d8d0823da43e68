"""Prefill and decode: compiled programs around one model; the state is a value passed through.

    engine = Engine(model, CacheConfig(kv_format="bfloat16"))
    state = engine.start(batch=1, capacity=4096)
    logits, state = engine.prefill(state, [prompt_ids])
    token = engine.sample(logits, Greedy(), key, state)
    burst, state = engine.decode(state, token, steps=64, sampler=Greedy(), key=key)

Every program has static shapes: prefill chunks come in a few sizes, decoding runs up to
`max_burst` steps in one call, and only a larger capacity or batch compiles anew.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from lsa_jax import shardings
from lsa_jax.cache.state import DecodeState, grow, token_room
from lsa_jax.config import CacheConfig, ConfigError
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Sampler, sample_rows

MIN_CHUNK = 16
MIN_CAPACITY = 256
STREAM_SECONDS = 0.25  # aim of one burst of `stream`: a reader should not wait for text longer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Burst:
    """What a call to `decode` produced. Row b's new tokens are tokens[b, :count[b]]; `done` rows
    have produced a stop token (which is their last one)."""

    tokens: Int[Array, "B steps"]
    count: Int[Array, " B"]
    done: Bool[Array, " B"]
    logits: Float[Array, "B steps V"] | None  # output after feeding each step's input token

    def last_token(self, before: Int[Array, " B"]) -> Int[Array, " B"]:
        """The token to feed next: the last one of this burst, or `before` where there is none."""
        tokens, count = np.asarray(self.tokens), np.asarray(self.count)
        last = tokens[np.arange(count.size), count - 1]  # on the host: it compiles nothing
        return jnp.asarray(np.where(count > 0, last, np.asarray(before)))


def empty_burst(done: Bool[Array, " B"], steps: int, vocab: int | None) -> Burst:
    """Room for `steps` steps; with `vocab`, for their logits too."""
    batch = done.shape[0]
    return Burst(
        tokens=jnp.zeros((batch, steps), jnp.int32),
        count=jnp.zeros((batch,), jnp.int32),
        done=done,
        logits=None if vocab is None else jnp.zeros((batch, steps, vocab), jnp.float32),
    )


class HasLengths(Protocol):
    """A decode state: it knows how many tokens each row has seen."""

    @property
    def lengths(self) -> Int[Array, " B"]:
        """Tokens of each row."""
        ...


def run_burst[State: HasLengths](
    forward: Callable[[State, Array, Array], tuple[Float[Array, "B V"], State]],
    state: State,
    burst: Burst,
    token: Int[Array, " B"],
    key: Array,
    steps: Int[Array, ""],
    *,
    sampler: Sampler,
    stop: tuple[int, ...],
    enough: Callable[[State, Array], Bool[Array, ""]] | None = None,
) -> tuple[Burst, State]:
    """Up to `steps` steps on the device: feed a token, draw the next; ends when all rows are done.

    `forward(state, token, live)` feeds the live rows and returns logits and the next state;
    `enough(state, live)` ends the burst before the next step.
    """
    stops = jnp.asarray(stop, jnp.int32)

    def step(carry: tuple[Array, Array, Burst, State]) -> Any:
        i, token, burst, state = carry
        live = ~burst.done
        logits, state = forward(state, token, live)
        token = jnp.where(live, sample_rows(sampler, logits, key, state.lengths), token)
        kept = burst.logits
        burst = Burst(
            tokens=burst.tokens.at[:, i].set(token),
            count=burst.count + live,
            done=burst.done | jnp.isin(token, stops),
            logits=None if kept is None else kept.at[:, i].set(logits),
        )
        return i + 1, token, burst, state

    def more(carry: tuple[Array, Array, Burst, State]) -> Array:
        i, _, burst, state = carry
        left = (i < steps) & ~jnp.all(burst.done)
        return left if enough is None else left & ~enough(state, ~burst.done)

    _, _, burst, state = jax.lax.while_loop(more, step, (jnp.int32(0), token, burst, state))
    return burst, state


def capacity_for(tokens: int, limit: int) -> int:
    """Capacity to allocate for `tokens`: the next power of two, so that lengths share programs."""
    if tokens > limit:
        raise ConfigError(
            f"prompt and new tokens must fit max_position_embeddings={limit}, got {tokens}"
        )
    return min(limit, max(MIN_CAPACITY, 1 << (tokens - 1).bit_length()))


class Engine:
    """Compiled prefill and decode of one model.

    `prefill_chunk` bounds activation memory (rounded up to a power of two), `max_burst` the steps
    of one decode call. `compile_seconds` and `compilations` count what was compiled so far.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheConfig,
        *,
        prefill_chunk: int = 1024,
        max_burst: int = 64,
        mesh: Mesh | None = None,
    ):
        if prefill_chunk < 1 or max_burst < 1:
            raise ConfigError(
                f"prefill_chunk and max_burst must be positive, got {prefill_chunk}, {max_burst}"
            )
        self.cfg, self.cache, self.model, self.mesh = model.cfg, cache, model, mesh
        self.prefill_chunk = max(MIN_CHUNK, 1 << (prefill_chunk - 1).bit_length())
        self.max_burst = max_burst
        self.compile_seconds, self.compilations = 0.0, 0
        # Flattened once: walking a module tree of a thousand leaves costs milliseconds per call.
        self._weights, self._treedef = jax.tree.flatten(model)
        self._programs: dict[Any, Any] = {}

    def start(self, *, batch: int, capacity: int) -> DecodeState:
        """An empty state."""
        state = self.model.empty_state(self.cache, batch=batch, capacity=capacity)
        return state if self.mesh is None else shardings.place_state(state, self.mesh)

    def grow(self, state: DecodeState, capacity: int) -> DecodeState:
        """The same state with room for `capacity` tokens a row."""
        state = grow(self.cfg, self.cache, state, capacity)
        return state if self.mesh is None else shardings.place_state(state, self.mesh)

    def prefill(
        self,
        state: DecodeState,
        prompts: Sequence[Sequence[int]],
        *,
        all_logits: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Array | list[np.ndarray], DecodeState]:
        """Appends prompts[b] to row b, in chunks; rows may differ in length, and may be empty.

        Returns float32 logits [B, V] at each row's last token (zeros where a row is empty), or with
        `all_logits` one host array [len(prompts[b]), V] per row. `progress` is called with the
        number of tokens of the longest row that the device has done so far.
        """
        lengths = np.array([len(p) for p in prompts], np.int32)
        if len(prompts) != state.lengths.shape[0] or not lengths.max(initial=0):
            raise ConfigError(
                f"prompts must be {state.lengths.shape[0]} rows with at least one token, "
                f"got lengths {lengths.tolist()}"
            )
        self._check_room(state, lengths)
        rows: list[list[np.ndarray]] = [[] for _ in prompts]
        last = jnp.zeros((len(prompts), self.cfg.vocab_size), jnp.float32)
        for at, size in self._chunks(int(lengths.max())):
            ids = np.zeros((len(prompts), size), np.int32)
            count = np.clip(lengths - at, 0, size)
            for b, prompt in enumerate(prompts):
                ids[b, : count[b]] = prompt[at : at + count[b]]
            logits, state = self._run(
                "extend", state, self._rows(ids), self._rows(count), all_logits
            )
            if all_logits:
                host = np.asarray(logits)
                for b, n in enumerate(count):
                    rows[b].append(host[b, :n])
            else:
                last = jnp.where((count > 0)[:, None], logits, last)
            if progress is not None:
                jax.block_until_ready(logits)
                progress(min(at + size, int(lengths.max())))
        return ([np.concatenate(row) for row in rows] if all_logits else last), state

    def _chunks(self, tokens: int) -> Iterator[tuple[int, int]]:
        """(offset, size) of full chunks, then one bucket that holds the rest."""
        full = tokens // self.prefill_chunk * self.prefill_chunk
        yield from ((at, self.prefill_chunk) for at in range(0, full, self.prefill_chunk))
        if rest := tokens - full:
            yield full, max(MIN_CHUNK, 1 << (rest - 1).bit_length())

    def sample(
        self,
        logits: Float[Array, "B V"] | np.ndarray,
        sampler: Sampler,
        key: Array,
        state: DecodeState,
    ) -> Int[Array, " B"]:
        """Draws the first token after a prefill, with the keys `decode` would use."""
        logits = logits if isinstance(logits, jax.Array) else self._rows(logits)
        return self._run("sample", state, logits, key, sampler)

    def decode(
        self,
        state: DecodeState,
        token: Int[Array, " B"],
        *,
        steps: int,
        sampler: Sampler,
        key: Array,
        done: Bool[Array, " B"] | None = None,
        stop: Sequence[int] = (),
        keep_logits: bool = False,
    ) -> tuple[Burst, DecodeState]:
        """Feeds `token`, draws the next, and so on for `steps` <= max_burst steps, on the device.

        `token` has been drawn but not fed yet; afterwards the burst's last token is in that role.
        `done` rows are left alone; the loop ends early when all rows are.
        """
        if not 1 <= steps <= self.max_burst:
            raise ConfigError(f"steps must be in 1..max_burst={self.max_burst}, got {steps}")
        done = self._rows(np.zeros(token.shape, bool) if done is None else done)
        token = self._rows(token)
        self._check_room(state, np.where(np.asarray(done), 0, steps))
        args = (token, done, key, jnp.int32(steps), sampler, tuple(stop), keep_logits)
        return self._run("decode", state, *args)

    def stream(
        self,
        state: DecodeState,
        token: Int[Array, " B"],
        *,
        max_new_tokens: int,
        sampler: Sampler,
        key: Array,
        stop: Sequence[int] = (),
        keep_logits: bool = False,
    ) -> Iterator[tuple[Burst, DecodeState]]:
        """Bursts of steps until `max_new_tokens` (which counts `token`) or all rows stop.

        A burst doubles while it takes less than half of STREAM_SECONDS: the caller sees early
        tokens early, and later ones without a host round trip each.
        """
        done = np.isin(np.asarray(token), stop)
        left, steps = max_new_tokens - 1, 1
        while left > 0 and not done.all():
            steps = min(steps, left)
            began, compiled = time.perf_counter(), self.compile_seconds
            burst, state = self.decode(
                state,
                token,
                steps=steps,
                sampler=sampler,
                key=key,
                done=self._rows(done),
                stop=stop,
                keep_logits=keep_logits,
            )
            done = np.asarray(burst.done)  # waits for the device
            seconds = time.perf_counter() - began - (self.compile_seconds - compiled)
            yield burst, state
            token, left = self._rows(burst.last_token(token)), left - steps
            if seconds < STREAM_SECONDS / 2:
                steps = min(2 * steps, self.max_burst)
            elif seconds > STREAM_SECONDS:
                steps = max(1, steps // 2)

    def _check_room(self, state: DecodeState, new: np.ndarray) -> None:
        """Entries past the last page would be dropped, and the logits wrong without a word."""
        wanted, room = int((np.asarray(state.lengths) + new).max()), token_room(self.cfg, state)
        if wanted > room:
            raise ConfigError(f"state must have capacity for {wanted} tokens, it holds {room}")

    def _rows(self, x: Any) -> Array:
        if self.mesh is None:
            return jnp.asarray(x)
        return jax.device_put(np.asarray(x), shardings.batch_sharding(self.mesh))

    def _run(self, name: str, state: DecodeState, *args: Any) -> Any:
        """Calls a program, compiling it first where these shapes and static arguments are new."""
        dynamic = tuple(a for a in args if isinstance(a, jax.Array))
        static = tuple(a for a in args if not isinstance(a, jax.Array))
        shapes = jax.tree.map(lambda x: (x.shape, x.dtype.name), (state, dynamic))
        at = (name, static, jax.tree.structure(shapes), *jax.tree.leaves(shapes))
        with jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext():
            if at not in self._programs:
                begin = time.perf_counter()
                program = getattr(self, f"_{name}")(*static)
                program.__name__ = name  # in profiles, and in what XLA writes down
                donate = () if name == "sample" else (1,)
                jitted = jax.jit(program, donate_argnums=donate)
                self._programs[at] = jitted.lower(self._weights, state, *dynamic).compile()
                self.compile_seconds += time.perf_counter() - begin
                self.compilations += 1
            return self._programs[at](self._weights, state, *dynamic)

    def _extend(self, all_logits: bool) -> Callable[..., Any]:
        def program(weights: list[Array], state: DecodeState, ids: Array, count: Array) -> Any:
            model = jax.tree.unflatten(self._treedef, weights)
            streams, state = model(ids, state, count)
            if all_logits:
                return model.logits(streams), state
            at = jnp.maximum(count - 1, 0)[:, None, None, None]
            return model.logits(jnp.take_along_axis(streams, at, axis=1))[:, 0], state

        return program

    def _sample(self, sampler: Sampler) -> Callable[..., Any]:
        def program(weights: list[Array], state: DecodeState, logits: Array, key: Array) -> Array:
            del weights
            return sample_rows(sampler, logits, key, state.lengths)

        return program

    def _decode(self, sampler: Sampler, stop: tuple[int, ...], keep: bool) -> Callable[..., Any]:
        def program(
            weights: list[Array],
            state: DecodeState,
            token: Array,
            done: Array,
            key: Array,
            n: Array,
        ) -> tuple[Burst, DecodeState]:
            model = jax.tree.unflatten(self._treedef, weights)

            def forward(state: DecodeState, token: Array, live: Array) -> tuple[Array, DecodeState]:
                streams, state = model(token[:, None], state, live.astype(jnp.int32))
                return model.logits(streams)[:, 0], state

            burst = empty_burst(done, self.max_burst, self.cfg.vocab_size if keep else None)
            return run_burst(forward, state, burst, token, key, n, sampler=sampler, stop=stop)

        return program
