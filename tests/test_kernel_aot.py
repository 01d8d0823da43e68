"""Every kernel compiles for the devices it is for, where there are none: `pallas_kernels.aot`.

CI runs these twice, where libtpu is installed and where the compilers for Hopper are.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pallas_kernels import casebook, dispatch, targets

ROOT = Path(__file__).parents[1]
TPUS = ("v5e", "v5p", "v6e", "tpu7x")
HOPPER = ("h100",)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def report(names: tuple[str, ...], folder: Path, *more: str) -> list[dict[str, Any]]:
    """Rows of the command's report. The command fails if a program does: tests say which."""
    if why := targets.missing(targets.CHIPS[names[0]]):
        pytest.skip(why)
    file = folder / "report.json"
    command = [sys.executable, "-m", "pallas_kernels.aot", "--target", ",".join(names)]
    command += more
    ran = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True)
    assert file.exists(), ran.stderr[-3000:]
    return json.loads(file.read_text())


@pytest.fixture(scope="module")
def tpu_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return report(TPUS, tmp_path_factory.mktemp("tpu"))


@pytest.fixture(scope="module")
def hopper_rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return report(HOPPER, tmp_path_factory.mktemp("hopper"), "--tunings", "splits=2 scorer")


def failures(rows: list[dict[str, Any]]) -> list[str]:
    bad = [row for row in rows if row["outcome"] == "failed"]
    return [f"{row['target']} {row['backend']} {row['case']}: {row['error'][:600]}" for row in bad]


def compiled(rows: list[dict[str, Any]]) -> set[tuple[str, str, str]]:
    done = (row for row in rows if row["outcome"] == "compiled")
    return {(row["op"], row["backend"], row["target"]) for row in done}


def kernels_of(backends: tuple[str, ...], names: tuple[str, ...]) -> set[tuple[str, str, str]]:
    ops = {(op, backend) for op in casebook.operations() for backend in casebook.backends(op)}
    return {(op, b, name) for op, b in ops if b in backends for name in names}


def test_every_tpu_kernel_compiles_for_four_generations_and_fits_them(tpu_rows) -> None:
    assert failures(tpu_rows) == []


def test_no_operation_with_a_tpu_kernel_was_left_out(tpu_rows) -> None:
    assert compiled(tpu_rows) == kernels_of((dispatch.MOSAIC_TPU,), TPUS)


def test_every_gpu_kernel_compiles_for_hopper_and_fits_it(hopper_rows) -> None:
    assert failures(hopper_rows) == []


def test_no_operation_with_a_hopper_kernel_was_left_out(hopper_rows) -> None:
    wanted = kernels_of((dispatch.MOSAIC_GPU, dispatch.TRITON), HOPPER)
    assert compiled(hopper_rows) == wanted


def test_kernels_compile_for_hopper_in_other_tunings(hopper_rows) -> None:
    tuned = [row for row in hopper_rows if "scorer" in row["case"]]
    assert {row["op"] for row in tuned} == {"dense_decode", "sparse_decode"}
    assert all(row["outcome"] == "compiled" for row in tuned)


def test_the_assembler_told_registers_and_shared_memory_of_every_hopper_kernel(hopper_rows) -> None:
    told = [row["kernels"] for row in hopper_rows if row["outcome"] == "compiled"]
    assert told and all(k["registers"] > 0 for kernels in told for k in kernels) and all(told)
