import contextlib
import dataclasses
import functools
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from generate_runs import CONFIG, call
from jax.experimental.compilation_cache import compilation_cache

from lsa_jax import config_io, model_io, synthesize
from lsa_jax.compile_clock import CompileClock
from lsa_jax.lsa import indexer_io, plot
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.indexer_config import IndexerConfig
from lsa_jax.lsa.memory_indexer import MemoryIndexer, random_leaves
from lsa_jax.lsa.rows import Event

IDS = " ".join(str(i) for i in np.random.default_rng(5).integers(2, 320, 37))
# Pages of two entries, 8 tokens: there are several after a few chunks of 16 tokens.
COMMON = ("--page-entries", "2", "--prompt-ids", IDS, "--max-new-tokens", "20")
RELEASED = {"ensemble": "max", "score": "sigmoid", "lookback": 1, "dilation": 0, "falloff": 0.0}
ROOM = 256  # tokens: the least that a conversation gets, so that runs of this size share programs
SAMPLED = ("--temperature", 1, "--seed", 4)
EVERYTHING = ("--kv-budget", "1.0", "--lookahead", 8)
ARMS = ("recency", "random", "lagged", "quest", "snapkv", "oracle")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lsa")


@pytest.fixture(scope="module", autouse=True)
def compiled_once(root) -> Iterator[None]:
    """Every run of the command starts afresh; its programs are compiled once, and quickly."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(root / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    with contextlib.ExitStack() as stack:
        for name, value in settings.items():
            stack.callback(jax.config.update, name, jax.config.values[name])
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        yield
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def ckpt(root) -> Path:
    """A small model with two CSA layers, and indexers for its second one beside it."""
    layers = {"layer_types": ("csa", "hca", "csa"), "mlp_types": ("hash", "score", "score")}
    cfg = dataclasses.replace(CONFIG, **layers)
    (root / "config.toml").write_text(config_io.to_toml(cfg))
    common = ["--config", str(root / "config.toml"), "--seed", "3", "--weights", "f32"]
    assert synthesize.main([*common, str(root / "ckpt")]) == 0
    shape = IndexerConfig.for_model(cfg, target_layers=(1,), n_heads=4, q_lora_rank=16)
    indexer = MemoryIndexer(shape, random_leaves(shape, jax.random.key(1)))
    indexer_io.save_indexer(root / "indexer", indexer)
    fitted = json.loads(Calibration((8,), (0.25, 0.125), 0.1).to_json())
    indexer_io.save_indexer(root / "calibrated", indexer, fitted)
    indexer_io.save_indexer(root / "unknown", indexer, {"thresholds": "high"})
    return root / "ckpt"


@pytest.fixture
def run(capsys, ckpt):
    return functools.partial(call, capsys, ckpt)


@pytest.fixture
def run_json(run, tmp_path):
    """Runs the command, which must succeed: the contents of `--json` and `--report`."""

    def succeed(*arguments: object) -> tuple[dict, dict]:
        files = tmp_path / "run.json", tmp_path / "report.json"
        wanted = ["--json", files[0]]
        if "--attention" in arguments:
            wanted += ["--report", files[1]]
        code, _, err = run(*arguments, *wanted)
        assert code == 0, err
        result = json.loads(files[0].read_text())
        return result, json.loads(files[1].read_text()) if len(wanted) > 2 else {}

    return succeed


@pytest.mark.slow
def test_everything_resident_draws_what_full_attention_draws(run_json, root, tmp_path) -> None:
    length = ["--max-new-tokens", ROOM - 37, *SAMPLED]
    full, _ = run_json(*COMMON, *length)
    resident = [*EVERYTHING, "--indexer", root / "indexer", "--threshold", 1e-6]
    plot_file = ["--plot", tmp_path / "pages.png"]
    lsa, found = run_json(*COMMON, *length, "--attention", "lsa", *resident, *plot_file)
    assert lsa["ids"] == full["ids"]
    assert lsa["kv_capacity_tokens"] == ROOM  # exactly what is needed
    assert lsa["compile_seconds"] > 0 and lsa["decode"]["tokens"] == ROOM - 37 - 1
    assert (tmp_path / "pages.png").read_bytes().startswith(b"\x89PNG\r\n")

    assert found["kv_share"] == found["logical_share"] == 1
    assert found["tokens"] == [ROOM - 1] and not found["simulated_bytes"]
    assert found["components"] == found["calculated"]["components"]
    assert found["settings"]["kv_budget"]["share"] == 1 and found["threshold"] == 1e-6
    assert found["indexer"] == {"dtype": "float32", "query_mode": "float32", **RELEASED}
    assert [cycle["tokens"] for cycle in found["cycles"]] == list(range(37, ROOM, 8))
    last = found["cycles"][-1]
    assert last["pages"] == list(range(31)) and last["complete"] == last["wanted"] == 31
    assert found["recall"]["pages"] == sum(cycle["recalled"] for cycle in found["cycles"])
    # Pages of 8 tokens of the first 253 are on the host, once each.
    assert found["host"]["live"] == 31 * found["page_record_bytes"]
    assert found["host"]["stored"] == 31
    assert found["misses"] == {"entries": 0, "highest_mass": 0}
    assert found["peak_device_bytes_above_weights"] is None  # a CPU does not say


@pytest.mark.slow
@pytest.mark.parametrize(("reply", "room"), [(60, ROOM), (150, 2 * ROOM)])
def test_a_conversation_keeps_its_pages_and_prefills_only_what_is_new(
    run_json, monkeypatch, reply, room
) -> None:
    def chat(*arguments: object) -> tuple[dict, dict]:
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\nhow are you?\n"))
        length = ["--page-entries", 2, "--max-new-tokens", reply, *SAMPLED]
        return run_json("--chat", *length, *arguments)

    full, _ = chat()
    arm, found = chat("--attention", "recency", "--target-layers", 1, *EVERYTHING)
    assert [turn["ids"] for turn in arm["turns"]] == [turn["ids"] for turn in full["turns"]]
    two = arm["turns"][1]
    assert two["prefill"]["tokens"] == len(two["prompt_ids"]) + 1
    assert arm["kv_capacity_tokens"] == room  # which doubles where it must
    host = found["host"]
    pages = found["cycles"][-1]["complete"]
    assert host["stored"] == pages and host["live"] == pages * found["page_record_bytes"]
    assert {cycle["owner"] for cycle in found["cycles"]} == {0}


@pytest.mark.slow
def test_dumped_logits_are_those_of_full_attention(run, root, tmp_path) -> None:
    dumps = tmp_path / "full.npz", tmp_path / "lsa.npz"
    resident = [*EVERYTHING, "--indexer", root / "indexer", "--threshold", 1e-6]
    assert run(*COMMON, "--dump-logits", dumps[0])[0] == 0
    assert run(*COMMON, "--dump-logits", dumps[1], "--attention", "lsa", *resident)[0] == 0
    full, lsa = map(np.load, dumps)
    assert lsa["ids"].tolist() == full["ids"].tolist()
    # The same sums fused otherwise; the project's bound for equal logits.
    np.testing.assert_allclose(lsa["logits"], full["logits"], rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_runs_inside_the_same_bytes(run_json, arm) -> None:
    budget = ["--kv-budget", "0.75", "--lookahead", 8]
    result, found = run_json(*COMMON, *budget, "--attention", arm)
    assert len(result["ids"]) == 20
    assert found["simulated_bytes"] == (arm in ("lagged", "oracle"))
    assert found["kv_share"] <= 0.75 and found["logical_share"] < 1
    assert found["cycles"][-1]["pages"] and found["cycles"][-1]["over_budget"] > 0
    if found["simulated_bytes"]:
        everything = found["allocated_on_device"]
        assert everything["csa_entries"] > found["components_reserved"]["csa_entries"]


@pytest.mark.slow
@pytest.mark.parametrize("path", ["gathered", "mask"])
def test_other_paths_draw_the_same(run_json, root, path) -> None:
    arguments = [*COMMON, "--indexer", root / "indexer", "--kv-budget", "0.75", "--attention"]
    paged, one = run_json(*arguments, "lsa")
    other, two = run_json(*arguments, "lsa", "--resident-path", path)
    assert other["ids"] == paged["ids"]
    assert [c["pages"] for c in one["cycles"]] == [c["pages"] for c in two["cycles"]]
    assert two["simulated_bytes"] == (path == "mask")


@pytest.mark.slow
def test_thresholds_come_from_the_indexers_file_unless_given(run_json, root) -> None:
    arguments = [*COMMON, "--attention", "lsa", "--indexer", root / "calibrated"]
    _, found = run_json(*arguments)
    assert found["threshold"] == found["lsa"]["policy"]["threshold"] == "calibrated"
    assert found["calibrated_thresholds"] == [0.25, 0.125]
    for more, used in ((["--threshold", 0.3], 0.3), (["--policy", "published"], 0.5)):
        _, found = run_json(*arguments, *more)
        assert (found["threshold"], found["calibrated_thresholds"]) == (used, None)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "mode"), [("bfloat16", "fp8"), ("float32", "bfloat16")])
def test_the_indexer_computes_as_it_was_told_to(run_json, root, dtype, mode) -> None:
    told = ["--indexer-dtype", dtype, "--query-mode", mode, "--max-new-tokens", ROOM - 37]
    arguments = [*COMMON, *told, *EVERYTHING, "--indexer", root / "indexer"]
    _, found = run_json(*arguments, "--attention", "lsa")
    assert found["indexer"] == {"dtype": dtype, "query_mode": mode, **RELEASED}
    assert found["cycles"][-1]["pages"]


LSA = ("--attention", "lsa", "--indexer", "INDEXER")
QUEST = ("--attention", "quest")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["--indexer", "x"],
            "--indexer needs --attention lsa or another arm, got --attention full",
        ),
        (["--target-layers", "1"], "--target-layers needs --attention lsa or another arm"),
        (["--indexer-dtype", "float32"], "--indexer-dtype needs --attention lsa or another arm"),
        (["--query-mode", "fp8"], "--query-mode needs --attention lsa or another arm"),
        (["--lookahead", "8"], "--lookahead needs --attention lsa or another arm"),
        (["--threshold", "0.5"], "--threshold needs --attention lsa or another arm"),
        (["--recency", "0"], "--recency needs --attention lsa or another arm"),
        (["--sink", "1"], "--sink needs --attention lsa or another arm"),
        (["--policy", "budget"], "--policy needs --attention lsa or another arm"),
        (["--recall-pages", "1"], "--recall-pages needs --attention lsa or another arm"),
        (["--kv-budget", "0.5"], "--kv-budget needs --attention lsa or another arm"),
        (["--resident-path", "paged"], "--resident-path needs --attention lsa or another arm"),
        (["--host-limit", "1GB"], "--host-limit needs --attention lsa or another arm"),
        (["--fallback", "0.1"], "--fallback needs --attention lsa or another arm"),
        (["--patience", "3"], "--patience needs --attention lsa or another arm"),
        (["--report", "x"], "--report needs --attention lsa or another arm"),
        (["--plot", "x"], "--plot needs --attention lsa or another arm"),
        (["--attention", "lsa"], "--attention lsa needs --indexer FILE, got none"),
        (["--attention", "best"], "'best'"),
        ([*LSA, "--target-layers", "1"], "the --indexer names its layers"),
        ([*QUEST, "--indexer", "x"], "--indexer needs --attention lsa, got quest"),
        ([*QUEST, "--indexer-dtype", "bfloat16"], "--indexer-dtype needs --attention lsa, got que"),
        ([*QUEST, "--query-mode", "float32"], "--query-mode needs --attention lsa, got quest"),
        ([*LSA, "--indexer-dtype", "float16"], "'float16'"),
        ([*LSA, "--query-mode", "int8"], "'int8'"),
        ([*QUEST, "--threshold", "0.5"], "--threshold needs --attention lsa, got quest"),
        ([*QUEST, "--recall-gate", "1"], "--recall-gate needs --attention lsa, got quest"),
        ([*LSA, "--recall-gate", "0"], "a finite number above 0, got '0'"),
        ([*QUEST, "--policy", "published"], "--policy needs --attention lsa, got quest"),
        ([*QUEST, "--target-layers", "2"], "distinct ascending CSA ordinals in 0..1, got [2]"),
        ([*QUEST, "--target-layers", "a"], "CSA ordinals such as 10,12,20, got 'a'"),
        ([*QUEST, "--lookahead", "0"], "an integer in [1, 2^31), got '0'"),
        ([*QUEST, "--recency", "-1"], "an integer in [0, 2^31), got '-1'"),
        ([*QUEST, "--fallback", "1"], "a number in (0, 1), got '1'"),
        ([*QUEST, "--fallback", "on"], "a number in (0, 1), got 'on'"),
        ([*QUEST, "--patience", "3"], "patience must be given with a fallback only, got 3"),
        ([*QUEST, "--fallback", "0.1", "--patience", "0"], "an integer in [1, 2^31), got '0'"),
        ([*QUEST, "--kv-budget", "1"], "1.0 for everything or 1B for one byte"),
        ([*QUEST, "--kv-budget", "200B"], "kv_budget must be at least the floor of "),
        ([*QUEST, "--host-limit", "0.5"], "bytes such as 64GiB or 123456, got '0.5'"),
        ([*QUEST, "--host-limit", "1B"], "--host-limit must be at least "),
        (
            [*QUEST, "--resident-path", "mask", "--host-limit", "1GB"],
            "--resident-path mask has none",
        ),
        (["--attention", "lagged", "--resident-path", "paged"], "needs --resident-path mask"),
        (["--attention", "oracle", "--resident-path", "gathered"], "got gathered"),
        ([*QUEST, "--report", "a", "--json", "a"], "--report cannot be combined with --json of"),
        ([*QUEST, "--report", "no-such-directory/a"], "No such file or directory"),
        ([*QUEST, "--plot", "no-such-directory/a"], "No such file or directory"),
        ([*LSA[:3], "no-such-file"], "no-such-file"),
        ([*LSA[:3], "/"], "--indexer must be a file, got the directory /"),
        ([*LSA[:3], "UNKNOWN"], "calibration must be a table with the keys"),
    ],
)
def test_bad_options_are_one_line_before_weights_are_loaded(
    run, root, monkeypatch, tmp_path, arguments, wanted
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(model_io, "load_model", None)
    files = {"INDEXER": str(root / "indexer"), "UNKNOWN": str(root / "unknown")}
    code, out, err = run(*COMMON, *(files.get(word, word) for word in arguments))
    (line,) = err.splitlines()
    assert (code, out) == (2, "") and line.startswith("error: ") and wanted in line
    assert list(tmp_path.iterdir()) == []


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(model_io, "load_model", None)
    code, _, err = run(*COMMON, *QUEST, "--plot", "pages.png")
    assert code == 2 and "--plot needs matplotlib, got none: pip install 'lsa_jax[plot]'" in err


def test_time_that_was_spent_compiling_counts_once_however_nested() -> None:
    clock = CompileClock()
    trace, compiled = (
        f"/jax/core/compile/{name}_duration" for name in ("jaxpr_trace", "backend_compile")
    )
    with clock.listen():
        jax.monitoring.record_event_time_span(trace, 11.0, 12.0)
        jax.monitoring.record_event_time_span(trace, 10.0, 14.0)  # the first was inside of it
        jax.monitoring.record_event_time_span(compiled, 14.0, 20.0)
        jax.monitoring.record_event_time_span("/jax/other", 20.0, 30.0)
    jax.monitoring.record_event_time_span(compiled, 40.0, 50.0)  # nobody listens
    assert (clock.seconds, clock.programs) == (10, 1)


def test_the_plot_tells_new_pages_from_kept_ones_and_from_those_on_the_host() -> None:
    nothing = {field.name: 0 for field in dataclasses.fields(Event)} | {"read": (1,)}
    sets = [(2, (0, 1)), (3, (1, 2)), (4, (0, 2))]
    events = [Event(**nothing | {"complete": n, "pages": pages}) for n, pages in sets]
    none, host, kept, new = 0, plot.HOST, plot.KEPT, plot.NEW
    assert plot.residency_map(events).tolist() == [
        [new, host, new],
        [new, kept, host],
        [none, new, kept],
        [none, none, host],
    ]
    buffer = io.BytesIO()
    plot.residency(events, page_tokens=8, title="a title").savefig(buffer, format="png")
    assert buffer.getvalue().startswith(b"\x89PNG")
