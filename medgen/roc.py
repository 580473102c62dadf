"""The area under the ROC curve, of two sides and of several classes. Used by families that are selected by it and by evaluate/."""

from __future__ import annotations

import numpy as np


def area_under_curve(labels: np.ndarray, probabilities: np.ndarray, weights: np.ndarray | None = None) -> float | None:
    """One class against the rest, averaged over classes; None unless every class is there.

    labels int [n], probabilities [n, classes]; weights [n], at least 0: how often each sample counts."""
    counted = np.ones(len(labels)) if weights is None else weights
    areas = [binary_area(probabilities[:, number], labels == number, counted) for number in range(probabilities.shape[1])]
    known = [area for area in areas if area is not None]
    return float(np.mean(known)) if len(known) == len(areas) else None


def binary_area(scores: np.ndarray, is_positive: np.ndarray, weights: np.ndarray) -> float | None:
    """How often a positive scores higher than a negative, a tie counting half; None if one side has no weight. All [n].

    The rank form (Mann and Whitney): a bootstrap asks a thousand times, and a library's curve takes milliseconds each."""
    levels, place = np.unique(scores, return_inverse=True)
    positive, negative = (np.bincount(place[side], weights[side], len(levels)) for side in (is_positive, ~is_positive))
    pairs = positive.sum() * negative.sum()
    if pairs == 0:
        return None
    below = np.cumsum(negative) - negative
    return float((positive * (below + negative / 2)).sum() / pairs)
