"""Bootstrap intervals over patients (or images where there are no patients). Used by every metric of this folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy import special

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


@dataclass(frozen=True)
class Jackknifed:
    """A statistic of a sample, and of the sample without each of its groups, float64 [groups]."""

    value: float
    without: np.ndarray

    @property
    def variance(self) -> float:
        count = len(self.without)
        return float((count - 1) / count * ((self.without - self.without.mean()) ** 2).sum())


OfSums = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]  # of the number of values, their sum and that of their squares


def jackknifed(values: np.ndarray, groups: np.ndarray, statistic: OfSums) -> Jackknifed:
    """values float [n], about 0 as far as the statistic allows, for their squares are summed; names of groups [n]."""
    names, codes = np.unique(groups, return_inverse=True)
    columns = np.stack([np.ones(len(values)), values, values**2], axis=1)
    sums = np.zeros((len(names), 3))
    np.add.at(sums, codes, columns)
    with np.errstate(divide="ignore", invalid="ignore"):  # without a group there may be nothing left; the interval is then None
        whole, without = statistic(*columns.sum(axis=0)), statistic(*(columns.sum(axis=0) - sums).T)
    return Jackknifed(float(whole), without)


def difference_interval(first: Jackknifed, second: Jackknifed) -> tuple[float, float] | None:
    """95% interval of first - second: Student's t with the degrees of freedom of Welch, from what each group changes.

    None with fewer than 5 groups on a side, or where the statistic is not finite without one of them."""
    sides, values = (first, second), np.concatenate([first.without, second.without, [first.value, second.value]])
    if min(len(side.without) for side in sides) < FEWEST_GROUPS or not np.isfinite(values).all():
        return None
    gap, variance = first.value - second.value, first.variance + second.variance
    if variance == 0:
        return gap, gap
    freedom = variance**2 / sum(side.variance**2 / (len(side.without) - 1) for side in sides)
    half = float(special.stdtrit(freedom, COVERAGE_PERCENTILES[1] / 100)) * np.sqrt(variance)
    return float(gap - half), float(gap + half)


def describe(groups: np.ndarray, unit: str, method: str = "bootstrap") -> str:
    """The words for a protocol: over which groups the interval is, or why there is none."""
    count = len(np.unique(groups))
    if count < FEWEST_GROUPS:
        plural = unit if count == 1 else unit + "s"
        return f"no interval: {count} {plural}, at least {FEWEST_GROUPS} are needed"
    return f"95% {method} over {count} {unit}s"
