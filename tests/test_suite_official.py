"""Official files: rows as their projects write them, made up, and the rules of their scores."""

import json

import pytest

from evals.suite import official
from evals.suite.official import read_grid
from lsa_jax.config import ConfigError
from lsa_jax.text.byte_level import byte_level_tokenizer_json
from lsa_jax.text.tokenizer import TOKENIZER_FILE, Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    (directory / TOKENIZER_FILE).write_text(byte_level_tokenizer_json(320))
    return Tokenizer.from_dir(directory)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = content if path.suffix == ".jsonl" else [content]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


RULER = {
    "index": 7,
    "input": "Two numbers: 12 and 34. Which?",
    "outputs": ["12", "34"],
    "length": 9,
}


@pytest.mark.parametrize(
    ("name", "said", "worth"),
    [
        ("niah_multivalue.jsonl", "They are 12, 34.", 1.0),
        ("niah_multivalue.jsonl", "It is 34.", 0.5),
        ("vt.jsonl", "none", 0.0),
        ("qa_1/validation.jsonl", "It is 34.", 1.0),
        ("qa_1/validation.jsonl", "none", 0.0),
    ],
)
def test_ruler_counts_the_strings_that_are_contained(tmp_path, name, said, worth):
    (item,) = official.items("ruler", write(tmp_path / name, [RULER]))
    assert item.task == f"ruler/{name.split('/')[0].removesuffix('.jsonl')}" and item.name == "7"
    assert item.score(said) == worth


def test_longbench_wants_the_letter_in_the_sentence(tmp_path):
    row = {"_id": "a1", "length": "short", "question": "Who?", "answer": "C", "context": "Text."}
    row |= {f"choice_{letter}": f"option {letter}" for letter in "ABCD"}
    (item,) = official.items("longbench", write(tmp_path / "data.json", [row]))
    said = (
        "The correct answer is (C).",
        "**The correct answer is C**",
        "The correct answer is (A)",
    )
    assert [item.score(text) for text in (*said, "C")] == [1.0, 1.0, 0.0, 0.0]
    assert "(D) option D" in item.messages[0]["content"]


def test_longmemeval_is_scored_by_a_stand_in_that_says_so(tmp_path):
    turns = [{"role": "user", "content": "My cat is Tom."}, {"role": "assistant", "content": "Hi!"}]
    row = {"question_id": "q1", "question_type": "single-session", "question": "Cat?"}
    row |= {"answer": "Tom", "question_date": "Monday", "haystack_dates": ["Sunday"]}
    row |= {"haystack_sessions": [turns]}
    path = write(tmp_path / "lme.json", [row, {**row, "question_id": "q2_abs"}])
    known, abstained = official.items("longmemeval", path)
    assert known.task == "longmemeval/single-session (stand-in)"
    assert (known.score("It is: TOM!"), known.score("I do not know.")) == (1.0, 0.0)
    assert (abstained.score("It is: TOM!"), abstained.score("I do not know.")) == (0.0, 1.0)


def test_mrcr_wants_its_prefix_and_counts_likeness(tmp_path):
    row = {"prompt": json.dumps([{"role": "user", "content": "Again!"}]), "n_needles": 2}
    row |= {"answer": "xyzA poem.", "random_string_to_prepend": "xyz"}
    (item,) = official.items("mrcr", write(tmp_path / "rows.jsonl", [row]))
    assert (item.score("xyzA poem."), item.score("A poem.")) == (1.0, 0.0)
    assert 0.5 < item.score("xyzA poet.") < 1


def test_a_case_asks_the_end_of_the_prompt_and_decodes_what_was_said(tmp_path, tokenizer):
    long = {**RULER, "input": "words " * 400 + RULER["input"]}
    path = write(tmp_path / "niah_single_1.jsonl", [RULER, long])
    grid = read_grid({"ruler": [path]}, tokenizer, None)
    first, second = grid.cases()
    assert [case.cell.length for case in (first, second)] == [1024, 4096] == list(grid.lengths)
    for case in (first, second):
        (asked,) = case.questions
        text = tokenizer.decode([*case.haystack, *asked.prompt.tolist()])
        assert "Two numbers: 12 and 34. Which?" in text
        assert case.most_tokens <= case.cell.length + 8 and case.new_tokens == (128,)
        assert case.scores[0](tokenizer.encode("12 34")) == 1.0
    assert read_grid({"ruler": [path]}, tokenizer, 1000).left_out == 1
    assert [grid.tasks_at(length) for length in grid.lengths] == [("ruler/niah_single_1",)] * 2
    assert grid.tasks_at(2048) == ()
    with pytest.raises(ConfigError, match="items that fit, got 2"):
        read_grid({"ruler": [path]}, tokenizer, 10)


@pytest.mark.parametrize(
    ("reader", "name", "content", "said"),
    [
        ("ruler", "other.jsonl", [RULER], "must have the name of a RULER task"),
        ("ruler", "vt.jsonl", [{"input": "x"}], "benchmark's fields: KeyError"),
        ("mrcr", "rows.jsonl", [7], "benchmark's fields: TypeError"),
    ],
)
def test_files_of_something_else_are_refused_by_name(tmp_path, reader, name, content, said):
    path = write(tmp_path / name, content)
    with pytest.raises(ConfigError, match=said):
        official.items(reader, path)


def test_what_is_no_json_is_refused(tmp_path):
    (tmp_path / "data.json").write_text("[{")
    with pytest.raises(ConfigError, match=r"data\.json must be JSON"):
        official.items("longbench", tmp_path / "data.json")
