"""A plan's memory held against a run: what can be known of it without an accelerator."""

import types

import pytest

from evals import live_memory
from lsa_jax import plan

CASE = ["--config", "mini_model", "--weights", "bf16", "--context", "2048"]
LSA = ["--attention", "lsa", "--kv-budget", "0.5", "--page-entries", "4", "--recency", "16"]
LSA += ["--lookahead", "16"]


def test_a_device_that_plans_do_not_know_is_refused(capsys):
    assert live_memory.main([]) == 2
    assert "device must be one of ['h100', 'h200'" in capsys.readouterr().err


def test_weights_are_made_as_the_plan_counts_them():
    case = plan.read_case(plan.parse([*CASE, "--topology", "h100:1"]))
    made = live_memory.random_weights(case)
    assert {path: (x.shape, x.dtype) for path, x in made.items()} == {
        path: (info.shape, info.dtype) for path, info in case.leaves.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "peak", "code"), [([], 104, 0), ([], 106, 1), (LSA, 96, 0), (LSA, 94, 1)]
)
def test_a_run_more_than_a_twentieth_off_its_plan_fails(monkeypatch, options, peak, code):
    peaks = iter([50, peak])
    device = types.SimpleNamespace(
        device_kind="NVIDIA H200", memory_stats=lambda: {"peak_bytes_in_use": next(peaks)}
    )
    monkeypatch.setattr(live_memory, "planned", lambda _: 100)
    monkeypatch.setattr(live_memory, "here", lambda: device)
    assert live_memory.main([*CASE, *options]) == code
    assert not list(peaks)
