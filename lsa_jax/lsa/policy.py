"""How scores become a resident set: the settings, in plain Python (LSA spec 2.4, 2.6)."""

import dataclasses
import math
from typing import Literal, get_args

from lsa_jax.config_checks import number, refusal
from lsa_jax.lsa.indexer_config import Score

Policy = Literal["budget", "published", "threshold", "top"]
MAX_THRESHOLD = 1 - 2**-24  # the largest float32 below 1: scores are compared in float32
EVEN_ODDS = 0.5  # the threshold of probabilities where none is given
MAX_COUNT = 2**31 - 1  # entries and pages are counted in int32


def check_threshold(field: str, value: object) -> None:
    """Refuse a threshold that is not strictly between 0 and 1 in float32."""
    if not 0 < number(field, value, float) <= MAX_THRESHOLD:
        raise refusal(field, value, "in (0, 1)")


def default_threshold(score: Score) -> float | str:
    """The threshold where none is given, for reports."""
    return EVEN_ODDS if score == "sigmoid" else "even share"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Settings of `resident_set.select`; static under jit. Scores are those of an ensemble.

    `policy`:
      - "budget" (ours): pages with an entry to keep, most worth first, up to the allowed pages.
      - "threshold" (published Mode A, spec 2.4): every page with an entry to keep, and so exactly
        the published entries where a page is one entry. It is "budget" with room for everything,
        under a name of its own so that a report says which was meant.
      - "published" (published Mode B, spec 2.6): the `recall_pages` pages densest in entries above
        the threshold, the newest and the first pages forced, the page in formation counted too.
      - "top": the highest pages whatever the threshold says; for arms that must fill a budget.

    An entry is kept when its score is strictly above `threshold` (None: 0.5 of probabilities, as
    published, an even share of shares), when it is among the last
    `recency` entries or the first `sink` ones. `cap` (0: none) bounds the kept entries of a row:
    recent and first ones stay, then the highest scores. `sticky` keeps what was resident before.
    `recall_pages` bounds the pages of each row; None leaves that to the budget.

    Shares add up to one whether or not anything is needed. With a `recall_gate`, a row wants its
    forced (and sticky) pages alone where its best other entries, as many as `recency` and `sink`
    always keep, score no more than `recall_gate` times what these score together (policies
    "budget" and "threshold").
    """

    policy: Policy = "budget"
    threshold: float | None = None
    recency: int = 2048
    sink: int = 0
    cap: int = 0
    sticky: bool = False
    recall_pages: int | None = None
    recall_gate: float | None = None

    def __post_init__(self) -> None:
        if self.policy not in get_args(Policy):
            raise refusal("policy", self.policy, f"one of {get_args(Policy)}")
        if self.threshold is not None:
            check_threshold("threshold", self.threshold)
        for name in ("recency", "sink", "cap"):
            if not 0 <= number(name, getattr(self, name), int) <= MAX_COUNT:
                raise refusal(name, getattr(self, name), "an int in [0, 2^31)")
        pages = self.recall_pages
        if pages is not None and not 1 <= number("recall_pages", pages, int) <= MAX_COUNT:
            raise refusal("recall_pages", pages, "None or an int in [1, 2^31)")
        if not isinstance(self.sticky, bool):
            raise refusal("sticky", self.sticky, "true or false")
        self._check_gate()
        if self.policy in ("published", "top"):
            if self.cap:
                raise refusal("cap", self.cap, f"0 with policy {self.policy!r}")
            if self.sticky:
                raise refusal("sticky", self.sticky, f"false with policy {self.policy!r}")

    def _check_gate(self) -> None:
        gate = self.recall_gate
        if gate is None:
            return
        if not 0 < number("recall_gate", gate, float) < math.inf:
            raise refusal("recall_gate", gate, "a finite number above 0")
        if self.policy in ("published", "top"):
            raise refusal("recall_gate", gate, f"not given with policy {self.policy!r}")
        if not self.recency and not self.sink:
            raise refusal("recall_gate", gate, "given with a recency or a sink above 0")
