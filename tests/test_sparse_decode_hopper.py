"""The Hopper kernel of sparse decode, as far as a CPU can tell.

Interpret mode runs it with plain indexing in place of its PTX; the PTX is run here on its own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hopper_interpreted import Interpreter
from ptx_interpreted import GLOBAL, Block

from pallas_kernels import casebook, dispatch, rows
from pallas_kernels.casebook import Case
from pallas_kernels.decode_hopper import cluster, copies, ptx
from pallas_kernels.sparse_decode import mosaic_gpu
from pallas_kernels.sparse_decode.cases import CASES, small

BF16 = ml_dtypes.bfloat16
COPIERS, LIST, RAW, SHARED = 256, 2 * ptx.HALF, 3 * ptx.HALF, 4 * ptx.HALF
NUMBERS = np.where(np.arange(64) % 7 == 3, -1, np.arange(64) * 37 % 50).astype(np.int32)


def interpreted_agrees(interpreter: Interpreter, case: Case, **tuning: Any) -> None:
    args = case.arguments(jax.random.key(0))
    want = jax.jit(lambda *a: case.run(a, "xla"))(*args)
    got = interpreter.call("sparse_decode", args, dict(case.static), **tuning)
    result = casebook.compare(case.tolerance, got, jax.device_get(want))
    assert result.ok, result.why


@pytest.mark.parametrize("scorer", [False, True])
def test_kernel_matches_the_definition_when_interpreted(
    interpreter: Interpreter, scorer: bool
) -> None:
    case = small("few", "fp8", picks=70)
    interpreted_agrees(interpreter, case, splits=2, scorer=scorer)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("case", [c for c in CASES if "mosaic_gpu" not in c.declined], ids=str)
@pytest.mark.parametrize(("splits", "scorer"), [(1, True), (4, False)])
def test_kernel_is_right_in_every_case_when_interpreted(
    interpreter: Interpreter, case: Case, splits: int, scorer: bool
) -> None:
    interpreted_agrees(interpreter, case, splits=splits, parts="float32", scorer=scorer)


@pytest.mark.parametrize("splits", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("recent", [0, 5, 128])
def test_shares_are_all_keys_once_and_fit_the_list(recent: int, splits: int) -> None:
    picks = 100
    shares = [
        [int(x) for x in copies.share(jnp.int32(recent), picks, jnp.int32(i), splits)]
        for i in range(splits)
    ]
    slots = [k for first, count, *_ in shares for k in range(first, first + count)]
    picked = [k for *_, first, count in shares for k in range(first, first + count)]
    assert (slots, picked) == ([*range(recent)], [*range(picks)])
    chunks = [-(-slots // 64) + -(-picked // 64) for _, slots, _, picked in shares]
    assert max(chunks) <= copies.most_chunks(128, picks, splits)


@pytest.mark.parametrize(
    ("batch", "picks", "fp8", "splits"),
    [
        *((1, 512, True, 8), (8, 512, True, 8), (16, 512, True, 4), (32, 512, True, 2)),
        *((64, 512, False, 2), (128, 512, True, 1)),
        *((128, 1024, True, 4), (128, 1024, False, 1), (512, 512, True, 1)),
    ],
)
def test_clusters_run_at_once_and_lists_fit(batch: int, picks: int, fp8: bool, splits: int) -> None:
    assert mosaic_gpu.default_tuning(batch, 64, 128, picks, fp8).splits == splits


def unswizzled(memory: np.ndarray) -> np.ndarray:
    """Rows [64, 512] of the tile [2, 64, 256] at the beginning of memory."""
    atoms = memory[: 2 * ptx.HALF].view(BF16).reshape(2, 8, 4, 8, 8, 8)  # half, rows, atoms, row
    row = np.arange(8)[:, None]
    pieces = atoms[:, :, :, row, np.arange(8)[None] ^ row]
    return pieces.transpose(1, 3, 0, 2, 4, 5).reshape(64, 512)


def copier(*arrays: Any) -> Block:
    """The copying warpgroup, its memory poisoned but for the list of numbers."""
    memory = np.full(SHARED, 0xFF, np.uint8)
    memory[LIST : LIST + 256] = NUMBERS.view(np.uint8)
    return Block([memory], arrays, COPIERS, 128)


def wanted(entries: np.ndarray) -> np.ndarray:
    return np.where(NUMBERS[:, None] >= 0, entries[NUMBERS], np.zeros((), entries.dtype))


def test_rows_land_where_matrix_instructions_read_them() -> None:
    source = np.random.default_rng(0).standard_normal((50, 512)).astype(BF16)
    block = copier(source)
    block.run(ptx.rows(), (0, LIST, GLOBAL, 0))
    np.testing.assert_array_equal(unswizzled(block.shared[0]), wanted(source))


def test_codes_are_fetched_and_decoded_exactly_and_the_next_chunk_asked_for() -> None:
    rng = np.random.default_rng(1)
    nope = rng.integers(0, 256, (50, 512), np.uint8)
    nope[:2, :448].reshape(-1)[:256] = np.arange(256)
    nope[:, :448][nope[:, :448] & 0x7F == 0x7F] = 0x80  # all codes but NaN
    nope[:, 448:455] = rng.integers(20, 230, (50, 7))  # normal values: CPUs flush others
    nope[:, 455:] = 0xFF
    rope = rng.standard_normal((50, 64)).astype(BF16)
    planes = rows.Fp8Rows(jnp.asarray(nope.reshape(50, 4, 128)), jnp.asarray(rope))
    want = np.asarray(rows.decode(planes, 512, 64, jnp.bfloat16))
    block = copier(nope, rope)
    block.run(ptx.codes(), (0, LIST, GLOBAL, RAW))
    for more in (1, 0):
        block.shared[0][: 2 * ptx.HALF] = 0xFF
        block.run(ptx.rope(), (0, LIST, 2 * GLOBAL))
        block.run(ptx.decoded(), (0, LIST, GLOBAL, RAW, 0, more))
        np.testing.assert_array_equal(unswizzled(block.shared[0]), wanted(want))


@pytest.mark.parametrize(("slots", "pick", "picks"), [(70, 0, 30), (0, 11, 130), (3, 0, 0)])
def test_the_list_names_slots_then_valid_picks_then_nothing(
    slots: int, pick: int, picks: int
) -> None:
    rng = np.random.default_rng(2)
    index, valid = rng.integers(0, 1000, 300, np.int32), rng.random(300) < 0.7
    block, slot_chunks = copier(index, valid), -(-slots // 64)
    text = ptx.posted(320)
    block.run(
        text, (LIST, GLOBAL, 2 * GLOBAL, slot_chunks * 64, 9000, slots, 100 + pick, picks, 5000)
    )
    got = block.shared[0][LIST : LIST + 1280].view(np.int32)
    want = np.full(320, -1)
    want[:slots] = 9000 + np.arange(slots)
    at = slice(100 + pick, 100 + pick + picks)
    begin = slot_chunks * 64
    want[begin : begin + picks] = np.where(valid[at], index[at] + 5000, -1)
    np.testing.assert_array_equal(got, want)


def test_a_run_of_rows_is_named_by_its_first() -> None:
    block = copier()
    block.run(ptx.counted(), (LIST, 7000))
    got = block.shared[0][LIST : LIST + 256].view(np.int32)
    np.testing.assert_array_equal(got, 7000 + np.arange(64))


@pytest.mark.parametrize("splits", [2, 3, 4, 5, 7, 8])
def test_a_cluster_combines_what_its_blocks_have(splits: int) -> None:
    rng = np.random.default_rng(3)
    parts = rng.standard_normal((splits, 64, 512)).astype(BF16)
    top = rng.standard_normal((splits, 64)).astype(np.float32) * 3
    total = rng.random((splits, 64), np.float32) * 50
    top[0], total[0] = -1e30, 0  # a part over no keys
    top[:, 1], total[:, 1] = -1e30, 0  # a head of none
    sink, out = rng.standard_normal(64, np.float32), np.zeros((64, 512), BF16)
    memories = []
    for part, stats in zip(parts, np.stack([top, total], axis=1), strict=True):
        memory = np.zeros(SHARED, np.uint8)
        row = np.arange(8)[:, None]
        pieces = part.reshape(8, 8, 2, 4, 8, 8).transpose(2, 0, 3, 1, 4, 5)
        atoms = pieces[:, :, :, row, np.arange(8)[None] ^ row]
        memory[: 2 * ptx.HALF] = np.ascontiguousarray(atoms).reshape(-1).view(np.uint8)
        memory[LIST : LIST + 512] = stats.reshape(-1).view(np.uint8)
        memories.append(memory)
    assert (unswizzled(memories[0]) == parts[0]).all()
    for rank in range(splits):
        block = Block(memories, (sink, out), 0, 256, rank)
        block.run(cluster.combined(splits), (0, LIST, GLOBAL, 2 * GLOBAL))
        out = block.memory[1].view(BF16).reshape(64, 512)
    weight = total * np.exp2(top.astype(np.float64))
    weight /= weight.sum(axis=0) + np.exp(sink)
    want = np.einsum("sh,shc->hc", weight, parts.astype(np.float64))
    np.testing.assert_allclose(out.astype(np.float64), want, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"q": jnp.zeros((2, 64, 512))}, "q must be bfloat16"),
        ({"q": jnp.zeros((2, 32, 256), jnp.bfloat16)}, "512 dims, got 256"),
        ({"rows": jnp.zeros((4, 8, 512))}, "bfloat16 or fp8"),
        ({"tuning": mosaic_gpu.Tuning(splits=9)}, "clusters of at most 8 blocks, got 9"),
        ({"index": jnp.zeros((2, 65536), jnp.int32)}, "shorter lists of picks, got 130 chunks"),
    ],
)
def test_what_the_kernel_declines(change: dict[str, Any], why: str) -> None:
    call: dict[str, Any] = {"q": jnp.zeros((2, 64, 512), jnp.bfloat16)}
    call |= {"rows": jnp.zeros((4, 8, 512), jnp.bfloat16), "index": jnp.zeros((2, 8), jnp.int32)}
    call |= {
        "window": jnp.zeros((2, 128, 512), jnp.bfloat16),
        "window_count": None,
        "valid": None,
        "sink": jnp.zeros(64),
    }
    options = {"scale": 1.0, "group": 64, "own": False}
    with pytest.raises(dispatch.Unsupported, match=why):
        mosaic_gpu.sparse_decode(**(call | change), **options)
