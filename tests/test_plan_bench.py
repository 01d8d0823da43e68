"""The complete `bench` model with LSA, every program, compiled for every TPU generation."""

import pytest

from lsa_jax import plan
from lsa_jax.planning import aot
from lsa_jax.planning.hardware import DEVICES, parse_topology
from lsa_jax.planning.plan import make_plan

pytestmark = pytest.mark.usefixtures("devices_elsewhere")

# The shortest pieces of a prompt that take every path: compilers spend twice the time on 1024.
OPTIONS = "--config bench --context 64K --attention lsa --kv-budget 0.3 --prefill-chunk 128"
# In bfloat16: to widen fp4 experts is the largest single cost of compiling these programs, and
# test_plan_compiled has them in a small model.
OPTIONS += " --weights bf16 --layers all"
GENERATIONS = ("v5e:1x1", "v5p:1x1x1", "v6e:1x1", "tpu7x:1x1x1")


@pytest.mark.skipif(
    not aot.has_compiler(DEVICES["v5e"]), reason="compiling for TPUs needs the package libtpu"
)
@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATIONS)
def test_every_program_of_the_whole_bench_model_compiles_and_fits(name):
    args = plan.parse([*OPTIONS.split(), "--topology", name])
    topology, asked = parse_topology(name), plan.read_case(args)
    made = make_plan(asked, topology, depth="all")
    names = [p.name for p in made.programs]
    # Sliding, CSA with hash and with score, a target layer and not, HCA; and the logits.
    assert names[:6] == [f"prefill, layer {i}" for i in ("0 (x 2)", "2 (x 1)", "3 (x 7)")] + [
        "prefill, layer 4 (x 3)",
        "prefill, layer 8 (x 3)",
        "prefill, logits",
    ]
    assert names[6:] == ["decode step", "flush", "fire", "missed", "recall"]
    assert made.programs[6].layers == "all" and asked.cfg.num_layers == 16
    assert made.fits
