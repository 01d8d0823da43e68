"""One conversation: what was said and how fast. `lsa_session` has the one with LSA."""

import abc
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jax
import numpy as np
from jax.sharding import Mesh

from lsa_jax.cache.state import DecodeState, kv_bytes
from lsa_jax.config import CacheConfig, ConfigError
from lsa_jax.engine import Burst, Engine, capacity_for
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Sampler

Progress = Callable[[int], None]  # called with the number of tokens done


@dataclasses.dataclass
class Turn:
    """One prompt and the model's reply; filled in while it happens, so that Ctrl-C loses nothing.

    `prompt_ids` and `ids` of all turns, in order, are the conversation. `prefilled` also counts the
    last token of the reply before, which was drawn but not fed. Seconds exclude compilation; the
    first token is drawn within `prefill_seconds`.
    """

    prompt_ids: list[int]
    prefilled: int = 0
    ids: list[int] = dataclasses.field(default_factory=list)
    ended: Literal["stop", "length", "interrupted"] = "interrupted"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def decoded(self) -> int:
        """Tokens that took a decode step: all but the first."""
        return max(0, len(self.ids) - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replies:
    """How replies are drawn and where they end."""

    sampler: Sampler
    seed: int
    stop: tuple[int, ...]
    max_new_tokens: int
    keep_logits: bool = False


class Session(abc.ABC):
    """Turns of one sequence; each is `prefill`, then `generate` run to its end.

    The decode state stays between turns, so only new tokens are prefilled. `logits` holds one host
    array [tokens, V] per prefill and burst if `replies.keep_logits`.
    """

    prefill_chunk: int
    capacity = 0  # tokens that there is room for

    def __init__(
        self, model: DeepSeekV4, cache: CacheConfig, mesh: Mesh | None, replies: Replies
    ) -> None:
        self.model, self.cache, self.mesh, self.replies = model, cache, mesh, replies
        self.turns: list[Turn] = []
        self.logits: list[np.ndarray] = []
        self._key = jax.random.key(replies.seed)
        self._fed = 0  # tokens in the state
        self._pending: list[int] = []  # drawn, but not fed yet
        self._token: jax.Array | None = None

    @property
    @abc.abstractmethod
    def compile_seconds(self) -> float:
        """Seconds spent compiling so far."""

    @property
    @abc.abstractmethod
    def compilations(self) -> int:
        """Programs compiled so far."""

    @property
    @abc.abstractmethod
    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the decode state on the device, as allocated, by component."""

    @property
    @abc.abstractmethod
    def kv_summary(self) -> str:
        """What the KV cache takes, in words."""

    @abc.abstractmethod
    def _reserve(self, tokens: int) -> None:
        """Makes room for so many tokens in all, or raises ConfigError and changes nothing."""

    @abc.abstractmethod
    def _extend(self, ids: list[int], progress: Progress | None) -> jax.Array | np.ndarray:
        """Feeds a prompt; logits [1, V] after it, or [tokens, V] with `keep_logits`."""

    @abc.abstractmethod
    def _draw(self, logits: jax.Array | np.ndarray) -> jax.Array:
        """The token [1] after a prompt, from logits [1, V]."""

    @abc.abstractmethod
    def _stream(self, token: jax.Array) -> Iterator[Burst]:
        """Bursts of decode steps until the reply ends."""

    def prefill(self, prompt_ids: Sequence[int], progress: Progress | None = None) -> None:
        """Begins a turn: appends the prompt and draws the first token.

        Raises ConfigError, leaving the session as it was, where prompt and reply have no room.
        """
        ids = [*self._pending, *prompt_ids]
        self._reserve(self._fed + len(ids) + self.replies.max_new_tokens)
        turn = Turn(list(prompt_ids))
        self.turns.append(turn)
        began = self._clock()
        try:
            logits = self._extend(ids, progress)
        except ConfigError:
            self.turns.pop()
            raise
        turn.prefilled = len(ids)
        self._fed, self._pending = self._fed + len(ids), []
        if self.replies.keep_logits:
            self.logits.append(np.asarray(logits))
        if self.replies.max_new_tokens:
            self._token = self._draw(logits[-1:])
            turn.ids.append(int(self._token[0]))
        jax.block_until_ready(logits)
        turn.prefill_seconds = self._clock() - began

    def generate(self) -> Iterator[int]:
        """The reply's tokens, as they come."""
        turn = self.turns[-1]
        yield from turn.ids
        for tokens in self._bursts(turn) if turn.ids else ():
            yield from tokens
        self._pending = turn.ids[-1:]
        stopped = self._pending and self._pending[0] in self.replies.stop
        turn.ended = "stop" if stopped else "length"

    def _bursts(self, turn: Turn) -> Iterator[list[int]]:
        assert self._token is not None  # prefill has run
        stream = self._stream(self._token)
        while True:
            began = self._clock()
            burst = next(stream, None)
            if burst is None:
                return
            count = int(np.asarray(burst.count)[0])
            tokens = np.asarray(burst.tokens)[0, :count].tolist()
            turn.decode_seconds += self._clock() - began
            if burst.logits is not None:
                self.logits.append(np.asarray(burst.logits)[0, :count])
            turn.ids += tokens
            self._fed += count
            yield tokens

    def _clock(self) -> float:
        """Seconds that were not spent compiling, from an arbitrary start."""
        return time.perf_counter() - self.compile_seconds


class FullSession(Session):
    """With all KV on the device; the state's capacity doubles when it is full."""

    def __init__(self, engine: Engine, replies: Replies):
        super().__init__(engine.model, engine.cache, engine.mesh, replies)
        self.engine, self.prefill_chunk = engine, engine.prefill_chunk
        self._state: DecodeState | None = None
        self._kv_bytes: dict[str, int] = {}

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling so far."""
        return self.engine.compile_seconds

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self.engine.compilations

    @property
    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the decode state, as allocated, by component."""
        return self._kv_bytes

    @property
    def kv_summary(self) -> str:
        """Bytes as allocated."""
        return f"KV {sum(self.kv_bytes.values()) / 1e6:,.2f} MB ({self.cache.kv_format})"

    def _reserve(self, tokens: int) -> None:
        capacity = capacity_for(tokens, self.engine.cfg.max_position_embeddings)
        if self._state is None:
            self._state = self.engine.start(batch=1, capacity=capacity)
        elif capacity > self.capacity:
            self._state = self.engine.grow(self._state, capacity)
        if capacity > self.capacity:
            self.capacity = capacity
            self._kv_bytes = kv_bytes(self.engine.cfg, self._state)

    def _extend(self, ids: list[int], progress: Progress | None) -> jax.Array | np.ndarray:
        assert self._state is not None
        keep = self.replies.keep_logits
        logits, self._state = self.engine.prefill(
            self._state, [ids], all_logits=keep, progress=progress
        )
        return logits[0] if isinstance(logits, list) else logits

    def _draw(self, logits: jax.Array | np.ndarray) -> jax.Array:
        assert self._state is not None
        return self.engine.sample(logits, self.replies.sampler, self._key, self._state)

    def _stream(self, token: jax.Array) -> Iterator[Burst]:
        assert self._state is not None
        stream = self.engine.stream(
            self._state,
            token,
            max_new_tokens=self.replies.max_new_tokens,
            sampler=self.replies.sampler,
            key=self._key,
            stop=self.replies.stop,
            keep_logits=self.replies.keep_logits,
        )
        for burst, state in stream:
            self._state = state
            yield burst
