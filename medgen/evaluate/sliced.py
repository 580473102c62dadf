"""Sliced Wasserstein distance between patches on a Laplacian pyramid, after Karras et al. 2018; needs no weights. Used by run.py.

Unlike there, both sides are scaled by the statistics of the real side, so that wrong brightness or contrast is seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medgen import rng
from medgen.evaluate import intervals

PATCH_PIXELS = 7
COARSEST_PIXELS = 16
PROJECTIONS = 64
MOST_PATCHES = 65536  # per side and level
MOST_PATCHES_PER_IMAGE = 64
BINOMIAL = np.array([1, 4, 6, 4, 1], dtype=np.float32) / 16
BOOTSTRAP_REPLICATES = 200
BOOTSTRAP_BINS = 256
MOST_IMAGE_GROUPS = 50


@dataclass(frozen=True)
class SlicedDistance:
    """`value` is the mean over levels; `levels` maps the side length of a level in pixels to its distance."""

    value: float
    levels: dict[int, float]
    interval: tuple[float, float] | None


def level_sizes(size: int) -> list[int]:
    """Side lengths of the pyramid: halved down to 16 pixels."""
    sizes = [size]
    while sizes[-1] % 2 == 0 and sizes[-1] // 2 >= COARSEST_PIXELS:
        sizes.append(sizes[-1] // 2)
    return sizes


def pyramid(images: np.ndarray) -> list[np.ndarray]:
    """Laplacian levels of float [n,H,W], finest first; the last one is the blurred remainder."""
    levels = []
    current = images.astype(np.float32)
    for _ in level_sizes(images.shape[-1])[1:]:
        smaller = _blur(current)[:, ::2, ::2]
        levels.append(current - _enlarge(smaller, current.shape))
        current = smaller
    return [*levels, current]


def _blur(images: np.ndarray) -> np.ndarray:
    from scipy.ndimage import convolve1d

    return convolve1d(convolve1d(images, BINOMIAL, axis=1, mode="mirror"), BINOMIAL, axis=2, mode="mirror")


def _enlarge(images: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    spread = np.zeros(shape, dtype=np.float32)
    spread[:, ::2, ::2] = images
    return 4 * _blur(spread)


def patches(level: np.ndarray, count: int, seed: int, stream: str) -> np.ndarray:
    """`count` patches per image at random places, float32 [n, count, 49]. Image i has the same places on both sides."""
    generator = rng.numpy_generator(seed, stream, level.shape[-1])
    places = level.shape[-1] - PATCH_PIXELS + 1
    rows, columns = generator.integers(0, places, size=(2, len(level), count))
    windows = np.lib.stride_tricks.sliding_window_view(level, (PATCH_PIXELS, PATCH_PIXELS), axis=(1, 2))
    picked = windows[np.arange(len(level))[:, None], rows, columns]
    return picked.reshape(len(level), count, PATCH_PIXELS**2)


def distance(reference: np.ndarray, other: np.ndarray, seed: int, reference_groups: np.ndarray | None = None,
             other_groups: np.ndarray | None = None) -> SlicedDistance:
    """Distance between two sets of equal size, float [n,H,W], in standard deviations of the reference's patches.

    With groups (patients, images) also a 95% interval: both sides are resampled by group and the spread is centred on the
    value, because resampling alone moves a distance upwards. Raises ValueError for sets of unequal size."""
    if reference.shape != other.shape:
        raise ValueError(f"both sides must have the same shape, got {reference.shape} and {other.shape}")
    count = max(1, min(MOST_PATCHES_PER_IMAGE, MOST_PATCHES // len(reference)))
    levels: dict[int, float] = {}
    replicates = []
    for reference_level, other_level in zip(pyramid(reference), pyramid(other), strict=True):
        size = reference_level.shape[-1]
        projected = _project(patches(reference_level, count, seed, "swd_places"), patches(other_level, count, seed, "swd_places"), seed)
        levels[size] = _wasserstein(*projected)
        if reference_groups is not None and other_groups is not None:
            replicates.append(_replicates(projected, reference_groups, other_groups, seed))
    value = float(np.mean(list(levels.values())))
    return SlicedDistance(value, levels, _centred_interval(value, replicates, reference_groups))


def _project(reference: np.ndarray, other: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Scaled patches on random unit directions: two arrays [n, count, projections]."""
    directions = rng.numpy_generator(seed, "swd_directions").normal(size=(PATCH_PIXELS**2, PROJECTIONS))
    directions = (directions / np.linalg.norm(directions, axis=0)).astype(np.float32)
    mean, deviation = reference.mean(), reference.std()
    scale = deviation if deviation > 1e-8 else np.float32(1)
    return ((reference - mean) / scale) @ directions, ((other - mean) / scale) @ directions


def _wasserstein(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over projections of the exact one-dimensional distance of two samples of equal size."""
    flat = [np.sort(side.reshape(-1, PROJECTIONS), axis=0) for side in (reference, other)]
    return float(np.abs(flat[0] - flat[1]).mean())


def _replicates(projected: tuple[np.ndarray, np.ndarray], reference_groups: np.ndarray, other_groups: np.ndarray, seed: int) -> np.ndarray:
    """Bootstrap distances [replicates], from histograms per group: sorting again for every replicate would take minutes."""
    reference_codes, other_codes = _codes(reference_groups), _codes(other_groups)
    weights = [
        intervals.draw_weights(codes.max() + 1, BOOTSTRAP_REPLICATES, seed, stream).astype(np.float32)
        for codes, stream in ((reference_codes, "swd_bootstrap_real"), (other_codes, "swd_bootstrap_synthetic"))
    ]
    total = np.zeros(BOOTSTRAP_REPLICATES)
    for direction in range(PROJECTIONS):
        sides = [side[:, :, direction] for side in projected]
        edges = np.unique(np.quantile(np.concatenate(sides), np.linspace(0, 1, BOOTSTRAP_BINS)))
        if len(edges) < 2:
            continue
        below = [
            _shares_below(weight @ _histograms(side, codes, edges))
            for side, codes, weight in zip(sides, (reference_codes, other_codes), weights, strict=True)
        ]
        total += np.abs(below[0] - below[1]) @ np.diff(edges)
    return total / PROJECTIONS


def _codes(groups: np.ndarray) -> np.ndarray:
    """Group numbers per image; single images are joined to at most 50 blocks, which changes nothing but the cost."""
    names, codes = np.unique(groups, return_inverse=True)
    if len(names) == len(groups) and len(names) > MOST_IMAGE_GROUPS:
        return codes % MOST_IMAGE_GROUPS
    return codes


def _histograms(values: np.ndarray, codes: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Counts per group, float32 [groups, bins], of values [n, count]."""
    bins = np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
    flat = (codes[:, None] * (len(edges) - 1) + bins).ravel()
    counts = np.bincount(flat, minlength=(codes.max() + 1) * (len(edges) - 1))
    return counts.reshape(-1, len(edges) - 1).astype(np.float32)


def _shares_below(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts, axis=1) / counts.sum(axis=1, keepdims=True)


def _centred_interval(value: float, replicates: list[np.ndarray], reference_groups: np.ndarray | None) -> tuple[float, float] | None:
    if not replicates or reference_groups is None or len(np.unique(reference_groups)) < intervals.FEWEST_GROUPS:
        return None
    means = np.mean(replicates, axis=0)
    low, high = np.percentile(means - means.mean(), intervals.COVERAGE_PERCENTILES)
    return max(0.0, value + float(low)), value + float(high)
