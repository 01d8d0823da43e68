"""Names, numbers and codes: which of them tests keep, which haystacks use, and how they are drawn.

A name is a pair of syllables, a number two or three two-digit groups, a code two names written as
one word. The sum of the parts modulo 16 (names) or 10 (numbers) says whom a string belongs to, so
every syllable and every group occurs on every side, in other combinations.
"""

import random

from evals.mini.vocabulary import GROUPS, SYLLABLES, vocabulary

_NAME_CLASSES, _NUMBER_CLASSES = 16, 10
_TESTS = 2  # residues below are the tests'
FILLER, CONSTANT = 2, 3  # what haystacks and the constant table keep to themselves
_TRAIN = 4  # training's residues begin here

Tokens = list[int]


def name_class(code: int) -> int:
    """The residue that says whose a name is."""
    return sum(divmod(code, SYLLABLES)) % _NAME_CLASSES


def is_test_name(code: int) -> bool:
    """Whether only tests may ask for a name."""
    return name_class(code) < _TESTS


def name_tokens(code: int) -> Tokens:
    """A name as a word of its own, with the space before it."""
    first, second = divmod(code, SYLLABLES)
    table = vocabulary()
    return [table.initial + first, table.final + second]


def number_class(groups: Tokens) -> int:
    """The residue that says whose a number is, by its two-digit groups (values, not ids)."""
    return sum(groups) % _NUMBER_CLASSES


def is_test_number(groups: Tokens) -> bool:
    """Whether only tests may ask for a number."""
    return number_class(groups) < _TESTS


def index_tokens(index: int) -> Tokens:
    """A number below 10,000 of a document or session, in two-digit groups."""
    table, (high, low) = vocabulary(), divmod(index, GROUPS)
    if high:
        return [table.spaced_group + high, table.group + low]
    return [table.spaced_group + low]


class Strings:
    """Draws the strings of one example: names and codes distinct from each other, numbers fresh.

    `alike` is the share of names that share a syllable with an earlier one. A distractor's name may
    be of training's in a test too: the tests' own would not suffice for a haystack full of them.
    """

    def __init__(self, rnd: random.Random, *, test: bool, alike: float = 0.0) -> None:
        self._random, self._test, self._alike = rnd.random, test, alike
        self._taken: set[int] = set()
        self._codes: list[int] = []
        table = vocabulary()
        self._banned = table.word_names
        self._initial, self._final = table.initial, table.final
        self._spaced, self._group = table.spaced_group, table.group

    def name(self, *, distractor: bool = False) -> Tokens:
        """A name that this example does not have yet."""
        while True:
            twin = self._codes and self._random() < self._alike
            code = self._twin(distractor) if twin else self._new(distractor)
            if code not in self._taken and code not in self._banned:
                break
        self._taken.add(code)
        self._codes.append(code)
        first, second = divmod(code, SYLLABLES)
        return [self._initial + first, self._final + second]

    def names(self, count: int) -> list[Tokens]:
        """So many different names."""
        return [self.name() for _ in range(count)]

    def _below(self, bound: int) -> int:
        return int(self._random() * bound)

    def _residue(self, classes: int, *, distractor: bool = False) -> int:
        """A class of names or numbers that this split may use."""
        training = _TRAIN + self._below(classes - _TRAIN)
        if not self._test or (distractor and self._random() < 0.5):
            return training
        return self._below(_TESTS)

    def _new(self, distractor: bool) -> int:
        first, step = self._below(SYLLABLES), self._below(SYLLABLES // _NAME_CLASSES)
        second = (self._residue(_NAME_CLASSES, distractor=distractor) - first) % _NAME_CLASSES
        return first * SYLLABLES + step * _NAME_CLASSES + second

    def _twin(self, distractor: bool) -> int:
        """A name that begins or ends as one of the example's own does."""
        first, second = divmod(self._codes[self._below(len(self._codes))], SYLLABLES)
        step = self._below(SYLLABLES // _NAME_CLASSES) * _NAME_CLASSES
        residue = self._residue(_NAME_CLASSES, distractor=distractor)
        if self._random() < 0.5:
            return first * SYLLABLES + step + (residue - first) % _NAME_CLASSES
        return (step + (residue - second) % _NAME_CLASSES) * SYLLABLES + second

    def number(self, groups: int = 2) -> Tokens:
        """A number of so many two-digit groups. It may occur twice in an example."""
        head = [self._below(GROUPS) for _ in range(groups - 1)]
        step = self._below(GROUPS // _NUMBER_CLASSES) * _NUMBER_CLASSES
        last = step + (self._residue(_NUMBER_CLASSES) - sum(head)) % _NUMBER_CLASSES
        return [self._spaced + head[0], *(self._group + g for g in (*head[1:], last))]

    def code(self, *, distractor: bool = False) -> Tokens:
        """Four syllables in one word: two names, of which the second has lost its space."""
        start = self.name(distractor=distractor)
        first, second = divmod(self._new(distractor), SYLLABLES)
        return [*start, self._final + first, self._final + second]
