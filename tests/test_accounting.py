"""Accounted bytes are those of the arrays that exist, and the columns hang together."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from footprint_cases import CONFIGS, FLASH, placed

from lsa_jax.cache import codec, exchange, state
from lsa_jax.config import CacheConfig, ConfigError, KVFormat
from lsa_jax.config_io import load_config
from lsa_jax.lsa import accounting, targets
from lsa_jax.lsa.accounting import Offload, Placement

FORMATS: tuple[KVFormat, ...] = ("fp8", "bfloat16", "float32")
MiB = 2**20


# Layer names (spec 2.3).


def test_csa_ordinals_are_the_layers_of_the_published_table():
    table = [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42]
    assert list(targets.csa_layers(FLASH)) == table
    assert [targets.csa_ordinal(FLASH, layer) for layer in table] == list(range(21))
    assert targets.hca_layers(FLASH) == tuple(range(3, 42, 2))  # ordinals of their own
    assert [table[i] for i in targets.default_target_layers(FLASH)] == [22, 26, 42]


@pytest.mark.parametrize("layer", [0, 3, 43, -1])
def test_a_layer_that_is_not_csa_has_no_ordinal(layer):
    with pytest.raises(ConfigError, match=rf"one of the CSA layers \[2, 4, .*got {layer}$"):
        targets.csa_ordinal(FLASH, layer)


@pytest.mark.parametrize(
    ("name", "ordinals"),
    [
        ("v4_flash", (10, 12, 20)),
        ("v4_pro", (15, 22, 29)),
        ("bench", (3, 4, 6)),
        ("tiny", (1,)),
        ("v4_flash_slice", (0,)),
        ("late", (3, 4, 5)),
    ],
)
def test_default_target_layers_are_of_the_upper_half(name, ordinals):
    assert targets.default_target_layers(CONFIGS[name]) == ordinals
    assert targets.check_targets(CONFIGS[name], ordinals) == ordinals


def test_a_model_without_csa_layers_has_no_target_layers():
    none = dataclasses.replace(load_config("tiny"), layer_types=("hca",) * 6)
    assert targets.default_target_layers(none) == ()
    with pytest.raises(ConfigError, match="layer_types must have CSA layers"):
        targets.check_targets(none, ())


# The arrays that exist.


@pytest.mark.parametrize("kv_format", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_reserved_bytes_are_those_of_the_arrays(name, kv_format):
    cfg, cache = CONFIGS[name], CacheConfig(kv_format=kv_format, page_entries=16)
    dtype = jnp.float32 if kv_format == "float32" else jnp.bfloat16
    # 1000: no whole number of pages of any layer.
    arrays = jax.eval_shape(
        lambda: state.init_state(cfg, cache, batch=3, capacity=1000, dtype=dtype)
    )
    want = {"window": 0, "tails": 0, "hca_entries": 0, "csa_entries": 0, "index_keys": 0}

    def add(column: str, tree: object) -> None:
        want[column] += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    for layer, kind in zip(arrays.layers, cfg.layer_types, strict=True):
        add("window", layer.window)
        add("tails", (layer.tail, layer.index_tail))
        add("hca_entries" if kind == "hca" else "csa_entries", layer.entries)
        add("index_keys", layer.index_keys)
    at = Placement(
        lengths=(1000, 0, 7),
        targets=targets.default_target_layers(cfg),
        page_entries=16,
        window_bytes=jnp.dtype(dtype).itemsize,
    )
    found = accounting.reserved(cfg, accounting.layout_of(kv_format), at)
    keys = found.target_keys + found.other_keys
    assert {**dataclasses.asdict(found), "index_keys": keys}.items() >= want.items()
    assert found.kv == want["hca_entries"] + want["csa_entries"] + want["index_keys"]


@pytest.mark.parametrize("page_entries", [1, 16, 64])
@pytest.mark.parametrize("name", CONFIGS)
def test_page_sizes_are_those_of_the_codec_and_of_exchanged_pages(name, page_entries):
    cfg = CONFIGS[name]
    for kv_format in FORMATS:
        page = accounting.page_bytes(cfg, accounting.layout_of(kv_format), page_entries)
        assert page.csa == page.hca == page_entries * codec.entry_bytes(cfg, kv_format)
        assert page.keys == page_entries * codec.key_bytes(cfg, kv_format)
    page = accounting.page_bytes(cfg, "pages584", page_entries)
    assert page.csa == page.record_csa == exchange.entry_page_bytes(cfg, page_entries)
    assert page.keys == page.record_keys == page_entries * exchange.key_record_bytes(cfg)
    assert page.hca == exchange.entry_page_bytes(cfg, page.hca_entries)


@pytest.mark.parametrize("kv_format", FORMATS)
def test_every_plane_of_a_page_record_is_whole_rows(kv_format):
    cfg, entries = CONFIGS["groups"], 3
    cache = CacheConfig(kv_format=kv_format, page_entries=entries)

    def rows(planes: codec.Planes) -> int:
        return sum(-(-plane.nbytes // 128) * 128 for plane in jax.tree.leaves(planes))

    page = accounting.page_bytes(cfg, accounting.layout_of(kv_format), entries)
    assert page.record_csa == rows(codec.empty_entries(cfg, cache, (entries,)))
    assert page.record_keys == rows(codec.empty_keys(cfg, cache, (entries,)))
    layers = len(targets.csa_layers(cfg))
    both = accounting.record_bytes(cfg, page, 1, path_i=True)
    assert both == layers * page.record_csa + (layers - 1) * page.record_keys
    assert accounting.record_bytes(cfg, page, 1, path_i=False) == layers * page.record_csa


def test_a_page_record_of_flash_is_a_megabyte():
    page = accounting.page_bytes(FLASH, "planes640", 64)
    assert accounting.record_bytes(FLASH, page, 3, path_i=True) == 1_012_224
    assert page.csa == page.record_csa  # no fill at these shapes
    assert page.keys == page.record_keys


# How the columns hang together.


@pytest.mark.parametrize("layout", accounting.LAYOUTS)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_exists_never_exceeds_what_is_reserved_and_every_entry_is_somewhere(name, layout):
    cfg = CONFIGS[name]
    chosen = targets.default_target_layers(cfg)
    lengths = (1021, 300, 0)
    hosted = sum(tokens // cfg.csa_ratio // 16 * 16 for tokens in lengths)
    off = Offload(pool_pages=9, resident_entries=8 * 16, fresh_entries=32, table_pages=5)
    at = Placement(lengths=lengths, targets=chosen, page_entries=16, offload=off)
    found = accounting.footprint(cfg, layout, at)
    held = dataclasses.asdict(found.reserved)
    for column, nbytes in dataclasses.asdict(found.occupied).items():
        assert 0 <= nbytes <= held[column], column
    assert at.in_formation(cfg) == at.entries(cfg) - hosted > 0
    page = accounting.page_bytes(cfg, layout, 16)
    record = accounting.record_bytes(cfg, page, len(chosen), path_i=True)
    assert found.occupied.host == hosted // 16 * record
    pool = found.reserved.csa_entries + found.reserved.other_keys
    assert pool == 9 * record
    rest = found.reserved.hca_entries + found.reserved.target_keys + found.reserved.fresh
    assert found.reserved.kv == rest + 9 * record


def test_more_target_layers_keep_more_keys_and_no_others():
    def keys(chosen: tuple[int, ...]) -> tuple[int, int, int]:
        off = Offload(pool_pages=100, resident_entries=6400)
        at = Placement(lengths=(2**18,), targets=chosen, offload=off)
        found = accounting.reserved(FLASH, "planes640", at)
        return found.target_keys, found.other_keys, found.host_keys

    layer, pool = 2**16 * 132, 6400 * 132
    assert keys((10, 12, 20)) == (3 * layer, 18 * pool, 18 * layer)
    assert keys((4,)) == (layer, 20 * pool, 20 * layer)


def test_side_columns_are_apart_from_the_share():
    pool = {"pool_pages": 384, "resident_entries": 384 * 64}
    at = placed(2**20, **pool)
    more = placed(2**20, **pool, table_pages=384, staging_bytes=5 * MiB)
    more = dataclasses.replace(more, window_bytes=4)
    before, after = (accounting.footprint(FLASH, "planes640", x) for x in (at, more))
    assert before.share == after.share
    assert after.occupied.staging == after.reserved.staging == 5 * MiB
    assert after.reserved.page_tables - before.reserved.page_tables == 2 * 4 * 384
    assert after.reserved.window == 2 * before.reserved.window == 43 * 128 * 512 * 4
