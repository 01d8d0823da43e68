"""Facts that build on each other: variable tracking, and questions on people in documents."""

from evals.tasks import phrases
from evals.tasks.phrases import literal
from evals.tasks.plan import Answer, Ask, Draw, Plan, ask
from evals.tasks.strings import Tokens, index_tokens

_HOP_TOKENS = 11
_DOCUMENT_TOKENS = 24
_PEOPLE = 2  # who work for the same company, at most
JOBS = ("baker", "cook", "dancer", "doctor", "driver", "farmer", "lawyer", "painter", "sailor")
JOBS += ("singer", "soldier", "student", "teacher", "writer")
PETS = ("bear", "cat", "cow", "dog", "eagle", "fish", "fox", "goat", "horse", "lion", "mouse")
PETS += ("pig", "rabbit", "sheep", "snake", "tiger")


def build_tracking(draw: Draw) -> Plan:
    """Chains of variables, one a question; the answer names a chain from its beginning.

    A variable is copied only after it was set. Chains have their own values, and mix in the text.
    """
    index = phrases.index_of(draw.rnd, len(phrases.CHAIN_START), test=draw.test)
    wording = [
        draw.reworded(phrases.compile_phrase(str(index), texts[index], index == len(texts) - 1))
        for texts in (phrases.CHAIN_START, phrases.CHAIN_HOP)
    ]
    most = draw.cfg.hops[1] + 1
    chains: list[tuple[Tokens, list[Tokens]]] = []
    values: set[tuple[int, ...]] = set()
    order: list[tuple[float, int, int]] = []
    for chain in range(draw.fitting(min(draw.questions, draw.cfg.facts[1]), most * _HOP_TOKENS)):
        while tuple(value := draw.strings.number(3)) in values:
            pass
        values.add(tuple(value))
        names = draw.strings.names(draw.between(draw.cfg.hops) + 1)
        places = sorted(draw.rnd.random() for _ in names)
        order += [(at, chain, hop) for hop, at in enumerate(places)]
        chains.append((value, names))
    order.sort()
    pieces, piece_of = [], {}
    for _, chain, hop in order:
        value, names = chains[chain]
        slots = {"value": value, "new": names[hop], "old": names[hop - 1]}
        piece_of[chain, hop] = len(pieces)
        pieces.append(wording[min(hop, 1)].fill(slots))
    asks = []
    for chain, (value, names) in enumerate(chains):
        own = tuple(piece_of[chain, hop] for hop in range(len(names)))
        asks.append(_ask_chain(draw, value, names, own, wording[0].held_out))
    return Plan(pieces=pieces, asks=asks, filler=draw.kind())


def _ask_chain(
    draw: Draw, value: Tokens, names: list[Tokens], pieces: tuple[int, ...], held_out: bool
) -> Ask:
    phrase, answer = draw.pick(phrases.ASK_CHAIN), Answer().follow(value)
    for name in names:
        answer.find(name)
    return ask(
        phrase,
        phrases.turn(phrase.fill({"value": value})),
        answer,
        rule="all",
        accepted=names,
        pieces=pieces,
        held_out=held_out,
    )


def build_one_hop(draw: Draw) -> Plan:
    """Documents, each about one person's town, job and pet; questions on one of these."""
    wanted = draw.facts()
    pieces: list[Tokens] = []
    people: list[tuple[dict[str, Tokens], int, bool]] = []
    for i in range(draw.fitting(wanted, _DOCUMENT_TOKENS)):
        phrase = draw.pick(phrases.PERSON)
        slots = {
            "number": index_tokens(i + 1),
            "name": draw.strings.name(),
            "town": draw.strings.name(),
            "job": list(literal(" " + draw.one_of(JOBS))),
            "pet": list(literal(" " + draw.one_of(PETS))),
        }
        pieces.append(phrase.fill(slots))
        people.append((slots, i, phrase.held_out))
    asks = []
    for slots, piece, held_out in draw.shuffled(people)[: draw.questions]:
        topic = draw.one_of(list(phrases.ASK_PERSON))
        phrase = draw.pick_as_is(phrases.ASK_PERSON[topic])
        asks.append(
            ask(
                phrase,
                phrases.turn(phrase.fill(slots)),
                Answer().follow(slots["name"]).find(slots[topic]),
                rule="all",
                accepted=[slots[topic]],
                pieces=(piece,),
                held_out=held_out,
            )
        )
    return Plan(pieces=pieces, asks=asks, filler=draw.kind())


def build_two_hops(draw: Draw) -> Plan:
    """People's companies, companies' towns; answers think of the company, then name the town."""
    count = draw.fitting(draw.facts(), 2 * _HOP_TOKENS)
    companies: list[dict[str, Tokens]] = []
    while len(companies) < count:
        pair = {"company": draw.strings.name(), "town": draw.strings.name()}
        companies += [pair] * (1 + int(draw.rnd.random() * _PEOPLE))
    people = [{"name": draw.strings.name(), **pair} for pair in companies[:count]]
    facts: list[tuple[str, Tokens, bool]] = []
    for slots in people:
        facts.append(_fact(draw, phrases.WORKS, slots, "name"))
    towns = {tuple(slots["company"]): slots for slots in people}
    for slots in towns.values():
        facts.append(_fact(draw, phrases.LOCATED, slots, "company"))
    facts = draw.shuffled(facts)
    where = {key: i for i, (key, _, _) in enumerate(facts)}
    asks = []
    for slots in draw.shuffled(people)[: draw.questions]:
        steps = (where[_key(slots["name"])], where[_key(slots["company"])])
        asks.append(_ask_town(draw, slots, steps, any(facts[i][2] for i in steps)))
    return Plan(pieces=[piece for _, piece, _ in facts], asks=asks, filler=draw.kind())


def _key(name: Tokens) -> str:
    return " ".join(map(str, name))


def _fact(
    draw: Draw, texts: tuple[str, ...], slots: dict[str, Tokens], subject: str
) -> tuple[str, Tokens, bool]:
    """Whom a fact is about, its tokens, and whether its wording is held out."""
    phrase = draw.pick(texts)
    return _key(slots[subject]), phrase.fill(slots), phrase.held_out


def _ask_town(draw: Draw, slots: dict[str, Tokens], pieces: tuple[int, ...], held_out: bool) -> Ask:
    phrase = draw.pick(phrases.ASK_WORKS_IN)
    answer = Answer().follow(slots["name"]).find(slots["company"])
    answer.follow([phrases.END_THINK_ID, *slots["company"]]).find(slots["town"])
    return ask(
        phrase,
        phrases.turn(phrase.fill(slots), think=True),
        answer,
        rule="all",
        accepted=[slots["town"]],
        pieces=pieces,
        held_out=held_out,
    )
