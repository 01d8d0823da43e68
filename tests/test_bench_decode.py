"""`evals.bench_decode`: tokens, rates and launches of decoding, backend by backend."""

import json

import pytest

from evals import bench_decode
from evals.thunks import Launches, launches_of_a_step

DECODE = """\
000: kCommandBuffer [source       | next=006 (1)]
    001: kCopy         [source | sink] kCopy
    002: kCustomKernel [source | sink] loop_broadcast_fusion grid: [1, 1, 1]
003: kWhile         [prev=000 (1) | next=000 (1)]
condition:
    004: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1]
  body:
    005: kCustomKernel [source | sink] loop_one
006: kWhile         [prev=000 (1) | next=339 (1)]
condition:
    007: kCustomKernel [source | sink] loop_and_fusion grid: [1, 1, 1]
  body:
    000: kCommandBuffer [source       | next=020 (1)]
        008: kCustomKernel [source       | sink        ] input_reduce_fusion_110
        009: kGemm          [source       | sink        ] kGemm
        010: kWhile         [source       | next=013 (3)]
    condition:
            011: kCustomKernel [source | sink] loop_and_fusion
      body:
            012: kCopy         [source       | next=013 (3)] kCopy
    020: kCustomCall    [prev=000 (1) | next=000 (1)] kCustomCall
    000: kCommandBuffer [prev=020 (1) | next=044 (1)]
        021: kCustomKernel [source       | next=022 (1)] input_reduce_fusion_43
339: kCopy          [prev=006 (1) | next=340 (1)] kCopy
"""


def test_a_step_is_the_body_of_the_largest_loop() -> None:
    assert launches_of_a_step(DECODE) == Launches(inside=5, outside=1)


def test_a_program_without_a_loop_has_no_step() -> None:
    with pytest.raises(ValueError, match="must have a loop, got none"):
        launches_of_a_step(DECODE.split("003:")[0])


@pytest.mark.parametrize(
    ("ids", "where"), [([1, 2, 3], None), ([1, 5, 3], 1), ([1, 2], 2), ([1, 2, 3, 4], 3)]
)
def test_the_first_token_that_differs_is_found(ids, where) -> None:
    assert bench_decode.first_difference(ids, [1, 2, 3]) == where


@pytest.mark.slow
def test_every_backend_that_is_named_runs_on_the_embedded_model_and_is_compared(tmp_path, capsys):
    out = tmp_path / "out.json"
    options = "--tokens 512 --task niah_single_2 --max-new-tokens 12 --attention full --json"
    assert bench_decode.main([*options.split(), str(out), "--", "--dtype", "float32"]) == 0
    found = json.loads(out.read_text())
    assert [case["case"]["backend"] for case in found["cases"]] == ["xla", "auto"]
    assert found["cases"][0]["ids"] == found["cases"][1]["ids"] and found["cases"][0]["decode"] > 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| full, ")]
    assert len(rows) == 2 and "1.00x" in rows[0] and ", the same |" in rows[1]


def test_tokens_that_differ_are_said_and_make_the_exit_code(monkeypatch, capsys) -> None:
    def run(args, case, prompt, folder) -> bench_decode.Outcome:
        ids = [4, 5, 6] if case.backend == "xla" else [4, 5, 7]
        of = {"decode": 10.0 if case.backend == "xla" else 15.0, "prefill": 100.0}
        of |= {"compile_seconds": 1.0, "device": "none", "jax": "0", "launches": Launches(7, 2)}
        return bench_decode.Outcome(case=case, ids=ids, **of)

    monkeypatch.setattr(bench_decode, "run", run)
    assert bench_decode.main(["--attention", "lsa", "--backends", "xla,auto"]) == 1
    row = [line for line in capsys.readouterr().out.splitlines() if "lsa, auto" in line]
    assert row == ["| lsa, auto | 15.0 | 1.50x | differ from token 2 | 7 | 2 | 100.0 | 1 s |"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--json", "none/out.json"], "--json must be in a directory that is there"),
        (["--task", "vt", "--tokens", "9999999"], "lengths must be at most"),
        (["--task", "vt", "--tokens", "16"], "tokens"),
        (["--ckpt", "none"], "none"),
        (["--backends", "cuda"], "cuda"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(options, words, monkeypatch, capsys):
    monkeypatch.setattr(bench_decode, "run", None)
    try:
        assert bench_decode.main(options) == 2
    except SystemExit as stop:  # the parser's
        assert stop.code == 2
    assert words in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_case_that_fails_says_why_and_the_others_run_on(tmp_path, capsys) -> None:
    options = ["--tokens", "64", "--attention", "full", "--backends", "mosaic_tpu,xla"]
    out = tmp_path / "out.json"
    assert bench_decode.main([*options, "--max-new-tokens", "2", "--json", str(out)]) == 1
    said = capsys.readouterr()
    (line,) = (line for line in said.err.splitlines() if line.startswith("failed:"))
    assert line.startswith("failed: full, mosaic_tpu: exit code 2: error: ") and "TPU" in line
    (row,) = (line for line in said.out.splitlines() if line.startswith("| full, xla |"))
    assert "| nothing to hold them to |" in row and "x |" not in row.replace("xla |", "")
    found = json.loads(out.read_text())
    assert found["failures"] == [line] and len(found["cases"]) == 1


def test_an_error_is_found_before_what_jax_says_after_it() -> None:
    stderr = "loading x\npallas_kernels.dispatch.Unsupported: why\n----\nFor simplicity, JAX has"
    assert bench_decode.last_word(stderr) == "pallas_kernels.dispatch.Unsupported: why"
    assert bench_decode.last_word("one\ntwo") == "two"
    assert bench_decode.last_word("") == "no word"
