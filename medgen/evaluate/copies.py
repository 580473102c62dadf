"""Are synthetic images copies of training slices? Nearest training slice, judged by held-out real slices. Used by run.py.

Fidelity rises when a model memorises, so the evaluation never prints one without the other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

COMPARED_PIXELS = 32
THRESHOLD_PERCENTILE = 1.0
FEWEST_HELD_OUT = 100  # a 1st percentile of fewer is their minimum


@dataclass(frozen=True)
class Copies:
    """How strongly each synthetic image singles out one training patient.

    `ratios` float [n]: distance to the nearest training slice over the distance to the nearest slice of any other training
    patient, 0 for an exact copy, near 1 for a stranger. A ratio, because a blurred image is near to everything.
    `held_out_ratios`: the same for real slices of patients outside the training set.
    `nearest` int64 [n]: the position of the nearest training slice. `threshold`: 1st percentile of held_out_ratios."""

    threshold: float
    nearest: np.ndarray
    ratios: np.ndarray
    held_out_ratios: np.ndarray


def find_copies(synthetic: np.ndarray, held_out: np.ndarray, train: np.ndarray, train_patients: np.ndarray) -> Copies:
    """All images float32 [n,D] from `shrink`; distances are root mean squares. Raises ValueError with one training patient."""
    if len(np.unique(train_patients)) < 2:
        raise ValueError("a ratio needs two training patients")
    nearest, ratios = _ratios(synthetic, train, train_patients)
    _, held_out_ratios = _ratios(held_out, train, train_patients)
    threshold = float(np.percentile(held_out_ratios, THRESHOLD_PERCENTILE))
    return Copies(threshold, nearest, ratios, held_out_ratios)


def shrink(images: np.ndarray) -> np.ndarray:
    """float [n,C,H,W] in [0,1] as rows to compare, float32 [n,D]: at most 32 x 32 pixels per channel, antialiased."""
    from medgen.data.resize import resize_images

    count, _, height, _ = images.shape
    if height > COMPARED_PIXELS:
        images = resize_images(images.reshape(-1, *images.shape[2:]).astype(np.float32), COMPARED_PIXELS)
    return images.reshape(count, -1).astype(np.float32)


def _ratios(items: np.ndarray, train: np.ndarray, patients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest training slice of each item, and its distance over that of the nearest slice of another patient."""
    names = np.unique(patients)
    closest = np.empty((len(items), len(names)), dtype=np.int64)
    distances = np.empty((len(items), len(names)))
    for column, name in enumerate(names):
        rows = np.flatnonzero(patients == name)
        block = train[rows]
        squared = (block**2).sum(1)[None] - 2 * items @ block.T  # the items' own norm does not move the minimum
        closest[:, column] = rows[squared.argmin(axis=1)]
        # computed again directly: the expansion above loses digits for near-copies
        distances[:, column] = np.sqrt(((items - train[closest[:, column]]) ** 2).mean(axis=1, dtype=np.float64))
    order = np.argsort(distances, axis=1, kind="stable")
    every = np.arange(len(items))
    first, second = distances[every, order[:, 0]], distances[every, order[:, 1]]
    ratios = np.divide(first, second, out=np.ones(len(items)), where=second > 0)
    return closest[every, order[:, 0]], ratios
