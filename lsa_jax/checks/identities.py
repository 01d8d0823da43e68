"""Identities of two-level decoding, on a small random model in float32.

With everything resident, each way to confine level 2 must give full attention's tokens, and its
logits within 2e-5; with a tight budget all of them must choose the same pages at every boundary.
The host store must hold every page once.
"""

import dataclasses
import resource
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsa_jax import shardings
from lsa_jax.cache.state import DecodeState
from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.checks.finding import Finding
from lsa_jax.config import CacheConfig, ComputeConfig
from lsa_jax.config_io import load_config
from lsa_jax.engine import Engine
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig, ResidentPath
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from lsa_jax.lsa.targets import default_target_layers
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.sampling import Greedy

PROMPT, STEPS, LOOKAHEAD, PAGE, TOLERANCE = 420, 72, 16, 4, 2e-5
CACHE = CacheConfig(kv_format="float32", page_entries=PAGE)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a session drew: logits [STEPS, V], and the resident pages after each boundary."""

    logits: np.ndarray
    pages: list[tuple[int, ...]]

    @property
    def tokens(self) -> np.ndarray:
        """Greedy tokens."""
        return self.logits.argmax(-1)


def small_model(mesh: Mesh | None) -> DeepSeekV4:
    """Four layers of the tiny preset, of every kind, with random float32 weights."""
    cfg = dataclasses.replace(
        load_config("tiny"),
        layer_types=("sliding", "csa", "hca", "csa"),
        mlp_types=("hash", "score", "score", "score"),
        num_nextn_predict_layers=0,
        vocab_size=128,
    )
    source = SyntheticModel(cfg, seed=0)
    leaves = {}
    for path, info in source.leaves("f32").items():
        value = source.read(path, 0, info.shape[0], weights="f32")
        where = mesh and shardings.leaf_sharding(cfg, mesh, path, value.shape)
        leaves[path] = jax.device_put(value, where)
    return DeepSeekV4(cfg, ComputeConfig(dtype="float32"), leaves)


def session(model: DeepSeekV4, path: ResidentPath, budget: str, mesh: Mesh | None) -> LsaSession:
    """A session whose pages a fixed random choice ranks, which needs no indexer."""
    lsa = LsaConfig(
        targets=default_target_layers(model.cfg),
        arm="random",
        lookahead=LOOKAHEAD,
        policy=PolicyConfig(recency=PAGE),
        budget=parse_budget(budget),
        resident_path=path,
    )
    return LsaSession(model, CACHE, lsa, capacity=PROMPT + STEPS, prefill_chunk=256, mesh=mesh)


def admitted(made: LsaSession) -> jax.Array:
    """Prefills the prompt; the first token [1]."""
    ids = np.random.default_rng(0).integers(2, made.batch.model.cfg.vocab_size, PROMPT).tolist()
    _, logits = made.admit(ids, max_new_tokens=STEPS)
    return jnp.argmax(jnp.asarray(logits))[None].astype(jnp.int32)


def answer(made: LsaSession, token: jax.Array) -> Answer:
    """STEPS greedy steps."""
    rows: list[np.ndarray] = []
    key = jax.random.key(0)
    while len(rows) < STEPS:
        left = STEPS - len(rows)
        burst = made.decode(token, steps=left, sampler=Greedy(), key=key, keep_logits=True)
        rows += list(np.asarray(burst.logits)[0, : int(burst.count[0])])
        token = burst.last_token(token)
    return Answer(np.stack(rows), [event.pages for event in made.batch.events])


def full(model: DeepSeekV4, made: LsaSession, token: jax.Array, mesh: Mesh | None) -> np.ndarray:
    """Full attention's logits from the same prefilled state, which path "mask" holds whole."""
    engine = Engine(model, CACHE, max_burst=STEPS, mesh=mesh)
    state = made.batch.state
    whole = jax.tree.map(jnp.copy, DecodeState(state.layers, state.lengths))
    burst, _ = engine.decode(
        whole, token, steps=STEPS, sampler=Greedy(), key=jax.random.key(0), keep_logits=True
    )
    return np.asarray(burst.logits)[0]


def identities(mesh: Mesh | None, others: Sequence[ResidentPath]) -> Iterator[Finding]:
    """What was found, and whether it is as it must be; path "mask" is what `others` must equal."""
    model = small_model(mesh)
    paths: tuple[ResidentPath, ...] = ("mask", *others)
    want = None
    for path in paths:
        made = session(model, path, "1.0", mesh)
        token = admitted(made)
        want = full(model, made, token, mesh) if want is None else want
        got = answer(made, token)
        gap = float(np.abs(got.logits - want).max())
        same = np.array_equal(got.tokens, want.argmax(-1))
        said = f"everything resident, {path}: largest difference {gap:.1e}, tokens equal {same}"
        yield Finding(said, same and gap <= TOLERANCE)
        if path == "paged":
            yield recalls(made)
            yield from host_bytes(made)
    tight = {path: session(model, path, "0.6", mesh) for path in paths}
    answers = {path: answer(made, admitted(made)) for path, made in tight.items()}
    first = answers["mask"]
    for path, got in answers.items():
        gap = float(np.abs(got.logits - first.logits).max())
        same = got.pages == first.pages
        said = f"tight budget, {path}: largest difference {gap:.1e}, pages equal {same}"
        yield Finding(said, same and gap <= TOLERANCE)


def recalls(made: LsaSession) -> Finding:
    """How pages reach the device; each complete page must have come."""
    tiers = made.batch.tiers
    how = "in place" if tiers.recall.in_place else "through a slab"
    said = f"recall: {tiers.store.memory.kind} host memory, {how}, {tiers.recall.pages} pages"
    return Finding(said, tiers.recall.pages >= made.batch.events[-1].complete)


def host_bytes(made: LsaSession) -> Iterator[Finding]:
    """One copy of every page, whatever the number of devices."""
    store = made.batch.tiers.store
    pages = sum(len(row.digests) for row in made.batch.rows if row)
    live, size = store.stats().live, store.memory.record_nbytes
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = f"host store: {live} bytes live for {pages} pages of {size}, {store.memory.nbytes} taken"
    yield Finding(f"{said}; process peak {peak} (KiB on Linux)", live == pages * size)
