"""One document from token ids to a finished trace: prefill, decode in tapped bursts, labels.

Every token of the answer but a last one that ends it is fed and recorded. A step's votes are those
of all CSA layers on the history it attends to (LSA spec 4.2). Index keys are read from the cache
when decoding has ended, so that one pass has those of prompt and answer.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lsa_jax.cache import codec
from lsa_jax.cache.state import DecodeState
from lsa_jax.config import CacheConfig, ConfigError, ModelConfig
from lsa_jax.config_checks import number, refusal
from lsa_jax.engine import capacity_for
from lsa_jax.lsa.targets import check_targets, csa_layers
from lsa_jax.nn.transformer import DeepSeekV4
from train.traces.columns import TraceError
from train.traces.taps import GOLDEN_STEPS, TapConfig, TappedEngine, Taps
from train.traces.trace import TraceWriter, open_trace
from train.traces.trace_info import KeyRope, Keys, TraceInfo, fingerprint
from train.traces.votes import SparseRows, VoteConfig, golden_sets, kept_ranks

LEAST_ENTRIES = 3  # of a prompt: with fewer there is nothing to select (LSA spec 4.1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecordConfig:
    """What is recorded of every document.

    `targets` are CSA ordinals. `max_new_tokens` are recorded at most. Attention mass is kept where
    an entry's, summed over all CSA layers, is above `mass_eps`: what is left out is less than
    `mass_eps` times the entries.
    """

    targets: tuple[int, ...]
    votes: VoteConfig
    max_new_tokens: int = 2048
    mass_eps: float = 1e-4

    def __post_init__(self) -> None:
        if number("record.max_new_tokens", self.max_new_tokens, int) < 1:
            raise refusal("record.max_new_tokens", self.max_new_tokens, ">= 1")
        if not 0 <= number("record.mass_eps", self.mass_eps, float) < 1:
            raise refusal("record.mass_eps", self.mass_eps, "in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Document:
    """What is to be recorded. `answer` is fed instead of what the model would say."""

    name: str
    source: str  # as in TraceInfo
    prompt: Sequence[int]
    answer: Sequence[int] | None = None


@dataclasses.dataclass(frozen=True)
class Recorded:
    """A finished trace: the answer's tokens, whether it ended by itself, golden labels, bytes of
    all arrays, and attention mass on entries, all of it and what was kept."""

    path: Path
    answer: tuple[int, ...]
    stopped: bool
    labels: int
    nbytes: int
    mass: float
    kept_mass: float


class Nothing(Exception):
    """A document of which there is nothing to record; says why."""


class Recorder:
    """Records documents with one model; compiled programs are shared by documents of like size.

    `stop` tokens end an answer and are not part of it. `backbone` is the model's configuration as
    its checkpoint has it, where less was loaded, and `weights` that checkpoint's digest. Raises
    ConfigError where `config` does not fit.
    """

    def __init__(
        self,
        model: DeepSeekV4,
        cache: CacheConfig,
        config: RecordConfig,
        *,
        stop: Sequence[int] = (),
        prefill_chunk: int = 1024,
        max_burst: int = 64,
        mesh: Mesh | None = None,
        backbone: ModelConfig | None = None,
        weights: str | None = None,
    ):
        check_record(model.cfg.layer_types.count("csa"), config)
        check_targets(model.cfg, config.targets)
        taps = TapConfig(targets=config.targets, top_k=config.votes.top_k)
        self.engine = TappedEngine(
            model, cache, taps, prefill_chunk=prefill_chunk, max_burst=max_burst, mesh=mesh
        )
        self.config, self.stop = config, tuple(stop)
        self.fingerprint, self.weights = fingerprint(backbone or model.cfg), weights

    def record(
        self,
        document: Document,
        root: Path,
        progress: Callable[[int], None] = lambda _: None,
        note: Callable[[Sequence[int], bool], None] = lambda ids, stopped: None,
    ) -> Recorded:
        """Writes the trace `root / document.name`, which must not be there.

        `progress` gets numbers of tokens as they are done, of the prompt and of the answer; `note`
        the answer, and whether it ended by itself, before the trace gets its name. Raises Nothing
        before anything is written.
        """
        room = self._room(document)
        state = self.engine.start(batch=1, capacity=room)
        before = 0

        def prefilled(tokens: int) -> None:
            nonlocal before
            progress(tokens - before)
            before = tokens

        logits, state = self.engine.prefill(state, [document.prompt], progress=prefilled)
        if document.answer is None:
            token = int(jnp.argmax(jnp.asarray(logits)[0]))
            if token in self.stop:
                raise Nothing("the answer is empty")
            parts = self._drawn(document, state, token)
        else:
            parts = self._replayed(document, state, document.answer)
        info, model = self._info(document), self.engine.model
        writer = TraceWriter(
            root, info, hidden_size=model.cfg.hidden_size, hidden_dtype=model.dtype, mass=True
        )
        with writer:
            return self._write(document, writer, parts, progress, note)

    def _room(self, document: Document) -> int:
        """Capacity for prompt and answer; Nothing where there is none or no use."""
        cfg, prompt = self.engine.cfg, len(document.prompt)
        entries = prompt // cfg.csa_ratio
        if entries < LEAST_ENTRIES:
            raise Nothing(f"the prompt has {entries} entries, {LEAST_ENTRIES} are wanted")
        try:
            return capacity_for(prompt + self._most(document), cfg.max_position_embeddings)
        except ConfigError as why:
            raise Nothing(str(why)) from None

    def _most(self, document: Document) -> int:
        most = self.config.max_new_tokens
        return most if document.answer is None else min(most, len(document.answer))

    def _info(self, document: Document) -> TraceInfo:
        cfg = self.engine.cfg
        return TraceInfo(
            name=document.name,
            source=document.source,
            model=self.fingerprint,
            target_layers=self.config.targets,
            csa_layers=len(csa_layers(cfg)),
            csa_ratio=cfg.csa_ratio,
            page_entries=self.engine.cache.page_entries,
            prompt_tokens=len(document.prompt),
            rope=KeyRope.of_model(cfg),
            votes=self.config.votes,
            weights=self.weights,
        )

    def _write(
        self,
        document: Document,
        writer: TraceWriter,
        parts: Iterator["_Fed"],
        progress: Callable[[int], None],
        note: Callable[[Sequence[int], bool], None],
    ) -> Recorded:
        """Appends part by part, as they are fed; finishes the trace."""
        fed: list[int] = []
        labels, mass, kept_mass, golden, part = 0, 0.0, 0.0, None, None
        for part in parts:
            positions = len(document.prompt) + len(fed) + np.arange(len(part.ids))
            seen = self._seen(part.taps, positions)
            writer.append(seen.hidden, positions, seen.votes, seen.mass)
            fed += part.ids
            golden = seen.golden if golden is None else golden
            labels += len(seen.votes.indices)
            mass, kept_mass = mass + seen.total_mass, kept_mass + float(seen.mass.values.sum())
            progress(len(part.ids))
        assert part is not None  # an answer has a token
        keys = target_keys(self.engine.cfg, self.config.targets, part.state)
        note(fed, part.ended)
        trace = open_trace(writer.finish(keys, golden), verify=False)
        nbytes = sum(math.prod(c.shape) * c.numpy_dtype.itemsize for c in trace.columns.values())
        return Recorded(trace.path, tuple(fed), part.ended, labels, nbytes, mass, kept_mass)

    def _drawn(self, document: Document, state: DecodeState, token: int) -> Iterator["_Fed"]:
        """What the model says from `token` on, until its answer ends."""
        done, ended, most = 0, False, self._most(document)
        while done < most and not ended:
            steps = min(self.engine.max_burst, most - done)
            first = jnp.asarray([token], jnp.int32)
            burst, taps, state = self.engine.record(state, first, steps=steps, stop=self.stop)
            drawn = np.asarray(burst.tokens)[0, : int(np.asarray(burst.count)[0])].tolist()
            ended = bool(np.asarray(burst.done)[0])
            yield _Fed([token, *drawn[:-1]], taps, state, ended)
            done, token = done + steps, drawn[-1]

    def _replayed(
        self, document: Document, state: DecodeState, answer: Sequence[int]
    ) -> Iterator["_Fed"]:
        """The answer that is given, many tokens at once."""
        answer, size = answer[: self._most(document)], self.engine.replay_tokens
        for at in range(0, len(answer), size):
            ids = list(answer[at : at + size])
            taps, state = self.engine.replay(state, ids)
            yield _Fed(ids, taps, state, False)

    def _seen(self, taps: Taps, positions: np.ndarray) -> "_Seen":
        count, votes = len(positions), self.config.votes
        logits, entries = (np.asarray(x)[:count] for x in (taps.logits, taps.entries))
        there = (positions + 1) // self.engine.cfg.csa_ratio
        _check_finite(logits, there, positions)
        top = np.s_[..., : votes.top_k]
        rows = golden_sets(entries[top], kept_ranks(logits[top], votes), votes.min_layers)
        total, mass = summed_mass(taps, count, self.config.mass_eps)
        golden = np.array(taps.golden)[:count, :, : there[:GOLDEN_STEPS][-1]]
        for step, exist in enumerate(there[: len(golden)]):
            golden[step, :, exist:] = np.nan
        return _Seen(np.asarray(taps.hidden)[:count], rows, mass, total, golden)


class _Fed(NamedTuple):
    """Tokens that were fed together, what was tapped, the state then, whether the answer ended."""

    ids: list[int]
    taps: Taps
    state: DecodeState
    ended: bool


@dataclasses.dataclass(frozen=True)
class _Seen:
    """A burst's taps as a trace has them; `golden` would be that of a first burst."""

    hidden: np.ndarray
    votes: SparseRows
    mass: SparseRows
    total_mass: float
    golden: np.ndarray


def check_record(csa: int, config: RecordConfig) -> None:
    """Raises ConfigError where a model with so many CSA layers can have no golden entry."""
    if config.votes.min_layers > csa:
        wanted = f"<= the model's {csa} CSA layers"
        raise refusal("votes.min_layers", config.votes.min_layers, wanted)


def _check_finite(logits: np.ndarray, there: np.ndarray, positions: np.ndarray) -> None:
    """Of the [T, C, k] highest logits, as many as entries exist must be numbers."""
    wanted = np.minimum(there, logits.shape[2])[:, None]
    good = np.sum(np.isfinite(logits), axis=2)
    if np.any(good != wanted):
        step, layer = np.argwhere(good != wanted)[0]
        where = f"position {positions[step]}, CSA layer {layer}"
        got = f"{wanted[step, 0] - good[step, layer]} that are not"
        raise TraceError(f"native logits must be finite, got {got} at {where}")


def summed_mass(taps: Taps, steps: int, eps: float) -> tuple[float, SparseRows]:
    """Attention mass on all entries in these steps, summed over CSA layers; and by step and entry,
    float32, where it is above `eps`."""
    mass = np.asarray(taps.mass)[:steps].astype(np.float64)
    entries = np.asarray(taps.entries)[:steps, :, : mass.shape[2]].astype(np.int64)
    step = np.broadcast_to(np.arange(steps)[:, None, None], mass.shape)
    some = mass > 0
    pairs, of = np.unique((step[some] << 32) | entries[some], return_inverse=True)
    sums = np.bincount(of, weights=mass[some], minlength=len(pairs))
    kept = sums > eps
    ends = np.searchsorted(pairs[kept] >> 32, np.arange(steps + 1))
    indices = (pairs[kept] & 0xFFFFFFFF).astype(np.int32)
    return float(sums.sum()), SparseRows(indices, sums[kept].astype(np.float32), ends)


def target_keys(cfg: ModelConfig, targets: Sequence[int], state: DecodeState) -> Keys:
    """The index keys of all entries of a state of one row, as its cache has them."""
    count = int(np.asarray(state.lengths)[0]) // cfg.csa_ratio
    csa = csa_layers(cfg)
    values, scales = [], []
    for ordinal in targets:
        planes = state.layers[csa[ordinal]].index_keys
        assert isinstance(planes, codec.Fp8Keys | codec.DensePlanes)
        values.append(_first(planes.values, count))
        scales += [_first(planes.scale, count)] if isinstance(planes, codec.Fp8Keys) else []
    return Keys(np.stack(values, axis=1), np.stack(scales, axis=1) if scales else None)


def _first(plane: jax.Array, count: int) -> np.ndarray:
    """The first entries of a plane [1, pages, page_entries, ...]."""
    array = np.asarray(plane)[0]
    return array.reshape(-1, *array.shape[2:])[:count]
