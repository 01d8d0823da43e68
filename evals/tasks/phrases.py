"""The wording of facts and questions, compiled to ids; tests see wordings that training never does.

In a phrasing "{key}" stands for tokens that carry their own space. The last phrasing of every set
is held out: only tests use it, in HELD_OUT of the cases, however many others there are.
"""

import dataclasses
import functools
import random
import re
from collections.abc import Mapping

from evals.mini.vocabulary import vocabulary
from lsa_jax.text.special import ASSISTANT, BOS, END_THINK, EOS, THINK, USER

Tokens = list[int]
Slots = Mapping[str, Tokens]

_SLOT = re.compile(r"\{(\w+)\}")


def _id(token: str) -> int:
    return vocabulary().id_of[token]


BOS_ID, EOS_ID, USER_ID = _id(BOS), _id(EOS), _id(USER)
ASSISTANT_ID, THINK_ID, END_THINK_ID = _id(ASSISTANT), _id(THINK), _id(END_THINK)


HELD_OUT = 0.2
_OTHER = 0.4  # of the words of a reworded phrasing


@dataclasses.dataclass(frozen=True)
class Phrase:
    """A compiled phrasing: ids, and names of slots between them."""

    name: str
    held_out: bool
    parts: tuple[Tokens | str, ...]

    def fill(self, slots: Slots) -> Tokens:
        """The ids with every slot filled; KeyError where one is not given."""
        out: Tokens = []
        for part in self.parts:
            out += slots[part] if isinstance(part, str) else part
        return out


def compile_phrase(name: str, text: str, held_out: bool) -> Phrase:
    """Ids of a phrasing whose words are all in the vocabulary."""
    pieces = _SLOT.split(text)  # literal, slot, literal, ..
    parts = [p if i % 2 else vocabulary().encode(p) for i, p in enumerate(pieces) if p]
    return Phrase(name, held_out, tuple(parts))


@functools.cache
def _compiled(texts: tuple[str, ...]) -> tuple[Phrase, ...]:
    last = len(texts) - 1
    return tuple(compile_phrase(str(i), text, i == last) for i, text in enumerate(texts))


def pick(rnd: random.Random, texts: tuple[str, ...], *, test: bool) -> Phrase:
    """One of the phrasings this split may use, those of training equally often."""
    return _compiled(texts)[index_of(rnd, len(texts), test=test)]


def index_of(rnd: random.Random, count: int, *, test: bool) -> int:
    """Which of `count` phrasings `pick` takes."""
    if test and rnd.random() < HELD_OUT:
        return count - 1
    return int(rnd.random() * (count - 1))


def reworded(rnd: random.Random, phrase: Phrase, words: tuple[int, ...]) -> Phrase:
    """The phrasing with about `_OTHER` of its words replaced by words at random. Slots, their order
    and the length stay."""
    known = _as_set(words)

    def part(ids: Tokens | str) -> Tokens | str:
        if isinstance(ids, str):
            return ids
        changes = (id_ in known and rnd.random() < _OTHER for id_ in ids)
        return [
            words[int(rnd.random() * len(words))] if changed else id_
            for id_, changed in zip(ids, changes, strict=True)
        ]

    return dataclasses.replace(phrase, parts=tuple(part(ids) for ids in phrase.parts))


@functools.cache
def _as_set(words: tuple[int, ...]) -> frozenset[int]:
    return frozenset(words)


@functools.cache
def literal(text: str) -> tuple[int, ...]:
    """Ids of a fixed text."""
    return tuple(vocabulary().encode(text))


def turn(question: Tokens, *, think: bool = False) -> Tokens:
    """A user's message and the mark that opens the answer, as V4 writes them (spec 11.2)."""
    return [USER_ID, *question, ASSISTANT_ID, THINK_ID if think else END_THINK_ID]


# Needles. `noun` and `nouns` follow from the value's type.
NOUNS = {
    "number": ((" number", " numbers"), (" code", " codes"), (" password", " passwords")),
    "name": ((" word", " words"), (" name", " names"), (" label", " labels")),
    "code": ((" key", " keys"), (" tag", " tags"), (" entry", " entries")),
}
FACT = (
    " One of the special magic{nouns} for{key} is{value}.",
    " The{noun} for{key} is{value}.",
    "{key} has the{noun}{value}.",
    " Note{key}{value}.",
    " Remember that{key} goes with{value}.",
    " The secret{noun} of{key} is :{value}.",
    " For{key}, the{noun} is{value}.",
    "{value} is the{noun} of{key}.",
    " Give{key} the{noun}{value}.",
    " The{noun} that belongs to{key} is{value}.",
    " We gave{key} the{noun}{value}.",
    " The{noun} given to{key} was{value}.",
)
ASK_ONE = (
    "What is the special magic{noun} for{key}?",
    "What is the{noun} for{key}?",
    "Which{noun} does{key} have?",
    "Tell me the{noun} of{key}.",
    "Find the{noun} that goes with{key}.",
    "Give me the{noun} for{key}.",
    "What{noun} was given to{key}?",
    "Name the{noun} that belongs to{key}.",
    "What was the{noun} of{key}?",
)
ASK_ALL = (
    "What are all the special magic{nouns} for{key}?",
    "List all{nouns} for{key}.",
    "Which{nouns} does{key} have?",
    "Find every{noun} of{key}.",
    "Give me all{nouns} of{key}.",
    "Name every{noun} for{key}.",
    "Tell me all the{nouns} that go with{key}.",
)
ASK_SEVERAL = (
    "What are the special magic{nouns} for{keys}?",
    "List the{nouns} for{keys}.",
    "Which{nouns} do{keys} have?",
    "Find the{nouns} of{keys}.",
    "Give me the{nouns} of{keys}.",
    "Name the{nouns} for{keys}.",
    "Tell me the{nouns} that go with{keys}.",
)
ASK_CHOICE = (
    "Which is the{noun} for{key}?{choices}",
    "Choose the{noun} of{key}:{choices}",
    "What is the{noun} for{key}?{choices}",
    "Name the{noun} for{key}:{choices}",
    "Tell me the{noun} of{key}.{choices}",
    "Find the{noun} that{key} has.{choices}",
)

# Variables: how a chain begins, how it goes on. The two belong together.
CHAIN_START = (
    " VAR{new} ={value}.",
    " The value{value} is stored in{new}.",
    " Write{value} into{new}.",
    "{value} goes to{new}.",
    " Set{new} to{value}.",
    " The variable{new} is{value}.",
    "{new} has the value{value}.",
    " Give{new} the value{value}.",
    " From now{new} is{value}.",
    " We write{value} in{new}.",
    "{value} is now in{new}.",
    " Let{new} hold{value}.",
)
CHAIN_HOP = (
    " VAR{new} = VAR{old}.",
    " The value of{old} is copied into{new}.",
    " Copy{old} to{new}.",
    "{old} goes to{new}.",
    " Set{new} to{old}.",
    " The variable{new} is equal to{old}.",
    "{new} has the value of{old}.",
    " Give{new} what{old} holds.",
    " From now{new} is the same as{old}.",
    " We write{old} in{new}.",
    "{old} is now in{new}.",
    " Let{new} hold the value of{old}.",
)
ASK_CHAIN = (
    "Find all variables that have the value{value}.",
    "Which variables hold{value}?",
    "List the variables that are equal to{value}.",
    "Tell me all variables that hold{value}.",
    "Where is{value} stored?",
    "Give me every variable with{value}.",
    "Name all variables with the value{value}.",
)

# People in documents.
PERSON = (
    " Document{number}.{name} was born in{town}. She works as a{job}. Her pet is a{pet}.",
    " Document{number}.{name} lives with a{pet}. He was born in{town} and works as a{job}.",
    " Document{number}. The{job}{name} was born in{town} and has a{pet}.",
    " Document{number}. In{town} lives{name}, a{job} with a{pet}.",
    " Document{number}.{name} is a{job} from{town} with a{pet}.",
    " Document{number}.{name}, born in{town}, is a{job} and has a{pet}.",
)
ASK_PERSON = {
    "town": (
        "Where was{name} born?",
        "In which town was{name} born?",
        "Tell me where{name} was born.",
    ),
    "job": ("What is the job of{name}?", "What work does{name} do?", "Tell me the job of{name}."),
    "pet": ("Which pet does{name} have?", "Name the pet of{name}.", "What is the pet of{name}?"),
}
WORKS = (
    "{name} works for{company}.",
    " The company of{name} is{company}.",
    "{name} found a job at{company}.",
    "{company} gave a job to{name}.",
    " You can find{name} at{company}.",
    "{name} is with{company}.",
    " Since last year{name} works at{company}.",
)
LOCATED = (
    "{company} is located in{town}.",
    " The office of{company} is in{town}.",
    "{company} has its building in{town}.",
    " In{town} is the building of{company}.",
    "{company} is a company in{town}.",
    " The company{company} is from{town}.",
    " You can find{company} in{town}.",
)
ASK_WORKS_IN = (
    "In which town does{name} work?",
    "Where is the company of{name} located?",
    "Find the town where{name} works.",
    "Tell me the town where{name} works.",
    "Which town does{name} work in?",
    "Name the town in which{name} has a job.",
)

# Counting.
ASK_COMMON = (
    "What are the{count} most common words in the list?",
    "List the{count} words that appear most often.",
    "Which{count} words occur most often?",
    "Name the{count} most frequent words.",
)
ASK_FREQUENT = (
    "What are the three most frequent coded words?",
    "List the three coded words that appear most often.",
    "Which three coded words are most common?",
    "Name the three most common coded words.",
)

# Conversations over several sessions.
SESSION = (" Session{number}.", " Session{number} :")
CHAT_FACT = (
    " The{item} of{key} is{value}.",
    "{key} said that the{item} is{value}.",
    " I think{key} has the{item}{value}.",
    "{value} is the{item} of{key}.",
    " You know that{key} has the{item}{value}.",
    " The{item} that{key} has is{value}.",
    " For{key} the{item} was{value}.",
)
CHAT_UPDATE = (
    " The{item} of{key} is now{value}.",
    "{key} said that the{item} is now{value}.",
    " From today{key} has the{item}{value}.",
    " Now{value} is the{item} of{key}.",
    " The new{item} of{key} is{value}.",
    " Since today the{item} of{key} is{value}.",
    " For{key} the{item} changed to{value}.",
)
ASK_CHAT = (
    "What is the{item} of{key}?",
    "What is the{item} of{key} now?",
    "Tell me the{item} of{key}.",
    "Name the{item} of{key}.",
    "What{item} does{key} have?",
    "Which{item} does{key} have?",
)
CHAT_EVENT = (
    " Today I visited{place}.",
    " I went to{place}.",
    " We traveled to{place}.",
    " I took a trip to{place}.",
)
ASK_ORDER = (
    "Where was I first,{one} or{other}?",
    "Which did I visit first,{one} or{other}?",
    "What came first,{one} or{other}?",
    "Tell me which was before the other,{one} or{other}.",
)
CHAT_ITEMS = (
    "doctor",
    "teacher",
    "hobby",
    "pet",
    "color",
    "song",
    "street",
    "hotel",
    "car",
    "friend",
)
UNKNOWN = " I do not know"

# Repetitions, passages, constants.
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
POEM = (
    " Here is a poem about{key} :{text}.",
    " A poem about{key} :{text}.",
    " Poem about{key} :{text}.",
    " This poem is about{key} :{text}.",
)
ASK_POEM = (
    "Repeat the{nth} poem about{key}.",
    "Write the{nth} poem about{key} again.",
    "Give me the{nth} poem about{key}.",
    "Tell me the{nth} poem about{key}.",
    "Write the{nth} poem about{key}.",
    "What was the{nth} poem about{key}?",
)
PASSAGE = (
    " Passage{key} starts here.{text} End of passage{key}.",
    " Here is passage{key} :{text} End of passage{key}.",
    " Passage{key} :{text} End.",
)
ASK_PASSAGE = (
    "Recite passage{key}.",
    "Repeat passage{key} word for word.",
    "Write passage{key} again.",
)
ASK_CONSTANT = (
    "What is the capital of{key}?",
    "Which town is the capital of{key}?",
    "Name the capital of{key}.",
    "Tell me the capital of{key}.",
)
