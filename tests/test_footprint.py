"""`python -m lsa_jax.footprint`: lengths, columns, budgets, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest
from footprint_cases import CONFIGS, flash, run

from lsa_jax import footprint
from lsa_jax.config import ConfigError
from lsa_jax.config_io import to_toml
from lsa_jax.lsa import resident_set
from lsa_jax.lsa.accounting import GIB
from lsa_jax.lsa.policy import PolicyConfig


def test_requests_add_up(capsys):
    args = ("--attention", "lsa", "--recall-pages", 20, "--layout", "planes640")
    one, five = (flash(capsys, 100_000, *args, "--requests", n) for n in (1, 5))
    wide = 4 * (5 * 2 * 100 + 3 * 100)  # any row may have all of the pool: 100 columns each
    for column, nbytes in one["components"].items():
        want = wide if column == "page_tables" else 5 * nbytes
        assert five["components"][column] == want, column
    assert five["kv_share"] == pytest.approx(one["kv_share"], rel=1e-12)
    assert five["gflop_per_token"] == one["gflop_per_token"]


def test_a_pool_has_no_more_pages_than_the_history(capsys):
    args = ("--attention", "lsa", "--recall-pages", 384, "--layout", "planes640")
    found = flash(capsys, 46_000, *args)
    assert found["recall_pages"] == 46_000 // 4 // 64
    assert found["kept_entries"] == found["entries"]
    assert found["kv_gib"]["logical"] == pytest.approx(found["kv_gib"]["device"], rel=1e-6)


def test_entries_in_formation_are_on_the_device_and_counted(capsys):
    whole, more = 64 * 4 * 100, 63 * 4
    args = ("--attention", "lsa", "--recall-pages", 10, "--layout", "planes640")
    a, b = flash(capsys, whole, *args), flash(capsys, whole, *args, "--decoded", more)
    assert a["components"]["fresh"] == 0
    assert b["components"]["fresh"] == 63 * (21 * 640 + 18 * 132)
    assert a["components_reserved"]["fresh"] == 2 * 64 * (21 * 640 + 18 * 132)  # whole pages
    assert b["kept_entries"] == a["kept_entries"] + 63
    assert b["components"]["host_entries"] == a["components"]["host_entries"]
    assert b["kv_share"] > a["kv_share"]


def test_without_a_setting_the_published_share_of_pages_is_recalled(capsys):
    for context, pages in (("256K", 96), ("512K", 192), ("1M", 384)):
        assert flash(capsys, context, "--attention", "lsa")["recall_pages"] == pages


# Budgets.


@pytest.mark.parametrize("layout", ["pages584", "planes640", "bf16"])
@pytest.mark.parametrize("name", ["v4_flash", "v4_pro", "bench"])
def test_a_budget_is_never_exceeded_and_used_up_to_a_page(capsys, name, layout):
    rng = np.random.default_rng(7)
    for share in ("0.10", "0.25", "0.5"):
        for tokens in rng.integers(400_000, 2**20, 3):
            args = ("--attention", "lsa", "--layout", layout, "--kv-budget", share)
            context = ("--config", name, "--context", tokens, "--requests", 2)
            args += ("--recency", 256, "--target-layers", 3)
            found = run(capsys, *context, *args)
            full = run(capsys, *context, "--layout", layout)["kv_gib"]["device"] * GIB
            room = float(share) * full - found["kv_gib"]["device"] * GIB
            assert 0 <= room < found["page_record_bytes"]
            assert found["kv_share"] <= float(share)


def test_a_budget_in_bytes_and_one_above_the_history(capsys):
    args = ("--attention", "lsa", "--layout", "planes640", "--kv-budget")
    found = flash(capsys, "1M", *args, "400MB")
    assert 0 <= 400e6 - found["kv_gib"]["device"] * GIB < found["page_record_bytes"]
    everything = flash(capsys, "1M", *args, "100GB")
    assert everything["kept_entries"] == everything["entries"]


@pytest.mark.parametrize(
    ("tokens", "recency", "sink"),
    [(2**19, 2048, 0), (2**19 + 4 * 37, 2048, 70), (2**18, 0, 64), (40_000, 10**6, 10**6)],
)
def test_the_floor_has_the_pages_that_selection_forces(capsys, tokens, recency, sink):
    policy = PolicyConfig(recency=recency, sink=sink)
    entries = tokens // 4
    columns = -(-entries // 64)
    forced = resident_set.forced_pages(jnp.asarray([entries]), columns, policy, page_entries=64)
    complete = int(np.asarray(forced)[0, : entries // 64].sum())
    code = footprint.main(
        [
            *("--config", "v4_flash", "--context", str(tokens), "--attention", "lsa"),
            *("--kv-budget", "1B", "--recency", str(recency), "--sink", str(sink)),
        ]
    )
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: kv_budget must be at least the floor of ")
    assert f"{complete} pages of 1671168 are forced" in err
    assert len(err.splitlines()) == 1


# The command.


@pytest.mark.parametrize(
    ("text", "kilo", "tokens", "unit"),
    [
        ("46K", 1000, 46_000, 1000),
        ("46k", 1024, 47_104, 1024),
        ("0.5K", 1024, 512, 1024),
        ("1M", 1000, 2**20, 2**20),
        ("1.024M", 1024, 1_024_000, 1_000_000),
        ("524288", 1000, 524_288, 1),
    ],
)
def test_lengths_are_read_in_the_stated_unit(text, kilo, tokens, unit):
    assert footprint.parse_length(text, kilo) == (tokens, unit)


@pytest.mark.parametrize("text", ["", "K", "-5", "1e6", "1G", "1.K", "0x10", "٣K", "1" * 40])
def test_a_length_that_is_none_is_refused(text):
    with pytest.raises(ConfigError, match="context must be tokens such as 46K"):
        footprint.parse_length(text, 1024)


def test_part_of_a_token_is_refused():
    with pytest.raises(ConfigError, match=r"whole tokens, got '1\.0001K'"):
        footprint.parse_length("1.0001K", 1000)


def test_the_unit_follows_the_layout_and_is_said(capsys):
    for args, unit in (
        (("--layout", "pages584"), "K = 1,000, as in the published tables"),
        (("--layout", "planes640"), "K = 1,024"),
        (("--layout", "planes640", "--kilo", "1000"), "K = 1,000, as in"),
    ):
        assert footprint.main(["--config", "v4_flash", "--context", "46K", *args]) == 0
        assert f"({unit}" in capsys.readouterr().out


@pytest.mark.parametrize("attention", ["full", "lsa"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_has_a_footprint(capsys, name, attention, tmp_path):
    path = tmp_path / "model.toml"
    path.write_text(to_toml(CONFIGS[name]))
    args = ["--config", str(path), "--context", "1000", "--attention", attention]
    assert footprint.main(args) == 0
    text = capsys.readouterr().out
    found = run(capsys, *args)
    assert all(column in text for column in found["components"])
    assert found["gflop_per_token"]["with_hca"] >= found["gflop_per_token"]["like_for_like"] > 0
    gib = found["kv_gib"]
    if attention == "full":
        assert gib["logical"] == gib["device"] == gib["device_plus_host"] > 0
    else:
        assert gib["device"] < gib["device_plus_host"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--config v5 --context 1M", "config must be one of"),
        ("--config v4_flash --context 1048577", "max_position_embeddings=1,048,576"),
        ("--config v4_flash --context 1M --decoded 1", "got 1,048,577"),
        ("--config v4_flash --context 0", "got 0"),
        ("--config v4_flash --context ten", "context must be tokens"),
        ("--config v4_flash --context 1M --target-layers 10,21", "CSA ordinals in 0..20"),
        ("--config v4_flash --context 1M --target-layers 12,10", "ascending"),
        ("--config v4_flash --context 1M --target-layers x", "must be CSA ordinals"),
        ("--config v4_flash --context 1M --recall-pages 9", "is for --attention lsa"),
        ("--config v4_flash --context 1M --no-path-i", "is for --attention lsa"),
        ("--config v4_flash --context 1M --attention lsa --recall-pages -1", "an integer in"),
        ("--config v4_flash --context 1M --attention lsa --kv-budget 0.05", "the floor of"),
        ("--config v4_flash --context 1M --attention lsa --kv-budget 1.5", "kv_budget must be"),
        ("--config v4_flash --context 1K --attention lsa --kept-entries 257", "256 entries"),
        ("--config v4_flash --context 1M --layout fp8", "invalid choice"),
        (
            "--config v4_flash --context 1M --attention lsa --kv-budget 0.2 --recall-pages 9",
            "not allowed with",
        ),
        ("--config v4_flash --context 1M --requests 1000000000", "an integer in 1..100000"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, args, words):
    try:
        code = footprint.main(args.split())
    except SystemExit as end:  # argparse's own refusals
        code = end.code
    out, err = capsys.readouterr()
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert words in err
    assert len(err.splitlines()) == 1
