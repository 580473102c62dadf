"""Statistics of a test set under a bootstrap of its patients, and what a difference of two of them says. Used by comparison.py.

Every statistic takes how often each patient is drawn, [replicates, patients], and gives [replicates] (NaN where a class is missing), so that
all arms can be drawn with the same patients: their differences are paired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from scipy import special

from medgen.evaluate import intervals
from medgen.evaluate.intervals import COVERAGE_PERCENTILES, FEWEST_GROUPS

POWER_Z = intervals.Z + 0.841621  # two-sided 5%, 80% power
CONFIDENCE = 0.975
Better = Literal["lower", "higher"]


class Statistic(Protocol):
    @property
    def patients(self) -> int:
        """How many it is about: those with an image that counts."""
        ...

    def of(self, weights: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class MeanOfShares:
    """The mean over columns of a ratio of sums: numerators and denominators [patients, columns]."""

    numerators: np.ndarray
    denominators: np.ndarray

    @property
    def patients(self) -> int:
        return int(self.denominators.any(axis=1).sum())

    def of(self, weights: np.ndarray) -> np.ndarray:
        total = weights @ self.denominators
        shares = np.divide(weights @ self.numerators, total, out=np.full(total.shape, np.nan), where=total > 0)
        means: np.ndarray = shares.mean(axis=1)
        return means


@dataclass(frozen=True)
class MeanOfAreas:
    """AUC of each class against the rest, averaged (as roc.area_under_curve). won [classes, patients, patients]: over the images of a class
    that the first patient has and the others that the second has, how often the first is given the higher probability, ties half."""

    won: np.ndarray
    of_class: np.ndarray  # [patients, classes], images
    of_others: np.ndarray

    @property
    def patients(self) -> int:
        return len(self.of_class)

    def of(self, weights: np.ndarray) -> np.ndarray:
        pairs = (weights @ self.of_class) * (weights @ self.of_others)
        won = np.stack([np.einsum("rp,rp->r", weights @ of_one, weights) for of_one in self.won], axis=1)
        areas = np.divide(won, pairs, out=np.full(pairs.shape, np.nan), where=pairs > 0)
        means: np.ndarray = areas.mean(axis=1)
        return means


def per_patient(values: np.ndarray, patients: np.ndarray, count: int) -> np.ndarray:
    """Sums [count, columns] of values [n, columns]; patients int [n]."""
    totals = np.zeros((count, values.shape[1]))
    np.add.at(totals, patients, values)
    return totals


def balanced_accuracy(labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray, count: int) -> Statistic:
    """Mean over classes of the share that is right."""
    truth = np.eye(probabilities.shape[1])[labels]
    right = truth * (probabilities.argmax(axis=1) == labels)[:, None]
    return MeanOfShares(per_patient(right, patients, count), per_patient(truth, patients, count))


def macro_f1(labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray, count: int) -> Statistic:
    """Mean over classes of 2 true positives / (taken for it + of it)."""
    identity = np.eye(probabilities.shape[1])
    truth, taken = identity[labels], identity[probabilities.argmax(axis=1)]
    return MeanOfShares(per_patient(2 * truth * taken, patients, count), per_patient(truth + taken, patients, count))


def area_under_curve(labels: np.ndarray, probabilities: np.ndarray, patients: np.ndarray, count: int) -> Statistic:
    truth = np.eye(probabilities.shape[1])[labels]
    won = np.stack([_won(probabilities[:, number], labels == number, patients, count) for number in range(probabilities.shape[1])])
    return MeanOfAreas(won, per_patient(truth, patients, count), per_patient(1 - truth, patients, count))


def _won(scores: np.ndarray, is_class: np.ndarray, patients: np.ndarray, count: int) -> np.ndarray:
    """[count, count], see MeanOfAreas. One patient's other images at a time: all pairs of images might not fit into memory."""
    own_scores, own_patients = scores[is_class], patients[is_class]
    won = np.zeros((count, count))
    for patient in np.unique(patients[~is_class]):
        others = np.sort(scores[~is_class & (patients == patient)])
        below, not_above = np.searchsorted(others, own_scores, "left"), np.searchsorted(others, own_scores, "right")
        won[:, patient] = np.bincount(own_patients, (below + not_above) / 2, count)
    return won


def together(parts: Sequence[MeanOfShares]) -> MeanOfShares:
    """The mean of several statistics of the same patients."""
    return MeanOfShares(np.concatenate([part.numerators for part in parts], axis=1), np.concatenate([part.denominators for part in parts], axis=1))


def mean_where(values: np.ndarray, counted: np.ndarray, patients: np.ndarray, count: int) -> MeanOfShares:
    """Of images that are counted, bool [n]."""
    columns = np.where(counted, values, 0.0)[:, None]
    return MeanOfShares(per_patient(columns, patients, count), per_patient(counted[:, None].astype(float), patients, count))


@dataclass(frozen=True)
class Resampled:
    """A statistic of one arm: `by_seed` [seeds] of the whole test set, `replicates` [replicates] of the mean over seeds."""

    by_seed: np.ndarray
    replicates: np.ndarray
    patients: int

    @property
    def value(self) -> float:
        return float(self.by_seed.mean())

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% over patients; None with too few of them."""
        usable = self.replicates[np.isfinite(self.replicates)]
        if self.patients < FEWEST_GROUPS or not len(usable):
            return None
        low, high = np.percentile(usable, COVERAGE_PERCENTILES)
        return float(low), float(high)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return float(self.by_seed.std(ddof=1)) if len(self.by_seed) > 1 else None

    def minus(self, other: Resampled) -> Resampled:
        """Paired: the same patients in each replicate, the same seed numbers."""
        return Resampled(self.by_seed - other.by_seed, self.replicates - other.replicates, self.patients)


def resampled(of_seeds: Sequence[Statistic], weights: np.ndarray) -> Resampled:
    """weights [replicates, patients], from intervals.draw_weights."""
    whole = np.ones((1, weights.shape[1]))
    by_seed = np.array([float(statistic.of(whole)[0]) for statistic in of_seeds])
    replicates = np.mean([statistic.of(weights.astype(float)) for statistic in of_seeds], axis=0)
    return Resampled(by_seed, replicates, min(statistic.patients for statistic in of_seeds))


@dataclass(frozen=True)
class Difference:
    """`detectable`: the smallest true difference that such a test set shows in 80% of cases at the 5% level; from patients alone.

    `seeds_agree`: None where there are too few seeds to ask them (a paired t-test over seeds, 5%)."""

    value: float
    interval: tuple[float, float] | None
    spread: float | None
    detectable: float | None
    seeds_agree: bool | None
    verdict: Literal["gain", "loss", "not shown", "too few patients"]
    words: str


def difference(arm: Resampled, other: Resampled, other_name: str, better: Better) -> Difference:
    """What is to be said of an arm beside another one."""
    gap = arm.minus(other)
    interval, spread = gap.interval, gap.spread
    if interval is None:
        return Difference(gap.value, None, spread, None, None, "too few patients", f"nothing can be said: {gap.patients} patients in the test split, at least {FEWEST_GROUPS} are needed")
    detectable = float(POWER_Z * np.nanstd(gap.replicates, ddof=1))
    agree = _seeds_agree(gap)
    is_gain = interval[0] > 0 if better == "higher" else interval[1] < 0
    is_loss = interval[1] < 0 if better == "higher" else interval[0] > 0
    verdict: Literal["gain", "loss", "not shown"] = "not shown" if agree is False or not (is_gain or is_loss) else "gain" if is_gain else "loss"
    return Difference(gap.value, interval, spread, detectable, agree, verdict, _words(gap.value, interval, detectable, verdict, is_gain or is_loss, other_name))


def _seeds_agree(gap: Resampled) -> bool | None:
    count, spread = len(gap.by_seed), gap.spread
    if spread is None:
        return None
    return bool(abs(gap.value) > special.stdtrit(count - 1, CONFIDENCE) * spread / np.sqrt(count))


def _words(value: float, interval: tuple[float, float], detectable: float, verdict: str, patients_agree: bool, other: str) -> str:
    told = f"{abs(value):.3f} ({interval[0]:+.3f} to {interval[1]:+.3f})"
    if verdict != "not shown":
        return f"a {verdict} of {told} over {other}"
    if patients_agree:
        return f"no difference to {other} shown: other patients would agree on {told}, but the seeds differ by as much; train more seeds"
    if detectable == 0:
        return f"the same as {other} on every patient, so nothing is known of what could have been seen"
    return f"no gain over {other} shown; a gain below {detectable:.3f} could not have been seen"
