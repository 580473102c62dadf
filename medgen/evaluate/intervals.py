"""Bootstrap intervals over patients (or images where there are no patients). Used by every metric of this folder."""

from __future__ import annotations

import numpy as np

from medgen import rng

REPLICATES = 1000
# With fewer groups the percentiles of a bootstrap are the extremes of the sample, not a 95% interval
FEWEST_GROUPS = 5
COVERAGE_PERCENTILES = (2.5, 97.5)
Z = 1.959964  # the same coverage for a normal distribution


def draw_weights(groups: int, replicates: int, seed: int, stream: str) -> np.ndarray:
    """How often each group is drawn in each replicate, int64 [replicates, groups]; every row sums to `groups`."""
    generator = rng.numpy_generator(seed, stream)
    return generator.multinomial(groups, np.full(groups, 1 / groups), size=replicates)


def mean_interval(values: np.ndarray, memberships: list[np.ndarray], seed: int, stream: str) -> tuple[float, float] | None:
    """95% interval of a mean, resampling whole groups.

    values float [n]. memberships: one array [n] of group names per member of an observation (one for a single image, two
    for a pair of images: a pair counts as often as both its groups are drawn). None with fewer than 5 groups."""
    names, codes = np.unique(np.concatenate(memberships), return_inverse=True)
    if len(names) < FEWEST_GROUPS:
        return None
    codes = codes.reshape(len(memberships), len(values))
    weights = draw_weights(len(names), REPLICATES, seed, stream)
    of_observation = np.prod([weights[:, member] for member in codes], axis=0).astype(float)
    total = of_observation.sum(axis=1)
    usable = total > 0
    means = (of_observation[usable] @ values) / total[usable]
    low, high = np.percentile(means, COVERAGE_PERCENTILES)
    return float(low), float(high)


def share_interval(share: float, groups: np.ndarray) -> tuple[float, float] | None:
    """95% Wilson interval of a share, counting groups and not images; a bootstrap of 0 or 1 would have no width."""
    count = len(np.unique(groups))
    if count < FEWEST_GROUPS:
        return None
    middle = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z / (1 + Z**2 / count) * np.sqrt(share * (1 - share) / count + Z**2 / (4 * count**2))
    # rounded: the lower end of a share of 0 is 0, not 7e-18
    return max(0.0, round(float(middle - half), 12)), min(1.0, round(float(middle + half), 12))


def describe(groups: np.ndarray, unit: str, method: str = "bootstrap") -> str:
    """The words for a protocol: over which groups the interval is, or why there is none."""
    count = len(np.unique(groups))
    if count < FEWEST_GROUPS:
        plural = unit if count == 1 else unit + "s"
        return f"no interval: {count} {plural}, at least {FEWEST_GROUPS} are needed"
    return f"95% {method} over {count} {unit}s"
