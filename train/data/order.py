"""The order of an epoch's samples: shuffled, of like lengths, from few documents at a time.

An epoch takes the documents in a random order. The samples of some documents in a row, a *group*,
are mixed: shuffled, then sorted into padded sizes, cut into batches, and the batches shuffled. So
that every group has whole batches, the last of its documents may go on in the next group; only the
last batch of an epoch may be short, and every epoch has as many batches.
"""

import bisect
import dataclasses
import itertools

import numpy as np


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """All samples of a corpus, by document and token, and the sizes their candidates are padded to.

    `documents`, `tokens` and `slots` are int32 [S]; `sizes` ascend, the last one holds them all.
    """

    documents: np.ndarray
    tokens: np.ndarray
    slots: np.ndarray
    sizes: np.ndarray


@dataclasses.dataclass(frozen=True)
class Group:
    """Batches `first`.. of an epoch, up to the next group's, are of these documents."""

    first: int
    documents: np.ndarray


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """The batches of an epoch.

    `samples` int32 [steps, batch] are rows of the table, -1 behind the last of a short batch;
    `candidates` int64 [steps] is the padded size of each batch.
    """

    samples: np.ndarray
    candidates: np.ndarray
    groups: tuple[Group, ...]

    def around(self, step: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Documents of a batch's group, of the next group, and the share of the group's batches
        that are done with this one.
        """
        at = bisect.bisect_right([group.first for group in self.groups], step) - 1
        group, following = self.groups[at], self.groups[at + 1 : at + 2]
        end = following[0].first if following else len(self.samples)
        coming = following[0].documents if following else group.documents[:0]
        return group.documents, coming, (step + 1 - group.first) / (end - group.first)


def epoch_order(
    table: SampleTable, *, batch: int, mixed_documents: int, seed: int, epoch: int
) -> EpochOrder:
    """The order of one epoch: a function of its arguments only."""
    rng = np.random.default_rng([seed, epoch])
    documents, starts = np.unique(table.documents, return_index=True)
    ends = np.append(starts[1:], len(table.documents))
    samples = np.arange(len(table.documents), dtype=np.int32)
    shuffled = rng.permutation(len(documents))
    spans = [samples[starts[d] : ends[d]] for d in shuffled]
    stream = np.concatenate(spans)
    cuts = np.cumsum([len(span) for span in spans])[mixed_documents - 1 :: mixed_documents]
    cuts = np.unique([0, *(cuts[cuts < len(stream)] // batch * batch), len(stream)])
    rows, sizes, groups, first = [], [], [], 0
    for begin, end in itertools.pairwise(cuts.tolist()):
        part = _batches(rng, table, stream[begin:end], batch)
        rows.append(part)
        sizes.append(_candidates(table, part))
        groups.append(Group(first, np.unique(table.documents[stream[begin:end]])))
        first += len(part)
    return EpochOrder(np.concatenate(rows), np.concatenate(sizes), tuple(groups))


def _batches(
    rng: np.random.Generator, table: SampleTable, samples: np.ndarray, batch: int
) -> np.ndarray:
    """Samples of a group as batches of like sizes, [n, batch], in random order."""
    samples = rng.permutation(samples)
    size = np.searchsorted(table.sizes, table.slots[samples])
    # From the largest on: what is left over of a size is padded a little less than it could be.
    samples = samples[np.argsort(-size, kind="stable")]
    short = -len(samples) % batch
    rows = np.append(samples, np.full(short, np.iinfo(np.int32).max, np.int32)).reshape(-1, batch)
    rows = np.sort(rows, axis=1)  # neighbours are of one document, and read once
    rows[rows == np.iinfo(np.int32).max] = -1
    return rng.permutation(rows)


def _candidates(table: SampleTable, rows: np.ndarray) -> np.ndarray:
    slots = np.where(rows >= 0, table.slots[rows], 0)
    return table.sizes[np.searchsorted(table.sizes, slots.max(axis=1))]
