"""Whole programs compiled for TPUs that are not here."""

import dataclasses
import importlib.util

import pytest

from lsa_jax.config import ConfigError
from lsa_jax.planning import aot
from lsa_jax.planning.fit import DoesNotFit
from lsa_jax.planning.hardware import DEVICES, parse_topology
from lsa_jax.planning.plan import as_json, make_plan
from lsa_jax.planning.programs import Planner
from tests.plan_cases import TINY, case

SMALL = dataclasses.replace(
    TINY, layer_types=("csa", "hca", "csa"), mlp_types=("hash", "score", "score")
)
TPU = pytest.mark.skipif(
    not aot.has_compiler(DEVICES["v5e"]), reason="compiling for TPUs needs the package libtpu"
)
MESHES = ("v5p:2x2x1", "tpu7x:1x1x1")  # several devices; test_plan_bench has all generations


pytestmark = pytest.mark.usefixtures("devices_elsewhere")


def compiled(planner: Planner, *names: str):
    programs = planner._full() if planner.case.lsa is None else planner._two_level()
    return {p.name: planner._compile(p) for p in programs if p.name in names}


@TPU
@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_a_decode_step_with_lsa_compiles_for_a_mesh(name):
    topology, asked = parse_topology(name), case(SMALL, lsa=True)
    mesh = (1, topology.devices // 2, 2)
    planner = Planner(asked, aot.make_target(topology, mesh), "all")
    step = compiled(planner, "decode step")["decode step"]
    assert step.temporary > 0 and step.added >= 0
    assert step.collectives.count


@TPU
@pytest.mark.slow
def test_a_plan_with_lsa_compiles_prefill_step_and_boundary_and_they_fit():
    topology = parse_topology("v6e:1x1")
    made = make_plan(case(SMALL, lsa=True, batch=1), topology, depth="all")
    names = [p.name for p in made.programs]
    assert names[-5:] == ["decode step", "flush", "fire", "missed", "recall"]
    assert sum(name.startswith("prefill") for name in names) == 4  # three kinds, and the logits
    assert made.fits and as_json(made)["fits"]
    step = made.programs[names.index("decode step")]
    # What the compiler reserves for arguments is what arithmetic says, up to the fill of tiles:
    # these arrays are so small that tiles of 4 KiB cost more than their bytes.
    assert step.arguments >= made.memory.device - made.memory.indexer


@TPU
@pytest.mark.slow
def test_a_thinned_model_bounds_the_temporaries_of_the_whole_from_both_sides():
    deep = dataclasses.replace(
        SMALL,
        layer_types=("csa", "hca", "csa", "hca", "csa"),
        mlp_types=("hash", "score", "score", "score", "score"),
    )
    target = aot.make_target(parse_topology("v5e:1x1"), (1, 1, 1))
    asked = case(deep)
    both = [
        compiled(Planner(asked, target, d), "decode step")["decode step"] for d in ("all", "kinds")
    ]
    whole, thinned = both
    assert thinned.arguments == whole.arguments  # weights of skipped layers are there
    # From below, for layers take turns with most; from above, if none took turns with any.
    planner = Planner(asked, target, "kinds")
    alike = deep.num_layers / len(planner.counts)
    assert thinned.temporary <= 1.1 * whole.temporary <= 1.1 * 1.2 * alike * thinned.temporary


@TPU
@pytest.mark.slow
def test_a_program_that_its_compiler_cannot_fit_is_refused_with_both_sizes():
    topology = parse_topology("v5e:1x1")
    # By arithmetic everything fits, for the memory is a lie; the compiler knows better.
    liar = dataclasses.replace(
        topology, device=dataclasses.replace(topology.device, memory=1 << 45)
    )
    wide = dataclasses.replace(SMALL, max_position_embeddings=1 << 20)
    with pytest.raises(DoesNotFit, match="as its compiler says") as refused:
        make_plan(case(wide, context=1 << 20, batch=512), liar, depth="kinds")
    assert refused.value.needed > DEVICES["v5e"].memory


@pytest.mark.parametrize(("name", "extra"), [("v5e:1x1", "[tpu]"), ("h100:1", "[aot]")])
def test_a_compiler_that_is_not_installed_is_named_with_the_extra_that_brings_it(
    name, extra, monkeypatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as refused:
        aot.make_target(parse_topology(name), (1, 1, 1))
    assert extra in str(refused.value) and name in str(refused.value)
    assert "\n" not in str(refused.value)
