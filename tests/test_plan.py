"""Plans by arithmetic: bytes are those of real arrays; what cannot be is refused in one line."""

import dataclasses
import json
import math

import jax
import pytest

from lsa_jax import footprint, plan
from lsa_jax.checkpoint.synthetic import SyntheticModel
from lsa_jax.config import ConfigError
from lsa_jax.config_io import load_config
from lsa_jax.lsa.level2 import Level2
from lsa_jax.planning import fit, roofline
from lsa_jax.planning.case import choose_mesh, memory_of
from lsa_jax.planning.collectives import collectives
from lsa_jax.planning.hardware import DEVICES, parse_topology
from lsa_jax.planning.thinning import kinds
from tests.plan_cases import TINY, case

ONE = (1, 1, 1)


def nbytes(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_weights_are_the_bytes_of_the_leaves_that_a_checkpoint_has():
    asked = case()
    source = SyntheticModel(asked.cfg)
    wanted = sum(
        source.read(path, 0, info.shape[0], weights="keep").nbytes
        for path, info in source.leaves("keep").items()
    )
    memory = memory_of(asked, ONE)
    assert memory.experts + memory.weights == wanted
    experts = sum(i.nbytes for p, i in source.leaves("keep").items() if ".experts." in p)
    assert memory.experts == experts


def test_the_state_is_as_large_as_the_arrays_that_decoding_with_lsa_allocates():
    asked = case(lsa=True)
    assert asked.lsa is not None
    level2 = Level2(asked.cfg, asked.cache, targets=asked.lsa.targets, lookahead=8, path="paged")
    state = level2.start(batch=2, capacity=512, dtype=jax.numpy.bfloat16)
    records, *maps = asked.pool()
    held = asked.state_bytes
    assert sum(held.values()) - held["pool"] - plan_tables(maps) == nbytes(state)
    assert held["pool"] == asked.pool_slots * level2.layout.nbytes
    assert records.shape[0] == asked.pool_slots < 2 * asked.row_pages
    assert asked.host_bytes == 2 * (512 // TINY.csa_ratio // 8) * level2.layout.nbytes


def plan_tables(maps) -> int:
    return sum(4 * math.prod(x.shape) for x in jax.tree.leaves(maps))


def test_a_mesh_splits_what_the_sharding_rules_split_and_nothing_else():
    asked = case()
    whole, split = memory_of(asked, ONE), memory_of(asked, (2, 2, 2))
    assert split.experts == whole.experts // 4
    assert whole.weights // 2 < split.weights < whole.weights
    assert split.csa == whole.csa // 2 and split.keys == whole.keys // 2
    lsa = case(lsa=True)
    assert memory_of(lsa, (1, 2, 2)).pool == memory_of(lsa, ONE).pool


@pytest.mark.parametrize(
    ("lsa", "mesh", "message"),
    [
        (True, (2, 1, 1), "data axis of 1"),
        (False, (4, 1, 1), "multiple of the data axis 4, got 2"),
        (False, (1, 1, 16), "must divide over"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(lsa, mesh, message):
    with pytest.raises(ConfigError, match=message):
        memory_of(case(lsa=lsa), mesh)


def test_the_mesh_chosen_leaves_the_least_on_a_device_and_splits_no_rows_with_lsa():
    asked = case(lsa=True)
    assert choose_mesh(asked, 1) == ONE
    assert choose_mesh(asked, 2) == (1, 1, 2)
    assert choose_mesh(asked, 8) == (1, 4, 2)  # tensor divides o_groups = 2
    wide = case(context=1024, batch=8)
    assert choose_mesh(wide, 4)[0] > 1  # full attention's rows outweigh the weights


def test_topologies_have_as_many_devices_as_jax_counts():
    counts = {"v5e:4x4": 16, "v5p:4x4x4": 64, "v6e:2x4": 8, "tpu7x:2x2x1": 8, "h100:8": 8}
    assert {name: parse_topology(name).devices for name in counts} == counts
    assert all(parse_topology(name).name == name for name in counts)


@pytest.mark.parametrize("name", ["v9:2x2", "v5p", "v5e:2x2x2", "v5e:0x2", "h100:2x2", "v5p:x"])
def test_an_unknown_topology_is_refused_in_one_line(name, capsys):
    code = plan.main(["--config", "tiny", "--topology", name, "--context", "1K"])
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("error: topology must be ") and error.count("\n") == 1
    assert repr(name) in error


def test_a_topology_that_cannot_hold_the_model_says_what_it_needs_has_and_what_would_do(capsys):
    options = ["--config", "v4_flash", "--topology", "v5e:2x2", "--context", "64K"]
    assert plan.main(options) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    device = DEVICES["v5e"]
    assert f"got {device.memory:,} available" in error
    assert "--topology v5e:4x4" in error
    args = plan.parse(options)
    asked = plan.read_case(args)
    needed = memory_of(asked, choose_mesh(asked, 4)).device
    assert f"needs {needed:,} bytes" in error and needed > device.memory


def test_a_context_over_the_limit_is_refused_with_the_limit(capsys):
    assert plan.main(["--config", "tiny", "--topology", "v5e:1x1", "--context", "64K"]) == 2
    error = capsys.readouterr().err
    assert "max_position_embeddings=1,024" in error and "65,536" in error
    assert error.count("\n") == 1


def test_a_budget_under_its_floor_is_refused_as_that(capsys):
    case = ["--config", "bench", "--topology", "h100:1", "--attention", "lsa"]
    assert plan.main([*case, "--kv-budget", "0.10", "--layers", "none"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "kv_budget must be at least the floor of" in error


def test_hints_are_true(monkeypatch):
    small = dataclasses.replace(DEVICES["v5e"], memory=2_000_000)
    monkeypatch.setitem(DEVICES, "v5e", small)
    asked, topology = case(context=1024, batch=16), parse_topology("v5e:1x1")
    hints = list(fit.would_fit(asked, topology, memory_of(asked, ONE), 0))
    assert "--kv fp8" not in hints  # head_dim 80 has more bytes in fp8 planes
    batch = next(int(h.split()[1]) for h in hints if h.startswith("--batch"))
    for rows, holds in ((batch, True), (2 * batch, False)):
        held = memory_of(dataclasses.replace(asked, batch=rows), ONE).device
        assert (held <= small.memory) == holds
    with pytest.raises(fit.DoesNotFit) as refused:
        fit.check(asked, topology, ONE)
    assert refused.value.available == small.memory
    assert refused.value.needed == memory_of(asked, ONE).device


def test_the_smallest_topology_is_the_first_that_holds_the_case():
    cfg = dataclasses.replace(load_config("v4_flash"), num_nextn_predict_layers=0)
    asked, device = case(cfg, context=1 << 18, cache=plan.CacheConfig()), DEVICES["h200"]
    found = fit.smallest(asked, device)
    assert found is not None and found.devices == 2
    held = [memory_of(asked, choose_mesh(asked, n)).device + fit.RESERVE for n in (1, 2)]
    assert held[0] > device.memory >= held[1]


def test_arithmetic_alone_writes_a_report_that_says_that_nothing_was_compiled(tmp_path, capsys):
    file = tmp_path / "plan.json"
    options = ["--config", "tiny", "--topology", "v5e:1x1", "--context", "1K", "--layers", "none"]
    assert plan.main([*options, "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["programs"] == [] and found["fits"] is None and found["peak"] is None
    parts = found["memory"]
    resident = parts.pop("resident")
    assert resident == sum(parts.values()) - parts["host"]
    assert found["step"]["seconds"] > 0
    text = capsys.readouterr().out
    assert "roofline of a decode step (an estimate" in text and "peak" not in text


def test_a_step_reads_the_experts_it_can_choose_and_the_history_it_must():
    cfg = dataclasses.replace(load_config("v4_flash"), num_nextn_predict_layers=0)
    asked = case(cfg, context=1 << 20, batch=1, cache=plan.CacheConfig())
    step = roofline.decode_step(asked, ONE, DEVICES["h100"], None)
    chosen = cfg.num_experts_per_tok / cfg.n_routed_experts
    assert step.nbytes["experts"] == pytest.approx(memory_of(asked, ONE).experts * chosen)
    # 21 CSA layers, an index key of 128 bfloat16 for every 4 tokens (the spec's 34.6 MB of fp8
    # keys a layer, in bfloat16 and without scales).
    assert step.nbytes["keys"] == 21 * (1 << 18) * 256
    # 21 x 512 entries picked, 20 HCA layers with an entry for every 128 tokens, 43 windows of 128.
    assert step.nbytes["entries"] == 1024 * (21 * 512 + 20 * 8192 + 43 * 128)
    assert step.seconds == max(step.memory_seconds, step.compute_seconds)
    lsa = case(cfg, lsa=True, budget="0.10", context=1 << 20, batch=1, cache=plan.CacheConfig())
    less = roofline.decode_step(lsa, ONE, DEVICES["h100"], None)
    assert less.nbytes["keys"] < 0.1 * step.nbytes["keys"]
    assert less.nbytes["entries"] == step.nbytes["entries"]


def test_a_layer_of_each_kind_stands_for_all_layers():
    cfg = dataclasses.replace(load_config("v4_flash"), num_nextn_predict_layers=0)
    assert kinds(case(cfg)) == {0: 2, 2: 1, 3: 20, 4: 20}
    # Target layers, transformer layers 22, 26 and 42, keep other index keys.
    assert kinds(case(cfg, lsa=True, budget="0.5")) == {0: 2, 2: 1, 3: 20, 4: 17, 22: 3}


HLO = """
%inner (p: f32[4]) -> f32[4] {
  ROOT %ag = bf16[8,16]{1,0} all-gather(%p), metadata={op_name="jit(f)/while/body/layer_3/x"}
}

%body (p: f32[4]) -> f32[4] {
  %w = f32[4] while(%p), condition=%c, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
  %s = (f32[4]{0}, f32[32]{0}) all-gather-start(%w), metadata={op_name="layer_0/y"}
  ROOT %r = f32[4] all-reduce(%w), to_apply=%add
}

ENTRY %main (p: f32[4]) -> f32[4] {
  ROOT %w = f32[4]{0} while(%p), condition=%c, body=%body
}
"""


def test_collectives_count_by_the_turns_of_their_loops_and_by_the_layers_they_stand_for():
    found = collectives(HLO, {})
    assert found.count == {"all-gather": 6, "all-reduce": 1}
    assert found.nbytes == 5 * 256 + 128 + 16
    scaled = collectives(HLO, {0: 2, 3: 20})
    assert scaled.count == {"all-gather": 102, "all-reduce": 1}
    assert scaled.nbytes == 20 * 5 * 256 + 2 * 128 + 16


def test_lengths_are_read_as_the_footprint_reads_them():
    args = plan.parse(["--config", "v4_flash", "--topology", "h100:8", "--context", "256K"])
    assert plan.read_case(args).context == footprint.parse_length("256K", 1024)[0] == 1 << 18
