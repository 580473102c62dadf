"""Overlap and distance of binary masks, and the size of what they show. Used by the structure and utility stages, and for folders of masks.

Masks are [n, H, W]. Both empty: Dice and IoU are 1. One empty: they are 0, and no surface distance exists (NaN, to be left out and counted)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import ndimage
from scipy.spatial import ConvexHull
from scipy.spatial.distance import pdist

from medgen import rng
from medgen.errors import InputError

PERCENTILE = 95
EVERY_NEIGHBOUR = np.ones((3, 3))  # pixels that touch at a corner are one lesion
BIN_EDGES_MM = (10, 20, 30)  # RANO-BM (Lin et al., Lancet Oncol 2015): below 10 mm a lesion is not measurable
BINS = ("<10 mm", "10-20 mm", "20-30 mm", ">=30 mm")
NO_LESION = ""


def require_masks(values: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """bool [n, H, W] of arrays that hold 0 and 1 only. Raises InputError with the name of the first sample that is no mask."""
    if values.ndim != 3 or len(values) != len(names):
        raise InputError(f"masks are [n, height, width], one for each of {len(names)} names; got an array of {values.shape}")
    for name, value in zip(names, values, strict=True):
        if not np.isin(value, (0, 1)).all():
            found = np.unique(value)
            raise InputError(f"{name} is no mask: it holds {len(found)} values from {found[0]:g} to {found[-1]:g}, a mask holds 0 and 1 only")
    return values.astype(bool)


def dice(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """2 |A and B| / (|A| + |B|), float64 [n]."""
    common, total = _common_and_total(first, second)
    return np.where(total == 0, 1.0, 2 * common / np.maximum(total, 1))


def iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """|A and B| / |A or B|, float64 [n]."""
    common, total = _common_and_total(first, second)
    return np.where(total == 0, 1.0, common / np.maximum(total - common, 1))


def _common_and_total(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    _require_same_form(first, second)
    return (first & second).sum(axis=(1, 2)), first.sum(axis=(1, 2)) + second.sum(axis=(1, 2))


def _require_same_form(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise InputError(f"masks of {first.shape} cannot be compared with masks of {second.shape}")
    assert first.dtype == bool and second.dtype == bool


def hd95_mm(first: np.ndarray, second: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """95th percentile of the distances between the surfaces, the larger of the two directions; float64 [n], NaN where a mask is empty.

    spacing_mm [n, 2]: between rows, between columns. As MONAI's compute_hausdorff_distance with percentile=95."""
    _require_same_form(first, second)
    return np.array([_hd95_of_pair(*pair) for pair in zip(first, second, spacing_mm, strict=True)], dtype=float)


def _hd95_of_pair(first: np.ndarray, second: np.ndarray, spacing_mm: np.ndarray) -> float:
    if not first.any() or not second.any():
        return np.nan
    surfaces = [_surface(first), _surface(second)]
    directed = [ndimage.distance_transform_edt(~target, sampling=spacing_mm)[start] for start, target in (surfaces, surfaces[::-1])]
    return float(max(np.percentile(distances, PERCENTILE) for distances in directed))


def _surface(mask: np.ndarray) -> np.ndarray:
    """Pixels of the mask with a neighbour outside it, or at the edge of the image."""
    return mask & ~ndimage.binary_erosion(mask)


def longest_diameter_mm(mask: np.ndarray, spacing_mm: np.ndarray) -> float:
    """Of the largest lesion in a mask [H, W], between the outermost corners of its pixels; 0 if there is none."""
    labels, count = ndimage.label(mask, structure=EVERY_NEIGHBOUR)
    return max((_diameter_of(np.argwhere(labels == number + 1), spacing_mm) for number in range(count)), default=0.0)


def _diameter_of(pixels: np.ndarray, spacing_mm: np.ndarray) -> float:
    """pixels [k, 2]: row and column of each."""
    corners = np.concatenate([pixels + np.array([row, column]) for row in (0, 1) for column in (0, 1)]) * spacing_mm
    return float(pdist(corners[ConvexHull(corners).vertices]).max())


def lesion_bins(masks: np.ndarray, spacing_mm: np.ndarray) -> np.ndarray:
    """Which of BINS the largest lesion of each mask is in, by its longest diameter in the slice; text [n], NO_LESION for an empty mask.

    spacing_mm [n, 2]: between rows, between columns."""
    diameters = [longest_diameter_mm(mask, spacing) for mask, spacing in zip(masks, spacing_mm, strict=True)]
    return np.array([BINS[np.digitize(diameter, BIN_EDGES_MM)] if diameter > 0 else NO_LESION for diameter in diameters])


def strangers(groups: np.ndarray, seed: int, stream: str) -> np.ndarray:
    """For each of n samples another one of another group, int [n], -1 where there is none: the shuffled control.

    One permutation without a fixed point, the turn of a random order that leaves the fewest samples with their own group."""
    order = rng.permutation(len(groups), seed, stream)
    ordered = groups[order]
    clashes = [int((ordered == np.roll(ordered, -turn)).sum()) for turn in range(1, len(groups))]
    chosen = np.full(len(groups), -1)
    if clashes:
        turned = np.roll(order, -(1 + int(np.argmin(clashes))))
        chosen[order] = np.where(groups[turned] == ordered, -1, turned)
    return chosen
