"""What a training step gets: samples of all target layers, padded to one number of candidates."""

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Array, Bool, Float

from train.data.documents import LoadedDocument
from train.data.sampling import Sample

AnyArray = np.ndarray | jax.Array


class Targets(NamedTuple):
    """What a batch of samples should be scored like; all [B, C]."""

    labels: Float[Array, "B C"]  # 1: read within the window; 0: not
    weights: Float[Array, "B C"]  # of the losses that weigh elements
    mass: Float[Array, "B C"]  # attention mass over the window, all CSA layers
    valid: Bool[Array, "B C"]
    stands_for: Float[Array, "B C"]  # candidates of the full pool that a drawn one represents


class Batch(NamedTuple):
    """B samples of C candidates at L target layers; NumPy arrays, or JAX arrays on devices.

    Rows beyond the last sample of an epoch have `sample` -1 and no valid candidate; what is not
    valid is 0.
    """

    hidden: AnyArray  # bfloat16 or float32 [L, B, D]
    positions: AnyArray  # int32 [B]
    entries: AnyArray  # int32 [B]: those that exist at the token
    keys: AnyArray  # e4m3, bfloat16 or float32 [L, B, C, K]
    key_scale: AnyArray | None  # float32 [L, B, C], with e4m3 only
    targets: Targets  # [B, C] each
    sample: AnyArray  # int64 [B, 2]: document, token


class Row(NamedTuple):
    """One sample to be laid out; `offset` is added to its position."""

    document: LoadedDocument
    token: int
    offset: int
    sample: Sample


def plain(array: np.ndarray) -> np.ndarray:
    """The array as integers of its width: NumPy copies rows of its own types much faster."""
    return array.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize])


def assemble(rows: Sequence[Row], *, size: int, candidates: int, like: LoadedDocument) -> Batch:
    """A batch of `size` rows, the first of them `rows`, of `candidates` each.

    `like` is any document of the corpus: dtypes and sizes are its own.
    """
    layers, width = like.keys.shape[0], like.keys.shape[2]
    hidden = np.zeros((layers, size, like.hidden.shape[2]), like.hidden.dtype)
    positions, entries = np.zeros(size, np.int32), np.zeros(size, np.int32)
    keys = np.empty((layers, size, candidates, width), plain(like.keys).dtype)
    scale = None if like.scale is None else np.empty((layers, size, candidates), np.float32)
    labels, weights, mass, stands = np.zeros((4, size, candidates), np.float32)
    valid = np.zeros((size, candidates), bool)
    number = np.full((size, 2), -1, np.int64)
    for b, (document, token, offset, sample) in enumerate(rows):
        count = len(sample.index)
        plain(hidden)[:, b] = plain(document.hidden)[token]
        positions[b] = document.positions[token] + offset
        entries[b] = document.labels.entries_at(token)
        number[b] = document.labels.number, token
        labels[b, :count], weights[b, :count] = sample.labels, sample.weights
        mass[b, :count], stands[b, :count] = sample.mass, sample.stands_for
        valid[b, :count] = sample.index >= 0
        _gather(document, sample.index, keys[:, b], None if scale is None else scale[:, b])
    keys[:, len(rows) :] = 0
    if scale is not None:
        scale[:, len(rows) :] = 0
    targets = Targets(*cast(Any, (labels, weights, mass, valid, stands)))
    keys = keys.view(like.keys.dtype)
    return Batch(hidden, positions, entries, keys, scale, targets, number)


def _gather(
    document: LoadedDocument, index: np.ndarray, keys: np.ndarray, scale: np.ndarray | None
) -> None:
    """Copies the keys of candidates to [L, C, K], straight to their place; 0 for the others."""
    count, absent = len(index), np.flatnonzero(index < 0)
    for layer, source in enumerate(plain(document.keys)):
        # "clip" also lets NumPy write to `out` without a copy in between.
        np.take(source, index, axis=0, out=keys[layer, :count], mode="clip")
        if scale is not None and document.scale is not None:
            np.take(document.scale[layer], index, out=scale[layer, :count], mode="clip")
    for plane in (keys, *([] if scale is None else [scale])):
        plane[:, absent] = 0
        plane[:, count:] = 0
