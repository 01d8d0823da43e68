"""Questions on all of a haystack: its common words, its frequent coded words."""

import functools

import numpy as np

from evals.mini import words
from evals.mini.vocabulary import vocabulary
from evals.tasks import phrases
from evals.tasks.phrases import literal
from evals.tasks.plan import Answer, Draw, Plan, ask
from evals.tasks.strings import Tokens

_COMMON_SHARE = 0.02  # of all words, for each common one
_CODED = 40  # different coded words
_EXPONENT = 2.0  # their counts fall with this power of the rank
_TOP = 3


@functools.cache
def listed_words(test: bool) -> tuple[int, ...]:
    """Ids of the nouns that lists are made of, ascending; tests and training share none."""
    nouns = sorted(vocabulary().id_of[" " + noun] for noun in set(words.NOUNS))
    return tuple(nouns[not test :: 2])


def build_common(draw: Draw) -> Plan:
    """A list of words, some of which are several times as common; the answer is in id order.

    Every common word is 2 % of the list, whatever its length.
    """
    pool = draw.shuffled(list(listed_words(draw.test)))
    count = draw.between(draw.cfg.common)
    common, others = sorted(pool[:count]), pool[count:]
    phrase = draw.pick(phrases.ASK_COMMON)
    prompt = phrases.turn(phrase.fill({"count": _count(count)}))
    answer = Answer()
    for word in common:
        answer.find([word])
    asked = ask(phrase, prompt, answer, rule="all", accepted=[[word] for word in common])
    size = draw.tokens - asked.size - 1
    each = max(2, round(_COMMON_SHARE * size))
    rest = np.resize(others, size - each * count)
    return Plan(pieces=_shuffled(draw, np.repeat(common, each), rest), asks=[asked], packed=True)


def _count(count: int) -> Tokens:
    """How many, as a number of one or two digits."""
    return list(literal(f" {count}"))


def build_frequent(draw: Draw) -> Plan:
    """Coded words whose counts fall with the square of the rank; the answer is the first three."""
    phrase = draw.pick(phrases.ASK_FREQUENT)
    names = draw.strings.names(_CODED)
    answer = Answer()
    for name in names[:_TOP]:
        answer.find(name)
    asked = ask(phrase, phrases.turn(phrase.fill({})), answer, rule="all", accepted=names[:_TOP])
    total = (draw.tokens - asked.size - 1) // 2
    shares = np.arange(1, _CODED + 1) ** -_EXPONENT
    counts = np.floor(shares / shares.sum() * total).astype(int)
    counts[0] += total - counts.sum()
    pieces = _shuffled(draw, np.repeat(np.array(names), counts, axis=0))
    return Plan(pieces=pieces, asks=[asked], packed=True)


def _shuffled(draw: Draw, *parts: np.ndarray) -> list[Tokens]:
    """One piece: the words [N] or [N, 2] of all parts in random order."""
    rng = np.random.default_rng(draw.rnd.getrandbits(62))
    return [rng.permutation(np.concatenate(parts)).reshape(-1).tolist()]
