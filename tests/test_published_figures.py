"""The calculator reproduces the published figures (LSA spec 1.1, 1.3 to 1.6)."""

import pytest
from footprint_cases import FLASH, flash, placed

from lsa_jax.lsa import accounting, flops
from lsa_jax.lsa.accounting import GIB


@pytest.mark.parametrize(
    ("context", "gib"),
    [
        ("46K", 0.17),
        ("179K", 0.65),
        ("493K", 1.80),
        ("125K", 0.46),
        ("500K", 1.82),
        ("64K", 0.23),
        ("128K", 0.47),
        ("256K", 0.94),
        ("512K", 1.87),
        ("1.024M", 3.73),
    ],
)
def test_full_attention_takes_the_published_bytes(capsys, context, gib):
    # 0.01: the table is rounded to 0.005, and the tokens decoded in each row are known within 1000.
    # With K = 1024 the longest rows would be 0.04 too high, without the fill of pages 0.003 low.
    found = flash(capsys, context, "--layout", "pages584", "--decoded", 1500)
    assert found["context_unit"] in (1000, 1_000_000)
    for column in found["kv_gib"].values():
        assert column == pytest.approx(gib, abs=0.01)


def test_a_chunk_costs_the_bytes_derived_from_the_table(capsys):
    # 32 * 256 tokens: whole pages everywhere. 3899.25 bytes a token, exactly (spec 1.3).
    found = flash(capsys, 8192, "--layout", "pages584")
    kv = [found["components"][name] for name in ("hca_entries", "csa_entries")]
    keys = [found["components"][name] for name in ("target_keys", "other_keys")]
    assert kv == [8192 * 135, 8192 * 3071.25]
    assert keys == [8192 * 99, 8192 * 594]


@pytest.mark.parametrize(
    ("context", "kept", "gib"),
    [
        ("64K", 2750, 0.04),
        ("125K", 4100, 0.06),
        ("256K", 6200, 0.09),
        ("500K", 11700, 0.17),
        ("512K", 12400, 0.18),
        ("1.024M", 25500, 0.37),
    ],
)
def test_the_logical_column_is_the_published_one_of_lsa(capsys, context, kept, gib):
    args = ("--layout", "pages584", "--attention", "lsa", "--kept-entries", kept)
    found = flash(capsys, context, *args)
    assert found["kv_gib"]["logical"] == pytest.approx(kept * 15597 / GIB, rel=1e-3)
    assert found["kv_gib"]["logical"] == pytest.approx(gib, abs=0.005)


@pytest.mark.parametrize(
    ("context", "kept", "with_path_i", "without"),
    [
        ("64K", 2750, 0.052, 0.081),
        ("256K", 6200, 0.140, 0.268),
        ("512K", 12400, 0.281, 0.537),
        ("1.024M", 25500, 0.571, 1.081),
        ("1M", 384 * 64, 0.564, 1.090),
        ("1M", 96 * 64, 0.312, 0.879),
    ],
)
def test_the_device_column_is_what_the_device_really_holds(
    capsys, context, kept, with_path_i, without
):
    args = ("--layout", "pages584", "--attention", "lsa", "--kept-entries", kept)
    for flag, gib in (("--path-i", with_path_i), ("--no-path-i", without)):
        found = flash(capsys, context, *args, flag)
        # The published figures are rounded to 0.001; 6.2K, 12.4K and 25.5K to two or three digits.
        assert found["kv_gib"]["device"] == pytest.approx(gib, abs=0.0011)


@pytest.mark.parametrize(("flag", "share"), [("--path-i", 0.060), ("--no-path-i", 0.212)])
def test_the_share_has_the_published_floor(capsys, flag, share):
    args = ("--layout", "pages584", "--attention", "lsa", "--kept-entries", 0, flag)
    assert flash(capsys, "1M", *args)["kv_share"] == pytest.approx(share, abs=0.0005)


@pytest.mark.parametrize(("pages", "share"), [(384, 0.148), (96, 0.082)])
def test_recall_settings_have_the_published_share(capsys, pages, share):
    args = ("--layout", "pages584", "--attention", "lsa", "--recall-pages", pages)
    found = flash(capsys, "1M", *args)
    assert found["kept_entries"] == pages * 64
    assert found["kv_share"] == pytest.approx(share, abs=0.0005)
    assert found["kv_share_reserved"] == found["kv_share"]


@pytest.mark.parametrize(
    ("context", "pages", "full", "lsa", "fair", "ratios"),
    [
        ("256K", 96, 50.7, 28.8, 30.3, (0.57, 0.60, 0.635)),
        ("512K", 192, 73.4, 31.0, 32.5, (0.42, 0.44, 0.513)),
        ("1M", 384, 118.8, 35.4, 37.0, (0.30, 0.31, 0.416)),
    ],
)
def test_a_token_costs_the_published_arithmetic(capsys, context, pages, full, lsa, fair, ratios):
    base = flash(capsys, context)["gflop_per_token"]
    args = ("--attention", "lsa", "--recall-pages", pages)
    ours = flash(capsys, context, *args)["gflop_per_token"]
    assert base["published"] == base["like_for_like"] == pytest.approx(full, rel=0.003)
    assert ours["published"] == pytest.approx(lsa, rel=0.003)
    assert ours["like_for_like"] == pytest.approx(fair, rel=0.003)
    names = ("published", "like_for_like", "with_hca")
    for name, ratio, half_digit in zip(names, ratios, (0.005, 0.005, 0.0005), strict=True):
        assert ours[name] / base[name] == pytest.approx(ratio, abs=half_digit)


def test_the_terms_of_a_token_are_those_of_the_derivation():
    terms = flops.base_terms(FLASH)
    d, heads_out = 4096, 64 * 512
    assert terms["experts"] == 2 * 43 * 7 * 3 * d * 2048
    per_layer = d * 1024 + 1024 * heads_out + d * 512 + 8 * d * 1024 + 8192 * d
    assert terms["attention"] == 2 * 43 * per_layer
    assert terms["head"] == 2 * d * 129280
    assert terms["indexer"] == 2 * 21 * (1024 * 8192 + d * 64)
    assert terms["compressors"] == 2 * 2 * d * (21 * (1024 + 256) + 20 * 512)
    assert terms["router"] == 2 * 43 * d * 256
    assert terms["hyper"] == pytest.approx(0.08e9, rel=0.1)
    assert terms["rotation"] == 2 * 21 * 64 * 128 * 128
    assert sum(terms.values()) == pytest.approx(26.6e9, rel=0.001)


def test_attending_to_few_entries_is_cheaper_than_to_many():
    """Below index_topk every entry is attended; level 1 costs more the more often it fires."""

    def gflop(tokens: int, lookahead: int = 64) -> float:
        level1 = flops.Level1(lookahead=lookahead)
        found = flops.gflop_per_token(FLASH, tokens, kept_entries=100, level1=level1)
        return found.like_for_like

    attended = 21 * 4 * 64 * 512
    score = (
        flops.gflop_per_token(FLASH, 404).published - flops.gflop_per_token(FLASH, 400).published
    )
    assert score * 1e9 == pytest.approx(attended + 21 * 64 * (2 * 128 + 2), rel=1e-6)
    fire = (262144 * 128 * 258 + 2 * (4096 * 2048 + 2048 * 16384 + 4096 * 128)) * 3 / 1e9
    assert gflop(2**20, 32) - gflop(2**20, 64) == pytest.approx(fire / 64, rel=1e-6)


def test_memory_walls_are_the_published_ones():
    tokens = 66_000_000  # 60 requests of 1.1M
    full = accounting.occupied(FLASH, "pages584", placed(tokens))
    assert (full.target_keys + full.other_keys) / GIB == pytest.approx(42.6, abs=0.05)
    cells = 1_572_864
    at = placed(tokens, pool_pages=cells // 64, resident_entries=cells)
    for found in (accounting.occupied, accounting.reserved):
        lsa = found(FLASH, "pages584", at)
        assert (lsa.target_keys + lsa.other_keys) / GIB == pytest.approx(9.57, abs=0.01)
        assert lsa.host_entries / GIB == pytest.approx(188.8, abs=0.05)
        assert lsa.host_keys / GIB == pytest.approx(36.5, abs=0.05)


@pytest.mark.parametrize(
    ("pages", "entries", "keys"), [(96, 75, 15), (192, 151, 29), (384, 302, 58)]
)
def test_a_cold_recall_moves_the_published_bytes(capsys, pages, entries, keys):
    args = ("--layout", "pages584", "--attention", "lsa", "--recall-pages", pages)
    found = flash(capsys, "1M", *args)
    assert found["page_record_bytes"] == 37_440 * 21 + 8_448 * 18
    assert found["cold_recall_bytes"]["entries"] == pytest.approx(entries * 1e6, abs=0.5e6)
    assert found["cold_recall_bytes"]["keys"] == pytest.approx(keys * 1e6, abs=0.5e6)
    without = flash(capsys, "1M", *args, "--no-path-i")
    assert without["page_record_bytes"] == 37_440 * 21
    assert without["cold_recall_bytes"]["keys"] == 0
