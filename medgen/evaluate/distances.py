"""Distances between two sets of features: Frechet, and the kernel distance of KID with its interval. Used by by_class.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medgen.evaluate import intervals

REPLICATES = 200
MOST_KERNEL_IMAGES = 5000  # a side; the kernel matrix is n x n, and more no longer moves the value


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of two Gaussians with the mean and covariance of features [n, d] and [m, d].

    The trace of sqrt(S1 S2) is the sum of the singular values of A B^T, where A and B are the centred features over
    sqrt(n - 1): no matrix root, no imaginary part, and right for fewer images than features too. Raises ValueError below two images."""
    if min(len(first), len(second)) < 2:
        raise ValueError(f"a covariance needs two images a side, got {len(first)} and {len(second)}")
    sides = [features.astype(np.float64) for features in (first, second)]
    means = [side.mean(axis=0) for side in sides]
    roots = [_root(side, mean) for side, mean in zip(sides, means, strict=True)]
    shared = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(((means[0] - means[1]) ** 2).sum() + sum((root**2).sum() for root in roots) - 2 * shared)


def _root(features: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Some R with R^T R = covariance, with at most d rows."""
    centred = (features - mean) / np.sqrt(len(features) - 1)
    if len(centred) <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


@dataclass(frozen=True)
class KernelDistance:
    value: float
    interval: tuple[float, float] | None


def kernel(first: np.ndarray, second: np.ndarray, first_groups: np.ndarray, second_groups: np.ndarray, seed: int, stream: str) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy with the kernel (x.y/d + 1)^3, of whole sets; may be negative.

    Groups (patients, single images) are what varies independently. Two images of one group are never compared within a
    side: they resemble each other, and would push the distance of equal distributions above zero. Where every group is one
    image this is the usual estimate. The 95% interval draws groups of both sides anew; None with fewer than 5 on a side. Raises ValueError with a single group on a side."""
    codes = [np.unique(groups, return_inverse=True)[1] for groups in (first_groups, second_groups)]
    counts = [int(code.max()) + 1 for code in codes]
    if min(counts) < 2:
        raise ValueError("needs two groups a side")
    ones = [np.ones((1, count)) for count in counts]
    sides = [side.astype(np.float64) for side in (first, second)]
    sums = (_within(sides[0], codes[0]), _within(sides[1], codes[1]), _between(sides, codes))
    value = float(_estimate(sums, codes, ones)[0])
    if min(counts) < intervals.FEWEST_GROUPS:
        return KernelDistance(value, None)
    weights = [intervals.draw_weights(count, REPLICATES, seed, f"{stream}_{side}").astype(float) for side, count in enumerate(counts)]
    with np.errstate(invalid="ignore", divide="ignore"):  # of few groups, one may be all that is drawn: it has no pairs
        replicates = _estimate(sums, codes, weights)
    low, high = np.percentile(replicates[np.isfinite(replicates)], intervals.COVERAGE_PERCENTILES)
    return KernelDistance(value, (float(low), float(high)))


def _cubic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first @ second.T / first.shape[1] + 1) ** 3


def _within(side: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Kernel sums between groups of one side [g, g], nothing within a group."""
    sums = _by_group(_cubic(side, side), code, code)
    np.fill_diagonal(sums, 0)
    return sums


def _between(sides: list[np.ndarray], codes: list[np.ndarray]) -> np.ndarray:
    return _by_group(_cubic(*sides), *codes)


def _by_group(matrix: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """The sums over the blocks of a matrix."""
    order = [np.argsort(code, kind="stable") for code in (rows, columns)]
    starts = [np.searchsorted(code[place], np.arange(code.max() + 1)) for code, place in zip((rows, columns), order, strict=True)]
    return np.add.reduceat(np.add.reduceat(matrix[np.ix_(*order)], starts[0], axis=0), starts[1], axis=1)


def _estimate(sums: tuple[np.ndarray, np.ndarray, np.ndarray], codes: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    """The distance for every row of weights [r, g] per group."""
    sizes = [np.bincount(code).astype(float) for code in codes]
    totals = [weight @ size for weight, size in zip(weights, sizes, strict=True)]
    result = -2 * np.einsum("rg,gh,rh->r", weights[0], sums[2], weights[1], optimize=True) / (totals[0] * totals[1])
    for side in (0, 1):
        pairs = totals[side] ** 2 - (weights[side] ** 2) @ (sizes[side] ** 2)
        result += np.einsum("rg,gh,rh->r", weights[side], sums[side], weights[side], optimize=True) / pairs
    return result
