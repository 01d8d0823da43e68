"""Task examples: answers lie where they are said to, tests keep their strings and wordings."""

import collections
import random

import numpy as np
import pytest

from evals.mini.vocabulary import SYLLABLES, vocabulary
from evals.tasks import families, phrases
from evals.tasks.config import TaskConfig
from evals.tasks.examples import example
from evals.tasks.filler import word_ids
from evals.tasks.plan import TooShort
from evals.tasks.question import ANSWER, FIRST, Example, Split, score
from evals.tasks.strings import is_test_name, is_test_number, name_class
from lsa_jax.config import ConfigError
from lsa_jax.text.messages import encode_messages
from lsa_jax.text.special import ASSISTANT, THINK
from tests.test_mini_tokenizer import TOKENIZER

TABLE = vocabulary()
ALL = [name for name in families.FAMILIES if name != "plain"]
COUNTING = ("cwe", "fwe")
FOUND = [name for name in ALL if name not in (*COUNTING, "context_free", "chat_abstain")]
HEAD, TAIL = TaskConfig().head, TaskConfig().tail


def draw(family: str, seed: int = 0, split: Split = "test", tokens: int = 768) -> Example:
    return example(family, np.random.default_rng(seed), tokens, 8, split)


def names_in(ids) -> set[int]:
    """Codes of the pairs of syllables in a string of ids, of each half of a long name too."""
    codes, start = set(), None
    for id_ in map(int, ids):
        first, second = id_ - TABLE.initial, id_ - TABLE.final
        if start is not None and 0 <= second < SYLLABLES:
            codes.add(start * SYLLABLES + second)
            start = None
        else:
            start = first if 0 <= first < SYLLABLES else second
            start = start if 0 <= start < SYLLABLES else None
    return codes


def numbers_in(ids) -> list[list[int]]:
    """Values of the two-digit groups of each number of at least two."""
    out: list[list[int]] = []
    for id_ in map(int, ids):
        if 0 <= id_ - TABLE.spaced_group < 100:
            out.append([id_ - TABLE.spaced_group])
        elif 0 <= id_ - TABLE.group < 100 and out:
            out[-1].append(id_ - TABLE.group)
    return [groups for groups in out if len(groups) > 1]


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("family", families.FAMILIES)
def test_haystack_and_questions_fit_and_are_the_tokens_of_their_own_text(family, split):
    made = draw(family, split=split)
    ids = made.haystack.tolist()
    assert ids[0] == phrases.BOS_ID and TOKENIZER.encode(TOKENIZER.decode(ids)) == ids
    for question in made.questions:
        whole = [*question.prompt.tolist(), *question.answer.tolist()]
        assert len(ids) + len(whole) <= 768
        assert TOKENIZER.encode(TOKENIZER.decode(whole)) == whole
    longest = max((len(q.prompt) + len(q.answer) for q in made.questions), default=0)
    assert len(ids) + longest == 768
    assert len(made.questions) == 0 if family == "plain" else len(made.questions) >= 1


@pytest.mark.parametrize("family", ALL)
def test_answers_end_with_eos_say_what_must_be_found_and_score_one(family):
    for question in draw(family).questions:
        assert question.family == family
        answer = question.answer.tolist()
        assert answer.count(phrases.EOS_ID) == 1 and answer[-1] == phrases.EOS_ID
        assert len(question.kinds) == len(answer)
        assert set(question.kinds.tolist()) <= {ANSWER, FIRST} and FIRST in question.kinds
        assert score(question, [*answer, 5, 6]) == 1.0
        wrong = [
            TABLE.id_of[" car"] if k == FIRST else a
            for k, a in zip(question.kinds, answer, strict=True)
        ]
        assert score(question, wrong) < 1.0
        assert score(question, []) == 0.0


@pytest.mark.parametrize("family", FOUND)
def test_evidence_holds_the_answer_and_keeps_away_from_both_ends(family):
    for seed in range(5):
        made = draw(family, seed)
        for question in made.questions:
            assert question.evidence
            told = [made.haystack[a:b].tolist() for a, b in question.evidence]
            for (start, end), ids in zip(question.evidence, told, strict=True):
                assert start < end and start >= HEAD
                assert end <= len(made.haystack) - TAIL
                assert TOKENIZER.decode(ids).rstrip()[-1] in ".])"
            letter = family == "multiple_choice"
            wanted = [question.answer[2:4]] if letter else question.accepted
            text = " ".join(map(TOKENIZER.decode, told))
            for ids in wanted:
                if family == "niah_multiquery":
                    ids = ids[2:]  # the key is in every string that is accepted
                assert TOKENIZER.decode([int(i) for i in ids]) in text


@pytest.mark.parametrize("family", ["context_free", "chat_abstain", *COUNTING])
def test_no_single_place_is_evidence_where_all_or_nothing_of_the_text_is(family):
    assert all(question.evidence == () for question in draw(family).questions)


@pytest.mark.parametrize("family", [f for f in ALL if f not in ("cwe", "context_free", "recite")])
def test_strings_of_tests_never_occur_in_training(family):
    seen = collections.Counter()
    for split in ("train", "test"):
        for seed in range(3):
            for question in draw(family, seed, split).questions:
                strings = (*question.prompt, *question.answer)
                for code in names_in(strings):
                    assert is_test_name(code) == (split == "test")
                    seen[split] += 1
                if family not in ("qa_1",):
                    for groups in numbers_in(strings):
                        assert is_test_number(groups) == (split == "test")
                        seen[split] += 1
    assert min(seen["train"], seen["test"]) >= 3


@pytest.mark.parametrize("family", [f for f in ALL if f not in COUNTING])
def test_training_haystacks_hold_no_name_of_the_tests_and_no_constant(family):
    names = names_in(draw(family, split="train").haystack)
    assert not any(is_test_name(code) for code in names)
    assert not any(name_class(code) == 3 for code in names)


def test_common_words_of_tests_are_never_counted_in_training():
    words = {
        split: {id_ for seed in range(5) for id_ in draw("cwe", seed, split).haystack[1:]}
        for split in ("train", "test")
    }
    assert not words["train"] & words["test"] and min(map(len, words.values())) > 100


@pytest.mark.parametrize("family", ALL)
def test_a_wording_is_held_out_from_training_and_tests_use_it(family):
    held = {
        split: [q.held_out for seed in range(12) for q in draw(family, seed, split).questions]
        for split in ("train", "test")
    }
    assert not any(held["train"])
    assert any(held["test"]) and not all(held["test"])


@pytest.mark.parametrize("count", [2, 12])
def test_a_fifth_of_a_tests_wordings_is_held_out_however_many_there_are(count):
    rnd, texts = random.Random(0), tuple(f" note{'.' * i}" for i in range(count))
    picked = [phrases.pick(rnd, texts, test=True) for _ in range(4000)]
    held = sum(phrase.held_out for phrase in picked) / len(picked)
    assert abs(held - 0.2) < 4 * (0.16 / len(picked)) ** 0.5
    assert len({phrase.name for phrase in picked}) == count
    trained = [phrases.pick(rnd, texts, test=False) for _ in range(400)]
    assert {phrase.name for phrase in trained} == {str(i) for i in range(count - 1)}


def test_words_of_held_out_wordings_occur_in_training():
    every = [v for v in vars(phrases).values() if isinstance(v, tuple) and len(v) > 1]
    every += phrases.ASK_PERSON.values()
    texts_only = [texts for texts in every if all(isinstance(t, str) for t in texts)]
    lists = (phrases.ORDINALS, phrases.CHAT_ITEMS)
    wordings = [texts for texts in texts_only if texts not in lists]
    assert len(wordings) >= 25
    trained = set(word_ids())
    for texts in wordings:
        for text in texts[:-1]:
            for part in phrases.compile_phrase("", text, False).parts:
                trained |= set(part) if isinstance(part, list) else set()
    for texts in wordings:
        for part in phrases.compile_phrase("", texts[-1], True).parts:
            if isinstance(part, list):
                assert set(part) <= trained, texts[-1]


def test_facts_start_uniformly_within_entries_and_pages():
    starts = np.array(
        [
            start
            for family in ("recall", "niah_multikey_1", "niah_multikey_2", "vt")
            for seed in range(60)
            for question in draw(family, seed).questions
            for start, _ in question.evidence
        ]
    )
    assert len(starts) > 1500
    for modulus, bins in ((4, 4), (128, 16)):
        counts = np.bincount(starts % modulus // (modulus // bins), minlength=bins)
        expected = len(starts) / bins
        # Chi square; 5 standard deviations of its distribution above its mean.
        assert np.sum((counts - expected) ** 2 / expected) < bins - 1 + 5 * (2 * (bins - 1)) ** 0.5


def test_an_example_follows_from_the_generator():
    same, again, other = (draw("vt", seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(same.haystack, again.haystack)
    assert [q.accepted for q in same.questions] == [q.accepted for q in again.questions]
    assert not np.array_equal(same.haystack, other.haystack)


@pytest.mark.parametrize("family", [name for name in ALL if name != "recall"])
def test_a_prompt_is_what_a_conversation_of_the_same_text_is_rendered_to(family):
    made = draw(family)
    system = TOKENIZER.decode(made.haystack[1:].tolist())
    for question in made.questions:
        user, mark = TOKENIZER.decode(question.prompt[1:].tolist()).split(ASSISTANT)
        chat = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        text = encode_messages(chat, thinking=mark == THINK)
        ids = [*made.haystack.tolist(), *question.prompt.tolist()]
        assert TOKENIZER.encode(text) == ids


def test_scores_count_what_each_rule_wants():
    several = next(q for q in draw("niah_multivalue").questions if len(q.accepted) == 2)
    first, second = several.accepted
    assert score(several, [*second, *first]) == 1.0
    assert score(several, [7, *first, 7]) == 0.5
    assert score(several, [*first, phrases.EOS_ID, *second]) == 0.5
    choice = draw("multiple_choice").questions[0]
    answer = choice.answer.tolist()
    after = answer.index(phrases.END_THINK_ID) + 1
    assert score(choice, answer[after:]) == 0.0  # without its thought
    assert score(choice, [phrases.END_THINK_ID, *answer[after:]]) == 1.0
    assert score(choice, [*answer[:-1], 7]) == 0.0


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ConfigError, match=r"family must be one of recall, .*got 'niah'"):
        draw("niah")
    with pytest.raises(TooShort, match=r"tokens must be at least \d+ more"):
        draw("vt", tokens=200)


def test_reworded_phrasings_keep_their_slots_and_length_and_change_words_only():
    words = word_ids()
    for phrase in (phrases.compile_phrase("0", text, False) for text in phrases.FACT):
        changed = total = 0
        for seed in range(50):
            other = phrases.reworded(random.Random(seed), phrase, words)
            for was, now in zip(phrase.parts, other.parts, strict=True):
                if isinstance(was, str):
                    assert now == was
                    continue
                assert len(now) == len(was)
                assert all(
                    b == a or (a in words and b in words) for a, b in zip(was, now, strict=True)
                )
                changed += sum(a != b for a, b in zip(was, now, strict=True))
                total += sum(a in words for a in was)
        assert 0.3 < changed / total < 0.5


@pytest.mark.parametrize("family", ["niah_multikey_1", "vt", "qa_1", "chat_order", "qa_2"])
def test_only_training_is_reworded_and_never_what_says_which_fact_is_asked(family):
    cfg = TaskConfig(reword=1.0)

    def prompts(split: Split, cfg: TaskConfig) -> list[list[int]]:
        made = example(family, np.random.default_rng(0), 768, 8, split, cfg)
        return [question.prompt.tolist() for question in made.questions]

    assert prompts("test", cfg) == prompts("test", TaskConfig())
    known = {id_ for id_ in word_ids()}
    texts = [phrase for asks in phrases.ASK_PERSON.values() for phrase in asks]
    texts += phrases.ASK_ORDER
    asked = {
        id_
        for text in texts
        for part in phrases.compile_phrase("0", text, False).parts
        if not isinstance(part, str)
        for id_ in part
    }
    strange = [id_ for ids in prompts("train", cfg) for id_ in ids if id_ in known - asked]
    assert bool(strange) == (family not in ("qa_1", "chat_order"))
