"""Distances between two sets of features: Frechet, and kernel distances (KID, CMMD) with their intervals. Used by feature_scores.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from medgen.evaluate import intervals

REPLICATES = 200
BLOCK = 4096  # rows of features in memory at once
CMMD_SIGMA = 10.0
CMMD_SCALE = 1000.0
MOST_KERNEL_IMAGES = 5000  # a side; the kernel matrix is n x n, and more no longer moves the value


@dataclass(frozen=True)
class Moments:
    """Mean [d] of a set of features, and some R [r, d], r <= d, with R^T R = their covariance."""

    mean: np.ndarray
    root: np.ndarray


def moments(table: np.ndarray, rows: np.ndarray) -> Moments:
    """Of the `rows` of a table of features [n, d], read block by block. Raises ValueError below two rows."""
    count, width = len(rows), table.shape[1]
    if count < 2:
        raise ValueError(f"a covariance needs two images a side, got {count}")
    blocks = [rows[start : start + BLOCK] for start in range(0, count, BLOCK)]
    mean = np.sum([table[block].astype(np.float64).sum(axis=0) for block in blocks], axis=0) / count
    if count <= width:
        return Moments(mean, (table[rows].astype(np.float64) - mean) / np.sqrt(count - 1))
    covariance = np.zeros((width, width))
    for block in blocks:
        centred = table[block].astype(np.float64) - mean
        covariance += centred.T @ centred / (count - 1)
    values, vectors = np.linalg.eigh(covariance)
    return Moments(mean, np.sqrt(np.maximum(values, 0))[:, None] * vectors.T)


def frechet(first: Moments, second: Moments) -> float:
    """Squared Frechet distance of two Gaussians with these means and covariances.

    The trace of sqrt(S1 S2) is the sum of the singular values of R1 R2^T: no matrix root, no imaginary part, and right for
    fewer images than features too."""
    shared = np.linalg.svd(first.root @ second.root.T, compute_uv=False).sum()
    return float(((first.mean - second.mean) ** 2).sum() + (first.root**2).sum() + (second.root**2).sum() - 2 * shared)


@dataclass(frozen=True)
class KernelDistance:
    """`replicates` [r]: the distance of sets drawn anew, of which `interval` is the middle; None and None for few groups.

    Sets of as many groups, with one seed and stream, are drawn alike: the difference of their replicates is that of pairs."""

    value: float
    interval: tuple[float, float] | None
    replicates: np.ndarray | None


Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cubic(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(x.y/d + 1)^3 of features [n, d] and [m, d], [n, m]: the kernel of KID (Binkowski et al. 2018)."""
    return np.asarray((first @ second.T / first.shape[1] + 1) ** 3)


def gaussian(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1000 exp(-|x - y|^2 / 200) of features of length 1, [n, m]: the kernel and scale of CMMD (Jayasumana et al. 2024)."""
    units = [side / np.maximum(np.linalg.norm(side, axis=1, keepdims=True), 1e-12) for side in (first, second)]
    return np.asarray(CMMD_SCALE * np.exp((units[0] @ units[1].T - 1) / CMMD_SIGMA**2))


def discrepancy(
    of: Kernel, first: np.ndarray, second: np.ndarray, first_groups: np.ndarray, second_groups: np.ndarray, seed: int, stream: str
) -> KernelDistance:
    """Unbiased squared maximum mean discrepancy of whole sets of features [n, d] and [m, d] with a kernel; may be negative.

    Groups (patients, single images) are what varies independently. Two images of one group are never compared within a
    side: they resemble each other, and would push the distance of equal distributions above zero. Where every group is one
    image this is the usual estimate. The 95% interval draws groups of both sides anew; None with fewer than 5 on a side. Raises ValueError with a single group on a side."""
    codes = [np.unique(groups, return_inverse=True)[1] for groups in (first_groups, second_groups)]
    counts = [int(code.max()) + 1 for code in codes]
    if min(counts) < 2:
        raise ValueError("needs two groups a side")
    ones = [np.ones((1, count)) for count in counts]
    sides = [side.astype(np.float64) for side in (first, second)]
    within = [_by_group(of(side, side), code, code) for side, code in zip(sides, codes, strict=True)]
    for sums in within:
        np.fill_diagonal(sums, 0)
    every = (within[0], within[1], _by_group(of(*sides), *codes))
    value = float(_estimate(every, codes, ones)[0])
    if min(counts) < intervals.FEWEST_GROUPS:
        return KernelDistance(value, None, None)
    weights = [intervals.draw_weights(count, REPLICATES, seed, f"{stream}_{side}").astype(float) for side, count in enumerate(counts)]
    with np.errstate(invalid="ignore", divide="ignore"):  # of few groups, one may be all that is drawn: it has no pairs
        replicates = _estimate(every, codes, weights)
    low, high = np.percentile(replicates[np.isfinite(replicates)], intervals.COVERAGE_PERCENTILES)
    return KernelDistance(value, (float(low), float(high)), replicates)


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
