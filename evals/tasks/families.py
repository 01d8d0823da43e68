"""Every family by its name: what builds its haystack and questions."""

import functools
from collections.abc import Callable, Iterable

from evals.tasks import chains, copying, counting, memory, needles
from evals.tasks.needles import Needles
from evals.tasks.plan import Draw, Plan
from lsa_jax.config_checks import refusal

Builder = Callable[[Draw], Plan]

_NEEDLES = {
    "niah_single_1": Needles(filler="noise", distractors=False),
    "niah_single_2": Needles(distractors=False),
    "niah_single_3": Needles(distractors=False, value="code"),
    "niah_multikey_1": Needles(),
    "niah_multikey_2": Needles(packed=True),
    "niah_multikey_3": Needles(packed=True, key="code", value="code"),
    "niah_multivalue": Needles(several="values"),
    "niah_multiquery": Needles(several="keys"),
}

FAMILIES: dict[str, Builder] = {
    "recall": copying.build_recall,
    **{name: functools.partial(needles.build, family=kind) for name, kind in _NEEDLES.items()},
    "vt": chains.build_tracking,
    "cwe": counting.build_common,
    "fwe": counting.build_frequent,
    "qa_1": chains.build_one_hop,
    "qa_2": chains.build_two_hops,
    **{f"chat_{t}": functools.partial(memory.build_chat, topic=t) for t in memory.TOPICS},
    "multiple_choice": needles.build_choice,
    "mrcr": memory.build_repetition,
    "recite": copying.build_recite,
    "context_free": copying.build_context_free,
    "plain": copying.build_plain,
}


def check_families(where: str, names: Iterable[str]) -> None:
    """Raises ConfigError for a name that is no family's."""
    for name in names:
        if name not in FAMILIES:
            raise refusal(where, name, f"one of {', '.join(FAMILIES)}")
