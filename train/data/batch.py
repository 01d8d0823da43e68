"""What a training step gets: samples of all target layers, padded to one number of candidates."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from train.data.documents import LabelledDocument
from train.data.sampling import Sample

AnyArray = Any  # NumPy's on the host, JAX's in a step


class Targets(NamedTuple):
    """What a batch of samples should be scored like; all [B, C]."""

    labels: Float[Array, "B C"]  # 1: read within the window; 0: not
    weights: Float[Array, "B C"]  # of the losses that weigh elements
    mass: Float[Array, "B C"]  # attention mass over the window, all CSA layers
    valid: Bool[Array, "B C"]
    stands_for: Float[Array, "B C"]  # candidates of the full pool that a drawn one represents


class Drawn(NamedTuple):
    """B samples of C candidates, by the numbers of their entries; as few bytes as will do.

    Rows beyond the last sample of an epoch have document and token -1, and no valid candidate. What
    is not valid has `index` -1, and is 0 in all else. What a sample's candidates have in common is
    said once, in its `grades`; see `sampling.Sample`.
    """

    rows: AnyArray  # int32 [B, 4]: document, token, position, entries that exist at the token
    grades: AnyArray  # float32 [B, G, 3]: label, weight, what a candidate of the grade stands for
    index: AnyArray  # int32 [B, C]: entries of the row's document
    codes: AnyArray  # uint8 [B, C]: the grade of each
    mass: AnyArray  # float32 [B, C], or [B, 0] where nothing needs it

    @property
    def sample(self) -> AnyArray:
        """Document and token, int32 [B, 2]."""
        return self.rows[:, :2]

    @property
    def positions(self) -> AnyArray:
        """Positions of the tokens, int32 [B]."""
        return self.rows[:, 2]

    @property
    def entries(self) -> AnyArray:
        """Entries that exist at the tokens, int32 [B]."""
        return self.rows[:, 3]

    @property
    def targets(self) -> Targets:
        """What the candidates should be scored like."""
        numpy = isinstance(self.codes, np.ndarray)
        take = np.take_along_axis if numpy else jnp.take_along_axis
        grade = [take(self.grades[..., i], self.codes.astype(np.int32), axis=1) for i in range(3)]
        valid = self.index >= 0
        labels, weights, stands_for = (part * valid for part in grade)
        mass = self.mass if self.mass.shape[1] else labels * 0
        return Targets(labels, weights, mass, valid, stands_for)


class Batch(NamedTuple):
    """Drawn samples with hidden states at L target layers (0 in rows without a sample).

    Their keys are on the devices already (`train.run.key_pool`).
    """

    hidden: AnyArray  # bfloat16 or float32 [L, B, W, D], of the last W tokens, the row's own behind
    drawn: Drawn

    @property
    def sample(self) -> AnyArray:
        """Document and token of each row, int32 [B, 2]."""
        return self.drawn.sample

    @property
    def targets(self) -> Targets:
        """What the candidates should be scored like."""
        return self.drawn.targets


class Row(NamedTuple):
    """One sample to be laid out; `offset` is added to its position."""

    document: LabelledDocument
    token: int
    offset: int
    sample: Sample


def assemble(rows: Sequence[Row], *, size: int, candidates: int, grades: int, mass: bool) -> Drawn:
    """`size` rows, the first of them `rows`, of `candidates` each."""
    made = Drawn(
        np.zeros((size, 4), np.int32),
        np.zeros((size, grades, 3), np.float32),
        np.full((size, candidates), -1, np.int32),
        np.zeros((size, candidates), np.uint8),
        np.zeros((size, candidates if mass else 0), np.float32),
    )
    made.rows[len(rows) :, :2] = -1
    for b, (document, token, offset, sample) in enumerate(rows):
        count, labels = len(sample.index), document.labels
        position = document.positions[token] + offset
        made.rows[b] = labels.number, token, position, labels.entries_at(token)
        made.grades[b] = sample.grades
        made.index[b, :count] = sample.index
        made.codes[b, :count] = sample.codes
        if mass:
            made.mass[b, :count] = sample.mass
    return made
