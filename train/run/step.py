"""One training step: logits, losses and an update, on however many devices the batch is spread."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from lsa_jax.config_checks import refusal
from lsa_jax.lsa.indexer_config import ENSEMBLE_LEAF, IndexerConfig
from lsa_jax.shardings import batch_sharding
from train.data.batch import Batch, Drawn, Targets
from train.data.dataset import Batches, Demand
from train.run import losses, optimizer
from train.run.checks import check_program
from train.run.forward import compute_leaves, indexer_logits, log_length_scale
from train.run.key_pool import KeyPlanes, gather
from train.run.losses import ObjectiveConfig
from train.run.optimizer import OptimizerConfig, Params, TrainState


class Inputs(NamedTuple):
    """What a step is computed from, beside the pool of keys."""

    hidden: Any  # [L, B, W, D]
    drawn: Drawn


# Where the samples are; all else is whole on every device.
_AXES = Inputs(1, Drawn(0, 0, 0, 0, 0))  # pyright: ignore[reportArgumentType]


class _Part(NamedTuple):
    """Where an array of `Packed` is in each row, and what it is there; `first` is of words."""

    first: int
    words: int
    shape: tuple[int, ...]
    dtype: np.dtype


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["parts"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """`Inputs` as one array, as every transfer to a device has a price of its own: a row a sample.

    `parts` are of the leaves in their order; what they are is static.
    """

    words: Any  # int32 [B, W]
    parts: tuple[_Part, ...]

    @classmethod
    def of(cls, inputs: Inputs) -> "Packed":
        """Copies the host's arrays, whose items are of 1, 2 or 4 bytes."""
        rows = [np.moveaxis(x, axis, 0) for axis, x in _with_axes(inputs)]
        parts, first = [], 0
        for x in rows:
            count = -(-math.prod(x.shape[1:]) * x.itemsize // 4)
            parts.append(_Part(first, count, x.shape[1:], x.dtype))
            first += count
        words = np.empty((len(rows[0]), first), np.int32)
        for x, part in zip(rows, parts, strict=True):
            kind, count = np.dtype(f"u{x.itemsize}"), math.prod(part.shape)
            room = words[:, part.first : part.first + part.words].view(kind)
            # NumPy copies its own types much faster.
            room[:, :count] = x.reshape(len(x), count).view(kind)
        return cls(words, tuple(parts))

    def unpacked(self) -> Inputs:
        """The arrays again, on the device; exact."""

        def take(axis: int, part: _Part) -> Array:
            x = self.words[:, part.first : part.first + part.words]
            x = jax.lax.bitcast_convert_type(x, part.dtype)
            x = x.reshape(len(x), part.words * 4 // part.dtype.itemsize)
            x = x[:, : math.prod(part.shape)].reshape(len(x), *part.shape)
            return jnp.moveaxis(x, 0, axis)

        axes, tree = jax.tree.flatten(_AXES)
        return tree.unflatten(map(take, axes, self.parts))


def _with_axes(inputs: Inputs) -> list[tuple[int, Any]]:
    """The arrays, each with the axis that its samples are on."""
    return list(zip(jax.tree.leaves(_AXES), jax.tree.leaves(inputs), strict=True))


class Taken(NamedTuple):
    """A batch on its way: on the host, on the devices, and how the data stood when it was taken."""

    batch: Batch
    demand: Demand
    state: dict[str, Any]
    placed: Packed


def taken_from(data: Batches, mesh: Mesh) -> Iterator[Taken]:
    """The batches, each placed on the devices when it is asked for."""
    for batch in data:
        placed = place(Inputs(batch.hidden, batch.drawn), mesh)
        yield Taken(batch, data.demand, data.get_state(), placed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a step's program is made of; static.

    `total` is the number of updates that the schedule is for; `log_n_reference` the length whose
    logits `log_length_scale` leaves as they are (0: off).
    """

    indexer: IndexerConfig
    objective: ObjectiveConfig
    optimizer: OptimizerConfig
    total: int
    compute_dtype: str = "bfloat16"
    log_n_reference: int = 0

    def __post_init__(self) -> None:
        if self.compute_dtype not in ("bfloat16", "float32"):
            raise refusal("run.compute_dtype", self.compute_dtype, "bfloat16 or float32")
        check_program(self.indexer, self.objective, self.log_n_reference)


class Report(NamedTuple):
    """What a step says of itself, on the host."""

    loss: float
    terms: dict[str, np.ndarray]  # [L] each, scalars for the ensemble's
    norm: float
    rate: float
    taken: bool
    skipped: int
    skipped_in_a_row: int
    asked_to_stop: bool


def place(inputs: Inputs, mesh: Mesh) -> Packed:
    """The rows spread over the mesh's axis "data"; each process gives its own rows."""
    packed = Packed.of(inputs)
    sharding = NamedSharding(mesh, PartitionSpec(*batch_sharding(mesh).spec[:1]))
    words = jax.make_array_from_process_local_data(sharding, packed.words)
    return dataclasses.replace(packed, words=words)


def check_rows(rows: int, mesh: Mesh, accumulate: int) -> None:
    """Refuses a batch that does not divide over devices and parts."""
    data = mesh.shape["data"]
    if rows % (data * accumulate):
        wanted = f"a multiple of {data} devices times optimizer.accumulate={accumulate}"
        raise refusal("data.batch_size", rows, wanted)


def _parts(inputs: Inputs, count: int) -> Inputs:
    """Samples dealt out to `count` parts on a new first axis: every device has some of each."""

    def split(dim: int, x: Array) -> Array:
        shape = (*x.shape[:dim], x.shape[dim] // count, count, *x.shape[dim + 1 :])
        return jnp.moveaxis(x.reshape(shape), dim + 1, 0)

    return jax.tree.map(split, _AXES, inputs)


def _count(name: str, targets: Targets, cfg: ObjectiveConfig) -> Float[Array, ""]:
    """What a loss divides its sum by: elements, pairs, or attention mass."""
    valid = targets.valid
    if name in ("bpr", "margin"):
        positive = valid & (targets.labels > 0.5)
        negatives = jnp.sum(valid & ~positive, axis=1, dtype=jnp.float32)
        return jnp.sum(jnp.sum(positive, axis=1) * negatives)
    if name == "missed":
        flat = jnp.zeros((1, *valid.shape))
        pages = losses.pool_pages(flat, targets, cfg.page_entries)[1]
        mass = jnp.where(pages.valid, pages.stands_for * pages.mass, 0)
        return jnp.sum(mass)
    if name == "share":
        return jnp.sum(jnp.where(valid, targets.stands_for * targets.mass, 0))
    return jnp.sum(valid, dtype=jnp.float32)


def _shares(targets: Targets, cfg: ObjectiveConfig) -> dict[str, Float[Array, " A"]]:
    """Each part's share of what the whole batch's losses divide by; exactly 1 of a single part."""
    names = [name for name in losses.TERMS if getattr(cfg, name)]
    counts = {name: jax.vmap(lambda t, n=name: _count(n, t, cfg))(targets) for name in names}
    return {name: n / jnp.where(jnp.sum(n) > 0, jnp.sum(n), 1) for name, n in counts.items()}


def _weighted(
    parts: Mapping[str, Array], shares: Mapping[str, Array], cfg: ObjectiveConfig
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """A part's contribution to the batch's loss, and to its terms (see `losses.objective`)."""
    loss, terms = jnp.zeros(()), {}
    for name, value in parts.items():
        loss_name = name.removeprefix("ensemble.")
        weight = cfg.per_layer if loss_name == name else cfg.on_ensemble
        terms[name] = value * shares[loss_name]
        loss += weight * getattr(cfg, loss_name) * jnp.mean(terms[name])
    return loss, terms


def loss_of_part(
    cfg: StepConfig,
    leaves: Params,
    inputs: Inputs,
    planes: KeyPlanes,
    shares: Mapping[str, Array],
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The share of the batch's loss, and of its terms, that one part of the samples makes up."""
    drawn = inputs.drawn
    keys, scale = gather(planes, drawn.sample[:, 0], drawn.index)
    logits = indexer_logits(cfg.indexer, leaves, inputs.hidden, drawn, keys, scale)
    if cfg.log_n_reference:
        logits *= log_length_scale(drawn.entries, cfg.log_n_reference)[:, None]
    weight = leaves.get(ENSEMBLE_LEAF)
    _, parts = losses.objective(logits, drawn.targets, cfg.objective, ensemble_weight=weight)
    return _weighted(parts, shares, cfg.objective)


def gradients(
    cfg: StepConfig, params: Params, inputs: Inputs, planes: KeyPlanes
) -> tuple[Float[Array, ""], dict[str, Array], Params]:
    """Loss, terms and float32 gradients of a batch, computed in `optimizer.accumulate` parts."""
    leaves = compute_leaves(params, cfg.compute_dtype)
    dealt = _parts(inputs, cfg.optimizer.accumulate)
    shares = _shares(jax.vmap(lambda drawn: drawn.targets)(dealt.drawn), cfg.objective)

    def one(part: Inputs, share: dict[str, Array]) -> Any:
        f = jax.value_and_grad(loss_of_part, argnums=1, has_aux=True)
        (loss, terms), found = f(cfg, leaves, part, planes, share)
        return loss, terms, jax.tree.map(lambda x: x.astype(jnp.float32), found)

    if cfg.optimizer.accumulate == 1:
        return one(*jax.tree.map(lambda x: x[0], (dealt, shares)))

    def add(total: Any, part: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, one(*part)), None

    shapes = jax.eval_shape(one, *jax.tree.map(lambda x: x[0], (dealt, shares)))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return jax.lax.scan(add, zeros, (dealt, shares))[0]


def _pack(tree: Any) -> Float[Array, " M"]:
    """A tree of small arrays as one vector: one transfer to the host."""
    return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(tree)])


class Step:
    """The compiled step of one configuration; it takes the state over (donates it).

    `__call__(state, placed, planes, stop)` returns the new state and a packed report for `report`.
    Where any process passes `stop`, all processes read so in the same report, which is how they
    agree on the step to stop after.
    """

    def __init__(self, cfg: StepConfig, mesh: Mesh) -> None:
        self.cfg, self.mesh = cfg, mesh
        self.rates: optax.Schedule = optimizer.schedule(cfg.optimizer, cfg.total)
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._requests = {flag: self._request(flag) for flag in (False, True)}
        self._run: Callable[..., tuple[TrainState, Array]] = jax.jit(
            self._step, donate_argnums=0, out_shardings=self.replicated
        )

    def _request(self, flag: bool) -> Array:
        spread = batch_sharding(self.mesh)
        mine = np.full(len(spread.addressable_devices), flag, np.float32)
        return jax.make_array_from_process_local_data(spread, mine)

    def _terms(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the terms, by name."""
        objective = self.cfg.objective
        names = [name for name in losses.TERMS if getattr(objective, name)]
        shapes: dict[str, tuple[int, ...]] = {}
        if objective.per_layer:
            shapes |= {name: (len(self.cfg.indexer.target_layers),) for name in names}
        if objective.on_ensemble:
            shapes |= {f"ensemble.{name}": () for name in names}
        return shapes

    def _step(
        self, state: TrainState, placed: Packed, planes: KeyPlanes, stop: Array
    ) -> tuple[TrainState, Array]:
        loss, terms, found = gradients(self.cfg, state.params, placed.unpacked(), planes)
        state, applied = optimizer.apply(self.cfg.optimizer, self.rates, state, found, loss)
        counters = (state.skipped, state.skipped_in_a_row)
        ordered = [terms[name] for name in self._terms()]
        return state, _pack((loss, *applied, *counters, jnp.max(stop), ordered))

    def init(self, params: Mapping[str, Any]) -> TrainState:
        """The state before the first step, whole on every device, of float32 parameters.

        The arrays are copies: donating them takes nothing from the caller.
        """
        own = {name: np.asarray(x, np.float32) for name, x in params.items()}

        def make(params: Params) -> TrainState:
            return optimizer.init_state(self.cfg.optimizer, jax.tree.map(jnp.copy, params))

        return jax.jit(make, out_shardings=self.replicated)(own)

    def place(self, inputs: Inputs) -> Packed:
        """What the host has of a step, on the devices (see `place`)."""
        return place(inputs, self.mesh)

    def __call__(
        self, state: TrainState, placed: Packed, planes: KeyPlanes, *, stop: bool = False
    ) -> tuple[TrainState, Array]:
        """The state after a step, and its packed report; returns before it is computed."""
        return self._run(state, placed, planes, self._requests[stop])

    def report(self, packed: Array) -> Report:
        """A step's report, waiting for it."""
        loss, norm, rate, taken, skipped, row, stop, *rest = np.asarray(packed).tolist()
        terms: dict[str, np.ndarray] = {}
        for name, shape in self._terms().items():
            size = int(np.prod(shape))
            terms[name] = np.asarray(rest[:size], np.float32).reshape(shape)
            rest = rest[size:]
        return Report(loss, terms, norm, rate, bool(taken), int(skipped), int(row), stop > 0)
