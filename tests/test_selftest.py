"""The self-test: each of its checks fails when the thing that it checks is broken on purpose."""

import json
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax import selftest
from lsa_jax.checks import identities, kernels, memory, parity
from lsa_jax.checks.finding import Finding
from lsa_jax.lsa import boundary
from lsa_jax.lsa.host_memory import HostMemory
from lsa_jax.nn import attend_blocks
from pallas_kernels import casebook, timing

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def broken(findings) -> list[str]:
    return [finding.said for finding in findings if not finding.holds]


def test_memory_kinds_and_the_host_store_hold_here():
    assert broken(memory.kinds()) == []
    assert broken(memory.store()) == []


def test_a_device_without_pinned_memory_is_found(monkeypatch):
    real = jax.local_devices()[0]
    kinds = [m for m in real.addressable_memories() if m.kind != "pinned_host"]
    device = types.SimpleNamespace(
        addressable_memories=lambda: kinds, default_memory=real.default_memory
    )
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert not next(iter(memory.kinds())).holds


def test_a_transfer_that_loses_a_byte_is_found(monkeypatch):
    put = jax.device_put

    def lossy(x: Any, *args: Any) -> Any:
        return put(np.where(np.asarray(x) == 7, 0, np.asarray(x)), *args)

    monkeypatch.setattr(memory.jax, "device_put", lossy)
    assert any("bytes equal False" in said for said in broken(memory.kinds()))


def test_a_host_store_that_reads_another_row_is_found(monkeypatch):
    read = HostMemory.read
    monkeypatch.setattr(HostMemory, "read", lambda self, rows, out=None: read(self, rows ^ 1, out))
    assert broken(memory.store())


def test_a_slow_link_is_found(monkeypatch):
    monkeypatch.setattr(memory, "RECORDS", 16)
    monkeypatch.setattr(memory, "_seconds", lambda move: 1.0)
    assert len(broken(memory.bandwidth())) == 2


def test_a_bandwidth_is_bytes_over_the_median_time(monkeypatch):
    monkeypatch.setattr(memory, "RECORDS", 1000)
    monkeypatch.setattr(memory, "_seconds", lambda move: 1e-3)
    assert "4.10 GB/s" in next(iter(memory.bandwidth())).said  # 1000 x 4096 bytes in 1 ms


@pytest.mark.slow
def test_a_kernel_that_computes_something_else_is_found(monkeypatch):
    monkeypatch.setattr(casebook, "operations", lambda: ("hc_mix",))
    assert broken(kernels.kernels()) == []
    run = timing.Runner.__call__
    monkeypatch.setattr(
        timing.Runner, "__call__", lambda self, i: jax.tree.map(lambda x: x + 1, run(self, i))
    )
    assert any("differ" in said for said in broken(kernels.kernels()))


def test_no_case_at_all_is_a_failure(monkeypatch):
    monkeypatch.setattr(casebook, "operations", lambda: ())
    assert broken(kernels.kernels())


def test_a_check_that_ends_in_an_error_or_finds_nothing_does_not_hold():
    def raises():
        yield Finding("first", True)
        raise RuntimeError("the device\nis gone")

    result = selftest.run("x", raises)
    assert not result.holds and [f.said for f in result.findings][1] == "RuntimeError: the device"
    assert not selftest.run("x", lambda: []).holds
    assert selftest.run("x", lambda: [Finding("fine", True)]).holds


def test_the_report_is_text_and_json_and_the_exit_code_says_what_holds(
    monkeypatch, tmp_path, capsys
):
    good = {
        "parity": lambda: [Finding("close", True)],
        "bandwidth": lambda: [Finding("fast", True)],
    }
    monkeypatch.setattr(selftest, "CHECKS", good)
    file = tmp_path / "report.json"
    assert selftest.main(["--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["holds"] and [c["name"] for c in found["checks"]] == list(good)
    assert found["environment"]["device"].endswith("(cpu)")
    assert "all checks hold" in capsys.readouterr().out
    monkeypatch.setitem(good, "bandwidth", lambda: [Finding("slow", False)])
    assert selftest.main([]) == 1
    assert "FAIL slow" in capsys.readouterr().out
    assert selftest.main(["--only", "parity"]) == 0


@pytest.mark.slow
def test_parity_holds_and_fails_when_attention_loses_its_sinks(monkeypatch):
    assert broken(parity.parity()) == []
    sink = attend_blocks.sink_attention

    def without(q: Any, sets: Any, sink_logit: Any, scale: float) -> Any:
        return sink(q, sets, jnp.full_like(sink_logit, -1e9), scale)

    jax.clear_caches()
    monkeypatch.setattr(attend_blocks, "sink_attention", without)
    assert len(broken(parity.parity())) == 2


@pytest.mark.slow
def test_identities_hold_and_fail_when_pages_lose_their_keys(monkeypatch):
    assert broken(identities.identities(None, ("paged",))) == []
    flush = boundary.flush

    def forgetful(plan: Any, state: Any, due: Any) -> Any:
        state, records, done = flush(plan, state, due)
        return state, records.at[..., ::2, :].set(0), done

    jax.clear_caches()
    monkeypatch.setattr(boundary, "flush", forgetful)
    found = identities.identities(None, ("paged",))
    assert any("paged" in finding.said for finding in found if not finding.holds)
