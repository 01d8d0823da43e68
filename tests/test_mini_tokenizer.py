"""The mini tokenizer: any text comes back, names fall into syllables, the file is what we build."""

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from evals.mini import words
from evals.mini.build_tokenizer import main, tokenizer_json
from evals.mini.vocabulary import SIZE, SYLLABLES, VocabularyError, vocabulary
from evals.tasks.strings import index_tokens, name_tokens
from lsa_jax.text.special import SPECIAL_IDS, USER
from lsa_jax.text.tokenizer import Tokenizer

DIRECTORY = Path(__file__).parents[1] / "evals" / "mini"
TOKENIZER = Tokenizer.from_dir(DIRECTORY, model_vocab_size=SIZE)
TABLE = vocabulary()


def random_texts(count: int) -> list[str]:
    """Texts of characters from all of Unicode, of our own words, and of both."""
    rng = np.random.default_rng(0)
    known = [text for text in TABLE.texts if text is not None]
    out = []
    for i in range(count):
        points = rng.integers(0, 0x110000 if i % 2 else 0x180, 40)
        strange = [chr(p) for p in points if not 0xD800 <= p < 0xE000]
        pieces = [*strange, *rng.choice(np.array(known, object), 40)]
        out.append("".join(rng.permutation(np.array(pieces, object))))
    return out


HARD = [
    *("", " ", "  a  b ", "\n\n The\r\n\tkalo", "don't 's kalo's", "ThekaloVAR"),
    *(
        "123 45678 \u0663\u0664\u0665 \u00bd",
        "\u65e5\u672c \U0001d518e\u0301",
        "\x00\x7f\ufffd\u200d",
    ),
    *(USER + "What<think> <|User|> <placeholder 2000>", "e\u0301" * 3),
]


@pytest.mark.parametrize("texts", [HARD, random_texts(300)], ids=["hard", "random"])
def test_any_text_comes_back_from_our_reader_and_from_the_library(texts):
    library = tokenizers.Tokenizer.from_file(str(DIRECTORY / "tokenizer.json"))
    for text in texts:
        ids = TOKENIZER.encode(text)
        assert TOKENIZER.decode(ids) == text
        assert library.encode(text, add_special_tokens=False).ids == ids
        assert library.decode(ids, skip_special_tokens=False) == text
        assert max(ids, default=0) < SIZE


def test_the_file_beside_the_code_is_what_the_builder_writes(tmp_path, capsys):
    assert main(["--out", str(tmp_path / "made.json")]) == 0
    assert str(tmp_path / "made.json") in capsys.readouterr().out
    want = (DIRECTORY / "tokenizer.json").read_text("utf-8")
    assert (tmp_path / "made.json").read_text("utf-8") == want == tokenizer_json()
    assert main(["--out", str(tmp_path / "no" / "made.json")]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_every_text_of_the_vocabulary_is_one_token_and_has_its_id():
    for id_, text in enumerate(TABLE.texts):
        if text is not None:
            assert TOKENIZER.encode(text) == [id_], text
    assert [TABLE.id_of[token] for token in SPECIAL_IDS] == list(range(len(SPECIAL_IDS)))
    reserved = sum(text is None for text in TABLE.texts[400:])
    assert reserved >= 32  # room for words to come


def test_names_of_two_and_four_syllables_and_numbers_are_the_tokens_they_are_made_of():
    rng = np.random.default_rng(1)
    for code in rng.integers(0, SYLLABLES**2, 3000):
        if int(code) in TABLE.word_names:
            assert len(TOKENIZER.encode(TOKENIZER.decode(name_tokens(int(code))))) == 1
            continue
        start, end = name_tokens(int(code)), name_tokens(int(rng.integers(0, SYLLABLES**2)))
        assert TOKENIZER.encode(TOKENIZER.decode(start)) == start
        long = [*start, end[0] - TABLE.initial + TABLE.final, end[1]]
        assert TOKENIZER.encode(TOKENIZER.decode(long)) == long
    for number in (0, 7, 99, 100, 4821):
        ids = index_tokens(number)
        assert (
            int(TOKENIZER.decode(ids)) == number and TOKENIZER.encode(TOKENIZER.decode(ids)) == ids
        )
    assert len(TABLE.word_names) < SYLLABLES  # hardly any pair is lost


def test_our_encoder_of_listed_words_agrees_with_the_tokenizer():
    text = " The code for the door is 4821 : (A) VAR [ red ] = 07. What's this? No... - here"
    assert TABLE.encode(text) == TOKENIZER.encode(text)
    with pytest.raises(VocabularyError, match=r"' kalo' in ' The kalo' must be a word of the voca"):
        TABLE.encode(" The kalo")


def test_word_lists_hold_no_word_twice_and_no_syllable_is_a_word():
    for listed in (words.NOUNS, words.VERBS, words.ADJECTIVES, words.ADVERBS, words.TEMPLATE):
        assert len(set(listed)) == len(listed)
    assert len(TABLE.syllables) == len(set(TABLE.syllables)) == SYLLABLES
    starts = {" " + syllable for syllable in TABLE.syllables}
    assert not starts & {" " + word for word in (*words.FUNCTION, *words.NOUNS, *words.TEMPLATE)}
