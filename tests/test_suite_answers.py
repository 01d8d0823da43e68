"""The suite with a small random model: every arm is what a session that has the row alone is."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from evals import run as command
from evals.suite.answers import with_ensemble
from evals.suite.cases import capacity_for
from evals.suite.prefix import widen
from evals.suite.records import Log
from infer import demo, generate
from lsa_jax.config import ConfigError
from lsa_jax.lsa import report
from lsa_jax.sampling import Greedy
from tests import suite_models
from tests.suite_models import BASE, CHUNK, LENGTH, LOOKAHEAD, TARGETS, machine, tokens_of, variant

pytestmark = pytest.mark.usefixtures("compiled_quickly")

CAPACITY = capacity_for(LENGTH)
BUDGETED = ("lsa", "recency", "random", "lagged", "snapkv", "quest", "oracle")


@functools.cache
def case():
    return suite_models.case()


@functools.cache
def asked():
    return suite_models.asked(case())


def answers(of, new=20):
    replies = machine().answers.run(
        asked(), of, new_tokens=[new] * len(case().questions), capacity=CAPACITY
    )
    assert all(len(reply.tokens) <= new for reply in replies)
    return replies


# Equalities


@pytest.mark.slow
def test_a_full_budget_gives_the_answers_of_full_attention():
    want = tokens_of(answers(variant("full", None)))
    assert len({tuple(ids) for ids in want}) == len(want)  # or equality would say little
    for arm in ("lsa", "recency"):
        assert tokens_of(answers(variant(arm, "1.0"))) == want
    assert tokens_of(answers(variant("recency", "0.45"))) != want


@pytest.mark.slow
def test_haystacks_that_are_answered_together_are_answered_as_each_alone(tmp_path):
    """The last batch has idle rows, and questions of a haystack may be fewer."""
    cases = [suite_models.case(haystack=n) for n in (0, 1, 2)]
    cases[1] = dataclasses.replace(
        cases[1],
        questions=cases[1].questions[:2],
        new_tokens=cases[1].new_tokens[:2],
        scores=cases[1].scores[:2],
    )
    variants = [variant("full", None), variant("lsa"), variant("random")]
    records = []
    for together in (1, 2):
        log = Log(tmp_path / str(together), {})
        for at in range(0, len(cases), together):
            machine().answer(cases[at : at + together], variants, log, together)
        order = [(str(r["variant"]), r["haystack"], r["question"]) for r in log.records]
        records.append([log.records[i] for i in sorted(range(len(order)), key=order.__getitem__)])
    assert len(records[0]) == 3 * 10 and records[0] == records[1]


def alone(of, b, new, *, exact=False, at_once=False):
    """Question b in a session of its own: its tokens, its boundaries, and the session.

    Sessions share programs where they have room for the same tokens; an `exact` one has no more
    than it needs, as a row of the suite: what full rows may have bounds a budget's pages too. One
    that reads haystack and question `at_once` has no boundary between them.
    """
    ids, prompt = list(case().haystack), case().questions[b].prompt.tolist()
    limit = len(ids) + len(prompt) + new
    own = suite_models.session(of, limit if exact else CAPACITY)
    if at_once:
        _, logits = own.admit(ids + prompt, max_new_tokens=new)
    else:
        row, _ = own.admit(ids, max_new_tokens=len(prompt) + new)
        logits = own.extend(row, prompt, max_new_tokens=new)
    token = jnp.argmax(jnp.asarray(logits))[None].astype(jnp.int32)
    said, start = [int(token[0])], len(ids) + len(prompt)
    while len(said) < new and said[-1] != 1:
        burst = own.decode(
            token, steps=new - len(said), sampler=Greedy(), key=jax.random.key(0), stop=(1,)
        )
        said += np.asarray(burst.tokens)[0, : int(burst.count[0])].tolist()
        token = burst.last_token(token)
    events = [event for event in own.batch.events if event.tokens >= start]
    return said, events, own


@pytest.mark.slow
@pytest.mark.parametrize("arm", BUDGETED)
def test_rows_of_a_batch_are_what_sessions_of_one_row_are(arm):
    of = variant(arm)
    for b in (0, 2):
        reply = answers(of)[b]
        said, events, _ = alone(of, b, 20)
        assert reply.tokens == said
        assert len(reply.cycles) == 3  # of 8 steps, for 19
        assert [c.pages for c in reply.cycles] == [e.pages for e in events[:3]]
        assert [c.wanted for c in reply.cycles] == [e.wanted for e in events[:3]]


@pytest.mark.slow
def test_a_fallback_grows_as_a_session_s():
    of = dataclasses.replace(variant("recency", "0.45"), fallback=0.4)
    for b, reply in enumerate(answers(of)[:3]):
        said, events, _ = alone(of, b, 20, at_once=True)  # a row may grow between the two
        assert reply.tokens == said
        assert [c.pages for c in reply.cycles] == [e.pages for e in events[: len(reply.cycles)]]
        assert [c.above for c in reply.cycles] == [e.above for e in events[: len(reply.cycles)]]
    grown = [reply.growth for reply in answers(of)]
    assert max(grown) > 0 and answers(variant("recency", "0.45"))[0].growth == 0


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["recency", "lagged"])
def test_a_patient_fallback_ends_a_row_s_cycle_alone_as_a_session_s(arm):
    """Rows whose cycles ended at different steps do not know of each other."""
    of = dataclasses.replace(variant(arm, "0.45"), fallback=0.2, patience=2)
    replies = answers(of)[:3]
    for b, reply in enumerate(replies):
        said, events, _ = alone(of, b, 20)
        assert reply.tokens == said
        assert [c.pages for c in reply.cycles] == [e.pages for e in events[: len(reply.cycles)]]
        assert [c.above for c in reply.cycles] == [e.above for e in events[: len(reply.cycles)]]
    ends = [[cycle.end for cycle in reply.cycles] for reply in replies]
    assert max(reply.growth for reply in replies) > 0
    assert len({tuple(np.diff(end)) for end in ends}) > 1, "no row's cycles differ from another's"


@pytest.mark.slow
def test_pages_of_another_size_share_the_prefill():
    of = dataclasses.replace(variant("recency"), page_entries=4)
    said, events, own = alone(of, 1, 20, exact=True)
    reply = answers(of)[1]
    assert reply.tokens == said and own.batch.cache.page_entries == 4
    assert [c.pages for c in reply.cycles] == [e.pages for e in events[: len(reply.cycles)]]


@pytest.mark.slow
def test_idle_rows_change_nothing():
    of, new = variant("lsa"), [20] * len(case().questions)
    wide = widen(asked(), len(new) + 3)
    replies = machine().answers.run(wide, of, new_tokens=[*new, 1, 1, 1], capacity=CAPACITY)
    assert tokens_of(replies)[: len(new)] == tokens_of(answers(of))


@pytest.mark.slow
def test_without_csa_no_csa_entry_is_read():
    of = variant("no_csa", None)
    state = asked().state
    spoilt = [
        dataclasses.replace(layer, entries=jax.tree.map(lambda x: -x, layer.entries))
        if kind == "csa"
        else layer
        for layer, kind in zip(state.layers, BASE.cfg.layer_types, strict=True)
    ]
    other = asked()._replace(state=dataclasses.replace(state, layers=tuple(spoilt)))
    new = [20] * len(case().questions)

    def both(which):
        ask = functools.partial(machine().answers.run, new_tokens=new, capacity=CAPACITY)
        return tokens_of(ask(asked(), which)), tokens_of(ask(other, which))

    same, changed = both(of), both(variant("full", None))
    assert same[0] == same[1] and changed[0] != changed[1] and same[0] != changed[0]


# Bytes


@pytest.mark.slow
@pytest.mark.parametrize("budget", ["0.45", "0.9"])
def test_bytes_are_those_that_a_session_reports_and_keep_the_budget(budget):
    of = dataclasses.replace(variant("recency", budget), lookahead=64)  # one cycle
    new = list(case().new_tokens)
    replies = machine().answers.run(asked(), of, new_tokens=new, capacity=CAPACITY)
    records = machine().measure.records(case(), of, replies)
    for b in (0, 1):
        _, events, own = alone(of, b, new[b])
        if len(events) > 1:  # the session fires once more where its last step ends a cycle
            continue
        found, record = report.figures(own), records[b]
        assert record["device"] == found.occupied.kv and record["full"] == found.full_occupied
        assert record["host"] == found.occupied.host and record["kept"] == found.kept
        # A pool has room for what a full row may have; on this path a session counts what was
        # allowed, which leaves out the pages that form in a cycle.
        forming = own.batch.plan.fresh_pages * own.batch.plan.layout.nbytes
        assert record["device"] <= record["device_reserved"] <= found.reserved.kv + forming
    for record in records:
        assert not record["exceeded"] and record["slack"] <= 1
        assert record["device"] <= float(budget) * record["full"]


@pytest.mark.slow
def test_another_ensemble_needs_its_weights():
    assert with_ensemble(suite_models.indexer(), "mean").cfg.ensemble == "mean"
    with pytest.raises(ConfigError, match="ensemble learned needs"):
        with_ensemble(suite_models.indexer(), "learned")


# Commands


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return suite_models.write_checkpoint(tmp_path_factory.mktemp("weights"))


def arguments(weights, out, *more):
    ckpt, indexer = weights
    fixed = ["--ckpt", ckpt, "--indexer", indexer, "--out", out, "--lengths", str(LENGTH)]
    fixed += ["--tasks", "niah_multikey_1", "--seeds", "1", "--questions", "3"]
    fixed += ["--per-haystack", "4", "--page-entries", "2", "--recency", "2"]
    fixed += ["--prefill-chunk", str(CHUNK), "--target-layers", ",".join(map(str, TARGETS))]
    return [*map(str, fixed), *more]


def test_a_budget_below_the_floor_exits_with_2_and_names_it(weights, tmp_path, capsys):
    options = ["--arms", "full,recency", "--kv-budget", "0.5,0.01"]
    assert command.main(arguments(weights, tmp_path / "out", *options)) == 2
    err = capsys.readouterr().err
    assert (
        err.startswith("error: kv_budget must be at least the floor of ") and err.count("\n") == 1
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--arms", "full,none"], "must be among full"),
        (["--kv-budget", "1"], "1.0 for everything"),
        (["--arms", "full,full"], "distinct"),
        (["--seeds", "0"], ">= 1"),
    ],
)
def test_bad_options_are_refused_in_a_line(weights, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit) as stop:
        command.main(arguments(weights, tmp_path / "out", *options))
    err = capsys.readouterr().err
    assert stop.value.code == 2 and said in err and err.count("\n") == 1


def test_lsa_needs_an_indexer(weights, tmp_path, capsys):
    options = ["--ckpt", str(weights[0]), "--out", str(tmp_path / "out"), "--lengths", "640"]
    assert command.main([*options, "--arms", "lsa"]) == 2
    assert capsys.readouterr().err == "error: --arms lsa needs --indexer FILE, got none\n"


@pytest.mark.slow
def test_the_command_answers_once_and_writes_the_same_tables_again(weights, tmp_path, capsys):
    out, doc = tmp_path / "out", tmp_path / "results.md"
    doc.write_text("<!-- evals.run: begin -->\n<!-- evals.run: end -->\n")
    options = ["--arms", "full,lsa,recency", "--kv-budget", "0.5,1.0", "--threshold", "0.000001"]
    options += ["--lookahead", str(LOOKAHEAD), "--plot", "--write-into", str(doc)]
    assert command.main(arguments(weights, out, *options)) == 0
    assert "loading" in capsys.readouterr().err
    names = ("results.json", "results.md", f"accuracy_by_bytes_{LENGTH}.png")
    before = [(out / name).read_bytes() for name in names[:2]]
    assert (out / names[2]).read_bytes().startswith(b"\x89PNG")
    found = json.loads(before[0])
    scores = {str(line["variant"]): line["accuracy"][0] for line in found["lines"]}
    assert len(scores) == 5 and "### niah_multikey_1" in doc.read_text()
    for line in found["lines"]:
        if line["variant"].get("budget") == "1.0":
            assert line["minus_full"] == [0.0, None, None] and line["device"] <= 1
        if line["variant"].get("budget") == "0.5":
            assert line["device"] <= 0.5 and line["exceeded"] == 0
    assert command.main(arguments(weights, out, *options)) == 0
    assert "loading" not in capsys.readouterr().err
    assert [(out / name).read_bytes() for name in names[:2]] == before


@pytest.mark.slow
def test_cells_take_what_other_commands_have_answered(weights, tmp_path, capsys):
    out, file = tmp_path / "out", tmp_path / "cells.toml"
    for options in (["--arms", "full,recency"], ["--arms", "lsa", "--lookahead", str(LOOKAHEAD)]):
        assert command.main(arguments(weights, out, *options, "--kv-budget", "0.5")) == 0
    capsys.readouterr()
    cells = ["arms = ['full', 'recency']", f"arms = 'lsa'\nlookahead = {LOOKAHEAD}"]
    file.write_text("".join(f"[[cells]]\nkv_budget = '0.5'\n{cell}\n" for cell in cells))
    options = ["--arms", "quest", "--cells", str(file), "--plot"]
    assert command.main(arguments(weights, out, *options)) == 0
    assert "loading" not in capsys.readouterr().err
    lines = json.loads((out / "results.json").read_bytes())["lines"]
    assert [line["variant"]["arm"] for line in lines] == ["full", "recency", "lsa"]
    file.write_text(file.read_text() + "[[cells]]\nkv_budget = '0.6'\narms = 'recency'\n")
    assert command.main(arguments(weights, out, *options, "--part", "1/2")) == 0
    assert capsys.readouterr().err.count("loading") == 1
    assert command.main(arguments(weights, out, *options)) == 0
    assert "loading" not in capsys.readouterr().err  # there is one haystack, the first part's
    assert len(json.loads((out / "results.json").read_bytes())["lines"]) == 4


@pytest.mark.slow
def test_the_demo_shows_both_and_writes_what_it_says(weights, tmp_path, capsys):
    ckpt, indexer = map(str, weights)
    file, plot = tmp_path / "demo.json", tmp_path / "demo.png"
    options = ["--demo", "--ckpt", ckpt, "--indexer", indexer, "--context", "1024"]
    options += ["--json", str(file), "--plot", str(plot), "--kv-budget", "0.5"]
    assert generate.main(options) == 0
    out = capsys.readouterr().out
    content = json.loads(file.read_text())
    assert set(content) == {"full", "lsa", "context", "seconds"} and content["context"] == 1024
    assert content["full"]["total"] == content["lsa"]["total"] == demo.QUESTIONS
    assert content["lsa"]["kv_device_bytes"] <= 0.5 * content["full"]["kv_device_bytes"]
    assert f"{content['full']['correct']} of 8 correct" in out
    assert out.count("|\n") == demo.QUESTIONS and plot.read_bytes().startswith(b"\x89PNG")


def test_the_map_shows_the_most_telling_page_of_each_place():
    grid = np.zeros((2, 128), np.uint8)
    grid[0, 3], grid[0, 8], grid[1, 9] = demo.RESIDENT, demo.FOUND, demo.LOST
    first, second = demo.as_text(grid)
    assert len(first) == len(second) == demo.COLUMNS
    assert first[:6] == ".#..O." and second[:6] == "....!."
