"""Precision, recall, density and coverage: does each image lie near the other set's images, as near as those lie to each other? Used by feature_scores.py.

Kynkaanniemi et al. 2019 (precision, recall) and Naeem et al. 2020 (density, coverage), with k = 5 nearest neighbours."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEIGHBOURS = 5
MOST_IMAGES = 5000  # a side: every distance between two images is computed
BLOCK = 1024


@dataclass(frozen=True)
class Overlap:
    """One number per image, whose means are the four scores.

    precision, density [m]: of each image of the second set, whether (and in how many) balls around images of the first set it lies.
    recall, coverage [n]: of each image of the first set, whether it lies in a ball of the second, and whether its own ball holds any of those."""

    precision: np.ndarray
    recall: np.ndarray
    density: np.ndarray
    coverage: np.ndarray


def overlap(first: np.ndarray, second: np.ndarray) -> Overlap:
    """Of features [n, d] (real) and [m, d] (synthetic). A ball reaches to the k-th nearest image of its own set.

    Raises ValueError for sets of no more than k images."""
    if min(len(first), len(second)) <= NEIGHBOURS:
        raise ValueError(f"the {NEIGHBOURS} nearest neighbours need more than {NEIGHBOURS} images a side, got {len(first)} and {len(second)}")
    radii = [_radii(side) for side in (first, second)]
    inside_first = np.zeros(len(second))  # in how many balls of the first set
    inside_second = np.zeros(len(first))
    nearest = np.full(len(first), np.inf)
    for start in range(0, len(second), BLOCK):
        block = slice(start, start + BLOCK)
        between = _distances(first, second[block])
        inside_first[block] = (between <= radii[0][:, None]).sum(axis=0)
        inside_second += (between <= radii[1][None, block]).sum(axis=1)
        nearest = np.minimum(nearest, between.min(axis=1))
    return Overlap(
        precision=(inside_first > 0).astype(float), recall=(inside_second > 0).astype(float),
        density=inside_first / NEIGHBOURS, coverage=(nearest <= radii[0]).astype(float),
    )  # fmt: skip


def _radii(side: np.ndarray) -> np.ndarray:
    """The squared distance of each image to its k-th nearest other one, [n]."""
    found = []
    for start in range(0, len(side), BLOCK):
        block = _distances(side[start : start + BLOCK], side)
        rows = np.arange(len(block))
        block[rows, start + rows] = np.inf  # not to itself
        found.append(np.partition(block, NEIGHBOURS - 1, axis=1)[:, NEIGHBOURS - 1])
    return np.concatenate(found)


def _distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances [n, m] in float64."""
    sides = [side.astype(np.float64) for side in (first, second)]
    norms = [(side**2).sum(axis=1) for side in sides]
    return np.maximum(norms[0][:, None] + norms[1][None] - 2 * sides[0] @ sides[1].T, 0)
