"""Scores of whole sets: patches, diversity; equal numbers on both sides, floors from disjoint patients. Used by run.py."""

from __future__ import annotations

from typing import Any

import numpy as np

from medgen import rng
from medgen.evaluate import diversity, intervals, pairs, sliced
from medgen.evaluate.inputs import MASK, Sides, some_rows
from medgen.evaluate.scores import Score, score

Images = dict[str, np.ndarray]
Skipped = str | None
FEWEST_IMAGES = 8


def sliced_scores(sides: Sides, images: Images, levels: dict[str, Any]) -> tuple[list[Score], Skipped]:
    """Sliced Wasserstein distance per channel; fills `levels` with value and floor per pyramid level."""
    first, second, floor_words = floor_sides(sides)
    count = min(len(sides.chosen), len(sides.reference), *((len(first), len(second)) if len(first) else ()))
    if count < FEWEST_IMAGES:
        return [], f"only {count} images on the smaller side; at least {FEWEST_IMAGES} are needed"
    found = []
    positions = some_rows(np.arange(len(sides.chosen)), sides.seed, "swd_synthetic", count)
    reference = some_rows(sides.reference, sides.seed, "swd_real", count)
    for channel in _distribution_channels(images):
        synthetic = _synthetic(images, channel)[positions]
        distance = sliced.distance(_real(sides, channel, reference), synthetic, sides.seed,
                                   sides.patients(reference), sides.synthetic_groups()[positions])
        floor = None
        if len(first):
            rows = [some_rows(side, sides.seed, f"swd_floor_{number}", count) for number, side in enumerate((first, second))]
            floor = sliced.distance(_real(sides, channel, rows[0]), _real(sides, channel, rows[1]), sides.seed)
        levels[channel] = [
            {"pixels": size, "value": value, "floor": None if floor is None else floor.levels[size]} for size, value in distance.levels.items()
        ]
        protocol = (
            f"Laplacian pyramid of {', '.join(str(size) for size in distance.levels)} px, patches 7x7 in SD of the real side, "
            f"{sliced.PROJECTIONS} directions, mean over levels; {count} images on each side; reference: real {sides.against}"
            f"{', slices with a lesion only' if sides.positive_only else ''}; {floor_words}; "
            f"{_interval_words(sides, reference)}; seed {sides.seed}"
        )
        found.append(score("swd", channel, distance.value, distance.interval, None if floor is None else floor.value, count, protocol))
    return found, None


def _interval_words(sides: Sides, reference: np.ndarray) -> str:
    words = intervals.describe(sides.patients(reference), "patient")
    return words if words.startswith("no") else f"{words} and over {'patients' if sides.partners is not None else 'images'} of the synthetic side, centred"


def floor_sides(sides: Sides) -> tuple[np.ndarray, np.ndarray, str]:
    """Two groups of real slices of different patients, and how they were made. Empty groups if there are too few patients."""
    if sides.against != "train":
        return sides.reference, sides.train, f"floor: real {sides.against} against real train, no patient in both"
    names = np.unique(sides.patients(sides.reference))
    if len(names) < 2:
        return np.array([], dtype=np.int64), np.array([], dtype=np.int64), "no floor: only one patient"
    half = rng.permutation(len(names), sides.seed, "floor_halves")[: len(names) // 2]
    in_half = np.isin(sides.patients(sides.reference), names[half])
    return sides.reference[in_half], sides.reference[~in_half], "floor: one half of the training patients against the other"


def _distribution_channels(images: Images) -> list[str]:
    """Every channel; for two images also their difference, which a set of mismatched pairs gets wrong."""
    pictures = [channel for channel in images if channel != MASK]
    return [*images, f"{pictures[1]} - {pictures[0]}"] if len(pictures) == 2 else list(images)


def _synthetic(images: Images, channel: str) -> np.ndarray:
    if channel in images:
        return images[channel].astype(np.float32)
    minuend, subtrahend = channel.split(" - ")
    return images[minuend] - images[subtrahend]


def _real(sides: Sides, channel: str, rows: np.ndarray) -> np.ndarray:
    if channel == MASK:
        return sides.store.masks(rows).astype(np.float32)
    if channel in sides.store.channels:
        return sides.store.images(channel, rows)
    minuend, subtrahend = channel.split(" - ")
    return sides.store.images(minuend, rows) - sides.store.images(subtrahend, rows)


def diversity_scores(sides: Sides, images: Images) -> tuple[list[Score], Skipped]:
    """MS-SSIM between random pairs of different synthetic images, beside pairs of different real patients."""
    groups = sides.synthetic_groups()
    if sides.partners is not None and len(np.unique(groups)) < 2:
        return [], "all masks are of one patient, whose slices resemble each other; use a generate stage on masks of several patients"
    real_rows, real_words = sides.reference, f"real {sides.against}"
    if len(np.unique(sides.patients(real_rows))) < 2:
        real_rows, real_words = sides.train, f"real train ({sides.against} has one patient)"
    synthetic_pairs = diversity.random_pairs(groups, diversity.MOST_PAIRS, sides.seed, "diversity_synthetic")
    real_pairs = diversity.random_pairs(sides.patients(real_rows), diversity.MOST_PAIRS, sides.seed, "diversity_real")
    if len(synthetic_pairs) == 0:
        return [], "there is only one synthetic image"
    count = min(len(synthetic_pairs), len(real_pairs)) or len(synthetic_pairs)
    synthetic_pairs, real_pairs = synthetic_pairs[:count], real_pairs[:count]
    unit = "patient" if sides.partners is not None else "image"
    found = []
    for channel in images:
        drawn, real = _synthetic(images, channel), _real(sides, channel, real_rows)
        values = diversity.similarities(pairs.ms_ssim, drawn, drawn, synthetic_pairs)
        floor = float(diversity.similarities(pairs.ms_ssim, real, real, real_pairs).mean()) if len(real_pairs) else None
        protocol = (
            f"MS-SSIM with {pairs.scales_for(sides.store.size)} scales at {sides.store.size}x{sides.store.size} pixels, data range 1, "
            f"{count} random pairs on each side, never two of one {unit}; floor: {real_words}, pairs of different patients"
            f"{', slices with a lesion only' if sides.positive_only else ''}; {intervals.describe(groups, unit)}; seed {sides.seed}"
        )
        members = [groups[synthetic_pairs[:, 0]], groups[synthetic_pairs[:, 1]]]
        interval = intervals.mean_interval(values, members, sides.seed, f"interval_diversity_{channel}")
        found.append(score("ms_ssim_diversity", channel, values.mean(), interval, floor, count, protocol))
    return found, None
