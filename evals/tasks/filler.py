"""What haystacks are made of where they are not facts: sentences, random words, one paragraph.

Sentences follow a small grammar; those of a paragraph share a few nouns and a name, so that text is
worth reading. Everything is drawn in bulk: about ten million tokens a second.
"""

import functools
import random
import re
from typing import Literal

import numpy as np

from evals.mini import words
from evals.mini.vocabulary import GROUPS, SYLLABLES, vocabulary
from evals.tasks.strings import FILLER

Kind = Literal["text", "words", "noise"]

_PARAGRAPH = 6  # sentences that share a topic
_TOPIC = 4  # nouns of a topic
_ON_TOPIC = 0.6

_SENTENCES = """
 The {a} {n} {v} the {n}.
 The {n} {v} near the {n}.
 A {n} {v} behind the {a} {n}.
 {name} {v} the {n} and the {n}.
 {name} {v} {d}.
 {name} and {name} {v} the {a} {n}.
 In the {n} there was a {a} {n}.
 She {v} the {n} because it was {a}.
 He {v} the {n} when the {n} {v}.
 They {v} a {n} with a {n} and a {n}.
 We {v} the {n} before the {n}, but the {n} {v} {d}.
 It was a {a} {n} and a {a} {n}.
 Some of the {n} {v} under the {n}.
 Every {n} {v} {d} after the {n}.
 After {num} days the {n} was still {a}.
 The {n} of the {n} {v} {d}.
 There are {num} roads to the {n}.
 Near the {n}, {name} {v} a {a} {n}.
 {d}, {d} the {n} {v}.
 If the {n} is {a}, the {n} will be {a} too.
 The {n} was {a}, and the {n} was {a}.
 My {n} {v} your {n} {d}.
 When {name} {v}, the {n} {v} too.
 No {n} is as {a} as a {n}.
 {name} said that the {n} was {a}.
 {name} asked {name} about the {n}.
 From the {n} to the {n} the road was {a}.
 Not every {n} needed a {n}.
 Then the {a} {n} {v} a {a}, {a} {n}.
 At the {n} we {v} and {v}.
 Each {n} has its own {n}.
 The price of a {n} was {num}.
""".strip("\n")

_NOISE = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)


@functools.cache
def _classes() -> dict[str, np.ndarray]:
    """Ids of the words that each slot takes."""
    id_of = vocabulary().id_of
    lists = {"n": words.NOUNS, "v": words.VERBS, "a": words.ADJECTIVES, "d": words.ADVERBS}
    return {slot: np.array([id_of[" " + w] for w in listed]) for slot, listed in lists.items()}


@functools.cache
def word_ids() -> tuple[int, ...]:
    """Ids of all words with a space before them, those of questions and facts included."""
    lists = (words.NOUNS, words.VERBS, words.ADJECTIVES, words.ADVERBS, words.FUNCTION)
    every = {*words.TEMPLATE, *words.CAPITALISED}.union(*lists)
    return tuple(sorted(vocabulary().id_of[" " + word] for word in every))


_PAD, _SECOND = -1, -2  # no token; the second token of a name or a number
_SLOTS = {"n": -3, "v": -4, "a": -5, "d": -6, "name": -7, "num": -8}


@functools.cache
def _patterns() -> tuple[np.ndarray, np.ndarray]:
    """Sentences [P, W] as ids and codes of slots, padded; and their widths [P]."""
    lines: list[list[int]] = []
    for line in _SENTENCES.split("\n"):
        parts: list[int] = []
        for literal, slot in re.findall(r"([^{}]*?)(?: ?\{(\w+)\}|$)", line):
            parts += vocabulary().encode(literal)
            parts += [_SLOTS[slot]] if slot else []
            parts += [_SECOND] if slot in ("name", "num") else []
        lines.append(parts)
    widths = np.array([len(parts) for parts in lines])
    padded = [parts + [_PAD] * (widths.max() - len(parts)) for parts in lines]
    return np.array(padded, np.int32), widths


def _names(rng: np.random.Generator, shape: tuple[int, ...] | int) -> np.ndarray:
    """Ids [.., 2] of names that only haystacks use."""
    first = rng.integers(0, SYLLABLES, shape)
    second = rng.integers(0, SYLLABLES // 16, shape) * 16 + (FILLER - first) % 16
    banned = np.isin(first * SYLLABLES + second, list(vocabulary().word_names))
    first, second = np.where(banned, FILLER, first), np.where(banned, 0, second)
    return np.stack([vocabulary().initial + first, vocabulary().final + second], axis=-1)


def _numbers(rng: np.random.Generator, shape: tuple[int, ...] | int) -> np.ndarray:
    """Ids [.., 2] of numbers that only haystacks use."""
    first = rng.integers(0, GROUPS, shape)
    second = rng.integers(0, GROUPS // 10, shape) * 10 + (FILLER - first) % 10
    return np.stack([vocabulary().spaced_group + first, vocabulary().group + second], axis=-1)


def _text(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """At least `size` tokens of sentences, and where each begins."""
    patterns, widths = _patterns()
    count = int(size / widths.mean() * 1.1) + 64
    which = rng.integers(0, len(patterns), count)
    grid = patterns[which]
    out, starts = grid[grid != _PAD], np.cumsum(widths[which]) - widths[which]
    topic = np.repeat(np.arange(count) // _PARAGRAPH, widths[which])
    paragraphs = count // _PARAGRAPH + 1
    nouns = rng.choice(_classes()["n"], (paragraphs, _TOPIC))
    people = _names(rng, paragraphs)
    for slot, code in _SLOTS.items():
        at = np.flatnonzero(out == code)
        own = rng.random(len(at)) < _ON_TOPIC
        if slot in ("name", "num"):
            pairs = (_names if slot == "name" else _numbers)(rng, len(at))
            if slot == "name":
                pairs = np.where(own[:, None], people[topic[at]], pairs)
            out[at], out[at + 1] = pairs[:, 0], pairs[:, 1]
            continue
        drawn = rng.choice(_classes()[slot], len(at))
        if slot == "n":
            noun = nouns[topic[at], rng.integers(0, _TOPIC, len(at))]
            drawn = np.where(own, noun, drawn)
        out[at] = drawn
    return out, starts


def _words(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """At least `size` tokens of words, one name or number in six; and where each begins."""
    kind = rng.random(size)
    pairs = np.where((kind < 1 / 12)[:, None], _names(rng, size), _numbers(rng, size))
    single = rng.choice(np.array(word_ids()), size)
    grid = np.where((kind < 1 / 6)[:, None], pairs, np.stack([single, np.full(size, -1)], -1))
    flat = grid.reshape(-1)
    begins = np.tile([True, False], size)[flat >= 0]
    return flat[flat >= 0].astype(np.int32), np.flatnonzero(begins)


def _noise(size: int) -> tuple[np.ndarray, np.ndarray]:
    """At least `size` tokens of one paragraph over and over, and where its sentences begin."""
    paragraph = np.array(vocabulary().encode(_NOISE), np.int32)
    stop = vocabulary().id_of["."]
    ids = np.tile(paragraph, size // len(paragraph) + 2)
    return ids, np.concatenate([[0], 1 + np.flatnonzero(ids[:-1] == stop)])


class Filler:
    """A stock of haystack text of each kind, drawn when first needed; spans of it are taken."""

    def __init__(self, rng: np.random.Generator, size: int) -> None:
        self._rng, self._size = rng, size
        self._stock: dict[Kind, tuple[np.ndarray, np.ndarray]] = {}

    def take(self, rnd: random.Random, kind: Kind, size: int) -> tuple[np.ndarray, np.ndarray]:
        """`size` tokens from a random place on, and where sentences begin in them, ascending.

        The first place is always among them. Raises ValueError where the stock is smaller.
        """
        ids, starts = self._of(kind)
        if size > len(ids):
            raise ValueError(f"filler must have at least {size} tokens, got {len(ids)}")
        at = int(rnd.random() * (len(ids) - size + 1))
        low, high = np.searchsorted(starts, (at + 1, at + size))
        return ids[at : at + size], np.concatenate([[0], starts[low:high] - at])

    def sentences(self, rnd: random.Random, least: int, most: int) -> list[int]:
        """Whole sentences of `least` tokens or a few more, cut after `most`."""
        ids, starts = self._of("text")
        first = int(rnd.random() * (np.searchsorted(starts, len(ids) - most - 32) - 1))
        end = starts[np.searchsorted(starts, starts[first] + least)]
        return ids[starts[first] : min(end, starts[first] + most)].tolist()

    def _of(self, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
        if kind not in self._stock:
            if kind == "noise":
                self._stock[kind] = _noise(self._size)
            else:
                self._stock[kind] = (_text if kind == "text" else _words)(self._rng, self._size)
        return self._stock[kind]
