"""RULER's eight needle families, and multiple choice: values of keys, told in single sentences."""

import dataclasses
from typing import Literal

from evals.mini.words import LETTERS
from evals.tasks import phrases
from evals.tasks.filler import Kind
from evals.tasks.phrases import literal
from evals.tasks.plan import Answer, Ask, Draw, Plan, ask

Tokens = list[int]
Type = Literal["number", "name", "code"]

_FACT_TOKENS = 14  # of the longest wording; codes have up to four more
_COMMA = list(literal(","))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Needles:
    """One family: types of keys and values, and what surrounds the needles."""

    key: Type = "name"
    value: Type = "number"
    filler: Kind | None = None  # None: sentences or random words
    packed: bool = False  # the haystack is made of needles
    distractors: bool = True  # more needles than questions
    several: Literal["", "values", "keys"] = ""


@dataclasses.dataclass(frozen=True)
class _Fact:
    """A needle's strings, the index of its piece, and whether its wording is held out."""

    key: Tokens
    value: Tokens
    piece: int
    held_out: bool


def build(draw: Draw, family: Needles) -> Plan:
    """Needles and questions of a family."""
    nouns = _nouns(draw, family)
    pieces, facts = _packed(draw, family, nouns) if family.packed else _sparse(draw, family, nouns)
    if family.several == "keys":
        asks = _ask_several(draw, facts, nouns)
    else:
        asks = [_ask_one(draw, same, nouns) for same in facts[: draw.questions]]
    filler = family.filler or draw.kind()
    return Plan(pieces=pieces, asks=asks, filler=filler, packed=family.packed)


def _nouns(draw: Draw, family: Needles) -> dict[str, Tokens]:
    noun, nouns = draw.one_of(phrases.NOUNS[family.value])
    return {"noun": list(literal(noun)), "nouns": list(literal(nouns))}


def _string(draw: Draw, type_: Type, *, distractor: bool = False) -> Tokens:
    if type_ == "number":
        return draw.strings.number(draw.between((2, 3)))
    make = draw.strings.name if type_ == "name" else draw.strings.code
    return make(distractor=distractor)


def _sparse(
    draw: Draw, family: Needles, nouns: dict[str, Tokens]
) -> tuple[list[Tokens], list[list[_Fact]]]:
    """Needles in random order; facts by key, in random order, each key's in the text's order."""
    wanted = draw.facts() if family.distractors else min(draw.questions, draw.cfg.facts[1])
    each = draw.cfg.values[1] if family.several == "values" else 1
    size = (_FACT_TOKENS + 2 * (family.value == "code")) * each
    owners: list[int] = []
    for key in range(draw.fitting(wanted, size)):
        owners += [key] * (draw.between(draw.cfg.values) if each > 1 else 1)
    owners = draw.shuffled(owners)
    keys = [_string(draw, family.key) for _ in range(max(owners) + 1)]
    pieces: list[Tokens] = []
    facts: list[list[_Fact]] = [[] for _ in keys]
    for owner in owners:
        phrase = draw.pick(phrases.FACT)
        value = _string(draw, family.value)
        facts[owner].append(_Fact(keys[owner], value, len(pieces), phrase.held_out))
        pieces.append(phrase.fill({"key": keys[owner], "value": value, **nouns}))
    return pieces, draw.shuffled(facts)


def _packed(
    draw: Draw, family: Needles, nouns: dict[str, Tokens]
) -> tuple[list[Tokens], list[list[_Fact]]]:
    """A haystack of needles in one wording, and those that questions may ask for."""
    phrase = draw.pick(phrases.FACT)
    key, value = _string(draw, family.key), _string(draw, family.value)
    size = 1 + len(phrase.fill({"key": key, "value": value, **nouns}))
    question = len(key) * 2 + len(value) + 14
    head, tail = (draw.cfg.head, draw.cfg.tail) if draw.test else (0, 0)
    count = max(1, (draw.tokens - question * draw.questions) // size)
    least = size - 2  # tokens of a needle: numbers differ by one
    first, last = -(-head // least), count - 1 - -(-tail // least)
    candidates = range(first, last + 1)
    asked = draw.rnd.sample(candidates, min(draw.questions, len(candidates)))
    pieces: list[Tokens] = [[]] * count
    facts: list[list[_Fact]] = []
    for i in asked:  # the asked first: the others' names may begin or end like theirs
        key, value = _string(draw, family.key), _string(draw, family.value)
        pieces[i] = phrase.fill({"key": key, "value": value, **nouns})
        facts.append([_Fact(key, value, i, phrase.held_out)])
    for i, piece in enumerate(pieces):
        if not piece:
            key = _string(draw, family.key, distractor=True)
            value = _string(draw, family.value, distractor=True)
            pieces[i] = phrase.fill({"key": key, "value": value, **nouns})
    return pieces, facts


def _ask_one(draw: Draw, facts: list[_Fact], nouns: dict[str, Tokens]) -> Ask:
    """All values of one key, in the order of the text."""
    phrase = draw.pick(phrases.ASK_ONE if len(facts) == 1 else phrases.ASK_ALL)
    answer = Answer().follow(facts[0].key)
    for i, fact in enumerate(facts):
        answer.follow(_COMMA if i else []).find(fact.value)
    return ask(
        phrase,
        phrases.turn(phrase.fill({"key": facts[0].key, **nouns})),
        answer,
        rule="all",
        accepted=[fact.value for fact in facts],
        pieces=tuple(fact.piece for fact in facts),
        held_out=any(fact.held_out for fact in facts),
    )


def _ask_several(draw: Draw, facts: list[list[_Fact]], nouns: dict[str, Tokens]) -> list[Ask]:
    """Questions that name some keys each, none in two of them; answers repeat key before value."""
    asks, rest = [], [same[0] for same in facts]
    while rest and len(asks) < draw.questions:
        count = min(draw.between(draw.cfg.asked), len(rest))
        chosen, rest = rest[:count], rest[count:]
        phrase = draw.pick(phrases.ASK_SEVERAL)
        keys: Tokens = []
        answer = Answer()
        for i, fact in enumerate(chosen):
            keys += [*(_COMMA if i else []), *fact.key]
            answer.follow([*(_COMMA if i else []), *fact.key]).find(fact.value)
        asks.append(
            ask(
                phrase,
                phrases.turn(phrase.fill({"keys": keys, **nouns})),
                answer,
                rule="all",
                accepted=[[*fact.key, *fact.value] for fact in chosen],
                pieces=tuple(fact.piece for fact in chosen),
                held_out=any(fact.held_out for fact in chosen),
            )
        )
    return asks


def build_choice(draw: Draw) -> Plan:
    """Facts, and questions with four values to choose from; answers think of the value first."""
    family = Needles(value="name")
    nouns = _nouns(draw, family)
    pieces, facts = _sparse(draw, family, nouns)
    singles = [same[0] for same in facts]
    asks = [_ask_choice(draw, fact, singles, nouns) for fact in singles[: draw.questions]]
    return Plan(pieces=pieces, asks=asks, filler=draw.kind())


def _ask_choice(draw: Draw, fact: _Fact, facts: list[_Fact], nouns: dict[str, Tokens]) -> Ask:
    others = [other.value for other in facts if other is not fact]
    others += draw.strings.names(max(0, len(LETTERS) - 1 - len(others)))
    options = draw.shuffled([fact.value, *draw.rnd.sample(others, len(LETTERS) - 1)])
    choices: Tokens = []
    for letter, option in zip(LETTERS, options, strict=True):
        choices += [*literal(f" ({letter})"), *option]
    right = list(literal(" " + LETTERS[options.index(fact.value)]))
    phrase = draw.pick(phrases.ASK_CHOICE)
    question = phrase.fill({"key": fact.key, "choices": choices, **nouns})
    thought = Answer().follow(fact.key).find(fact.value).follow([phrases.END_THINK_ID])
    return ask(
        phrase,
        phrases.turn(question, think=True),
        thought.find(right),
        rule="exact",
        accepted=[right],
        pieces=(fact.piece,),
        held_out=fact.held_out,
    )
