"""Programs compiled ahead of time: what their text says, what must hold of them, the command."""

import zlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import aot, programs, targets, verdicts
from pallas_kernels.casebook import EXACT, Case, Work


def fake(**changes: Any) -> Case:
    case = Case(
        op="fake",
        call=lambda x, *, backend: x,
        make=lambda key, n: (jax.random.normal(key, (n,)),),
        floor=lambda n: Work(bytes=8 * n),
        shape={"n": 5},
        tolerance=EXACT,
    )
    return case.named("", **changes)


def encoded(*fields: tuple[int, int | bytes]) -> bytes:
    """A protocol-buffer message."""
    out = b""
    for number, value in fields:
        if isinstance(value, int):
            out += bytes([number << 3]) + varint(value)
        else:
            out += bytes([number << 3 | 2]) + varint(len(value)) + value
    return out


def varint(value: int) -> bytes:
    return bytes([value]) if value < 0x80 else bytes([value & 0x7F | 0x80]) + varint(value >> 7)


def program_text(payload: bytes) -> str:
    """A compiled program with a kernel of each kind, and calls that are none."""
    escaped = "".join(f"\\{byte:03o}" for byte in payload)
    return "\n".join(
        [
            '  %a = f32[8]{0} custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={'
            'op_name="jit(f)/jit(score)/index_score_tile/mpmd_map" stack_frame_id=7}',
            '  %b = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={'
            'op_name="jit(f)/my_op_kernel/pallas_call"}',
            '  %c = f32[8]{0} custom-call(%b), custom_call_target="triton_kernel_call", metadata={'
            f'op_name="jit(f)/triton_kernel_call"}}, backend_config="{escaped}"',
            '  %d = f32[8]{0} custom-call(%c), custom_call_target="__cublas$gemm"',
            "  %copy.3 = u8[64,4,128]{2,1,0:T(8,128)(4,1)} copy(%d)",
            "  ROOT %t = (f32[8]{0}) tuple(%d)",
        ]
    )


def test_a_programs_text_names_its_kernels_and_copies() -> None:
    kernel = encoded((1, b"gather"), (2, 4), (3, 49_152), (4, b".target sm_90a"))
    call = encoded((1, encoded((1, kernel), (2, 300))), (4, b"page_gather"))
    text = program_text(zlib.compress(call))
    names = [call.name for call in programs.kernel_calls(text)]
    assert names == ["index_score_tile", "my_op_kernel", "page_gather"]
    assert programs.copies(text) == ("u8[64,4,128]{2,1,0:T(8,128)(4,1)}",)
    found = programs.TritonKernel("page_gather", ".target sm_90a", 49_152)
    assert programs.triton_kernels(text) == (found,)


ASSEMBLER = """
Resources(smem_scratch_bytes=131072, tmem_scratch_cols=0)
Resources(smem_scratch_bytes=1024, tmem_scratch_cols=0)
ptxas info    : Compiling entry function 'one_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for one_mosaic_gpu_kernel
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 170 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'two_mosaic_gpu_kernel' for 'sm_90a'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 30 registers, used 0 barriers
"""


def test_the_assemblers_words_become_registers_spills_and_shared_memory() -> None:
    one, two = programs.assembled(ASSEMBLER)
    assert (one.name, one.registers, one.spill_bytes) == ("one_mosaic_gpu_kernel", 170, 20)
    assert one.shared_bytes == 131_073 and (two.registers, two.shared_bytes) == (30, 1024)
    assert programs.assembled("nothing") == ()


def program(**changes: Any) -> targets.Program:
    """A program of the pool below that nothing is wrong with."""
    kernel = programs.GpuKernel(name="fake", registers=255, spill_bytes=0, shared_bytes=232_448)
    figures = {"temp_bytes": 1 << 20, "argument_bytes": 4 << 20, "output_bytes": 0}
    good: dict[str, Any] = {**figures, "alias_bytes": 0, "copies": ("u8[64,128]{1,0}",)}
    good |= {"calls": (programs.KernelCall("mosaic_gpu_v2", "fake_tile"),), "kernels": (kernel,)}
    return targets.Program(**(good | changes))


POOL = jax.ShapeDtypeStruct((8192, 4, 128), jnp.uint8)  # 4 MiB


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({}, None),
        ({"calls": ()}, "no kernel named fake in the program"),
        ({"argument_bytes": 90_000_000_000}, "needs 90001048576 bytes"),
        ({"copies": ("u8[8192,4,128]{2,0,1:T(8,128)(4,1)}",)}, "a pool is copied"),
        ({"copies": ("u8[8192,512]{1,0}",)}, "a pool is copied"),
        ({"temp_bytes": 4 << 20}, "temporaries of 4194304 bytes beside a pool of 4194304"),
        ({"kernels": ()}, "the assembler said nothing"),
    ],
)
def test_what_is_wrong_with_a_compiled_program_is_said(changes: dict, why: str | None) -> None:
    case = fake(zero_copy=True)
    found = list(verdicts.problems(targets.CHIPS["h100"], case, (POOL,), program(**changes)))
    assert (found == []) if why is None else (len(found) == 1 and why in found[0])


def test_a_kernel_beyond_a_blocks_shared_memory_is_said() -> None:
    kernel = programs.GpuKernel(name="k", registers=64, spill_bytes=0, shared_bytes=262_144)
    found = verdicts.problems(targets.CHIPS["h100"], fake(), (POOL,), program(kernels=(kernel,)))
    assert [*found] == [
        "k needs 262144 bytes of shared memory, and a block may have 232448",
    ]


def test_without_a_compiler_compiling_ahead_of_time_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(targets.Missing, match="needs the package libtpu"):
        targets.compile_for(targets.CHIPS["v5e"], jnp.sin, (jax.ShapeDtypeStruct((3,), "float32"),))
    assert aot.main(["--target", "h100"]) == 2
    assert "error: --target h100: compiling for Hopper needs" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["target", "op", "backend"])
def test_compiling_ahead_of_time_names_what_it_does_not_know(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert aot.main([f"--{option}", "v9"]) == 2
    assert f"error: --{option} must be of " in (said := capsys.readouterr().err)
    assert said.endswith(", got 'v9'\n") and said.count("\n") == 1


def test_processes_that_compile_share_targets_or_operations() -> None:
    def groups(*argv: str) -> list[tuple[list[str], list[str]]]:
        return aot.grouped(aot.parser().parse_args(argv))

    two = groups("--target", "v5e,v5p,v6e", "--op", "a,b")
    assert two == [(["v5e", "v6e"], ["a", "b"]), (["v5p"], ["a", "b"])]
    assert groups("--target", "h100", "--op", "a,b,c") == [
        (["h100"], ["a", "c"]),
        (["h100"], ["b"]),
    ]
    assert groups("--target", "h100", "--op", "a") == [(["h100"], ["a"])]
