"""The calculator against the arrays of a session: reserved bytes exactly, occupied ones counted."""

import collections
import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from footprint_cases import CONFIGS, run

from lsa_jax import config_io, footprint
from lsa_jax.cache.records import RecordLayout
from lsa_jax.config import CacheConfig, ComputeConfig, ConfigError, KVFormat, ModelConfig
from lsa_jax.lsa import accounting, report, targets
from lsa_jax.lsa.accounting import Components
from lsa_jax.lsa.batch import Batch
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig, ResidentPath
from lsa_jax.lsa.policy import PolicyConfig
from lsa_jax.lsa.session import LsaSession
from lsa_jax.nn.transformer import DeepSeekV4
from lsa_jax.parameters import parameter_table
from tests import lsa_models

pytestmark = pytest.mark.usefixtures("compiled_quickly")

FORMATS: tuple[KVFormat, ...] = ("fp8", "bfloat16", "float32")
ROWS = 2


def nbytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def planned(cfg: ModelConfig, kv_format: KVFormat) -> DeepSeekV4:
    """A model without weights; in float32 where its cache is."""
    dtype = "float32" if kv_format == "float32" else "bfloat16"
    leaves = {
        path: jax.ShapeDtypeStruct(spec.shape, jnp.int32 if "tid2eid" in path else dtype)
        for path, spec in parameter_table(cfg).items()
    }
    return DeepSeekV4(cfg, ComputeConfig(dtype=dtype), leaves)


def settings(cfg: ModelConfig, path: ResidentPath = "paged", **more: Any) -> LsaConfig:
    chosen = targets.default_target_layers(cfg)
    return LsaConfig(targets=chosen, arm="recency", resident_path=path, **more)


def arrays(batch: Batch) -> tuple[Any, ...]:
    """Everything that a session keeps on the device between two calls, weights apart."""
    tiers = batch.tiers
    return batch.state, tiers.records, tiers.pool, tiers.table, tiers.pages


def rows_of(planes: Any) -> int:
    is_plane = lambda x: hasattr(x, "rows")  # noqa: E731
    return sum(plane.rows for plane in jax.tree.leaves(planes, is_leaf=is_plane))


def columns(batch: Batch, live: tuple[Any, ...]) -> dict[str, int]:
    """Bytes of these arrays by the calculator's components; the remainder is `others`."""
    state, records, pool, table, pages = live
    plan, slots = batch.plan, records.shape[0]
    layout: RecordLayout = plan.layout
    found = dict.fromkeys(("hca_entries", "target_keys", "fresh", "window", "tails"), 0)
    for i, layer in enumerate(state.layers):
        found["window"] += nbytes(layer.window)
        found["tails"] += nbytes((layer.tail, layer.index_tail))
        if i not in plan.csa:
            found["hca_entries"] += nbytes(layer.entries)
            continue
        target = plan.csa.index(i) in plan.targets
        found["fresh"] += nbytes(layer.entries)
        found["target_keys" if target else "fresh"] += nbytes(layer.index_keys)
    found["csa_entries"] = slots * 128 * sum(rows_of(x) for x in layout.entries)
    found["other_keys"] = slots * 128 * sum(rows_of(x) for x in layout.keys if x is not None)
    assert found["csa_entries"] + found["other_keys"] == nbytes(records)
    found["page_tables"] = nbytes((pool, table))
    small = (state.lengths, state.base, state.hidden, state.reads, state.votes, state.streak, pages)
    found["others"] = nbytes(small)
    assert sum(found.values()) == nbytes(live)
    return found


def calculated(batch: Batch, lengths: tuple[int, ...], resident: int) -> tuple[Any, Any]:
    """(reserved, occupied) as the calculator has them."""
    tiers = batch.tiers
    at = batch.room.placement(
        lengths,
        resident_pages=resident,
        pool_pages=tiers.slots,
        capacity=batch.capacity,
        table_pages=tiers.width,
    )
    found = accounting.footprint(batch.plan.cfg, accounting.layout_of(batch.cache.kv_format), at)
    return found.reserved, found.occupied


def planned_batch(
    cfg: ModelConfig, kv_format: KVFormat, lsa: LsaConfig, capacity: int, page_entries: int = 64
) -> tuple[Batch, tuple[Any, ...]]:
    """A batch whose arrays are shapes only: a million tokens cost nothing here."""
    cache = CacheConfig(kv_format=kv_format, page_entries=page_entries)
    made: list[Batch] = []

    def make() -> tuple[Any, ...]:
        made.append(Batch(planned(cfg, kv_format), cache, lsa, rows=ROWS, capacity=capacity))
        return arrays(made[0])

    live = jax.eval_shape(make)
    return made[0], live


def assert_same(found: dict[str, int], want: Components) -> None:
    want = dataclasses.asdict(want)
    del want["staging"], want["host_entries"], want["host_keys"]
    others = found.pop("others")
    assert found == want
    assert others < 0.01 * sum(want.values())  # the last tokens' activations, lengths, page flags


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_reserved_bytes_are_those_of_a_sessions_arrays(name, kv_format):
    cfg = CONFIGS[name]
    capacity = min(cfg.max_position_embeddings, 2**20) - 1000  # no whole number of pages
    batch, live = planned_batch(cfg, kv_format, settings(cfg), capacity)
    reserved, _ = calculated(batch, (capacity, 0), resident=0)
    assert_same(columns(batch, live), reserved)


@pytest.mark.parametrize("path", ["paged", "gathered"])
@pytest.mark.parametrize("page_entries", [1, 16])
def test_reserved_bytes_hold_for_other_pages_budgets_and_paths(page_entries, path):
    cfg = CONFIGS["groups"]
    lsa = settings(
        cfg,
        path,
        lookahead=37,
        budget=parse_budget("0.5"),
        policy=PolicyConfig(recency=64, sink=16),
    )
    batch, live = planned_batch(cfg, "fp8", lsa, 900, page_entries)
    reserved, _ = calculated(batch, (900, 900), resident=0)
    assert_same(columns(batch, live), reserved)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_says_what_a_session_reserves(name, capsys, tmp_path):
    """`lsa_jax.footprint` at a context, and a session with exactly that capacity."""
    cfg = CONFIGS[name]
    tokens = min(cfg.max_position_embeddings, 2**17) - 300
    batch, live = planned_batch(cfg, "fp8", settings(cfg), tokens)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_io.to_json(cfg)))
    options = ("--attention", "lsa", "--layout", "planes640", "--requests", ROWS)
    said = run(capsys, "--config", file, "--context", tokens, *options)["components_reserved"]
    assert_same(columns(batch, live), Components(**said))


BUDGETED = ("--page-entries", 8, "--lookahead", 37, "--recency", 10, "--sink", 3)


def budgeted(cfg: ModelConfig, budget: str, **more: Any) -> LsaConfig:
    """The same settings as those options."""
    policy = PolicyConfig(recency=10, sink=3)
    return settings(cfg, lookahead=37, policy=policy, budget=parse_budget(budget), **more)


@pytest.mark.parametrize("budget", ["0.6", "0.8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_allows_the_pages_that_a_session_allows_under_a_budget(
    name, budget, capsys, tmp_path
):
    """To the page, at lengths with entries in formation, and with it every reserved byte."""
    cfg = CONFIGS[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_io.to_json(cfg)))
    options = ("--attention", "lsa", "--layout", "planes640", "--requests", ROWS, *BUDGETED)
    options += ("--kv-budget", budget)
    most = min(cfg.max_position_embeddings, 2**17)
    for tokens in (most - 300, most - 17):
        batch, live = planned_batch(cfg, "fp8", budgeted(cfg, budget), tokens, page_entries=8)
        said = run(capsys, "--config", file, "--context", tokens, *options)
        allowed = batch.room.allowed((tokens,) * ROWS, tokens, strict=True)
        assert 0 < allowed < ROWS * batch.room.complete_pages(tokens)
        assert said["pool_pages"] == allowed == batch.tiers.slots
        assert said["recall_pages"] == allowed // ROWS
        assert_same(columns(batch, live), Components(**said["components_reserved"]))


@pytest.mark.parametrize("share", [0.25, 0.5])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_command_and_a_session_refuse_with_the_same_floor(name, share, capsys, tmp_path):
    cfg = CONFIGS[name]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_io.to_json(cfg)))
    tokens = int(share * min(cfg.max_position_embeddings, 2**17)) + 7
    batch, _ = planned_batch(cfg, "fp8", budgeted(cfg, "2B"), tokens, page_entries=8)
    with pytest.raises(ConfigError) as refused:
        batch.room.allowed((tokens,) * ROWS, tokens, strict=True)
    args = ("--config", file, "--context", tokens, "--requests", ROWS, *BUDGETED)
    args += ("--attention", "lsa", "--layout", "planes640", "--kv-budget", "2B")
    assert footprint.main([*map(str, args)]) == 2
    assert capsys.readouterr().err == f"error: {refused.value}\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "budget"),
    [(301, "0.5"), (301, "60kB"), (140, "0.8")],
)
def test_the_command_allows_what_a_running_session_allows(tokens, budget, capsys, tmp_path):
    session = lsa_models.session(budget=budget, capacity=tokens)
    session.admit(lsa_models.prompt(tokens), max_new_tokens=0)
    (event,) = session.batch.events
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config_io.to_json(lsa_models.CONFIG)))
    of = session.lsa
    said = run(
        *(capsys, "--config", file, "--context", tokens, "--attention", "lsa"),
        *("--layout", "f32", "--page-entries", lsa_models.PAGE_ENTRIES, "--kv-budget", budget),
        *("--lookahead", of.lookahead, "--recency", of.policy.recency, "--target-layers", 1),
    )
    assert said["pool_pages"] == event.allowed == len(event.pages) < event.complete
    assert said["kv_share"] == report.figures(session).share


# What exists in a session that runs.


def entries_formed(tokens: int, ratio: int) -> int:
    """One by one: an entry exists once its last token was seen."""
    return sum((position + 1) % ratio == 0 for position in range(tokens))


def entry_bytes(planes: Any) -> int:
    """Of one entry of planes [B, pages, page_entries, ...]."""
    return sum(x[0, 0, 0].nbytes for x in jax.tree.leaves(planes))


def written(planes: Any, row: int) -> list[int]:
    """Entries of a row whose bytes are not all zero, in planes [B, pages, page_entries, ...]."""
    found: set[int] = set()
    for plane in jax.tree.leaves(planes):
        flat = np.asarray(plane[row]).view(np.uint8)
        found |= set(np.flatnonzero(flat.reshape(plane.shape[1] * plane.shape[2], -1).any(1)))
    return sorted(found)


def slots_read(batch: Batch) -> set[int]:
    """Slots of the pool that the next steps read; each holds the page that its row's table says."""
    tiers, found = batch.tiers, set()
    pool = np.asarray(tiers.records)
    for b, row in enumerate(batch.rows):
        for page, slot in zip(*(np.asarray(x[b]) for x in tiers.table), strict=True):
            if page >= 0:
                assert row is not None
                stored = tiers.store.memory.read(tiers.store.rows(row.owner)[page : page + 1])
                np.testing.assert_array_equal(pool[slot], stored[0])
                found.add(int(slot))
    return found


def counted(batch: Batch) -> dict[str, int]:
    """Occupied bytes of a session between two cycles, entry by entry and page by page."""
    plan, found = batch.plan, collections.Counter()
    per_page, cfg = batch.cache.page_entries, batch.plan.cfg
    parts = {
        "entries": 128 * sum(rows_of(x) for x in plan.layout.entries),
        "keys": 128 * sum(rows_of(x) for x in plan.layout.keys if x is not None),
    }
    for b, row in enumerate(batch.rows):
        if row is None:
            continue
        tokens = len(row.tokens)
        formed = entries_formed(tokens, cfg.csa_ratio)
        base = formed // per_page * per_page
        for i, layer in enumerate(batch.state.layers):
            if cfg.layer_types[i] == "hca":
                there = written(layer.entries, b)
                assert there == list(range(entries_formed(tokens, cfg.hca_ratio)))
                found["hca_entries"] += len(there) * entry_bytes(layer.entries)
            if i not in plan.csa:
                continue
            fresh = [layer.entries]
            if i in plan.target_layers:
                assert written(layer.index_keys, b) == list(range(formed))
                found["target_keys"] += formed * entry_bytes(layer.index_keys)
            else:
                fresh.append(layer.index_keys)
            for planes in fresh:
                assert {*range(formed - base)} <= {*written(planes, b)}
                found["fresh"] += (formed - base) * entry_bytes(planes)
        hosted = len(batch.tiers.store.rows(row.owner))
        assert hosted == base // per_page
        found["host_entries"] += hosted * parts["entries"]
        found["host_keys"] += hosted * parts["keys"]
    pages = len(slots_read(batch))
    return found + collections.Counter(
        csa_entries=pages * parts["entries"], other_keys=pages * parts["keys"]
    )


def check_now(session: LsaSession) -> None:
    """The calculator, `report` and a count by hand agree, to the byte."""
    batch = session.batch
    lengths = tuple(len(row.tokens) if row else 0 for row in batch.rows)
    reserved, occupied = calculated(batch, lengths, resident=len(slots_read(batch)))
    want = {name: size for name, size in dataclasses.asdict(occupied).items() if size}
    seen = {name: want.pop(name) for name in ("window", "tails", "page_tables")}
    assert counted(batch) == want
    live = columns(batch, arrays(batch))
    assert seen == {name: live[name] for name in seen}
    measured = report.measured(report.live_of(session))
    for mine, theirs in ((reserved, measured.reserved), (occupied, measured.occupied)):
        assert dataclasses.replace(theirs, staging=0) == mine  # the slab is gone by now
    live.pop("others")
    assert live.items() <= dataclasses.asdict(reserved).items()
    host = batch.tiers.store.stats()
    assert host.live == occupied.host <= host.allocated


@pytest.mark.slow
@pytest.mark.parametrize("kv_format", ["float32", "fp8"])
def test_occupied_bytes_are_what_exists_at_every_boundary(kv_format):
    session = lsa_models.session(kv=kv_format, rows=3, budget="0.7")
    lookahead, run = session.lsa.lookahead, lsa_models.Run(session)
    check_now(session)
    run.admit(lsa_models.prompt(61, seed=1), new=80)
    run.admit(lsa_models.prompt(23, seed=2), new=80)
    check_now(session)
    for _ in range(4):
        run.decode(lookahead)
        check_now(session)
    session.finish(0)
    assert session.batch.tiers.store.stats().cached > 0
    run.decode(lookahead, only=[1])
    check_now(session)
