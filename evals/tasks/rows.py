"""Training rows: a haystack and several questions with their answers, by the batch."""

import functools
import random
from typing import NamedTuple

import numpy as np

from evals.mini.vocabulary import SIZE, vocabulary
from evals.tasks.config import MixtureConfig
from evals.tasks.examples import draw_plan
from evals.tasks.families import FAMILIES, check_families
from evals.tasks.filler import Filler
from evals.tasks.plan import Ask, place
from evals.tasks.question import ANSWER

_ECHO_KNOWN = 2  # tokens of an echo before which nothing says that it is one
_ECHO_TRIES = 12  # for each: facts and other echoes are in the way of most
_PER = 512  # tokens of haystack that `MixtureConfig.echoes` counts for


class Rows(NamedTuple):
    """`ids` [B, S] int32, `kinds` [B, S] int8 and the family of each row, as an index [B]."""

    ids: np.ndarray
    kinds: np.ndarray
    families: np.ndarray


def family_names() -> tuple[str, ...]:
    """Names in the order of `Rows.families`."""
    return tuple(FAMILIES)


def rows(
    mixture: MixtureConfig, rng: np.random.Generator, batch: int, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and kinds of targets, [batch, tokens] each; see `labelled_rows`."""
    return labelled_rows(mixture, rng, batch, tokens)[:2]


def labelled_rows(
    mixture: MixtureConfig, rng: np.random.Generator, batch: int, tokens: int
) -> Rows:
    """Rows of families drawn by weight, all of them of the training split.

    kinds: 0 for the haystack and the questions, 1 for answers and what is repeated, 2 for what must
    be found (`evals.tasks.question`). Raises ConfigError for unknown families, TooShort.
    """
    check_families("mixture.weights", mixture.weights)
    names = family_names()
    weights = np.array([mixture.weights.get(name, 0.0) for name in names])
    families = rng.choice(len(names), batch, p=weights / weights.sum())
    filler = Filler(rng, max(2 * tokens, batch * tokens // 4) + 1024)
    rnd = random.Random(int(rng.integers(1 << 62)))
    ids = np.empty((batch, tokens), np.int32)
    kinds = np.zeros((batch, tokens), np.int8)
    for i, family in enumerate(families):
        _write_row(mixture, rnd, filler, names[family], ids[i], kinds[i])
    return Rows(ids, kinds, families)


def _write_row(
    mixture: MixtureConfig,
    rnd: random.Random,
    filler: Filler,
    family: str,
    ids: np.ndarray,
    kinds: np.ndarray,
) -> None:
    tokens = len(ids)
    low, high = mixture.questions
    questions = low + int(rnd.random() * (high - low + 1))
    room = {"tokens": tokens, "questions": questions, "test": False}
    draw, plan = draw_plan(family, rnd, filler, mixture.task, **room)
    asks = _within(plan.asks, mixture.question_share * tokens)
    length = tokens - sum(ask.size for ask in asks)
    haystack, is_filler, _ = place(draw, plan, length)
    ids[:length] = haystack
    if mixture.echoes[1]:
        _echo(mixture, rnd, ids[:length], kinds[:length], is_filler)
    at = length
    for ask in asks:
        middle, end = at + len(ask.prompt), at + ask.size
        ids[at:end] = ask.prompt + ask.answer
        kinds[middle:end] = ask.kinds
        at = end


def _within(asks: list[Ask], room: float) -> list[Ask]:
    """The first questions that fit, and the first in any case."""
    used, out = 0, []
    for ask in asks:
        used += ask.size
        if out and used > room:
            break
        out.append(ask)
    return out


@functools.cache
def _continues() -> np.ndarray:
    """[SIZE] bool: ids that only go on with the word before them."""
    return np.array([vocabulary().continues(id_) for id_ in range(SIZE)])


def _echo(
    mixture: MixtureConfig,
    rnd: random.Random,
    ids: np.ndarray,
    kinds: np.ndarray,
    is_filler: np.ndarray,
) -> None:
    """Repeats stretches of filler further on in a haystack, where filler stood, in whole words.

    What is repeated becomes ANSWER, but for its first tokens. No stretch that was repeated, and no
    repetition, is written over, so a full haystack takes fewer than are wanted.
    """
    low, high = mixture.echoes
    shortest, longest = mixture.echo_tokens
    wanted = (low + rnd.random() * (high - low + 1)) * len(ids) / _PER
    begins = np.flatnonzero(is_filler & ~_continues()[ids])
    free = is_filler.copy()
    done = 0
    for _ in range(_ECHO_TRIES * int(wanted) if len(begins) > 1 else 0):
        if done == int(wanted):
            return
        size = shortest + int(rnd.random() * (longest - shortest + 1))
        first, second = sorted(int(rnd.random() * len(begins)) for _ in range(2))
        source, to = int(begins[first]), int(begins[second])
        end, behind = min(source + size, to), to + size
        if end - source < size or behind >= len(ids) or not is_filler[source:end].all():
            continue
        # An earlier repetition may have changed what stands at any of the three.
        if not free[to:behind].all() or _continues()[ids[[source, end, behind]]].any():
            continue
        ids[to:behind] = ids[source:end]
        kinds[to + _ECHO_KNOWN : behind] = ANSWER
        free[to:behind] = False
        free[source:end] = False
        done += 1
