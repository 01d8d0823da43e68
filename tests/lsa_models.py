"""Small random models with CSA layers, and sessions around them that share compiled programs."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from lsa_jax.cache.state import DecodeState
from lsa_jax.config import CacheConfig, ComputeConfig, KVFormat, ModelConfig
from lsa_jax.engine import Engine
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig, ResidentPath
from lsa_jax.lsa.host_store import HostStore
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.programs import Programs
from lsa_jax.lsa.session import LsaSession
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Greedy
from tests import small_model

# A target and another CSA layer, whose pages differ, and an HCA layer, which has none. A page is
# 8 tokens (2 entries), top-k 3 entries, the window 8 tokens: all of them bind within 30 tokens.
CONFIG = dataclasses.replace(
    small_model.CONFIG,
    layer_types=("csa", "hca", "csa"),
    mlp_types=("hash", "score", "score"),
    max_position_embeddings=8192,
)
TARGETS = (1,)
PAGE_ENTRIES = 2
PAGE_TOKENS = PAGE_ENTRIES * CONFIG.csa_ratio
CAPACITY = 512
LONGEST = 256  # lookahead
KEY = jax.random.key(0)
# Every entry's score is above it, so that budgets alone decide what is resident.
ALL = PolicyConfig(threshold=1e-6, recency=8)


@functools.cache
def model(cfg: ModelConfig = CONFIG) -> DeepSeekV4:
    """In float32 arithmetic, so that differences are bugs and not rounding."""
    return DeepSeekV4(cfg, ComputeConfig(dtype="float32"), small_model.leaves("f32", cfg))


@functools.cache
def indexer(cfg: ModelConfig = CONFIG, targets: tuple[int, ...] = TARGETS) -> MemoryIndexer:
    """A random one: scores between 0.1 and 0.7, so that sets change from cycle to cycle."""
    sizes = IndexerConfig.for_model(cfg, target_layers=targets, n_heads=4, q_lora_rank=16)
    return MemoryIndexer(sizes, random_leaves(sizes, jax.random.key(1)))


def cache(kv: KVFormat = "float32") -> CacheConfig:
    return CacheConfig(kv_format=kv, page_entries=PAGE_ENTRIES)


@functools.cache
def engine(kv: KVFormat = "float32", chunk: int = 16) -> Engine:
    """Full attention."""
    return Engine(model(), cache(kv), prefill_chunk=chunk, max_burst=64)


class SharedPrograms(Programs):
    """Programs that sessions of one plan share: of all of them, only "choose" knows the policy,
    and only "cycle" a patient fallback."""

    all: ClassVar[dict[Any, dict[Any, Any]]] = {}

    def _run(self, name: str, *args: Any) -> Any:
        watched = (self.lsa.fallback, self.lsa.patience) if self.lsa.patience else None
        knows = {"choose": self.lsa.policy, "cycle": watched}
        of = self.plan, name, knows.get(name)
        self._compiled = self.all.setdefault(of, {})
        return super()._run(name, *args)


def _plan(path: ResidentPath, kv: KVFormat, lookahead: int) -> Level2:
    return Level2(CONFIG, cache(kv), targets=TARGETS, lookahead=lookahead, path=path)


def session(
    path: ResidentPath = "paged",
    *,
    kv: KVFormat = "float32",
    lookahead: int = 16,
    rows: int = 1,
    capacity: int = CAPACITY,
    chunk: int = 16,
    policy: PolicyConfig = ALL,
    budget: str | None = "1.0",
    fallback: float | None = None,
    patience: int | None = None,
    host_limit: int | None = None,
    own_buffer: bool = False,
) -> LsaSession:
    """A session whose store checks shared pages and overwrites freed ones.

    Unlike a user's, sessions share programs, for compilation would be most of the time, and so
    have a fresh buffer for the longest lookahead, unless they want one of their `own_buffer`.
    """
    lsa = LsaConfig(
        targets=TARGETS,
        lookahead=lookahead,
        policy=policy,
        budget=None if budget is None else parse_budget(budget),
        resident_path=path,
        fallback=fallback,
        patience=patience,
        host_limit=host_limit,
    )
    made = LsaSession(
        model(), cache(kv), lsa, indexer(), rows=rows, capacity=capacity, prefill_chunk=chunk
    )
    batch, longest = made.batch, lookahead if own_buffer else LONGEST
    batch.plan = batch.tiers.plan = _plan(path, kv, longest)
    wide = dataclasses.replace(lsa, lookahead=longest)
    batch.programs = SharedPrograms(batch.plan, wide, model(), indexer(), None)
    fresh = batch.plan.fresh_pages * PAGE_ENTRIES
    batch.room = dataclasses.replace(batch.room, fresh_entries=fresh)
    batch.state = batch.empty(capacity)
    batch.tiers.store = HostStore(batch.tiers.store.memory, verify=True)
    return made


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = np.random.default_rng(seed)
    return rng.integers(0, CONFIG.vocab_size, length).tolist()


class Run:
    """Greedy decoding of a session's rows: per row the drawn tokens, and logits [steps, V]."""

    def __init__(self, of: LsaSession):
        self.session = of
        self.token = np.zeros(len(of.batch.rows), np.int32)
        self.tokens: dict[int, list[int]] = {}
        self.logits: dict[int, list[np.ndarray]] = {}

    def admit(self, ids: list[int], new: int) -> int:
        row, logits = self.session.admit(ids, max_new_tokens=new)
        self._start(row, logits)
        return row

    def _start(self, row: int, logits: jax.Array) -> None:
        self.token[row] = int(jnp.argmax(logits))
        self.tokens[row], self.logits[row] = [int(self.token[row])], [np.asarray(logits)[None]]

    def extend(self, row: int, ids: list[int], new: int) -> None:
        """The drawn token was fed to nobody yet: it comes first."""
        ids = [int(self.token[row]), *ids]
        self._start(row, self.session.extend(row, ids, max_new_tokens=new))

    def decode(self, steps: int, only: list[int] | None = None, stop: tuple[int, ...] = ()) -> None:
        """So many steps of all live rows, or of these."""
        live = [b for b, row in enumerate(self.session.batch.rows) if row is not None]
        live = live if only is None else only
        idle = [b not in live for b in range(len(self.session.batch.rows))]
        while steps:
            burst = self.session.decode(
                jnp.asarray(self.token),
                steps=steps,
                sampler=Greedy(),
                key=KEY,
                done=idle,
                stop=stop,
                keep_logits=True,
            )
            count = np.asarray(burst.count)
            assert count.max() >= 1, "a call must take at least one step"
            self.token = np.array(burst.last_token(jnp.asarray(self.token)))
            for b in live:
                self.tokens[b] += np.asarray(burst.tokens)[b, : count[b]].tolist()
                self.logits[b].append(np.asarray(burst.logits)[b, : count[b]])
            steps -= int(count.max())
            if np.asarray(burst.done).all():
                return

    def drawn(self, row: int) -> np.ndarray:
        return np.array(self.tokens[row])

    def scores(self, row: int) -> np.ndarray:
        return np.concatenate(self.logits[row])


def alone(of: LsaSession, ids: list[int], steps: int, *, keep: bool = False) -> Run:
    """One request from its admission, `steps` steps, to its end."""
    run = Run(of)
    row = run.admit(ids, steps + 1)
    run.decode(steps)
    if not keep:
        of.finish(row)
    return run


def full_logits(of: LsaSession, token: int, steps: int, kv: KVFormat = "float32") -> np.ndarray:
    """What full attention makes of the state of a session on the path "mask", logits [steps, V]."""
    state = DecodeState(of.batch.state.layers, of.batch.state.lengths)
    state, out = jax.tree.map(jnp.copy, state), []
    fed = jnp.array([token], jnp.int32)
    for at in range(0, steps, 64):
        burst, state = engine(kv).decode(
            state, fed, steps=min(64, steps - at), sampler=Greedy(), key=KEY, keep_logits=True
        )
        out.append(np.asarray(burst.logits)[0, : min(64, steps - at)])
        fed = burst.last_token(fed)
    return np.concatenate(out)


def teacher_forced(ids: list[int], drawn: np.ndarray, kv: KVFormat = "float32") -> np.ndarray:
    """Full attention's logits [len(drawn), V] where these tokens were drawn after a prompt."""
    whole = [*ids, *drawn[:-1].tolist()]
    start = engine(kv, 32).start(batch=1, capacity=CAPACITY)
    logits, _ = engine(kv, 32).prefill(start, [whole], all_logits=True)
    return np.asarray(logits[0])[len(ids) - 1 :]
