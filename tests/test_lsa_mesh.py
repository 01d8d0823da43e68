"""Sessions on several devices against one: the same tokens, one copy of each page on the host."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from lsa_jax import shardings
from lsa_jax.config import ConfigError
from lsa_jax.lsa import devices, tiers
from lsa_jax.lsa.level2 import Level2
from tests import lsa_models

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(1800)  # two sessions are compiled, each for its own devices


def child(count: int, *args: str) -> str:
    """Output of `lsa_on_mesh.py` on so many fake devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # of XLA's: most of the time is its compilation
    command = [sys.executable, "-W", "error", str(ROOT / "tests/lsa_on_mesh.py"), *args]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> dict[str, np.ndarray]:
    """What two requests drew on one device and on four (expert 2, tensor 2: a mesh of two devices
    splits along one of these axes alone)."""
    file = tmp_path_factory.mktemp("mesh") / "served.npz"
    child(4, "sessions", str(file))
    with np.load(file) as arrays:
        return dict(arrays)


@pytest.mark.slow
def test_several_devices_draw_the_tokens_of_one(served):
    for row in ("", "other_"):
        np.testing.assert_array_equal(served[f"four.{row}tokens"], served[f"one.{row}tokens"])
        # Float32 sums in another order, split over devices.
        want, got = served[f"one.{row}logits"], served[f"four.{row}logits"]
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
        assert np.abs(want).max() > 0.1


@pytest.mark.slow
def test_several_devices_recall_the_pages_of_one_from_one_store(served):
    assert served["one.recalled"].sum() > 0
    for what in ("pages", "recalled", "host"):
        np.testing.assert_array_equal(served[f"four.{what}"], served[f"one.{what}"])
    assert served["one.copies"].tolist() == [1] and served["four.copies"].tolist() == [4]
    assert served["four.whole"]


@pytest.mark.slow
def test_a_full_store_takes_the_same_host_memory_for_one_device_and_for_two():
    one, two = (json.loads(child(n, "memory", str(n))) for n in (1, 2))
    assert (one["devices"], two["devices"]) == (1, 2)
    assert one["same"] and two["same"]
    assert one["live"] == two["live"] == one["allocated"] == two["allocated"] > 190e6
    for found in (one, two):  # as the process grew, give or take what allocators keep to themselves
        assert abs(found["grown"] - found["written"]) < 0.1 * found["written"]


class Sent:
    """Stands in for `jax.device_put` and notes bytes that leave NumPy arrays, by device."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.put, self.bytes = jax.device_put, []
        monkeypatch.setattr(devices.jax, "device_put", self)

    def __call__(self, x: Any, sharding: Any) -> Any:
        placed = self.put(x, sharding)
        assert isinstance(x, np.ndarray)
        self.bytes += [part.data.nbytes for part in placed.addressable_shards]
        return placed


@pytest.mark.parametrize("pages", [1, 3, 8])
def test_each_byte_of_a_slab_leaves_the_host_once(monkeypatch, pages):
    """On however many devices the tests run."""
    mesh = shardings.make_mesh(tensor=jax.device_count())
    slab = np.random.default_rng(0).integers(0, 256, (pages, 5, 128), np.uint8)
    sent = Sent(monkeypatch)
    found = devices.send(slab, mesh)
    assert found.is_fully_replicated
    np.testing.assert_array_equal(np.asarray(found), slab)
    assert len(sent.bytes) == mesh.size
    assert slab.nbytes <= sum(sent.bytes) < slab.nbytes + 128 * mesh.size  # shares of equal size


def test_a_mesh_that_would_split_rows_is_refused():
    mesh = AbstractMesh((2, 1, 1), shardings.MESH_AXES)
    with pytest.raises(ConfigError, match=r"mesh must have a data axis of 1, got .*'data': 2"):
        devices.check_mesh(mesh)  # pyright: ignore[reportArgumentType]
    devices.check_mesh(None)


def test_one_device_of_the_mesh_pins_the_store(monkeypatch):
    asked = []

    class Memory(tiers.HostMemory):
        def __init__(self, shape, limit, *, device):
            asked.append(device)
            super().__init__(shape, limit, kind="pinned", device=device)

    monkeypatch.setattr(tiers, "HostMemory", Memory)
    mesh = shardings.make_mesh()
    plan = Level2(
        lsa_models.CONFIG,
        lsa_models.cache(),
        targets=lsa_models.TARGETS,
        lookahead=8,
        path="paged",
    )
    made = tiers.Tiers(plan, rows=1, pages=4, host_limit=2**20, mesh=mesh)
    assert asked == [mesh.local_devices[0]]
    assert made.store.memory.kind == "pinned"
    assert not made.recall.in_place  # which is for a GPU alone
