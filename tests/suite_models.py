"""A random model of two small layers that knows the tasks' vocabulary, and what asks it."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax

from evals.mini.vocabulary import SIZE
from evals.suite.answers import Answers
from evals.suite.cases import Case, Cell, capacity_for, draw
from evals.suite.measure import Measure
from evals.suite.prefix import QUESTION_TOKENS, Asked, Prefixes
from evals.suite.running import Machine
from evals.suite.variants import Axes, Base, Variant
from lsa_jax import config_io, synthesize
from lsa_jax.config import CacheConfig, ComputeConfig
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.indexer_io import save_indexer
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from lsa_jax.lsa.programs import Programs
from lsa_jax.lsa.session import LsaSession
from lsa_jax.nn.transformer import DeepSeekV4
from tests import small_model

# Two layers, so that few programs are compiled. Top-k 3 of 100 entries, pages of two, and 36 % of
# the KV bytes on the device whatever is recalled.
CONFIG = dataclasses.replace(
    small_model.CONFIG,
    vocab_size=SIZE,
    layer_types=("csa", "hca"),
    mlp_types=("hash", "score"),
    hca_ratio=64,
    eos_token_id=1,
    max_position_embeddings=4096,
)
TARGETS = (0,)
BASE = Base(
    cfg=CONFIG,
    cache=CacheConfig(kv_format="float32", page_entries=2),
    targets=TARGETS,
    recency=2,
    sink=0,
    window_bytes=4,
)
LENGTH = 480
CHUNK = QUESTION_TOKENS  # the same programs read haystacks and questions
LOOKAHEAD = 8


@functools.cache
def model() -> DeepSeekV4:
    """In float32 arithmetic, so that differences are bugs and not rounding."""
    leaves = small_model.leaves("f32", CONFIG)
    return DeepSeekV4(CONFIG, ComputeConfig(dtype="float32"), leaves)


@functools.cache
def indexer() -> MemoryIndexer:
    sizes = IndexerConfig.for_model(CONFIG, target_layers=TARGETS, n_heads=4, q_lora_rank=16)
    return MemoryIndexer(sizes, random_leaves(sizes, jax.random.key(1)))


@functools.cache
def machine() -> Machine:
    prefixes = Prefixes(model(), BASE.cache, TARGETS, chunk=CHUNK)
    return Machine(prefixes, Answers(BASE, model(), indexer()), Measure(BASE), rows=4)


def case(task: str = "niah_multikey_1", haystack: int = 0, length: int = LENGTH) -> Case:
    return draw(Cell(task=task, length=length, seed=0, haystack=haystack), 4)


def asked(of: Case) -> Asked:
    prefixes = machine().prefixes
    state = prefixes.read(of.haystack, capacity_for(of.cell.length))
    return prefixes.ask(state, [question.prompt.tolist() for question in of.questions])


def variant(arm: str, budget: str | None = "0.6", **settings: object) -> Variant:
    """With every entry worth a place: budgets alone decide what is resident."""
    axes = Axes(
        arms=(arm,),
        budgets=(budget,),
        lookaheads=(LOOKAHEAD,),
        page_entries=(2,),
        thresholds=(1e-6,),
    )
    (made,) = axes.variants()
    return dataclasses.replace(made, **settings)


class SharedPrograms(Programs):
    """Programs that sessions of one plan share: of all of them, only "choose" knows the arm and
    only "cycle" a patient fallback, but those of a session with an indexer take its weights."""

    all: ClassVar[dict[Any, dict[Any, Any]]] = {}

    def _run(self, name: str, *args: Any) -> Any:
        own = self.lsa.arm if name == "choose" else self.lsa.arm == "lsa"
        watched = self.lsa.patience and (self.lsa.fallback, self.lsa.patience)
        of = self.plan, name, own, watched if name == "cycle" else None
        self._compiled = self.all.setdefault(of, {})
        return super()._run(name, *args)


@functools.cache
def _plan(page_entries: int, lookahead: int, votes: bool) -> Level2:
    cache = dataclasses.replace(BASE.cache, page_entries=page_entries)
    settings = {"lookahead": lookahead, "path": "mask", "count_votes": votes}
    return Level2(CONFIG, cache, targets=TARGETS, **settings)


def session(of: Variant, capacity: int) -> LsaSession:
    """A session of one row with the settings of a variant. Unlike a user's, sessions share what
    they compile."""
    lsa, own = BASE.lsa(of), indexer() if of.arm == "lsa" else None
    cache = BASE.cache_of(of)
    made = LsaSession(model(), cache, lsa, own, capacity=capacity, prefill_chunk=CHUNK)
    votes = of.arm in ("lagged", "oracle")
    made.batch.plan = made.batch.tiers.plan = _plan(cache.page_entries, lsa.lookahead, votes)
    made.batch.programs = SharedPrograms(made.batch.plan, lsa, model(), own, None)
    return made


def write_checkpoint(root: Path) -> tuple[Path, Path]:
    """A checkpoint of the same shape, and an indexer for it."""
    (root / "config.toml").write_text(config_io.to_toml(CONFIG))
    options = ["--config", str(root / "config.toml"), "--seed", "3", "--weights", "f32"]
    assert synthesize.main([*options, str(root / "ckpt")]) == 0
    save_indexer(root / "indexer.safetensors", indexer())
    return root / "ckpt", root / "indexer.safetensors"


def tokens_of(replies: Sequence) -> list[list[int]]:
    return [reply.tokens for reply in replies]
