"""Page records: planes in, the same planes out, in every format and at odd sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.cache.records import ROW, RecordLayout
from lsa_jax.config import CacheConfig
from lsa_jax.config_io import load_config
from lsa_jax.lsa import accounting
from tests import small_model

FLASH = load_config("v4_flash")
THREE = ("csa", "sliding", "csa", "hca", "csa")
# `even` has nothing to fill; in `odd`, no plane of any format is whole rows of 128 bytes.
CONFIGS = {
    "even": dataclasses.replace(small_model.CONFIG, layer_types=THREE, mlp_types=("score",) * 5),
    "odd": dataclasses.replace(
        small_model.CONFIG,
        layer_types=THREE,
        mlp_types=("score",) * 5,
        head_dim=36,
        qk_rope_head_dim=4,
        index_head_dim=16,
        o_groups=2,
    ),
}
FORMATS = ("fp8", "bfloat16", "float32")


def random_planes(planes: codec.Planes, rng: np.random.Generator) -> codec.Planes:
    """Random bits in the shape of these planes, NaN patterns among them."""

    def draw(x: jax.Array) -> jax.Array:
        raw = rng.integers(0, 256, (*x.shape, x.dtype.itemsize), np.uint8)
        raw = jnp.asarray(raw if x.dtype.itemsize > 1 else raw[..., 0])
        return jax.lax.bitcast_convert_type(raw, x.dtype)

    return jax.tree.map(draw, planes)


def raw_bytes(tree) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def layers_of(cfg, cache: CacheConfig, lead: tuple[int, ...]):
    """Random entries and keys of every CSA layer, [*lead, page_entries, ...]."""
    rng, lead = np.random.default_rng(5), (*lead, cache.page_entries)
    entries, keys = codec.empty_entries(cfg, cache, lead), codec.empty_keys(cfg, cache, lead)
    return [(random_planes(entries, rng), random_planes(keys, rng)) for _ in range(3)]


def case(name: str, kv, page_entries: int, targets=(1,)):
    cfg = CONFIGS[name]
    cache = CacheConfig(kv_format=kv, page_entries=page_entries)
    return cfg, cache, RecordLayout(cfg, cache, targets)


CASES = [(n, kv, e) for n, e in (("even", 8), ("odd", 3), ("odd", 1)) for kv in FORMATS]


@pytest.mark.parametrize("name, kv, page_entries", CASES)
def test_a_layers_planes_come_back_from_its_rows(name, kv, page_entries):
    cfg, cache, layout = case(name, kv, page_entries)
    for ordinal, (entries, keys) in enumerate(layers_of(cfg, cache, (2, 5))):
        rows = layout.pack(ordinal, entries, keys)
        size = sum(s.stop - s.start for s in layout.spans(ordinal))
        assert rows.shape == (2, 5, size, ROW) and rows.dtype == jnp.uint8
        back_entries, back_keys = layout.unpack(ordinal, rows)
        assert raw_bytes(back_entries) == raw_bytes(entries)
        if ordinal == 1:
            assert back_keys is None and len(layout.spans(ordinal)) == 1
        else:
            assert raw_bytes(back_keys) == raw_bytes(keys)


@pytest.mark.parametrize("name, kv, page_entries", CASES)
def test_spans_cut_each_layers_rows_out_of_whole_records(name, kv, page_entries):
    cfg, cache, layout = case(name, kv, page_entries)
    layers = layers_of(cfg, cache, (4,))
    records = np.asarray(layout.pack_pages(layers))
    assert records.shape == (4, *layout.shape) and records.nbytes == 4 * layout.nbytes
    taken = np.zeros(layout.rows, int)
    for ordinal, planes in enumerate(layers):
        spans = layout.spans(ordinal)
        for span in spans:
            taken[span] += 1
        rows = np.concatenate([records[:, span] for span in spans], axis=1)
        np.testing.assert_array_equal(rows, layout.pack(ordinal, *planes))
    assert (taken == 1).all()  # every row belongs to exactly one layer


@pytest.mark.parametrize("name, kv, page_entries", CASES)
def test_single_entries_and_keys_are_read_out_of_any_slot(name, kv, page_entries):
    cfg, cache, layout = case(name, kv, page_entries, targets=(0,))
    layers = layers_of(cfg, cache, (6,))
    records = layout.pack_pages(layers)
    slot = jnp.array([[5, 0, 3], [3, 5, 2]])
    offset = jnp.array([[0, page_entries - 1, 0], [page_entries // 2, 0, page_entries - 1]])
    for ordinal, (entries, keys) in enumerate(layers):
        got = layout.take(ordinal, records, slot, offset)
        assert raw_bytes(got) == raw_bytes(jax.tree.map(lambda x: x[slot, offset], entries))
        if ordinal == 0:
            continue
        assert raw_bytes(layout.keys_of(ordinal, records)) == raw_bytes(keys)
        taken = layout.take_keys(ordinal, records, slot)
        assert raw_bytes(taken) == raw_bytes(jax.tree.map(lambda x: x[slot], keys))


def test_the_fill_of_a_plane_is_zero():
    cfg, cache, layout = case("odd", "float32", 3)
    layers = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), layers_of(cfg, cache, ()))
    record = np.asarray(layout.pack_pages(layers))
    used = np.zeros(record.size, bool)
    for plane in [*layout.entries, *(k for k in layout.keys if k is not None)]:
        at = plane.values.row * ROW
        used[at : at + plane.values.nbytes] = True
    assert 0 < used.sum() < used.size
    assert not record.reshape(-1)[~used].any() and record.reshape(-1)[used].any()


def test_a_page_of_v4_flash_is_1012224_bytes_without_fill():
    layout = RecordLayout(FLASH, CacheConfig(kv_format="fp8", page_entries=64), (10, 12, 20))
    assert layout.nbytes == 64 * (640 * 21 + 132 * 18) == 1_012_224
    planes = jax.tree.leaves([layout.entries, [k for k in layout.keys if k is not None]])
    assert sum(p.nbytes for p in planes) == layout.nbytes


@pytest.mark.parametrize("targets", [(0,), (1, 2), (0, 1, 2)])
@pytest.mark.parametrize("name, kv, page_entries", CASES)
def test_the_calculator_counts_the_same_bytes(name, kv, page_entries, targets):
    cfg, _, layout = case(name, kv, page_entries, targets)
    pages = accounting.page_bytes(cfg, accounting.layout_of(kv), page_entries)
    assert layout.nbytes == accounting.record_bytes(cfg, pages, len(targets), path_i=True)


@pytest.mark.parametrize("preset", ["v4_flash", "v4_pro"])
@pytest.mark.parametrize("kv", FORMATS)
def test_the_calculator_counts_the_same_bytes_for_presets(preset, kv):
    cfg = load_config(preset)
    layout = RecordLayout(cfg, CacheConfig(kv_format=kv, page_entries=64), (3, 5))
    pages = accounting.page_bytes(cfg, accounting.layout_of(kv), 64)
    assert layout.nbytes == accounting.record_bytes(cfg, pages, 2, path_i=True)
