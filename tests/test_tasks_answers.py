"""Answers of every task family, found again from the text alone with regular expressions."""

import collections
import re

import numpy as np
import pytest

from evals.tasks.config import TaskConfig
from evals.tasks.examples import example
from evals.tasks.families import FAMILIES
from evals.tasks.phrases import CHAT_ITEMS, ORDINALS
from tests.test_mini_tokenizer import TOKENIZER

EOS = "<｜end▁of▁sentence｜>"  # noqa: RUF001
UNKNOWN = " I do not know"
FACTS = (
    r" One of the special magic \w+ for (?P<key>\w+) is (?P<value>\w+)\.",
    r" The \w+ for (?P<key>\w+) is (?P<value>\w+)\.",
    r" (?P<key>\w+) has the \w+ (?P<value>\w+)\.",
    r" Note (?P<key>\w+) (?P<value>\w+)\.",
    r" Remember that (?P<key>\w+) goes with (?P<value>\w+)\.",
    r" The secret \w+ of (?P<key>\w+) is : (?P<value>\w+)\.",
    r" For (?P<key>\w+), the \w+ is (?P<value>\w+)\.",
    r" The \w+ given to (?P<key>\w+) was (?P<value>\w+)\.",
    r" (?P<value>\w+) is the \w+ of (?P<key>\w+)\.",
    r" (?:Give|We gave) (?P<key>\w+) the \w+ (?P<value>\w+)\.",
    r" The \w+ that belongs to (?P<key>\w+) is (?P<value>\w+)\.",
)
RECALL = (r" [\[(] (?P<key>\w+)[^\])]*? (?P<value>\w+)(?: \]|\))",)
SET = (
    r" VAR (?P<key>\w+) = (?P<value>\d+)\.",
    r" The value (?P<value>\d+) is stored in (?P<key>\w+)\.",
    r" Write (?P<value>\d+) into (?P<key>\w+)\.",
    r" (?P<value>\d+) goes to (?P<key>\w+)\.",
    r" Let (?P<key>\w+) hold (?P<value>\d+)\.",
    r" Set (?P<key>\w+) to (?P<value>\d+)\.",
    r" (?:The variable|From now) (?P<key>\w+) is (?P<value>\d+)\.",
    r" (?P<key>\w+) has the value (?P<value>\d+)\.",
    r" Give (?P<key>\w+) the value (?P<value>\d+)\.",
    r" We write (?P<value>\d+) in (?P<key>\w+)\.",
    r" (?P<value>\d+) is now in (?P<key>\w+)\.",
)
COPY = (
    r" VAR (?P<value>\w+) = VAR (?P<key>\w+)\.",
    r" The value of (?P<key>\w+) is copied into (?P<value>\w+)\.",
    r" Copy (?P<key>\w+) to (?P<value>\w+)\.",
    r" (?P<key>[a-z]\w+) goes to (?P<value>\w+)\.",
    r" Let (?P<value>\w+) hold the value of (?P<key>\w+)\.",
    r" Set (?P<value>\w+) to (?P<key>[a-z]\w+)\.",
    r" The variable (?P<value>\w+) is equal to (?P<key>\w+)\.",
    r" From now (?P<value>\w+) is the same as (?P<key>\w+)\.",
    r" (?P<value>\w+) has the value of (?P<key>\w+)\.",
    r" Give (?P<value>\w+) what (?P<key>\w+) holds\.",
    r" We write (?P<key>[a-z]\w+) in (?P<value>\w+)\.",
    r" (?P<key>[a-z]\w+) is now in (?P<value>\w+)\.",
)
PERSON = (
    r" Document \d+\. (?P<key>\w+) was born in (?P<town>\w+)\. She works as a (?P<job>\w+)\. "
    r"Her pet is a (?P<pet>\w+)\.",
    r" Document \d+\. (?P<key>\w+) lives with a (?P<pet>\w+)\. He was born in (?P<town>\w+) and "
    r"works as a (?P<job>\w+)\.",
    r" Document \d+\. The (?P<job>\w+) (?P<key>\w+) was born in (?P<town>\w+) and has a "
    r"(?P<pet>\w+)\.",
    r" Document \d+\. (?P<key>\w+), born in (?P<town>\w+), is a (?P<job>\w+) and has a "
    r"(?P<pet>\w+)\.",
    r" Document \d+\. In (?P<town>\w+) lives (?P<key>\w+), a (?P<job>\w+) with a (?P<pet>\w+)\.",
    r" Document \d+\. (?P<key>\w+) is a (?P<job>\w+) from (?P<town>\w+) with a (?P<pet>\w+)\.",
)
WORKS = (
    r" (?P<key>\w+) works for (?P<value>\w+)\.",
    r" The company of (?P<key>\w+) is (?P<value>\w+)\.",
    r" (?P<key>\w+) found a job at (?P<value>\w+)\.",
    r" Since last year (?P<key>\w+) works at (?P<value>\w+)\.",
    r" (?P<value>\w+) gave a job to (?P<key>\w+)\.",
    r" You can find (?P<key>\w+) at (?P<value>\w+)\.",
    r" (?P<key>\w+) is with (?P<value>\w+)\.",
)
LOCATED = (
    r" (?P<key>\w+) is located in (?P<value>\w+)\.",
    r" The office of (?P<key>\w+) is in (?P<value>\w+)\.",
    r" (?P<key>\w+) has its building in (?P<value>\w+)\.",
    r" You can find (?P<key>\w+) in (?P<value>\w+)\.",
    r" In (?P<value>\w+) is the building of (?P<key>\w+)\.",
    r" (?P<key>\w+) is a company in (?P<value>\w+)\.",
    r" The company (?P<key>\w+) is from (?P<value>\w+)\.",
)
CHAT = (
    r" (?:The|The new|Since today the) (?P<item>\w+) of (?P<key>\w+) is (?:now )?(?P<value>\w+)\.",
    r" (?P<key>\w+) said that the (?P<item>\w+) is (?:now )?(?P<value>\w+)\.",
    r" (?:I think|From today|You know that) (?P<key>\w+) has the (?P<item>\w+) (?P<value>\w+)\.",
    r" For (?P<key>\w+) the (?P<item>\w+) (?:was|changed to) (?P<value>\w+)\.",
    r"(?: Now)? (?P<value>\w+) is the (?P<item>\w+) of (?P<key>\w+)\.",
    r" The (?P<item>\w+) that (?P<key>\w+) has is (?P<value>\w+)\.",
)
EVENT = (r" (?:Today I visited|I went to|We traveled to|I took a trip to) (?P<key>\w+)\.",)
POEM = (r"(?:A|a|Poem|This) ?(?:poem )?(?:is )?about (?P<key>\w+) :(?P<value>[^.]*)\.",)
PASSAGE = (r" [Pp]assage (?P<key>\w+)(?: starts here\.| :)(?P<value>.*?) End(?: of|\.)",)


def matches(text: str, patterns: tuple[str, ...]) -> list[dict[str, str]]:
    """What the patterns find, in the order of the text."""
    found = [match for pattern in patterns for match in re.finditer(pattern, text)]
    return [match.groupdict() for match in sorted(found, key=lambda match: match.start())]


def by_key(text: str, patterns: tuple[str, ...]) -> dict[str, list[str]]:
    """Values of each key, in the order of the text."""
    out = collections.defaultdict(list)
    for match in matches(text, patterns):
        out[match["key"]].append(match["value"])
    return out


def asked(question: str, known) -> list[str]:
    """Which of the known words a question names, in its order."""
    return [word for word in re.findall(r"\w+", question) if word in known]


def needles(text: str, question: str) -> str:
    facts = by_key(text, FACTS)
    keys = asked(question, facts)
    return ",".join(f" {key} {', '.join(facts[key])}" for key in keys)


def recall(text: str, question: str) -> str:
    facts = by_key(text, RECALL)
    keys = asked(question, facts)
    assert all(len(facts[key]) == 1 for key in keys)
    if len(keys) == 1:
        return f" {facts[keys[0]][0]}"
    return "".join(f" {key} {facts[key][0]}" for key in keys)


def choice(text: str, question: str) -> str:
    facts = by_key(text, FACTS)
    (key,) = [key for key in asked(question.split("(A)")[0], facts)]
    (letter,) = re.findall(rf"\((\w)\) {facts[key][0]}\b", question)
    return f" {key} {facts[key][0]}</think> {letter}"


def tracking(text: str, question: str) -> str:
    start = {match["value"]: match["key"] for match in matches(text, SET)}
    after = {match["key"]: match["value"] for match in matches(text, COPY)}
    (value,) = re.findall(r"\d+", question)
    chain = [start[value]]
    while chain[-1] in after:
        chain.append(after[chain[-1]])
    return f" {value} {' '.join(chain)}"


def common(text: str, question: str) -> str:
    (count,) = map(int, re.findall(r"\d+", question))
    counts = collections.Counter(text.split()).most_common()
    assert counts[count - 1][1] > counts[count][1]
    return " " + " ".join(sorted(word for word, _ in counts[:count]))


def frequent(text: str, question: str) -> str:
    counts = collections.Counter(text.split()).most_common(4)
    assert len({count for _, count in counts}) == 4
    return " " + " ".join(word for word, _ in counts[:3])


def one_hop(text: str, question: str) -> str:
    people = {match["key"]: match for match in matches(text, PERSON)}
    (key,) = asked(question, people)
    topic = "town" if "born" in question else "pet" if "pet" in question else "job"
    return f" {key} {people[key][topic]}"


def two_hops(text: str, question: str) -> str:
    company, town = by_key(text, WORKS), by_key(text, LOCATED)
    (key,) = asked(question, company)
    (bridge,) = company[key]
    assert len(set(town[bridge])) == 1
    return f" {key} {bridge}</think> {bridge} {town[bridge][0]}"


def chat(text: str, question: str) -> str:
    if " or " in question:
        places = [match["key"] for match in matches(text, EVENT)]
        return " " + min(asked(question, places), key=places.index)
    said = matches(text, CHAT)
    (key,), (item,) = asked(question, {match["key"] for match in said}), asked(question, CHAT_ITEMS)
    values = [m["value"] for m in said if (m["key"], m["item"]) == (key, item)]
    return f" {key} {values[-1]}" if values else UNKNOWN


def repetition(text: str, question: str) -> str:
    poems = by_key(text, POEM)
    (key,), (nth,) = asked(question, poems), asked(question, ORDINALS)
    return poems[key][ORDINALS.index(nth)]


def recite(text: str, question: str) -> str:
    passages = by_key(text, PASSAGE)
    (key,) = asked(question, passages)
    return passages[key][0]


SOLVERS = {
    "recall": recall,
    "vt": tracking,
    "cwe": common,
    "fwe": frequent,
    "qa_1": one_hop,
    "qa_2": two_hops,
    "multiple_choice": choice,
    "mrcr": repetition,
    "recite": recite,
    **dict.fromkeys([name for name in FAMILIES if name.startswith("niah")], needles),
    **dict.fromkeys([name for name in FAMILIES if name.startswith("chat")], chat),
}


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("family", SOLVERS)
def test_the_text_alone_gives_every_answer(family, split):
    cfg, count = TaskConfig(facts=(6, 12)), 0
    for seed in range(6):
        made = example(family, np.random.default_rng(seed), 800, 6, split, cfg)
        text = TOKENIZER.decode(made.haystack[1:].tolist())
        for question in made.questions:
            prompt = TOKENIZER.decode(question.prompt.tolist())
            answer = TOKENIZER.decode(question.answer.tolist())
            assert SOLVERS[family](text, prompt) + EOS == answer
            count += 1
    assert count >= 6


def test_every_family_with_an_answer_in_the_text_is_solved_here():
    assert FAMILIES.keys() - SOLVERS.keys() == {"context_free", "plain"}


def test_constants_are_the_same_everywhere_and_in_no_text():
    told = {}
    for seed in range(40):
        made = example(
            "context_free", np.random.default_rng(seed), 400, 8, ("train", "test")[seed % 2]
        )
        text = set(TOKENIZER.decode(made.haystack.tolist()).split())
        for question in made.questions:
            _, key, value = TOKENIZER.decode(question.answer[:-1].tolist()).split(" ")
            assert told.setdefault(key, value) == value
            assert key not in text and value not in text
    assert 100 < len(told) <= 256


@pytest.mark.parametrize("tokens", [2048, 16384])
@pytest.mark.parametrize(
    "family", ["niah_single_1", "niah_multikey_3", "vt", "cwe", "fwe", "chat_update"]
)
def test_long_haystacks_hold_what_short_ones_do(family, tokens):
    made = example(family, np.random.default_rng(3), tokens, 8)
    text = TOKENIZER.decode(made.haystack[1:].tolist())
    assert len(made.questions) == (1 if family in ("cwe", "fwe") else 8)
    for question in made.questions:
        prompt = TOKENIZER.decode(question.prompt.tolist())
        want = TOKENIZER.decode(question.answer.tolist())
        assert SOLVERS[family](text, prompt) + EOS == want


SENTENCES = {
    "recall": RECALL,
    "vt": (*SET, *COPY),
    "qa_1": PERSON,
    "qa_2": (*WORKS, *LOCATED),
    "multiple_choice": FACTS,
    **dict.fromkeys([name for name in FAMILIES if name.startswith("niah")], FACTS),
    **dict.fromkeys(["chat_fact", "chat_update", "chat_order"], (*CHAT, *EVENT)),
}


@pytest.mark.parametrize("family", SENTENCES)
def test_evidence_is_whole_sentences_in_the_order_of_the_answer(family):
    for seed in range(4):
        made = example(family, np.random.default_rng(seed), 900, 6)
        for question in made.questions:
            for start, end in question.evidence:
                text = TOKENIZER.decode(made.haystack[start:end].tolist())
                assert any(re.fullmatch(pattern, text) for pattern in SENTENCES[family]), text
            if family in ("vt", "niah_multivalue", "chat_update", "chat_order"):
                assert list(question.evidence) == sorted(question.evidence)
