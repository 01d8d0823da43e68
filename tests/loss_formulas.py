"""The losses as the specification writes them, in float64 NumPy, and random batches for them."""

from collections.abc import Iterator

import numpy as np

from train.run.losses import Targets

LAYERS, ROWS, COLUMNS = 2, 3, 7


def case(seed: int = 0) -> tuple[np.ndarray, Targets]:
    """Random logits and targets with garbage where nothing is valid; one row is all invalid."""
    rng = np.random.default_rng(seed)
    shape = (ROWS, COLUMNS)
    # Multiples of 1/4, other fractions per layer: no tie, no kink within a finite difference.
    logits = rng.integers(-12, 13, (LAYERS, *shape)) / 4 + np.array([0.03, 0.11])[:, None, None]
    valid = rng.random(shape) < 0.8
    valid[-1] = False
    valid[0, :2] = True
    labels = rng.random(shape) < 0.4
    labels[0, :2] = [True, False]
    targets = Targets(
        labels=labels.astype(np.float32),
        weights=rng.uniform(0.5, 2, shape).astype(np.float32),
        mass=np.where(valid, rng.exponential(0.5, shape), np.nan).astype(np.float32),
        valid=valid,
        stands_for=np.where(labels, 1, rng.uniform(1, 9, shape)).astype(np.float32),
    )
    return np.where(valid, logits, np.nan).astype(np.float32), targets


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def numpy_bce(z: np.ndarray, t: Targets, smoothing: float = 0.0, gamma: float = 0.0) -> np.ndarray:
    """Of probabilities, as the spec writes it, element by element."""
    total = np.zeros(len(z))
    for layer, row, column in np.argwhere(np.broadcast_to(t.valid, z.shape)):
        p = sigmoid(z[layer, row, column])
        y = t.labels[row, column] * (1 - 2 * smoothing) + smoothing
        cross = -y * np.log(p) - (1 - y) * np.log(1 - p)
        p_t = p * y + (1 - p) * (1 - y)
        total[layer] += t.weights[row, column] * (1 - p_t) ** gamma * cross
    return total / max(t.valid.sum(), 1)


def pairs(t: Targets) -> Iterator[tuple[int, int, int]]:
    for row in range(len(t.labels)):
        for i in np.flatnonzero(t.valid[row] & (t.labels[row] == 1)):
            for j in np.flatnonzero(t.valid[row] & (t.labels[row] == 0)):
                yield row, i, j


def numpy_pairwise(z: np.ndarray, t: Targets, margin: float | None) -> np.ndarray:
    total, count = np.zeros(len(z)), 0
    for row, i, j in pairs(t):
        gap = z[:, row, i] - z[:, row, j]
        total += -np.log(sigmoid(gap)) if margin is None else np.maximum(margin - gap, 0)
        count += 1
    return total / max(count, 1)


def numpy_mass(z: np.ndarray, t: Targets, rate: float) -> np.ndarray:
    y = np.where(t.valid, 1 - np.exp(-rate * t.mass.astype(np.float64)), 0).astype(np.float64)
    p = sigmoid(np.where(t.valid, z, 0))
    cross = -y * np.log(p) - (1 - y) * np.log(1 - p)
    return np.where(t.valid, cross, 0).sum(axis=(1, 2)) / max(t.valid.sum(), 1)


def numpy_share(z: np.ndarray, t: Targets) -> np.ndarray:
    """Every candidate written out as many times as it stands for, as a distribution of entries."""
    lost, total = np.zeros(len(z)), 0.0
    for row in range(len(t.labels)):
        valid = t.valid[row]
        count, mass = t.stands_for[row][valid].astype(np.float64), t.mass[row][valid]
        weight = float((count * mass).sum())
        total += weight
        for layer in range(len(z)) if weight else ():
            q = np.exp(z[layer, row][valid])
            p, q = mass / weight, q / (count * q).sum()
            lost[layer] += weight * (count * p * np.log(np.maximum(p, 1e-30) / q)).sum()
    return lost / max(total, 1e-12)


def numpy_missed(z: np.ndarray, t: Targets, budget: np.ndarray, temperature: float) -> np.ndarray:
    lost, total = np.zeros(len(z)), 0.0
    for row in range(len(budget)):
        valid = t.valid[row]
        count, mass = t.stands_for[row][valid].astype(np.float64), t.mass[row][valid]
        total += float((count * mass).sum())
        for layer in range(len(z)):
            x = z[layer, row][valid]
            low, high = -1e4, 1e4
            for _ in range(200):
                middle = (low + high) / 2
                kept = (count * sigmoid(np.clip((x - middle) / temperature, -500, 500))).sum()
                low, high = (middle, high) if kept > budget[row] else (low, middle)
            kept = sigmoid(np.clip((x - (low + high) / 2) / temperature, -500, 500))
            lost[layer] += (count * mass * (1 - kept)).sum()
    return lost / max(total, 1e-12)


def numpy_term(name: str, logits: np.ndarray, targets: Targets) -> np.ndarray:
    z = logits.astype(np.float64)
    if name == "focal":
        return numpy_bce(z, targets, gamma=2)
    return numpy_mass(z, targets, 1.0) if name == "mass" else numpy_pairwise(z, targets, None)
