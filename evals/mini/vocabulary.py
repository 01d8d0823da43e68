"""The mini model's 2,048 ids: special strings, bytes, syllables, digit groups, words, reserve.

Names are pairs of syllables, one of 256 with a space before it and one of 256 without; numbers are
pairs or triples of two-digit groups, the first with a space before it. So names and numbers that a
model has never seen are made of tokens that it has.
"""

import dataclasses
import functools
import re

from evals.mini import words
from lsa_jax.text.byte_level import byte_characters
from lsa_jax.text.special import SPECIAL_IDS

SIZE = 2048
SYLLABLES = 256
GROUPS = 100  # two-digit groups

_SINGLE = tuple("bcdfghjklmnprstvwyz")
_DOUBLE = tuple(
    onset
    for first, seconds in {
        **{"b": "lr", "c": "hlr", "d": "rw", "f": "lr", "g": "lnr", "k": "lnr", "p": "hlrs"},
        **{"q": "u", "s": "chklmnptvw", "t": "hrw", "v": "lr", "w": "h", "z": "lr"},
    }.items()
    for onset in (first + second for second in seconds)
)
_VOWELS = "aeiou"

SPLIT = r"'s(?!\p{L})| ?\p{N}{1,2}| ?[\p{L}\p{M}]+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
_PIECE = re.compile(r"'s(?![A-Za-z])| ?[A-Za-z]+| ?[0-9]{1,2}| ?[^\sA-Za-z0-9]+|\s+")


class VocabularyError(ValueError):
    """A text that needs more than one id a word; names the text and the piece."""


def _all_words() -> tuple[str, ...]:
    """Words with the space before them, by the alphabet, then those without one."""
    lists = (words.NOUNS, words.VERBS, words.ADJECTIVES, words.ADVERBS, words.FUNCTION)
    spaced = {" " + word for group in (*lists, words.TEMPLATE) for word in group}
    spaced |= {" " + word for word in (*words.CAPITALISED, *words.LETTERS)}
    return (*sorted(spaced), *sorted(words.STARTERS))


def _syllables(spaced: frozenset[str]) -> tuple[str, ...]:
    """The first 256 open syllables that are no word."""
    every = (onset + vowel for onset in (*_SINGLE, *_DOUBLE) for vowel in _VOWELS)
    return tuple(s for s in every if " " + s not in spaced)[:SYLLABLES]


@dataclasses.dataclass(frozen=True, eq=False)
class Vocabulary:
    """Every id's text (None: reserved, or a byte that is no character), and where kinds begin."""

    texts: tuple[str | None, ...]
    id_of: dict[str, int]
    syllables: tuple[str, ...]
    initial: int  # first of 256 syllables with a space before them
    final: int  # first of 256 without
    spaced_group: int  # first of 100 two-digit groups with a space before them
    group: int  # first of 100 without
    word_names: frozenset[int]  # codes of names that spell a word of the list: never used

    def encode(self, text: str) -> list[int]:
        """Ids of a text of listed words, digits, marks and ASCII punctuation; one id a piece."""
        out = []
        for piece in _PIECE.findall(text):
            if piece in self.id_of and self.id_of[piece] not in self._syllable_ids():
                out.append(self.id_of[piece])
            elif any(c.isalnum() for c in piece) or not piece.isascii():
                raise VocabularyError(f"{piece!r} in {text!r} must be a word of the vocabulary")
            else:
                out += [self.id_of[c] for c in piece]
        return out

    def _syllable_ids(self) -> range:
        return range(self.initial, self.final + SYLLABLES)

    def continues(self, id_: int) -> bool:
        """Whether a token only goes on with the word or number before it."""
        inside = self.final <= id_ < self.final + SYLLABLES
        return inside or self.group <= id_ < self.group + GROUPS


@functools.cache
def vocabulary() -> Vocabulary:
    """The one vocabulary; ids are in the order of the module's first sentence."""
    listed = _all_words()
    spaced = frozenset(w for w in listed if w.startswith(" "))
    syllables = _syllables(spaced)
    bytes_ = [chr(byte) if byte < 128 else None for byte in range(256)]
    groups = [f"{n:02}" for n in range(GROUPS)]
    blocks: dict[str, list[str | None]] = {
        "special": list(SPECIAL_IDS),
        "bytes": list(bytes_),
        "onsets": list(_DOUBLE),
        "initial": [" " + s for s in syllables],
        "final": list(syllables),
        "spaced digits": [f" {n}" for n in range(10)],
        "spaced group": [" " + g for g in groups],
        "group": list(groups),
        "marks": list(words.MARKS),
        "words": list(listed),
    }
    texts: list[str | None] = []
    first = {}
    for name, block in blocks.items():
        first[name] = len(texts)
        texts += block
    if len(texts) > SIZE:
        raise VocabularyError(f"the vocabulary must have at most {SIZE} ids, got {len(texts)}")
    texts += [None] * (SIZE - len(texts))
    id_of = {text: id_ for id_, text in enumerate(texts) if text is not None}
    index = {s: i for i, s in enumerate(syllables)}
    return Vocabulary(
        texts=tuple(texts),
        id_of=id_of,
        syllables=syllables,
        initial=first["initial"],
        final=first["final"],
        spaced_group=first["spaced group"],
        group=first["group"],
        word_names=frozenset(_names_that_are_words(spaced, index)),
    )


def _names_that_are_words(spaced: frozenset[str], index: dict[str, int]) -> list[int]:
    """Codes of the pairs of syllables that the tokenizer would read as one word."""
    pairs = ((w[1:cut], w[cut:]) for w in spaced for cut in range(2, len(w)))
    return [index[a] * SYLLABLES + index[b] for a, b in pairs if a in index and b in index]


def byte_level(text: str) -> str:
    """A text in the visible characters of a byte-level vocabulary."""
    character = byte_characters()
    return "".join(character[byte] for byte in text.encode())


def merges() -> list[tuple[str, str]]:
    """How the pieces that are no listed word fall into syllables: onset, syllable, space before."""
    syllables, space = vocabulary().syllables, byte_level(" ")
    out = [(onset[0], onset[1]) for onset in _DOUBLE]
    out += [(s[:-1], s[-1]) for s in syllables]
    return out + [(space, s) for s in syllables]
