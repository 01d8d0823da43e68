"""What `evals.bench_train` measures with: sizes, synthetic batches and traces, the step's floor."""

import dataclasses
import math
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from evals.lsa_workload import median_seconds
from lsa_jax.lsa.indexer_config import IndexerConfig, leaf_shapes
from train.data.batch import Drawn
from train.data.dataset import Batches
from train.data.labels import SamplingConfig
from train.data.sampling import grade_count
from train.run.key_pool import PAGE_ENTRIES, KeyPlanes
from train.run.losses import ObjectiveConfig
from train.run.optimizer import OptimizerConfig
from train.run.step import Inputs, Step, StepConfig
from train.traces.trace import TraceWriter
from train.traces.trace_info import E4M3, KeyRope, Keys, TraceInfo
from train.traces.votes import SparseRows, VoteConfig

CSA_LAYERS, CSA_RATIO, PAGE = 21, 4, 64
RUNS = 5  # of a measurement
_DRAWN = 20  # batches, to time the host's work by
_BLOCK_TOKENS = 64  # appended to a trace at once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """A step's sizes, and those of the documents that its samples come from; true by default.

    A token has `golden` golden entries, `renewed` of them other ones than the token before. So a
    window has 632, of the 100 to 1,000 that are reported; only the shorter ones at a document's end
    have fewer than `max_pos`, and the published sampling fills a batch with `candidates`.
    """

    target_layers: tuple[int, ...] = (10, 12, 20)
    hidden: int = 4096
    heads: int = 128
    rank: int = 2048
    head_dim: int = 128
    rope_dim: int = 64
    batch: int = 64
    max_pos: int = 512
    neg_ratio: int = 3
    entries: int = 65536
    tokens: int = 512
    documents: int = 4
    golden: int = 128
    renewed: int = 8

    @property
    def candidates(self) -> int:
        """Positives and negatives of a sample."""
        return self.max_pos * (1 + self.neg_ratio)

    @property
    def indexer(self) -> IndexerConfig:
        """The indexer that is trained."""
        return IndexerConfig(
            target_layers=self.target_layers,
            hidden_size=self.hidden,
            n_heads=self.heads,
            q_lora_rank=self.rank,
            head_dim=self.head_dim,
            rope_head_dim=self.rope_dim,
        )

    @property
    def sampling(self) -> SamplingConfig:
        """The published recipe at these sizes."""
        return SamplingConfig(max_pos=self.max_pos, neg_ratio=self.neg_ratio)

    def step(self, *, total: int, compute_dtype: str = "bfloat16", clip: float = 1.0) -> StepConfig:
        """The published objective and optimiser over `total` steps."""
        return StepConfig(
            indexer=self.indexer,
            objective=ObjectiveConfig(),
            optimizer=OptimizerConfig(clip=clip),
            total=total,
            compute_dtype=compute_dtype,
        )


SMOKE = Sizes(
    target_layers=(0, 2),
    hidden=32,
    heads=4,
    rank=24,
    head_dim=16,
    rope_dim=8,
    batch=8,
    max_pos=16,
    entries=256,
    tokens=96,
    documents=2,
    golden=8,
    renewed=1,
)


def random_keys(rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """e4m3 values `shape` and their scales, of about a backbone's size."""
    codes = rng.integers(0, 256, shape, np.uint8) & 0xBF  # without bit 6: numbers, below 2
    return codes.view(E4M3), rng.uniform(0.5, 1.5, shape[:-1]).astype(np.float32)


def random_planes(sizes: Sizes, seed: int) -> KeyPlanes:
    """A pool of keys that holds `documents` documents."""
    rng, size = np.random.default_rng(seed), min(PAGE_ENTRIES, sizes.entries)
    shape = (sizes.documents * -(-sizes.entries // size), size, sizes.head_dim)
    planes = [random_keys(rng, shape) for _ in sizes.target_layers]
    keys, scale = (tuple(map(jnp.asarray, part)) for part in zip(*planes, strict=True))
    table = np.arange(shape[0], dtype=np.int32).reshape(sizes.documents, -1)
    return KeyPlanes(keys, scale, jnp.asarray(table))


def random_inputs(sizes: Sizes, seed: int) -> Inputs:
    """A full batch from `random_planes`: every candidate counts, but each second sample's last."""
    rng, shape = np.random.default_rng(seed), (sizes.batch, sizes.candidates)
    hidden = (len(sizes.target_layers), sizes.batch, 1, sizes.hidden)
    index = np.stack([rng.choice(sizes.entries, shape[1], replace=False) for _ in range(shape[0])])
    index = np.sort(index).astype(np.int32)
    index[::2, -1] = -1
    # A half of the grades are positive ones.
    codes = rng.integers(1, 3, shape) + 2 * (rng.random(shape) < 1 / (1 + sizes.neg_ratio))
    codes[::2, -1] = 0
    grades = np.zeros((sizes.batch, grade_count(sizes.sampling), 3), np.float32)
    grades[:, 1:] = 1
    grades[:, 1:3, 0] = 0
    grades[:, 1:, 1] = rng.uniform(0.5, 2, grades[:, 1:, 1].shape)
    document = rng.integers(sizes.documents, size=sizes.batch)
    positions = rng.integers(0, 4 * sizes.entries, sizes.batch)
    rows = [document, positions * 0, positions, np.full(sizes.batch, sizes.entries)]
    return Inputs(
        rng.standard_normal(hidden, dtype=np.float32).astype(ml_dtypes.bfloat16),
        Drawn(
            np.stack(rows, axis=1).astype(np.int32),
            grades,
            index,
            codes.astype(np.uint8),
            np.zeros((sizes.batch, 0), np.float32),
        ),
    )


def _golden(sizes: Sizes, order: np.ndarray, first: int, count: int) -> np.ndarray:
    """Entries int32 [count, golden] of some tokens: a stretch of a random order that moves on."""
    starts = (first + np.arange(count)) * sizes.renewed
    at = (starts[:, None] + np.arange(sizes.golden)) % len(order)
    return order[at].astype(np.int32)


def write_traces(sizes: Sizes, root: Path) -> Path:
    """Writes `documents` traces of random contents, with votes and attention mass."""
    layers = len(sizes.target_layers)
    rope = KeyRope(
        rope_head_dim=sizes.rope_dim,
        rope_theta=sizes.indexer.rope_theta,
        yarn=sizes.indexer.yarn,
        norm_eps=sizes.indexer.norm_eps,
    )
    prompt = CSA_RATIO * sizes.entries - sizes.tokens  # so that the last token forms the last entry
    for number in range(sizes.documents):
        rng = np.random.default_rng([1, number])
        info = TraceInfo(
            name=f"random-{number}",
            source=f"evals.bench_train, document {number}",
            model=None,
            target_layers=sizes.target_layers,
            csa_layers=CSA_LAYERS,
            csa_ratio=CSA_RATIO,
            page_entries=PAGE,
            prompt_tokens=prompt,
            rope=rope,
            votes=VoteConfig(),
        )
        order = rng.permutation(prompt // CSA_RATIO)
        options = {"hidden_size": sizes.hidden, "hidden_dtype": ml_dtypes.bfloat16, "mass": True}
        with TraceWriter(root, info, **options) as writer:
            for first in range(0, sizes.tokens, _BLOCK_TOKENS):
                count = min(_BLOCK_TOKENS, sizes.tokens - first)
                shape = (count, layers, sizes.hidden)
                hidden = rng.standard_normal(shape, dtype=np.float32).astype(ml_dtypes.bfloat16)
                golden = _golden(sizes, order, first, count)
                ends = np.arange(count + 1) * sizes.golden
                votes = np.full(golden.size, VoteConfig().min_layers, np.uint8)
                mass = np.full(golden.size, CSA_LAYERS / sizes.golden, np.float32)
                rows = [SparseRows(golden.ravel(), values, ends) for values in (votes, mass)]
                writer.append(hidden, prompt + first + np.arange(count), *rows)
            writer.finish(Keys(*random_keys(rng, (sizes.entries, layers, sizes.head_dim))))
    return root


def drawing_seconds(stream: Batches) -> float:
    """CPU seconds to draw a batch, in one thread; the least of a few runs, documents in memory."""
    stream.make(0)
    times = []
    for _ in range(RUNS):
        start = time.process_time()
        for step in range(1, _DRAWN + 1):
            stream.make(step % stream.steps_per_epoch)
        times.append((time.process_time() - start) / _DRAWN)
    return min(times)


def sending_seconds(stream: Batches, step: Step) -> float:
    """CPU seconds that the run itself takes for a batch that was drawn: hidden states, sending."""
    batch, times = next(stream), []
    for _ in range(RUNS):
        start = time.thread_time()
        for _ in range(_DRAWN):
            hidden = stream.hidden_of(batch.sample)
            placed = step.place(Inputs(hidden, batch.drawn))
        times.append((time.thread_time() - start) / _DRAWN)
        jax.block_until_ready(placed)
    return min(times)


class Ceilings(NamedTuple):
    """What the device can do: bytes/s of memory, FLOP/s of bfloat16 products."""

    bytes_per_second: float
    flops_per_second: float


def measure_ceilings(elements: int, width: int) -> Ceilings:
    """The better of reading, and of reading and writing, `elements` float32; a square product."""
    x = jnp.ones(elements, jnp.float32)
    read, update = jax.jit(jnp.sum), jax.jit(lambda x: x * 0.5 + 1)
    seconds = {1: median_seconds(lambda _: read(x), 10), 2: median_seconds(lambda _: update(x), 10)}
    a = jax.random.normal(jax.random.key(0), (width, width), jnp.bfloat16)
    product = median_seconds(lambda _: jnp.matmul(a, a), 10)
    moved = max(times * x.nbytes / s for times, s in seconds.items())
    return Ceilings(moved, 2 * width**3 / product)


class Floor(NamedTuple):
    """What a step has to move and to compute, and the time that takes at least."""

    bytes: float
    flops: float
    optimizer_bytes: float  # of `bytes`, what the update moves
    seconds: float

    @classmethod
    def of(cls, sizes: Sizes, ceilings: Ceilings) -> "Floor":
        """36 bytes a parameter, and the batch once; products of both passes, none twice.

        The forward pass reads float32 parameters (4); gradients are written, and read by the
        update, which has to wait for their norm (8); the update reads and writes parameters and
        both moments (24). Keys have no gradient, and of the projections' inputs only W_b's does.
        """
        shapes = leaf_shapes(sizes.indexer)
        parameters = sum(math.prod(shape) for shape in shapes.values())
        matrices = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
        inner = sum(math.prod(shape) for name, shape in shapes.items() if ".wq_b." in name)
        layers = len(sizes.target_layers)
        scored = layers * sizes.batch * sizes.candidates
        batch = scored * (sizes.head_dim + 4) + 2 * layers * sizes.batch * sizes.hidden
        moved = 36 * parameters + batch
        flops = 2 * sizes.batch * (2 * matrices + inner)
        flops += 2 * 2 * scored * sizes.heads * sizes.head_dim
        seconds = max(moved / ceilings.bytes_per_second, flops / ceilings.flops_per_second)
        return cls(moved, flops, 28 * parameters, seconds)
