"""Key-value recall in a haystack, by the batch: the task every other one builds on.

A row is filler with facts strewn into it, then questions about them:

    bos  filler .. [fact key key gap.. value value end] .. filler
    [ask key key value value end] .. or
    [ask key key, key key, .. answer key key value value, key key value value, .. end] ..

A question for one key is answered at once. One for several names them all first, so that what its
answer needs is known before it is written, and the answer repeats each key before its value.
Between key and value of a fact stand `gap` tokens of filler: where it is 0, copying what followed
the key before is enough, and both kinds are needed for the matching to be learned at all. Every row
has its own keys, half of which share a syllable with another. Stretches of filler can be repeated,
`echoes` of them: that teaches copying, on which recall builds, from many more tokens than answers
have.
"""

import dataclasses

import numpy as np

from evals.alphabet import Alphabet
from lsa_jax.config_checks import number, refusal

REST, ANSWER, FIRST = 0, 1, 2  # kinds of targets, as `train.pretraining.lm_step` weighs them
_STRING = 2  # tokens of a key or a value


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecallConfig:
    """Sizes of a row; ranges are inclusive, and every row draws its own.

    `tokens` is the length of a row, `questions` how many a row ends with, `asked` how many keys
    each names. `adjacent` is the share of facts with gap 0 whatever `gap` is.
    """

    tokens: int = 512
    facts: tuple[int, int] = (2, 16)
    gap: tuple[int, int] = (0, 8)
    adjacent: float = 0.5
    questions: int = 4
    asked: tuple[int, int] = (1, 1)
    echoes: int = 0
    echo_tokens: int = 8

    def __post_init__(self) -> None:
        for name, least in (("facts", 1), ("gap", 0), ("asked", 1)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise refusal(f"recall.{name}", (low, high), f"ascending from at least {least}")
        for name, least in (("tokens", 1), ("questions", 1), ("echoes", 0), ("echo_tokens", 2)):
            if number(f"recall.{name}", getattr(self, name), int) < least:
                raise refusal(f"recall.{name}", getattr(self, name), f">= {least}")
        if not 0 <= number("recall.adjacent", self.adjacent, float) <= 1:
            raise refusal("recall.adjacent", self.adjacent, "in [0, 1]")
        if self.asked[1] > self.facts[0]:
            raise refusal("recall.asked", self.asked, f"<= the fewest facts, {self.facts[0]}")
        room = self.tokens - 1 - self.questions * self.question_tokens
        need = self.facts[1] * (2 + 2 * _STRING + self.gap[1])
        if need > room:
            raise refusal("recall.tokens", self.tokens, f">= {self.tokens + need - room}")

    @property
    def question_tokens(self) -> int:
        """Tokens of the longest question with its answer."""
        most = self.asked[1]
        return 2 + 2 * _STRING if most == 1 else 3 + 3 * _STRING * most


@dataclasses.dataclass(frozen=True)
class RecallRows:
    """A batch of rows: ids and kinds [B, tokens]; `questions_at` [B] is where the haystack ends.

    `fact_at` [B, F] is where each fact begins (-1: there is none), `asked` [B, Q, A] the facts that
    each question asks for (-1: it asks for fewer).
    """

    ids: np.ndarray
    kinds: np.ndarray
    questions_at: np.ndarray
    fact_at: np.ndarray
    asked: np.ndarray


def draw_rows(
    rng: np.random.Generator,
    letters: Alphabet,
    cfg: RecallConfig,
    batch: int,
    *,
    test: bool = False,
) -> RecallRows:
    """Rows of one batch; `test` takes keys and values that training never does."""
    most = cfg.facts[1]
    count = rng.integers(cfg.facts[0], cfg.facts[1] + 1, batch)
    gap = rng.integers(cfg.gap[0], cfg.gap[1] + 1, (batch, most))
    gap[rng.random((batch, most)) < cfg.adjacent] = 0
    exists = np.arange(most) < count[:, None]
    keys, values = (_strings(rng, letters, (batch, most), test) for _ in range(2))
    haystack = cfg.tokens - cfg.questions * cfg.question_tokens
    filler = rng.integers(0, letters.words, (batch, cfg.tokens)) + letters.first_word
    ids, kinds = filler.astype(np.int32), np.full((batch, cfg.tokens), REST, np.int8)
    _echo(rng, ids, kinds, cfg, haystack)
    ids[:, 0] = letters.bos
    start = _place(rng, np.where(exists, 2 + 2 * _STRING + gap, 0), haystack)
    _write_facts(ids, letters, np.where(exists, start, -1), gap, keys, values)
    _unmark(kinds, np.where(exists, start, -1), 2 + 2 * _STRING + gap)
    asked = _choose(rng, count, cfg, batch)
    _write_questions(ids, kinds, letters, cfg, haystack, asked, keys, values)
    at = np.full(batch, haystack)
    return RecallRows(ids, kinds, at, np.where(exists, start, -1), asked)


def _strings(
    rng: np.random.Generator, letters: Alphabet, shape: tuple[int, int], test: bool
) -> np.ndarray:
    """Codes [B, F], distinct in a row. Half of them share an initial syllable with another."""
    pool = letters.strings(test=test)
    codes = np.stack([rng.choice(pool, shape[1], replace=False) for _ in range(shape[0])])
    alike = rng.random(shape) < 0.5
    model = codes[np.arange(shape[0])[:, None], rng.integers(0, shape[1], shape)]
    twin = model // letters.syllables * letters.syllables + codes % letters.syllables
    swapped = np.where(alike & (letters.is_test(twin) == test), twin, codes)
    for row, old in zip(swapped, codes, strict=True):  # a twin that is taken stays what it was
        _, first = np.unique(row, return_index=True)
        if len(first) < len(row):
            row[:] = old
    return swapped


def _place(rng: np.random.Generator, lengths: np.ndarray, haystack: int) -> np.ndarray:
    """Starts [B, F] of pieces of these lengths, in random order and apart, in 1 .. haystack - 1."""
    batch, pieces = lengths.shape
    order = rng.permuted(np.broadcast_to(np.arange(pieces), (batch, pieces)), axis=1)
    shuffled = np.take_along_axis(lengths, order, axis=1)
    spare = haystack - 1 - shuffled.sum(axis=1, keepdims=True)
    before = np.sort(rng.integers(0, spare + 1, (batch, pieces)), axis=1)
    starts = 1 + before + np.cumsum(shuffled, axis=1) - shuffled
    out = np.empty_like(starts)
    np.put_along_axis(out, order, starts, axis=1)
    return out


def _echo(
    rng: np.random.Generator, ids: np.ndarray, kinds: np.ndarray, cfg: RecallConfig, haystack: int
) -> None:
    """Repeats stretches of filler further on. Facts are written over them, where they meet."""
    size, rows = cfg.echo_tokens, np.arange(len(ids))[:, None]
    for _ in range(cfg.echoes):
        to = rng.integers(1 + size, haystack - size + 1, len(ids))
        source = 1 + np.floor(rng.random(len(ids)) * (to - size)).astype(np.int64)
        span = np.arange(size)
        ids[rows, to[:, None] + span] = ids[rows, source[:, None] + span]
        kinds[rows, to[:, None] + span] = np.where(span < 2, REST, ANSWER)


def _put(ids: np.ndarray, at: np.ndarray, tokens: np.ndarray | int) -> None:
    """ids[b, at[b]] = tokens[b] where at >= 0."""
    rows = np.flatnonzero(at >= 0)
    ids[rows, at[rows]] = tokens[rows] if isinstance(tokens, np.ndarray) else tokens


def _write_facts(
    ids: np.ndarray,
    letters: Alphabet,
    start: np.ndarray,
    gap: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    key, value = letters.pair(keys), letters.pair(values)
    for f in range(start.shape[1]):
        at, here = start[:, f], start[:, f] >= 0
        behind = np.where(here, at + 1 + _STRING + gap[:, f], -1)
        _put(ids, at, letters.fact)
        for i in range(_STRING):
            _put(ids, np.where(here, at + 1 + i, -1), key[:, f, i])
            _put(ids, np.where(here, behind + i, -1), value[:, f, i])
        _put(ids, np.where(here, behind + _STRING, -1), letters.end)


def _unmark(kinds: np.ndarray, start: np.ndarray, length: np.ndarray) -> None:
    """Tokens of facts, and the first behind one, do not follow from an echo they stand in."""
    at = np.arange(kinds.shape[1])
    for f in range(start.shape[1]):
        first, last = start[:, f, None], (start + length)[:, f, None]
        kinds[(first >= 0) & (at >= first) & (at <= last)] = REST


def _choose(
    rng: np.random.Generator, count: np.ndarray, cfg: RecallConfig, batch: int
) -> np.ndarray:
    """The facts that each question asks for, distinct within it; [B, Q, A], -1 beyond its own."""
    shape, most = (batch, cfg.questions), cfg.facts[1]
    draw = np.where(np.arange(most) < count[:, None, None], rng.random((*shape, most)), 2.0)
    chosen = np.argsort(draw, axis=-1)[..., : cfg.asked[1]]
    asked = rng.integers(cfg.asked[0], cfg.asked[1] + 1, shape)
    return np.where(np.arange(cfg.asked[1]) < asked[..., None], chosen, -1)


def _write_questions(
    ids: np.ndarray,
    kinds: np.ndarray,
    letters: Alphabet,
    cfg: RecallConfig,
    haystack: int,
    asked: np.ndarray,
    keys: np.ndarray,
    values: np.ndarray,
) -> None:
    """Questions and answers from `haystack` on; behind a shorter one stands filler."""
    rows = np.arange(len(ids))
    for q in range(cfg.questions):
        facts = asked[:, q]
        number_of = np.sum(facts >= 0, axis=1)
        listed = np.where(number_of > 1, _STRING * number_of, 0)  # tokens that name the keys
        key = letters.pair(keys[rows[:, None], facts])
        value = letters.pair(values[rows[:, None], facts])
        at = np.full(len(ids), haystack + q * cfg.question_tokens)
        _put(ids, at, letters.ask)
        for a in range(cfg.asked[1]):
            for i in range(_STRING):
                here = (facts[:, a] >= 0) & (listed > 0)
                _put(ids, np.where(here, at + 1 + _STRING * a + i, -1), key[:, a, i])
        _put(ids, np.where(listed > 0, at + 1 + listed, -1), letters.answer)
        reply = at + 1 + np.where(listed > 0, listed + 1, 0)
        for a in range(cfg.asked[1]):
            here = facts[:, a] >= 0
            for i in range(_STRING):
                place = np.where(here, reply + 2 * _STRING * a + i, -1)
                _put(ids, place, key[:, a, i])
                _put(kinds, np.where(listed > 0, place, -1), ANSWER)
                place = np.where(here, place + _STRING, -1)
                _put(ids, place, value[:, a, i])
                _put(kinds, place, FIRST if i == 0 else ANSWER)
        last = reply + 2 * _STRING * number_of
        _put(ids, last, letters.end)
        _put(kinds, last, ANSWER)
