"""What synthetic tasks are written in: ranges of a vocabulary, and which strings tests keep.

Keys and values are pairs of syllables, an initial and a final one, so that test strings are new
combinations of tokens that training has seen: a pair belongs to the tests by a fixed rule on its
two syllables, and every syllable occurs on both sides.
"""

import dataclasses

import numpy as np

from lsa_jax.config_checks import refusal

_TEST_ONE_IN = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Alphabet:
    """Token ids: marks, then `words` of filler, then the initial and the final syllables."""

    bos: int = 0
    eos: int = 1
    fact: int = 2
    ask: int = 3
    answer: int = 4
    end: int = 5
    first_word: int = 16
    words: int = 512
    syllables: int = 128

    def __post_init__(self) -> None:
        marks = (self.bos, self.eos, self.fact, self.ask, self.answer, self.end)
        if len(set(marks)) < len(marks) or max(marks) >= self.first_word or min(marks) < 0:
            raise refusal("alphabet marks", marks, f"distinct ids below {self.first_word}")
        for name, least in (("words", 1), ("syllables", 2 * _TEST_ONE_IN)):
            if getattr(self, name) < least:
                raise refusal(f"alphabet.{name}", getattr(self, name), f">= {least}")

    @property
    def size(self) -> int:
        """Ids in use."""
        return self.first_word + self.words + 2 * self.syllables

    def pair(self, code: np.ndarray) -> np.ndarray:
        """Token ids [..., 2] of the strings with these codes in [0, syllables^2)."""
        initial, final = np.divmod(code, self.syllables)
        start = self.first_word + self.words
        return np.stack([start + initial, start + self.syllables + final], axis=-1)

    def is_test(self, code: np.ndarray) -> np.ndarray:
        """Which strings only tests may use: one in 16, each syllable in as many of them."""
        initial, final = np.divmod(code, self.syllables)
        return (initial + final) % _TEST_ONE_IN == 0

    def strings(self, *, test: bool) -> np.ndarray:
        """Codes of all strings of a split, ascending."""
        codes = np.arange(self.syllables**2)
        return codes[self.is_test(codes) == test]
