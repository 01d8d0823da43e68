"""Long conversations: facts, updates, order of events, what was never said; n-th repetitions."""

import dataclasses
import functools
from typing import Literal

from evals.mini import words
from evals.mini.vocabulary import vocabulary
from evals.tasks import phrases
from evals.tasks.phrases import literal
from evals.tasks.plan import Answer, Ask, Draw, Plan, ask
from evals.tasks.strings import Tokens, index_tokens

Topic = Literal["fact", "update", "order", "abstain"]

TOPICS: tuple[Topic, ...] = ("fact", "update", "order", "abstain")
_STATEMENT_TOKENS = 11
_PER_SESSION = 5  # statements
_OWN = 0.6  # share of a family's own topic among its questions in training
_POEM_WORDS = (6, 10)
_POEM_TOKENS = 19


@dataclasses.dataclass(kw_only=True)
class _Group:
    """Statements that belong together, in order, and what is asked about them."""

    topic: Topic
    slots: dict[str, Tokens]
    statements: list[Tokens]
    answer: Tokens
    held_out: bool
    pieces: list[int]


def build_chat(draw: Draw, topic: Topic) -> Plan:
    """Sessions of statements; in tests, every question is on `topic`, in training most are.

    The latest value counts. What was never said is asked of people who have said something else.
    """
    count = draw.fitting(draw.facts(), 3 * _STATEMENT_TOKENS)
    asked = min(count, draw.questions)
    topics: list[Topic] = []
    for i in range(count):
        own = i < asked and (draw.test or draw.rnd.random() < _OWN)
        topics.append(topic if own else draw.one_of(TOPICS))
    groups = [_group(draw, each) for each in topics]
    pieces = _in_sessions(draw, groups)
    asks = [_ask_about(draw, group) for group in groups[:asked]]
    return Plan(pieces=pieces, asks=asks, filler=draw.kind())


def _group(draw: Draw, topic: Topic) -> _Group:
    """One fact, one with its updates, two events, or a fact beside the one that is asked for."""
    if topic == "order":
        one, other = draw.strings.names(2)
        phrase = [draw.pick(phrases.CHAT_EVENT) for _ in range(2)]
        said = [p.fill({"place": place}) for p, place in zip(phrase, (one, other), strict=True)]
        slots = {"one": one, "other": other}
        if draw.rnd.random() < 0.5:
            slots = {"one": other, "other": one}
        answer = one
    else:
        key, (item, asked) = draw.strings.name(), draw.rnd.sample(phrases.CHAT_ITEMS, 2)
        slots = {"key": key, "item": list(literal(" " + item))}
        later = draw.between((1, 2)) if topic == "update" else 0
        phrase = [draw.pick(phrases.CHAT_FACT)]
        phrase += [draw.pick(phrases.CHAT_UPDATE) for _ in range(later)]
        values = draw.strings.names(1 + later)
        said = [p.fill({**slots, "value": v}) for p, v in zip(phrase, values, strict=True)]
        answer = values[-1]
        if topic == "abstain":
            slots["item"], answer = list(literal(" " + asked)), list(literal(phrases.UNKNOWN))
    return _Group(
        topic=topic,
        slots=slots,
        statements=said,
        answer=answer,
        held_out=any(p.held_out for p in phrase),
        pieces=[],
    )


def _in_sessions(draw: Draw, groups: list[_Group]) -> list[Tokens]:
    """All statements, each group's in order, under headings of sessions; fills `pieces`."""
    order: list[tuple[float, _Group, Tokens]] = []
    for group in groups:
        places = sorted(draw.rnd.random() for _ in group.statements)
        order += zip(places, [group] * len(places), group.statements, strict=True)
    order.sort(key=lambda item: item[0])
    pieces: list[Tokens] = []
    heading = draw.pick(phrases.SESSION)
    for i, (_, group, said) in enumerate(order):
        if i % _PER_SESSION == 0:
            pieces.append(heading.fill({"number": index_tokens(1 + i // _PER_SESSION)}))
        group.pieces.append(len(pieces))
        pieces.append(said)
    return pieces


def _ask_about(draw: Draw, group: _Group) -> Ask:
    if group.topic == "order":
        phrase = draw.pick_as_is(phrases.ASK_ORDER)
    else:
        phrase = draw.pick(phrases.ASK_CHAT)
    known = group.topic in ("fact", "update")
    return ask(
        phrase,
        phrases.turn(phrase.fill(group.slots)),
        Answer().follow(group.slots["key"] if known else []).find(group.answer),
        rule="all" if known else "exact",
        accepted=[group.answer],
        pieces=() if group.topic == "abstain" else tuple(group.pieces),
        held_out=group.held_out and group.topic != "abstain",
    )


@functools.cache
def _vocabulary_of_poems() -> tuple[int, ...]:
    listed = (*words.NOUNS, *words.VERBS, *words.ADJECTIVES)
    return tuple(vocabulary().id_of[" " + word] for word in listed)


def build_repetition(draw: Draw) -> Plan:
    """Poems, several on each topic; questions ask for the n-th on one, word for word."""
    copies = draw.between(draw.cfg.copies)
    topics = max(1, -(-draw.questions // copies))
    count = draw.fitting(topics * copies, _POEM_TOKENS)
    owners = draw.shuffled([i % topics for i in range(count)])
    keys = draw.strings.names(topics)
    fact, pieces, poems = draw.pick(phrases.POEM), [], [[] for _ in keys]
    for i, owner in enumerate(owners):
        text = draw.rnd.choices(_vocabulary_of_poems(), k=draw.between(_POEM_WORDS))
        pieces.append(fact.fill({"key": keys[owner], "text": text}))
        poems[owner].append((i, text))
    every = [(key, nth) for key, own in enumerate(poems) for nth in range(len(own))]
    asks = []
    for key, nth in draw.rnd.sample(every, min(draw.questions, len(every))):
        phrase, text = draw.pick(phrases.ASK_POEM), poems[key][nth][1]
        slots = {"key": keys[key], "nth": list(literal(" " + phrases.ORDINALS[nth]))}
        prompt = phrases.turn(phrase.fill(slots))
        same = tuple(i for i, _ in poems[key][: nth + 1])
        answer = Answer().find(text)
        held_out = fact.held_out
        asks.append(
            ask(
                phrase,
                prompt,
                answer,
                rule="exact",
                accepted=[text],
                pieces=same,
                held_out=held_out,
            )
        )
    return Plan(pieces=pieces, asks=asks, filler=draw.kind())
