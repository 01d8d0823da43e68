"""Columns of a running session: counted from arrays, and as the calculator has them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from footprint_cases import CONFIGS

from lsa_jax.config import CacheConfig, KVFormat
from lsa_jax.lsa import report
from lsa_jax.lsa.accounting import Components, Footprint
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.pool_map import PoolMap, Table
from lsa_jax.lsa.report import Live
from lsa_jax.lsa.targets import default_target_layers

LENGTHS = (1021, 300, 0)


def ints(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def abstract(name: str, kv_format: KVFormat, *, late: int = 0) -> Live:
    """Three rows of which one is free, `late` complete pages of the first still in its buffer.

    Nothing is allocated, so that the true shapes can be counted.
    """
    cfg, cache = CONFIGS[name], CacheConfig(kv_format=kv_format, page_entries=16)
    targets = default_target_layers(cfg)
    plan = Level2(cfg, cache, targets=targets, lookahead=64 * cfg.csa_ratio, path="paged")
    dtype = jnp.dtype(jnp.float32 if kv_format == "float32" else jnp.bfloat16)
    state = jax.eval_shape(lambda: plan.start(batch=3, capacity=1024, dtype=dtype))
    complete = [tokens // cfg.csa_ratio // 16 for tokens in LENGTHS]
    complete[0] -= late
    return Live(
        plan=plan,
        state=state,
        records=jax.ShapeDtypeStruct((11, *plan.layout.shape), jnp.uint8),
        table=Table(ints(3, 7), ints(3, 7)),
        pool=PoolMap(ints(11), ints(11), ints(11)),
        lengths=LENGTHS,
        bases=tuple(16 * pages for pages in complete),
        capacity=1024,
        pool_pages=11,
        resident_pages=5,
        hosted_pages=sum(complete),
        staging=5 * plan.layout.nbytes,
    )


def assert_agree(got: Footprint, want: Footprint) -> None:
    def close(a: float, b: float, what: str) -> None:
        # The bound of the accounting. Figures differ by the fill of records at odd shapes.
        assert abs(a - b) <= 0.01 * max(a, b), (what, a, b)

    for reading in ("occupied", "reserved"):
        a, b = getattr(got, reading), getattr(want, reading)
        for column in dataclasses.asdict(a):
            close(getattr(a, column), getattr(b, column), f"{reading} {column}")
    for name in ("full_occupied", "full_reserved", "kept", "share", "share_reserved", "logical"):
        close(getattr(got, name), getattr(want, name), name)


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.parametrize("kv_format", ["fp8", "bfloat16", "float32"])
@pytest.mark.parametrize("name", CONFIGS)
def test_arrays_and_calculator_agree_column_by_column(name, kv_format, late):
    live = abstract(name, kv_format, late=late)
    found = report.measured(live)
    assert_agree(found, report.calculated(live))
    assert found.occupied.fresh > 0 and found.occupied.host > 0 and found.kept < 1


def test_a_page_that_the_calculator_forgets_is_noticed():
    live = abstract("tiny", "fp8")
    with pytest.raises(AssertionError, match="csa_entries"):
        more = dataclasses.replace(live, resident_pages=live.resident_pages + 1)
        assert_agree(report.measured(live), report.calculated(more))


def test_reserved_columns_are_all_bytes_of_the_arrays():
    live = abstract("v4_flash", "fp8")
    arrays = (live.state.layers, live.records, live.table, live.pool)
    total = sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arrays))
    columns = dataclasses.asdict(report.measured(live).reserved)
    on_device = {name: size for name, size in columns.items() if not name.startswith("host_")}
    assert sum(on_device.values()) == total + live.staging
    assert set(columns) == {field.name for field in dataclasses.fields(Components)}
