"""A conversation with part of its KV cache on the host."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from infer.lsa_options import Plan
from infer.session import Progress, Replies, Session
from lsa_jax.compile_clock import CompileClock
from lsa_jax.config import CacheConfig
from lsa_jax.engine import STREAM_SECONDS, Burst, capacity_for
from lsa_jax.lsa import indexer_io, report
from lsa_jax.lsa.session import LsaSession
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import sample_rows

_sample = jax.jit(sample_rows, static_argnums=0)


class LsaTurns(Session):
    """With the KV of `plan`. Pages stay on the host between turns.

    A single request gets the room that it needs; with `grows`, room doubles as a conversation gets
    longer, since every new capacity compiles anew.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheConfig,
        plan: Plan,
        replies: Replies,
        *,
        prefill_chunk: int,
        grows: bool,
        fingerprint: str,
        mesh: Mesh | None = None,
    ):
        super().__init__(model, cache, mesh, replies)
        self.plan, self.prefill_chunk = plan, prefill_chunk
        self.indexer = None
        if plan.indexer is not None:
            self.indexer = indexer_io.from_file(
                plan.indexer, query_mode=plan.query_mode, dtype=plan.indexer_dtype
            )
        self.lsa: LsaSession | None = None  # from the first prompt on
        self._grows, self._fingerprint = grows, fingerprint
        self._compiled, self._row = CompileClock(), -1
        self._loaded = _memory(self)

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling so far."""
        return self._compiled.seconds

    @property
    def compilations(self) -> int:
        """Programs compiled so far."""
        return self._compiled.programs

    @property
    def kv_bytes(self) -> dict[str, int]:
        """Bytes of the decode state on the device, as allocated, by component."""
        return {} if self.lsa is None else report.device_bytes(self.lsa)

    @property
    def kv_summary(self) -> str:
        """Bytes, shares, recalls and misses."""
        return "no KV" if self.lsa is None else _summary(self.lsa)

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes that the first device held beyond the weights; None where it does not say.

        A peak while loading counts where it was the higher one.
        """
        now = _memory(self)
        if now is None or self._loaded is None:
            return None
        return now["peak_bytes_in_use"] - self._loaded["bytes_in_use"]

    def _reserve(self, tokens: int) -> None:
        limit = self.model.cfg.max_position_embeddings
        doubled = capacity_for(tokens, limit)  # refuses what is too long
        self.plan.check_room(self.model.cfg, self.cache, tokens)
        if self.lsa is None:
            self.lsa = LsaSession(
                self.model,
                self.cache,
                self.plan.lsa,
                self.indexer,
                capacity=doubled if self._grows else tokens,
                prefill_chunk=self.prefill_chunk,
                calibration=self.plan.calibration,
                fingerprint=self._fingerprint,
                mesh=self.mesh,
            )
        if tokens > self.lsa.capacity:
            with self._compiled.listen():
                self.lsa.grow(doubled if self._grows else tokens)
        self.capacity = self.lsa.capacity

    def _extend(self, ids: list[int], progress: Progress | None) -> jax.Array | np.ndarray:
        assert self.lsa is not None
        options = {
            "max_new_tokens": self.replies.max_new_tokens,
            "all_logits": self.replies.keep_logits,
            "progress": progress,
        }
        with self._compiled.listen():
            if self._row < 0:
                self._row, logits = self.lsa.admit(ids, **options)
            else:
                logits = self.lsa.extend(self._row, ids, **options)
        return logits if self.replies.keep_logits else logits[None]

    def _draw(self, logits: jax.Array | np.ndarray) -> jax.Array:
        assert self.lsa is not None
        lengths = self.lsa.batch.state.lengths
        with self._compiled.listen():
            return _sample(self.replies.sampler, jnp.asarray(logits), self._key, lengths)

    def _stream(self, token: jax.Array) -> Iterator[Burst]:
        """As `Engine.stream`; a burst also ends where pages move."""
        assert self.lsa is not None
        left, steps = self.replies.max_new_tokens - 1, 1
        done = bool(np.isin(np.asarray(token), self.replies.stop)[0])
        while left > 0 and not done:
            began = self._clock()
            with self._compiled.listen():
                burst = self.lsa.decode(
                    token,
                    steps=min(steps, left),
                    sampler=self.replies.sampler,
                    key=self._key,
                    stop=self.replies.stop,
                    keep_logits=self.replies.keep_logits,
                )
                done = bool(np.asarray(burst.done)[0])  # waits for the device
            seconds = self._clock() - began
            yield burst
            token = burst.last_token(token)
            left -= int(np.asarray(burst.count)[0])
            if seconds < STREAM_SECONDS / 2:
                steps = min(2 * steps, self.plan.lsa.lookahead)
            elif seconds > STREAM_SECONDS:
                steps = max(1, steps // 2)


def _memory(session: LsaTurns) -> dict[str, int] | None:
    """What the model's first device says of its memory."""
    device = jax.devices()[0] if session.mesh is None else session.mesh.devices.flat[0]
    found = device.memory_stats()
    return found if found and "peak_bytes_in_use" in found else None


def _summary(lsa: LsaSession) -> str:
    found = report.figures(lsa)
    events = lsa.batch.events
    missed = sum(event.missed_entries for event in events)
    worst = max((event.missed_mass for event in events), default=0.0)
    simulated = "simulated bytes: " if lsa.lsa.simulated else ""
    return (
        f"{simulated}KV {found.occupied.kv / 1e6:,.2f} MB on the device ({100 * found.share:.2f} % "
        f"of full, reserved {100 * found.share_reserved:.2f} %, logical {100 * found.kept:.2f} %), "
        f"{found.occupied.host / 1e6:,.2f} MB on the host; {lsa.batch.tiers.recall.pages} pages "
        f"recalled at {len(events)} boundaries, {lsa.batch.stall_seconds:.2f} s stalled; missed "
        f"{missed} entries, at most {100 * worst:.2f} % of attention mass"
    )
