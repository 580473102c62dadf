"""How alike groups of subjects are: standardised mean differences and tests, one value per subject. Used by match.py and split.py.

Standardised mean difference of two groups: |mean - mean| / sqrt((variance + variance) / 2), where a share p has the
variance p(1 - p); of more than two groups, the largest of any pair."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from medgen.prepare.table import Subject

ROUNDING = 1e-9  # square years: less than that is none
FEWEST_EXPECTED = 5.0  # below this count in a cell of a 2 x 2 table the chi-squared approximation is poor


@dataclass(frozen=True)
class Test:
    """A p-value and the name of the test that gave it."""

    p: float
    name: str


@dataclass(frozen=True)
class Alikeness:
    """Standardised mean differences and tests by what they are about; a difference is infinite between groups without any spread."""

    differences: dict[str, float]
    tests: dict[str, Test]

    @property
    def worst_p(self) -> float:
        return min((test.p for test in self.tests.values()), default=1.0)

    def record(self) -> dict[str, Any]:
        """For JSON, which has no infinity: null."""
        return {
            "standardised_mean_differences": {name: value if math.isfinite(value) else None for name, value in self.differences.items()},
            "tests": {name: {"p": test.p, "test": test.name} for name, test in self.tests.items()},
        }


@dataclass(frozen=True)
class Measures:
    """What is measured of everybody: `values` [n, k], by column its name and whether it is a share (0 or 1)."""

    names: tuple[str, ...]
    is_share: np.ndarray
    values: np.ndarray


def measures_of(subjects: Sequence[Subject]) -> Measures:
    """Age, and one column per sex."""
    names, columns, shares = [], [], []
    if subjects and subjects[0].age_years is not None:
        names.append("age")
        columns.append([float(subject.age_years or 0) for subject in subjects])
        shares.append(False)
    for sex in sorted({subject.sex for subject in subjects if subject.sex is not None}):
        names.append(f"share of {sex}")
        columns.append([float(subject.sex == sex) for subject in subjects])
        shares.append(True)
    return Measures(tuple(names), np.array(shares, bool), np.array(columns, float).reshape(len(columns), len(subjects)).T)


def pairwise_differences(count: np.ndarray, total: np.ndarray, squares: np.ndarray, is_share: np.ndarray) -> np.ndarray:
    """[..., pairs, k] from the sums of every group: count [..., groups], total and squares [..., groups, k]."""
    n = count[..., None]
    mean = total / n
    unbiased = (squares - total * mean) / np.maximum(n - 1, 1)
    variance = np.where(is_share, mean * (1 - mean), np.where(unbiased > ROUNDING, unbiased, 0))
    first, second = (np.array(side) for side in zip(*combinations(range(count.shape[-1]), 2), strict=True))
    apart = np.abs(mean[..., first, :] - mean[..., second, :])
    spread = np.sqrt((variance[..., first, :] + variance[..., second, :]) / 2)
    alike = apart < 1e-12
    return np.where(alike, 0.0, np.where(spread > 0, apart / np.where(spread > 0, spread, 1), np.inf))


def compare(sides: Mapping[str, Sequence[Subject]]) -> Alikeness:
    """Of two or more sides, none of them empty."""
    everybody = [subject for side in sides.values() for subject in side]
    weights = np.ones(len(everybody))
    return Alikeness(_differences(sides, weights), _tests(sides))


def image_differences(sides: Mapping[str, Sequence[Subject]]) -> dict[str, float]:
    """The same differences with every subject counted once per image: what a network sees. For information; images are no sample for a test."""
    return _differences(sides, np.array([len(subject.images) for side in sides.values() for subject in side], float))


def _differences(sides: Mapping[str, Sequence[Subject]], weights: np.ndarray) -> dict[str, float]:
    measured = measures_of([subject for side in sides.values() for subject in side])
    side_of = np.repeat(np.arange(len(sides)), [len(side) for side in sides.values()])
    count, total, squares = group_sums(measured.values, weights, side_of, len(sides))
    largest = pairwise_differences(count, total, squares, measured.is_share).max(axis=0)
    return {name: float(value) for name, value in zip(measured.names, largest, strict=True)}


def group_sums(values: np.ndarray, weights: np.ndarray, group_of: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Count [groups], total and squares [groups, k] of values [n, k], everybody counted as often as its weight says."""
    count = np.bincount(group_of, weights, groups)
    total, squares = np.zeros((2, groups, values.shape[1]))
    np.add.at(total, group_of, weights[:, None] * values)
    np.add.at(squares, group_of, weights[:, None] * values**2)
    return count, total, squares


def _tests(sides: Mapping[str, Sequence[Subject]]) -> dict[str, Test]:
    """Of what is known of everybody: ages by ranks, sexes by counts."""
    everybody = [subject for side in sides.values() for subject in side]
    tests = {}
    if everybody[0].age_years is not None:
        tests["age"] = age_test([[float(subject.age_years or 0) for subject in side] for side in sides.values()])
    if everybody[0].sex is not None:
        sexes = sorted({str(subject.sex) for subject in everybody})
        tests["sex"] = sex_test(np.array([[sum(subject.sex == sex for subject in side) for sex in sexes] for side in sides.values()]))
    return tests


def age_test(sides: Sequence[Sequence[float]]) -> Test:
    """Mann-Whitney U of two sides, Kruskal-Wallis of more."""
    from scipy import stats

    name = "Mann-Whitney U" if len(sides) == 2 else "Kruskal-Wallis"
    if len({age for side in sides for age in side}) == 1:
        return Test(1.0, name)
    found = stats.mannwhitneyu(*sides) if len(sides) == 2 else stats.kruskal(*sides)
    return Test(float(found.pvalue), name)


def sex_test(counts: np.ndarray) -> Test:
    """Chi-squared of the counts [sides, sexes]; Fisher's exact test of a 2 x 2 table with few people."""
    from scipy import stats

    if counts.shape[1] == 1:
        return Test(1.0, "chi-squared")
    expected = stats.contingency.expected_freq(counts)
    if counts.shape == (2, 2) and expected.min() < FEWEST_EXPECTED:
        return Test(float(stats.fisher_exact(counts).pvalue), "Fisher's exact")
    return Test(float(stats.chi2_contingency(counts).pvalue), "chi-squared")
