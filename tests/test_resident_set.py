"""Resident sets against a brute force written from the spec, and the properties they promise."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.config import ConfigError
from lsa_jax.lsa import resident_set
from lsa_jax.lsa.budget import Calibration
from lsa_jax.lsa.policy import PolicyConfig
from tests.reference import resident_reference as reference

CASES, ROWS, ENTRIES, PAGES = 100, 3, 22, 6  # of four entries, if not said otherwise
STEP = 16  # scores are multiples of 1 / STEP: many ties, many equal to the threshold
ROOM = np.full(CASES, ROWS * ENTRIES, np.int32)  # for everything

PLAIN = PolicyConfig(recency=0)
FORCING = PolicyConfig(recency=5, sink=3)
CAPPED = PolicyConfig(recency=5, sink=1, cap=7, sticky=True)
MODE_A = PolicyConfig(policy="threshold", recency=4, sink=2, cap=9, sticky=True)
DENSEST = PolicyConfig(policy="published", recency=0)
PUBLISHED = PolicyConfig(policy="published", recency=6, sink=1, recall_pages=3)
TOP = PolicyConfig(policy="top", recency=2)
SETTINGS = [
    (PLAIN, 4),
    (FORCING, 4),
    (CAPPED, 4),
    (PolicyConfig(recency=3, recall_pages=2), 3),
    (MODE_A, 1),
    (DENSEST, 4),
    (PUBLISHED, 4),
    (PolicyConfig(recency=2, sink=1, recall_gate=1.25), 4),
    (PolicyConfig(policy="threshold", recency=1, recall_gate=2.0, cap=6, sticky=True), 2),
    (PolicyConfig(policy="published", recency=0, sink=2, recall_pages=2), 3),
    (TOP, 4),
]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _select_cases(cfg: PolicyConfig, page_entries: int, args: dict) -> resident_set.Selection:
    def one(args):
        return resident_set.select(cfg=cfg, page_entries=page_entries, **args)

    return jax.vmap(one)(args)


def select_cases(cfg: PolicyConfig, page_entries: int, args: dict) -> Any:
    """`select` over a leading axis of independent cases; a Selection of NumPy arrays."""
    return jax.tree.map(np.asarray, _select_cases(cfg, page_entries, args))


def random_cases(seed: int, page_entries: int, *, per_row: bool = False) -> dict[str, np.ndarray]:
    """Random rows; whatever lies behind a row's entries is garbage, NaN among it."""
    rng = np.random.default_rng(seed)
    shape, pages = (CASES, ROWS), -(-ENTRIES // page_entries)
    entries = rng.integers(0, ENTRIES + 1, shape)
    scores = rng.integers(0, STEP + 1, (*shape, ENTRIES)) / STEP
    scores *= rng.random(shape)[..., None] < 0.8  # some rows need nothing
    garbage = rng.choice([np.nan, np.inf, -np.inf, 2.0], scores.shape)
    scores = np.where(np.arange(ENTRIES) < entries[..., None], scores, garbage)
    late = rng.random(shape) < 0.2  # a page that was completed but is not on the host yet
    return {
        "scores": scores.astype(np.float32),
        "entries": entries.astype(np.int32),
        "pages_complete": np.maximum(entries // page_entries - late, 0).astype(np.int32),
        "allowed": rng.integers(0, 2 * pages, shape if per_row else CASES).astype(np.int32),
        "live": rng.random(shape) < 0.9,
        "previous": rng.random((*shape, pages)) < 0.3,
        "threshold": rng.choice([0.25, 0.5, 0.75], shape).astype(np.float32),
    }


def reference_rows(args: dict[str, np.ndarray], case: int) -> list[reference.Row]:
    rows = []
    for b, n in enumerate(args["entries"][case]):
        n = int(n) if args["live"][case, b] else 0
        rows.append(
            reference.Row(
                args["scores"][case, b, :n].tolist(),
                float(args["threshold"][case, b]),
                int(args["pages_complete"][case, b]) if n else 0,
                frozenset(np.flatnonzero(args["previous"][case, b]).tolist()),
            )
        )
    return rows


def page_set(pages: np.ndarray) -> set[int]:
    return set(np.flatnonzero(pages).tolist())


@pytest.mark.parametrize(
    ("cfg", "page_entries", "per_row"),
    [
        *((cfg, page_entries, False) for cfg, page_entries in SETTINGS),
        *((cfg, 4, True) for cfg in (CAPPED, PUBLISHED)),
    ],
    ids=str,
)
def test_every_field_equals_the_brute_force(cfg, page_entries, per_row):
    args = random_cases(1, page_entries, per_row=per_row)
    got = select_cases(cfg, page_entries, args)
    for case in range(CASES):
        rows = reference_rows(args, case)
        want = reference.select(rows, cfg, page_entries, args["allowed"][case].tolist())
        for b, row in enumerate(want):
            assert page_set(got.pages[case, b]) == row.pages, (case, b)
            assert page_set(got.forced[case, b]) == row.forced, (case, b)
            for name in ("wanted", "over_budget", "kept_entries"):
                assert getattr(got, name)[case, b] == getattr(row, name), (name, case, b)
            np.testing.assert_allclose(got.captured[case, b], row.captured, rtol=1e-6)  # float32
        if not per_row:
            pages = reference.order(rows, cfg, page_entries)
            assert [got.page_rank[case][page] for page in pages] == list(range(len(pages)))
            assert np.isfinite(got.page_rank[case]).sum() == len(pages)
    assert not got.nan.any()


@pytest.mark.parametrize("sticky", [False, True])
def test_pages_of_one_entry_are_exactly_the_published_entries(sticky):
    args = random_cases(3, 1)
    args |= {"allowed": ROOM, "pages_complete": args["entries"]}
    args["previous"] &= sticky
    got, cut = select_cases(MODE_A, 1, args), 0
    for case, b in np.ndindex(CASES, ROWS):
        row = reference_rows(args, case)[b]
        want = reference.mode_a_entries(row.scores, row.threshold, MODE_A)
        assert page_set(got.pages[case, b]) == want | {
            j for j in row.previous if j < len(row.scores)
        }
        passed = sum(s > row.threshold for s in row.scores)
        cut += len(want) == MODE_A.cap < passed
    assert cut > 25  # the cap was exact where it applied


def test_the_published_quota_takes_the_densest_pages_partial_one_included():
    args = random_cases(5, 4) | {"allowed": ROOM}
    got, partial = select_cases(PUBLISHED, 4, args), 0
    for case, b in np.ndindex(CASES, ROWS):
        row = reference_rows(args, case)[b]
        pages = page_set(got.pages[case, b])
        # Which of equal pages fill the quota is arbitrary, as published; how dense they are is not.
        ranked = reference.published_order(row.scores, row.threshold, PUBLISHED, 4)
        taken = sorted((s for s, p in ranked if p in pages), reverse=True)
        assert taken == [s for s, _ in ranked[: PUBLISHED.recall_pages]]
        partial += any(p >= row.complete for p in pages)
    assert partial > 60


def test_a_published_quota_of_all_pages_is_everything():
    args = random_cases(6, 4) | {"allowed": ROOM}
    exists = np.arange(PAGES) * 4 < np.where(args["live"], args["entries"], 0)[..., None]
    np.testing.assert_array_equal(select_cases(DENSEST, 4, args).pages, exists)


@pytest.mark.parametrize(
    ("cfg", "per_row"), [(FORCING, False), (TOP, False), (CAPPED, True)], ids=str
)
def test_a_budget_is_never_exceeded_and_used_up_when_enough_is_wanted(cfg, per_row):
    args = random_cases(7, 4, per_row=per_row)
    got = select_cases(cfg, 4, args)
    used, wanted = got.pages.sum(-1), got.wanted
    if not per_row:
        used, wanted = used.sum(-1), wanted.sum(-1)
    np.testing.assert_array_equal(used, np.minimum(wanted, args["allowed"]))
    assert (wanted > args["allowed"]).any() and (wanted < args["allowed"]).any()


def test_no_other_pages_of_the_same_number_are_worth_more():
    args = random_cases(8, 4)
    args["threshold"][:] = 0.5
    args["live"][:] = np.arange(ROWS) == 0  # 2^5 sets of pages to try, not 2^15
    got = select_cases(PLAIN, 4, args)
    for case in range(CASES):
        row = reference_rows(args, case)[0]
        gain = np.maximum(np.array(row.scores[: row.complete * 4]) - 0.5, 0).reshape(-1, 4).sum(1)
        sizes = range(min(int(args["allowed"][case]), len(gain)) + 1)
        sets = itertools.chain(*(itertools.combinations(range(len(gain)), k) for k in sizes))
        best = max(gain[list(pages)].sum() for pages in sets)
        assert gain[np.flatnonzero(got.pages[case, 0])].sum() == best


def test_a_row_with_a_budget_of_its_own_does_not_feel_the_others():
    args, order = random_cases(9, 4, per_row=True), [2, 0, 1]
    got = select_cases(CAPPED, 4, args)
    moved = select_cases(CAPPED, 4, {name: x[:, order] for name, x in args.items()})
    for a, b in zip(got, moved, strict=True):
        np.testing.assert_array_equal(a[:, order], b)


def test_a_lower_threshold_keeps_a_superset():
    args = random_cases(10, 4) | {"allowed": ROOM}
    before = np.ones((CASES, ROWS, PAGES), bool)
    for threshold in (0.3, 0.5, 0.7, 0.9):
        args["threshold"] = np.full((CASES, ROWS), threshold, np.float32)
        pages = select_cases(FORCING, 4, args).pages
        assert (before | ~pages).all() and (before & ~pages).any()
        before = pages


def test_forced_pages_come_first():
    args = random_cases(11, 4)
    got = select_cases(FORCING, 4, args)
    room = got.forced.sum((1, 2)) <= args["allowed"]
    assert (got.pages | ~got.forced)[room].all() and not (got.pages & ~got.forced)[~room].any()
    assert room.any() and not room.all()


def test_a_sticky_set_grows_while_there_is_room():
    args = random_cases(12, 4) | {"allowed": ROOM}
    args["previous"][:] = False
    rng, sizes = np.random.default_rng(12), []
    for _ in range(4):
        args["scores"] = rng.random(args["scores"].shape, np.float32)
        pages = select_cases(CAPPED, 4, args).pages
        assert (pages | ~args["previous"]).all()
        args["previous"] = pages
        sizes.append(pages.sum())
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]


def select_rows(cfg, scores, allowed=99, entries=None, live: Any = True):
    """One selection of rows that are complete if not said otherwise, in the shape of the others."""
    args = {name: np.zeros_like(x) for name, x in random_cases(0, 4).items()}
    rows, columns = np.shape(scores)
    args["scores"][0, :rows, :columns] = scores
    args["entries"][0, :rows] = columns if entries is None else entries
    args["pages_complete"][:] = args["entries"] // 4
    args["live"][0, :rows] = live
    args["threshold"][:] = 0.5
    args["allowed"][:] = allowed
    got = select_cases(cfg, 4, args)
    return jax.tree.map(lambda x: x[0, :rows], got)


def test_a_score_equal_to_the_threshold_is_not_kept():
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    got = select_rows(PLAIN, [[0.5] * 4 + [above] + [0.0] * 7])
    assert page_set(got.pages[0]) == {1} and got.kept_entries.tolist() == [1]


def test_two_sure_entries_outrank_eight_doubtful_ones():
    scores = [[0.55] * 4 + [0.99, 0.99, 0.0, 0.0] + [0.55] * 4]
    assert page_set(select_rows(PLAIN, scores, allowed=1).pages[0]) == {1}
    densest = select_rows(DENSEST, scores, allowed=1)
    assert page_set(densest.pages[0]) == {2}  # and the newest of equals
    np.testing.assert_allclose(densest.captured, [0.4])


def test_a_question_that_needs_nothing_leaves_the_budget_to_the_others():
    got = select_rows(FORCING, [[0.0] * 20, [0.9] * 20], allowed=8)
    assert got.pages.sum(1).tolist() == [3, 5]  # the first page and the last two are forced
    assert got.over_budget.tolist() == [0, 0]


def test_nan_is_flagged_in_entries_that_exist_and_nowhere_else():
    scores = np.zeros((3, 8))
    scores[0, 5], scores[1, 6], scores[2, 0] = np.nan, np.nan, np.nan
    got = select_rows(PLAIN, scores, entries=6, live=[True, True, False])
    assert got.nan.tolist() == [True, False, False]


def test_page_scores_given_directly_fill_the_budget_highest_first():
    rng = np.random.default_rng(13)
    page_scores = rng.normal(size=(2, 40)).astype(np.float32)  # arms score as they like
    page_scores[1, 23:] = np.nan  # beyond the row's end
    entries = jnp.array([160, 90])
    cfg = PolicyConfig(policy="top", recency=0)
    choose = functools.partial(resident_set.select_pages, cfg=cfg, page_entries=4, allowed=17)
    live = jnp.array([True, True])
    got = jax.jit(choose)(page_scores, entries=entries, pages_complete=entries // 4, live=live)
    page_scores[1, 22:] = -np.inf  # entries 88 and 89 are a page in formation
    cut = np.sort(page_scores.ravel())[-17]
    np.testing.assert_array_equal(got.pages, page_scores >= cut)
    assert got.wanted.tolist() == [40, 22] and int(np.sum(got.over_budget)) == 62 - 17
    assert got.nan.tolist() == [False, False] and got.captured.tolist() == [1, 1]
    page_scores[1, 22] = np.nan  # of a page that exists
    got = jax.jit(choose)(page_scores, entries=entries, pages_complete=entries // 4, live=live)
    assert got.nan.tolist() == [False, True]


@pytest.mark.parametrize("edges", [(), (1, 10, 64, 65, 4096)])
def test_calibrated_thresholds_are_the_same_on_the_device(edges):
    thresholds = tuple((i + 1) / 8 for i in range(len(edges) + 1))
    calibration = Calibration(edges, thresholds, 0.1)
    entries = [0, 1, 9, 10, 11, 63, 64, 65, 4095, 4096, 1 << 20]
    got = jax.jit(lambda n: resident_set.row_thresholds(calibration, n))(jnp.array(entries))
    assert got.tolist() == [calibration.threshold(n) for n in entries]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"policy": "densest"}, "policy"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": 1 - 1e-12}, "threshold"),  # 1 in float32
        ({"threshold": float("nan")}, "threshold"),
        ({"threshold": "0.5"}, "threshold"),
        ({"recency": -1}, "recency"),
        ({"recency": 2**31}, "recency"),
        ({"sink": 1.0}, "sink"),
        ({"cap": True}, "cap"),
        ({"recall_pages": 0}, "recall_pages"),
        ({"sticky": 1}, "sticky"),
        ({"policy": "published", "cap": 5}, "cap"),
        ({"policy": "top", "sticky": True}, "sticky"),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(settings, field):
    with pytest.raises(ConfigError, match=f"^{field} must be "):
        PolicyConfig(**settings)


def test_a_gate_leaves_forced_pages_where_nothing_else_is_worth_as_much():
    """As many others as are always kept stand against these: two and two."""
    cfg = PolicyConfig(recency=2, threshold=1 / 16, recall_gate=1.0)
    scores = jnp.asarray([[0.5, 0.25, 0.25, 0.25, 0.5], [0.5, 0.25, 0.25, 0.25, 0.25]])
    asked = {"page_entries": 1, "allowed": 10, "live": jnp.ones(2, bool)}
    entries = jnp.array([5, 5])
    got = resident_set.select(scores, entries, entries, cfg, **asked)
    np.testing.assert_array_equal(got.pages, [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]])
    np.testing.assert_array_equal(got.wanted, [2, 5])
    np.testing.assert_array_equal(got.over_budget, [0, 0])
    loose = dataclasses.replace(cfg, recall_gate=0.5)
    assert np.asarray(resident_set.select(scores, entries, entries, loose, **asked).pages).all()


def test_a_gate_is_each_row_s_own_and_knows_no_later_column():
    cfg = PolicyConfig(recency=1, threshold=1 / 16, recall_gate=1.0)
    scores = jnp.asarray([[0.5, 0.75, 0.5, np.nan, 9.0], [0.25, 0.125, 0.5, 1.0, 1.0]])
    asked = {"page_entries": 1, "allowed": 10, "live": jnp.ones(2, bool)}
    entries = jnp.array([3, 3])
    got = resident_set.select(scores, entries, entries, cfg, **asked)
    np.testing.assert_array_equal(got.pages, [[1, 1, 1, 0, 0], [0, 0, 1, 0, 0]])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"recall_gate": 0.0}, "recall_gate must be a finite number above 0, got 0.0"),
        ({"recall_gate": float("inf")}, "recall_gate must be finite, got inf"),
        ({"recall_gate": 1.0, "policy": "top"}, "recall_gate must be not given with policy 'top'"),
        ({"recall_gate": 1.0, "recency": 0}, "recall_gate must be given with a recency or a sink"),
    ],
)
def test_a_gate_that_cannot_be_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        PolicyConfig(**given)
