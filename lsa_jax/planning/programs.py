"""The programs that a case runs, compiled from shapes alone: prefill, decode, fire, recall.

These are the running system's own programs. `Depth` says how much of the model is in a program that
has all layers: "all" of it, or "kinds", where the first layer of each kind stands for the others
and these pass their input on. Weights and state are whole in both; temporaries are a lower bound in
the second, for some of each layer's live as long as the program. What layers add up (collectives)
is scaled by how many there are.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding
from jaxtyping import Array

from lsa_jax import shardings
from lsa_jax.engine import Engine
from lsa_jax.lsa import prefill
from lsa_jax.lsa.boundary import Where
from lsa_jax.lsa.indexer_config import leaf_shapes
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.programs import Programs
from lsa_jax.lsa.session import MIN_CHUNK
from lsa_jax.nn.transformer import Block, DeepSeekV4
from lsa_jax.planning.aot import Target
from lsa_jax.planning.case import Case, shard_bytes, whole
from lsa_jax.planning.collectives import Collectives, collectives
from lsa_jax.planning.thinning import Skipped, kinds
from lsa_jax.sampling import Greedy
from pallas_kernels.page_recall import page_recall

Depth = Literal["all", "kinds"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """What a compiler says of one program, per device; bytes.

    `passing` are arguments that are on the device only for this call, `added` results that take no
    argument's place, `temporary` what the program needs besides. `flops` and `touched` are the
    compiler's own counts (None where it has none), in which most loops count once.
    """

    name: str
    layers: str
    seconds: float
    arguments: int
    passing: int
    added: int
    temporary: int
    code: int
    flops: float | None
    touched: float | None
    collectives: Collectives

    @property
    def needs(self) -> int:
        """Bytes on top of what stays on the device."""
        return self.passing + self.added + self.temporary + self.code


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Program:
    """Something to compile. `passing` are arguments that are not there between calls."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    passing: tuple[Any, ...] = ()
    donate: tuple[int, ...] = ()
    results: NamedSharding | None = None
    depth: Depth | None = None  # None: it has one layer, or none


class Planner:
    """Compiles a case's programs for a target."""

    def __init__(self, case: Case, target: Target, depth: Depth):
        self.case, self.target = case, target
        self.depth: Depth = depth
        self.mesh = target.mesh
        self.everywhere = whole(self.mesh)
        self.rows = shardings.batch_sharding(self.mesh) if case.lsa is None else self.everywhere
        self.counts = kinds(case)

    def compiled(self) -> Iterator[Compiled]:
        """Every program, as it is compiled."""
        programs = self._full() if self.case.lsa is None else self._two_level()
        for program in programs:
            yield self._compile(program)

    def _compile(self, program: _Program) -> Compiled:
        begin = time.perf_counter()
        jitted = jax.jit(
            program.function,
            donate_argnums=program.donate,
            out_shardings=program.results,
            keep_unused=program.depth is not None,  # skipped layers' weights are there too
        )
        made = self.target.compile(lambda: jitted.trace(*program.arguments))
        seconds = time.perf_counter() - begin
        memory, costs = made.memory_analysis(), made.cost_analysis() or {}
        scaled = self.counts if program.depth == "kinds" else {}
        passing = sum(shard_bytes(x, x.sharding) for x in jax.tree.leaves(program.passing))
        return Compiled(
            name=program.name,
            layers=program.depth or "one",
            seconds=seconds,
            arguments=memory.argument_size_in_bytes,
            passing=passing,
            added=max(0, memory.output_size_in_bytes - memory.alias_size_in_bytes),
            temporary=memory.temp_size_in_bytes,
            code=memory.generated_code_size_in_bytes,
            flops=costs.get("flops") if program.depth != "kinds" else None,
            touched=costs.get("bytes accessed") if program.depth != "kinds" else None,
            collectives=collectives(made.as_text(), scaled),
        )

    def model(self, *, thinned: bool = False) -> DeepSeekV4:
        """The model, of shapes; `thinned`, only layers that stand for their kind compute."""
        case = self.case
        leaves = {}
        for path, info in case.leaves.items():
            where = shardings.leaf_sharding(case.cfg, self.mesh, path, info.shape)
            leaves[path] = jax.ShapeDtypeStruct(info.shape, info.dtype, sharding=where)
        model = DeepSeekV4(case.cfg, case.compute, leaves)
        if thinned:
            layers: list[Any] = list(model.layers)
            thin = [b if i in self.counts else Skipped(b) for i, b in enumerate(layers)]
            model.layers = nnx.List[Any](thin)
        return model

    def _put(self, tree: Any, where: NamedSharding | None = None) -> Any:
        """Shapes with a place: everywhere unless said."""
        where = where or self.everywhere
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree)

    def _new(self, shape: tuple[int, ...], dtype: Any, where: NamedSharding | None = None) -> Any:
        return self._put(jax.ShapeDtypeStruct(shape, dtype), where)

    def _key(self) -> Any:
        return self._put(jax.eval_shape(lambda: jax.random.key(0)))

    def _full(self) -> Iterator[_Program]:
        """Full attention: the engine's two programs."""
        case, rows = self.case, self.rows
        model = self.model(thinned=self.depth == "kinds")
        engine = Engine(model, case.cache, prefill_chunk=case.prefill_chunk)
        weights, state = jax.tree.leaves(model), self._put(case.state(), rows)
        ids = self._new((case.batch, engine.prefill_chunk), jnp.int32, rows)
        count = self._new((case.batch,), jnp.int32, rows)
        yield _Program(
            name="prefill chunk",
            function=engine._extend(False),
            arguments=(weights, state, ids, count),
            donate=(1,),
            depth=self.depth,
        )
        done = self._new((case.batch,), jnp.bool_, rows)
        steps = self._new((), jnp.int32)
        yield _Program(
            name="decode step",
            function=engine._decode(Greedy(), (), False),
            arguments=(weights, state, count, done, self._key(), steps),
            donate=(1,),
            depth=self.depth,
        )

    def _two_level(self) -> Iterator[_Program]:
        """LSA: prefill layer by layer, a cycle's step, the boundary's programs, a recall."""
        yield from self._prefill()
        case, batch = self.case, self.case.batch
        assert case.lsa is not None
        state = self._put(case.state())
        records, pool, table = self._put(case.pool())
        model = self.model(thinned=self.depth == "kinds")
        programs = self._programs(model)
        row, done = self._new((batch,), jnp.int32), self._new((batch,), jnp.bool_)
        weights = jax.tree.leaves((model, self._indexer()))
        steps = self._new((), jnp.int32)
        yield _Program(
            name="decode step",
            function=functools.partial(programs._cycle, Greedy(), (), False),
            arguments=(weights, state, records, table, row, done, self._key(), steps),
            donate=(1,),
            results=self.everywhere,
            depth=self.depth,
        )
        model = self.model()
        programs = self._programs(model)
        weights = jax.tree.leaves((model, self._indexer()))
        yield _Program(
            name="flush",
            function=programs._flush,
            arguments=(weights, state, done),
            donate=(1,),
            results=self.everywhere,
        )
        yield self._fire(programs, weights, state, pool)
        yield _Program(
            name="missed",
            function=programs._missed,
            arguments=(weights, state, records, table),
            results=self.everywhere,
        )
        yield self._recall(records)

    def _programs(self, model: DeepSeekV4) -> Programs:
        assert self.case.lsa is not None
        return Programs(self.case.level2, self.case.lsa, model, self._indexer(), None)

    def _indexer(self) -> MemoryIndexer:
        cfg = self.case.indexer
        assert cfg is not None
        shapes = leaf_shapes(cfg).items()
        return MemoryIndexer(cfg, {name: self._new(s, jnp.float32) for name, s in shapes})

    def _fire(self, programs: Programs, weights: Any, state: Any, pool: Any) -> _Program:
        """Level 1, the selection and the slots."""
        case = self.case
        pages, batch = case.level2.pages_of(state), case.batch
        hosts = 1 << max(0, batch * case.row_pages - 1).bit_length()
        scalar = self._new((), jnp.int32)
        at = Where(
            host_rows=self._new((batch, pages), jnp.int32),
            generations=self._new((hosts,), jnp.int32),
            due=self._new((batch,), jnp.bool_),
            allowed=scalar,
            extra=None,
            limit=scalar,
            cycle=scalar,
        )
        before = self._new((batch, pages), jnp.bool_)
        width = min(case.pool_slots, pages)
        recall_pages = case.room.row_pages(case.context)
        return _Program(
            name="fire",
            function=functools.partial(programs._choose, recall_pages, width),
            arguments=(weights, state, pool, before, None, at),
            passing=(at.host_rows, at.generations),
            results=self.everywhere,
        )

    def _recall(self, records: Any) -> _Program:
        """A cold recall of one row's share of the pool, through a slab."""
        share = max(1, self.case.pool_slots // self.case.batch)
        size = min(1 << (share - 1).bit_length(), self.case.pool_slots)
        slab = self._new((size, *self.case.level2.layout.shape), jnp.uint8)
        index = self._new((size,), jnp.int32)

        def recall(records: Array, slab: Array, src: Array, dst: Array) -> Array:
            return page_recall(records, (slab,), src, dst, backend="xla")

        return _Program(
            name="recall",
            function=recall,
            arguments=(records, slab, index, index),
            passing=(slab, index),
            donate=(0,),
        )

    def _prefill(self) -> Iterator[_Program]:
        """One program per kind of layer, of a row that is not among the others yet."""
        case, plan, model = self.case, self.case.level2, self.model()
        size = max(MIN_CHUNK, 1 << (case.prefill_chunk - 1).bit_length())
        state = self._put(case.state(rows=1))
        tokens, one = self._new((1, size), jnp.int32), self._new((1,), jnp.int32)
        cfg = case.cfg
        width = (1, size, cfg.hc_mult, cfg.hidden_size)
        streams = self._new(width, jnp.dtype(case.compute.dtype))
        for i, count in self.counts.items():
            layer, block = state.layers[i], cast(Block, model.layers[i])
            args: tuple[Any, ...] = (block, streams, tokens, layer)
            passing: tuple[Any, ...] = (streams, state)
            if i not in plan.csa or plan.path == "mask":
                run = _whole(plan)
                args += (one, one)
            else:
                ordinal = plan.csa.index(i)
                rows = sum(part.stop - part.start for part in plan.layout.spans(ordinal))
                slab = self._new((plan.pages_of(state), rows, 128), jnp.uint8)
                run = _csa(plan, ordinal)
                args, passing = (*args, slab, (one, one, one)), (*passing, slab)
            name = f"prefill, layer {i} (x {count})"
            yield _Program(name=name, function=run, arguments=args, passing=passing, donate=(1, 3))
        yield _Program(
            name="prefill, logits",
            function=prefill._logits,
            arguments=(model, streams, one),
            passing=(streams, state),
        )


def _whole(plan: Level2) -> Callable[..., Any]:
    """A prefill layer whose cache is all in the state."""

    def run(block: Any, streams: Any, ids: Any, layer: Any, start: Any, count: Any) -> Any:
        return prefill._whole(plan, block, streams, ids, layer, start, count, None)

    return run


def _csa(plan: Level2, ordinal: int) -> Callable[..., Any]:
    """A prefill layer whose history comes from the host."""

    def run(block: Any, streams: Any, ids: Any, layer: Any, slab: Any, at: Any) -> Any:
        return prefill._csa(plan, ordinal, block, streams, ids, layer, slab, at, None)

    return run
