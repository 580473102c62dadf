"""Membership inference: can somebody tell which real slices a model was trained on? Pure functions, used by privacy.py.

Scores are higher for what is more likely a training image. Patients, not slices, are what varies independently."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medgen import rng
from medgen.evaluate import classification, copies, intervals
from medgen.evaluate.classification import Estimate
from medgen.roc import binary_area

FALSE_POSITIVE_RATE = 0.01
FEWEST_OTHERS = 100  # non-members below which 1% of them is less than one
POSITION_BINS = 10


def matched(positions: tuple[np.ndarray, np.ndarray], labels: tuple[np.ndarray, np.ndarray], most: int, seed: int, stream: str) -> tuple[np.ndarray, np.ndarray]:
    """Places in two sets of slices with equally many of each class and tenth of the head on both sides, at most about `most` a side.

    positions, labels: of the members and of the others, [m] and [n]. Otherwise anatomy would give away who is who."""
    strata = _strata(positions, labels)
    common = np.intersect1d(*strata)
    counts = np.array([min(int((side == stratum).sum()) for side in strata) for stratum in common])
    share = min(1.0, most / max(1, counts.sum()))
    kept: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for stratum, count in zip(common, np.ceil(share * counts).astype(int), strict=True):
        for number, side in enumerate(strata):
            places = np.flatnonzero(side == stratum)
            kept[number].append(places[rng.permutation(len(places), seed, f"{stream}_{number}", int(stratum))[:count]])
    members, others = (np.sort(np.concatenate([np.empty(0, np.int64), *side])) for side in kept)
    return members, others


def _strata(positions: tuple[np.ndarray, np.ndarray], labels: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A number per slice: of its class and of its position's tenth among all slices."""
    edges = np.unique(np.quantile(np.concatenate(positions), np.linspace(0, 1, POSITION_BINS + 1)[1:-1]))
    classes = np.unique(np.concatenate([side.astype(str) for side in labels]))
    first, second = (
        np.searchsorted(classes, label.astype(str)) * (POSITION_BINS + 1) + np.searchsorted(edges, position, side="right")
        for position, label in zip(positions, labels, strict=True)
    )
    return first, second


def folds(patients: np.ndarray, seed: int, stream: str) -> np.ndarray:
    """0 or 1 [n]: every patient in one of two halves of the patients."""
    names, codes = np.unique(patients, return_inverse=True)
    half = np.empty(len(names), dtype=np.int64)
    half[rng.permutation(len(names), seed, stream)] = np.arange(len(names)) % 2
    return half[codes]


def image_scores(items: np.ndarray, item_folds: np.ndarray, synthetic: np.ndarray, reference: np.ndarray, reference_folds: np.ndarray) -> np.ndarray:
    """Attack with nothing but the synthetic images: how near the nearest of them is, beside the nearest reference image; in [0, 1], [n].

    Rows of one space. A reference is real images of neither side's patient: those of the other fold, so that members and
    others meet it alike. Without it whatever resembles many people would look like a member.
    Chen et al., CCS 2020 (GAN-Leaks, arXiv:1909.03935), section 4.3, with reference images for its reference model."""
    to_synthetic = _nearest_distance(items, synthetic)
    to_reference = np.empty(len(items))
    for fold in (0, 1):
        inside = item_folds == fold
        to_reference[inside] = _nearest_distance(items[inside], reference[reference_folds != fold])
    total = to_synthetic + to_reference
    return np.divide(to_reference, total, out=np.full(len(items), 0.5), where=total > 0)


def _nearest_distance(items: np.ndarray, others: np.ndarray) -> np.ndarray:
    return copies.nearest(items, others, np.zeros(len(others), dtype=np.int64)).distance


@dataclass(frozen=True)
class Inferred:
    """How well the members are told from the others in one unit, slices or patients.

    `true_positive_rate`: at 1% false positives; None where fewer than 100 others cannot show 1%."""

    unit: str
    members: int
    others: int
    auc: Estimate
    true_positive_rate: Estimate | None


def by_slice(scores: np.ndarray, is_member: np.ndarray, patients: np.ndarray, seed: int) -> Inferred:
    """scores, is_member, patients: [n]. Intervals are of a bootstrap over patients."""
    return _inferred("slice", scores, is_member, patients, seed)


def by_patient(scores: np.ndarray, is_member: np.ndarray, patients: np.ndarray, seed: int) -> Inferred:
    """Each patient by the mean score of the slices: what somebody sees who holds all of them."""
    names, first, codes = np.unique(patients, return_index=True, return_inverse=True)
    means = np.bincount(codes, scores) / np.bincount(codes)
    return _inferred("patient", means, is_member[first], names, seed)


def _inferred(unit: str, scores: np.ndarray, is_member: np.ndarray, patients: np.ndarray, seed: int) -> Inferred:
    others = int((~is_member).sum())
    auc = classification.estimate(lambda weights: binary_area(scores, is_member, weights), patients, seed)
    rate = classification.estimate(lambda weights: true_positive_rate(scores, is_member, weights), patients, seed) if others >= FEWEST_OTHERS else None
    return Inferred(unit, int(is_member.sum()), others, auc, rate)


def true_positive_rate(scores: np.ndarray, is_member: np.ndarray, weights: np.ndarray) -> float | None:
    """Share of the members above the lowest threshold that at most 1% of the others exceed; None if a side has no weight.

    scores, weights float [n]."""
    outside, their_weights = scores[~is_member], weights[~is_member]
    total, inside_total = their_weights.sum(), weights[is_member].sum()
    if total == 0 or inside_total == 0:
        return None
    order = np.argsort(outside, kind="stable")
    reached = np.cumsum(their_weights[order])
    threshold = outside[order][np.searchsorted(reached, (1 - FALSE_POSITIVE_RATE) * total - 1e-9)]
    return float(weights[is_member][scores[is_member] > threshold].sum() / inside_total)


def has_enough_patients(member_patients: np.ndarray, other_patients: np.ndarray) -> bool:
    return min(len(np.unique(member_patients)), len(np.unique(other_patients))) >= intervals.FEWEST_GROUPS
