"""The plainest tasks: recall without sentences, recitation, constants, text without questions."""

import functools
import random

from evals.mini.vocabulary import vocabulary
from evals.tasks import phrases
from evals.tasks.filler import word_ids
from evals.tasks.plan import Answer, Draw, Plan, ask
from evals.tasks.strings import CONSTANT, name_class, name_tokens

Tokens = list[int]

CONSTANTS = 256
_CONSTANT_SEED = 20_401
_RECALL = (" [{key}{gap}{value} ]", " ({key}{gap}{value})", " [{key}{gap}{value})")
_ASK_RECALL = phrases.compile_phrase("0", "", False)


def build_recall(draw: Draw) -> Plan:
    """Facts " [ key gap value ]", questions that are a key, or several and then their pairs."""
    fact = draw.pick(_RECALL)
    most = 2 + 4 + draw.cfg.gap[1]
    count = draw.fitting(draw.facts(), most)
    pieces, pairs = [], []
    for i in range(count):
        key, value = draw.strings.name(), draw.strings.name()
        gap = 0 if draw.rnd.random() < draw.cfg.adjacent else draw.between(draw.cfg.gap)
        words = [draw.one_of(word_ids()) for _ in range(gap)]
        pieces.append(fact.fill({"key": key, "gap": words, "value": value}))
        pairs.append((i, key, value))
    rest, asks = draw.shuffled(pairs), []
    while rest and len(asks) < draw.questions:
        size = 1 if draw.rnd.random() < 0.7 else min(draw.between(draw.cfg.asked), len(rest))
        chosen, rest = rest[:size], rest[size:]
        answer, prompt = Answer(), [phrases.USER_ID]
        for _, key, value in chosen:
            prompt += key
            answer.follow(key if size > 1 else []).find(value)
        prompt += [phrases.ASSISTANT_ID] if size > 1 else []
        asks.append(
            ask(
                _ASK_RECALL,
                prompt,
                answer,
                rule="all",
                accepted=[value for _, _, value in chosen],
                pieces=tuple(i for i, _, _ in chosen),
                held_out=fact.held_out,
            )
        )
    return Plan(pieces=pieces, asks=asks, filler=draw.kind())


def build_recite(draw: Draw) -> Plan:
    """Passages to repeat word for word; as many as fit, up to the questions."""
    most = max(32, min(draw.cfg.passage[1], draw.tokens // 6))
    least = min(draw.cfg.passage[0], most)
    pieces, asks = [], []
    for i in range(draw.fitting(min(draw.questions, 4), 2 * most + 24)):
        key, fact = draw.strings.name(), draw.pick(phrases.PASSAGE)
        text = draw.filler.sentences(draw.rnd, draw.between((least, most)), most)
        pieces.append(fact.fill({"key": key, "text": text}))
        phrase = draw.pick(phrases.ASK_PASSAGE)
        asks.append(
            ask(
                phrase,
                phrases.turn(phrase.fill({"key": key})),
                Answer().find(text),
                rule="exact",
                accepted=[text],
                pieces=(i,),
                held_out=fact.held_out,
            )
        )
    return Plan(pieces=pieces, asks=asks)


@functools.cache
def constants() -> tuple[tuple[Tokens, Tokens], ...]:
    """Countries and their capitals: the same in every example, and in no haystack."""
    rnd = random.Random(_CONSTANT_SEED)
    words = vocabulary().word_names
    codes = [c for c in range(1 << 16) if name_class(c) == CONSTANT and c not in words]
    chosen = [name_tokens(code) for code in rnd.sample(codes, 2 * CONSTANTS)]
    return tuple(zip(chosen[:CONSTANTS], chosen[CONSTANTS:], strict=True))


def build_context_free(draw: Draw) -> Plan:
    """Questions that the haystack says nothing about: capitals learned in training."""
    asks = []
    for key, value in draw.rnd.sample(constants(), min(draw.questions, CONSTANTS)):
        phrase = draw.pick(phrases.ASK_CONSTANT)
        prompt = phrases.turn(phrase.fill({"key": key}))
        answer = Answer().follow(key).find(value)
        asks.append(ask(phrase, prompt, answer, rule="all", accepted=[value]))
    return Plan(pieces=[], asks=asks, filler=draw.kind())


def build_plain(draw: Draw) -> Plan:
    """Text without questions."""
    return Plan(pieces=[], asks=[], filler=draw.kind())
