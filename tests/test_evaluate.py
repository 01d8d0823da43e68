"""Evaluations against counts taken one by one; untrained arms; the command."""

import dataclasses
from fractions import Fraction
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from lsa_jax.cache import codec
from lsa_jax.config import CacheConfig, ConfigError
from lsa_jax.lsa.budget import parse_budget
from lsa_jax.lsa.config import LsaConfig
from lsa_jax.lsa.level2 import Level2
from lsa_jax.lsa.memory_indexer import MemoryIndexer
from lsa_jax.lsa.room import Room
from tests.evaluation_cases import (
    BUDGETS,
    KS,
    MODEL,
    PAGE,
    RULE,
    TARGETS,
    device_room,
    indexer,
    protocol,
    traces_of_model,
    write_case,
)
from tests.train_traces import planted_traces
from train.quality import baselines
from train.quality.baselines import BASELINES, of_probabilities
from train.quality.evaluation import Recording, evaluate_traces, open_traces
from train.quality.metrics import MetricsConfig
from train.quality.pareto import forced_pages
from train.quality.study import device_sums, set_sums, study
from train.traces.columns import TraceError
from train.traces.trace import Trace, TraceWriter
from train.traces.trace_info import Keys


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    sizes = {"documents": 3, "tokens": 80, "prompt_entries": 90}
    return write_case(tmp_path_factory.mktemp("evaluate") / "case", **sizes)


@pytest.fixture(scope="module")
def traces(case: Path) -> list[Trace]:
    return open_traces([case / "traces"])


@pytest.fixture(scope="module")
def found(traces: list[Trace]):
    return study(indexer(), traces, device_room(), protocol())


# One by one: an evaluation that shares no code with ours but the indexer and the page counts.


def naive_probabilities(module: MemoryIndexer, trace: Trace, token: int, n: int) -> np.ndarray:
    """Deployed scores at a token, by the indexer alone."""
    hidden = jnp.asarray(trace.read("hidden", slice(token, token + 1)))
    keys = trace.keys().dequantised()[:n]
    planes = [codec.DensePlanes(jnp.asarray(keys[None, :, i])) for i in range(2)]
    at = jnp.asarray(trace.read("positions")[token : token + 1])
    logits = np.asarray(module(jnp.swapaxes(hidden, 0, 1), at, planes), np.float64)[:, 0]
    return np.max(1 / (1 + np.exp(-logits)), axis=0)


def naive_truth(trace: Trace, first: int, last: int, n: int) -> tuple[set[int], list[float]]:
    golden, mass = set(), [0.0] * n
    votes, weights = trace.votes(), trace.mass()
    for token in range(first, min(last, trace.tokens)):
        golden |= {int(i) for i in votes.row(token)[0] if i < n}
        for i, value in zip(*weights.row(token), strict=True):
            if i < n:
                mass[i] += float(value)
    return golden, mass


def naive_pages(scores: np.ndarray, threshold: float, n: int, count: int) -> set[int]:
    """The first `count` pages: forced ones, the newest first, then by surplus, then by the best
    entry."""
    complete = n // PAGE
    forced = {p for p in range(complete) if p == 0 or p >= (n - RULE.recency) // PAGE}

    def worth(p: int) -> tuple[float, ...]:
        inside = [float(s) for s in scores[p * PAGE : (p + 1) * PAGE]]
        surplus = sum(max(0.0, s - threshold) for s in inside)
        return (1, p) if p in forced else (0, surplus or -1, max(inside), p)

    return set(sorted(range(complete), key=worth, reverse=True)[:count])


def naive_counts(module, trace: Trace, token: int, pages: dict[str, int], span) -> dict:
    """Numerator and denominator of some metrics at a decision."""
    n = sum(1 for step in trace.read("formed_at") if step <= token)
    scores = naive_probabilities(module, trace, token, n)
    golden, mass = naive_truth(trace, *span, n)
    free = {i for i in range(n) if i // PAGE >= 1 and i // PAGE < (n - RULE.recency) // PAGE}
    counts = {}
    for name, pool in (("all", set(range(n))), ("evictable", free)):
        right = golden & pool
        kept = {i for i in pool if scores[i] > 0.55}
        counts[f"{name}/precision"] = [len(kept & right), len(kept)]
        counts[f"{name}/recall"] = [len(kept & right), len(right)]
        best = sorted(pool, key=lambda i: (-scores[i], -i))
        counts |= {f"{name}/recall@{k}": [len(right & {*best[:k]}), len(right)] for k in KS}
        for budget, count in pages.items():
            inside = {i for i in pool if i // PAGE in naive_pages(scores, 0.55, n, count)}
            inside |= {i for i in pool if i // PAGE == n // PAGE}  # in formation
            total = sum(mass[i] for i in pool)
            counts[f"{name}/recall@{budget}"] = [len(right & inside), len(right)]
            counts[f"{name}/mass@{budget}"] = [sum(mass[i] for i in inside), total]
    return counts


@pytest.mark.parametrize(("horizon", "first", "last"), [("window", 0, 16), ("tau 9-16", 9, 17)])
def test_a_study_equals_an_evaluation_entry_by_entry(
    found, traces: list[Trace], horizon: str, first: int, last: int
) -> None:
    module, trace = indexer(), traces[1]
    total: dict[str, np.ndarray] = {}
    for token in range(0, trace.tokens, 16):
        if horizon != "window" and token + 16 >= trace.tokens:
            continue  # not recorded to its end
        pages = device_room().pages(360 + token + 1, BUDGETS)
        span = (token + first, token + last)
        for name, pair in naive_counts(module, trace, token, pages, span).items():
            total[name] = total.get(name, 0) + np.array(pair, np.float64)
    of_sets = {name: pair for name, pair in total.items() if "@0." in name}
    assert len(of_sets) == 12 and len(total) == 20
    for name, pair in (total if horizon == "window" else of_sets).items():
        got = found.arms["ensemble.max"].tallies[1][f"{horizon}/{name}"]
        np.testing.assert_allclose(got, pair, rtol=1e-5, err_msg=name)


def test_evaluate_traces_measures_the_same(found, traces: list[Trace]) -> None:
    cfg = MetricsConfig(threshold=0.55, ks=KS, resident=RULE)
    done: list[int] = []
    options = {"interval": 16, "window": 16, "progress": done.append}
    tallies = evaluate_traces(indexer(), traces, cfg, scores=("ensemble.max", "layer.2"), **options)
    assert done == [5, 5, 5]
    for i, tally in enumerate(tallies):
        assert {name.split("/")[0] for name in tally} == {"ensemble.max", "layer.2"}
        for name, pair in tally.items():
            arm, rest = name.split("/", 1)
            if "@0p" not in name:
                np.testing.assert_array_equal(pair, found.arms[arm].tallies[i][f"window/{rest}"])


def test_pages_of_a_budget_are_those_that_decoding_would_allow() -> None:
    lookahead, kv = 16, "bfloat16"
    cache = CacheConfig(kv_format=kv, page_entries=PAGE)
    level2 = Level2(MODEL, cache, targets=TARGETS, lookahead=lookahead, path="paged")
    for share in ("0.2", "0.45", "0.999", "30kB"):
        lsa = LsaConfig(targets=TARGETS, budget=parse_budget(share), lookahead=lookahead)
        fresh = level2.fresh_pages * PAGE
        running = Room(cfg=MODEL, cache=cache, lsa=lsa, fresh_entries=fresh)
        for tokens in (40, 361, 1000, 4099):
            got = device_room().pages(tokens, {share: lsa.budget})
            assert got == {share: running.allowed((tokens,), tokens)}


def test_every_arm_gets_the_same_bytes(traces: list[Trace]) -> None:
    """Where every entry is golden, a set's recall is the entries that it holds."""
    cfg, pages = protocol().metrics, {"a": 1, "b": 4, "c": 7, "d": 11, "e": 12}
    rec = Recording.of(traces[0])
    n = int(rec.document.entries_at(20))
    golden = np.ones(n, bool)
    held = {}
    for kind in BASELINES:
        arms = baselines.baseline_scores(kind, rec, 20, window=16, page_entries=PAGE)
        held |= {name: set_sums(arm, golden, None, pages, cfg) for name, arm in arms.items()}
    p = np.random.default_rng(0).random(n)
    for policy in ("budget", "top", "published"):
        arm = of_probabilities(p, policy, threshold=0.5, page_entries=PAGE)
        held[policy] = set_sums(arm, golden, None, pages, cfg)
    assert len(held) == 8
    for name, sums in held.items():
        for budget, count in pages.items():
            forming = n % PAGE
            assert sums[f"all/recall@{budget}"][0] == min(count, n // PAGE) * PAGE + forming, name
            want = max(0, min(count, n // PAGE) - forced_pages(n, RULE)) * PAGE
            assert sums[f"evictable/recall@{budget}"][0] == want, name


def test_device_shares_and_floors_are_of_the_same_bytes(found) -> None:
    room, cfg = device_room(), protocol()
    sizes = room.sizes(361)
    pages = room.pages(361, BUDGETS)
    sums = device_sums(361, 90, pages, room, cfg)
    for budget, count in pages.items():
        used = sizes.fixed + count * sizes.page
        limit = int(Fraction(budget) * sizes.full)
        assert sums[f"share@{budget}"].tolist() == [used, sizes.full]
        assert used <= limit < used + sizes.page
        floor = sizes.fixed + forced_pages(90, RULE) * sizes.page
        assert sums[f"below_floor@{budget}"].tolist() == [floor > limit, 1]
    assert len(found.device) == 3 and found.decisions == 15


def test_the_oracle_finds_everything_that_fits_and_nobody_more_of_it(found) -> None:
    entries = sum(tally["window/all/recall@20"] for tally in found.arms["oracle.recall"].tallies)
    assert entries[0] == entries[1] > 0  # at most 20 are golden
    for tally in found.arms["oracle.recall"].tallies:
        pages = tally["window/evictable/recall@0.80"]
        assert pages[0] == pages[1] > 0
    for metric in ("recall", "mass"):
        best = found.arms[f"oracle.{metric}"].tallies
        for result in found.arms.values():
            for mine, oracle in zip(result.tallies, best, strict=True):
                for name in (f"window/evictable/{metric}@{budget}" for budget in BUDGETS):
                    assert mine[name][1] == pytest.approx(oracle[name][1])
                    assert mine[name][0] <= oracle[name][0] + 1e-6


def test_entries_of_the_future_have_no_influence(traces: list[Trace], tmp_path: Path) -> None:
    """All keys that exist at no decision are replaced by the largest there are."""
    trace = traces[0]
    cfg = MetricsConfig(ks=KS, resident=RULE)
    late = trace.read("formed_at") > 64  # decisions are at 0 and 64
    keys = trace.keys()
    values = keys.values.copy()
    values[late] = 448
    with TraceWriter(
        tmp_path, trace.info, hidden_size=16, hidden_dtype=trace.read("hidden").dtype, mass=True
    ) as writer:
        votes, mass = trace.votes(), trace.mass()
        mass = dataclasses.replace(mass, values=mass.values.astype(np.float32))
        writer.append(trace.read("hidden"), trace.read("positions"), votes, mass)
        scale = np.where(late[:, None], np.float32(9), keys.scale)
        other = open_traces([writer.finish(Keys(values, scale))])
    assert late.sum() == 4
    want, got = (evaluate_traces(indexer(), [t], cfg)[0] for t in (trace, other[0]))
    assert want.keys() == got.keys()
    for name, pair in want.items():
        np.testing.assert_array_equal(got[name], pair)


def test_traces_of_another_backbone_are_refused(tmp_path: Path, traces: list[Trace]) -> None:
    foreign = open_traces([planted_traces(tmp_path / "a", documents=1, tokens=8)])[0]
    with pytest.raises(TraceError, match="must be of the backbone of --config: it is of"):
        device_room().check(foreign)
    with pytest.raises(TraceError, match="page_entries must be 64 as in --config, got 8"):
        device_room(page_entries=64).check(traces[0])
    cfg = MetricsConfig(resident=RULE)
    with pytest.raises(TraceError, match=r"must have the indexer's layers \[1\], got \[0, 2\]"):
        evaluate_traces(indexer(targets=(0, 1)), traces, cfg)
    wide = traces_of_model(tmp_path / "b", documents=1, tokens=8, head_dim=16)
    with pytest.raises(TraceError, match="head_dim must be the indexer's: the trace's is 16"):
        evaluate_traces(indexer(), open_traces([wide]), cfg)
    with pytest.raises(TraceError, match="traces must be given once"):
        open_traces([wide, wide / "doc-0-0"])


def test_an_indexer_of_one_layer_reads_its_own_and_traces_may_lack_mass(tmp_path: Path) -> None:
    root = traces_of_model(tmp_path, documents=2, tokens=40, prompt_entries=90, mass=False)
    module = indexer(targets=(2,))
    found = study(module, open_traces([root]), device_room(targets=(2,)), protocol(taus=(8,)))
    assert "oracle.mass" not in found.arms
    tallies = found.arms["layer.2"].tallies
    assert not any("mass@" in name for tally in tallies for name in tally)
    both = indexer()
    both = MemoryIndexer(both.cfg, both.leaves() | module.leaves())
    want = evaluate_traces(both, open_traces([root]), MetricsConfig(resident=RULE), interval=16)
    got = evaluate_traces(module, open_traces([root]), MetricsConfig(resident=RULE), interval=16)
    for a, b in zip(got, want, strict=True):
        for name in (n for n in a if n.startswith("layer.2")):
            np.testing.assert_array_equal(a[name], b[name])


def test_a_score_that_is_not_a_number_is_refused(traces: list[Trace]) -> None:
    module = indexer()
    leaves = {name: leaf * jnp.nan for name, leaf in module.leaves().items()}
    with pytest.raises(ConfigError, match="without NaN"):
        evaluate_traces(MemoryIndexer(module.cfg, leaves), traces, MetricsConfig())
