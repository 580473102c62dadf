"""Scores of whole sets: patches, diversity; equal numbers on both sides, floors from disjoint patients. Used by run.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from medgen import rng
from medgen.evaluate import diversity, intervals, pairs, sliced, spectrum
from medgen.evaluate.inputs import MASK, Sides, some_rows
from medgen.evaluate.scores import Score, Skipped, score

Images = dict[str, np.ndarray]
FEWEST_IMAGES = 8


@dataclass(frozen=True)
class EqualSides:
    """As many images everywhere: positions in `chosen`, store rows of the reference, and two groups of real rows for the floor (None without one)."""

    positions: np.ndarray
    reference: np.ndarray
    floor: tuple[np.ndarray, np.ndarray] | None
    words: str

    @property
    def count(self) -> int:
        return len(self.positions)


def equal_sides(sides: Sides) -> EqualSides:
    """Distances between sets depend on how large they are: the floor is only one at the same number."""
    first, second, floor_words = floor_sides(sides)
    count = min(len(sides.chosen), len(sides.reference), *((len(first), len(second)) if len(first) else ()))
    floor = (some_rows(first, sides.seed, "floor_0", count), some_rows(second, sides.seed, "floor_1", count)) if len(first) else None
    reference = some_rows(sides.reference, sides.seed, "equal_real", count)
    words = (f"{count} images on each side; reference: real {sides.against}{', slices with a lesion only' if sides.positive_only else ''}; {floor_words}; "
             f"{_interval_words(sides, reference)}; seed {sides.seed}")  # fmt: skip
    return EqualSides(some_rows(np.arange(len(sides.chosen)), sides.seed, "equal_synthetic", count), reference, floor, words)


def too_few(equal: EqualSides) -> Skipped:
    return f"only {equal.count} images on the smaller side; at least {FEWEST_IMAGES} are needed" if equal.count < FEWEST_IMAGES else None


def sliced_scores(sides: Sides, images: Images, levels: dict[str, Any]) -> tuple[list[Score], Skipped]:
    """Sliced Wasserstein distance per channel; fills `levels` with value and floor per pyramid level."""
    equal = equal_sides(sides)
    if too_few(equal):
        return [], too_few(equal)
    found = []
    for channel in _distribution_channels(images):
        distance = sliced.distance(_real(sides, channel, equal.reference), _synthetic(images, channel)[equal.positions], sides.seed,
                                   sides.patients(equal.reference), sides.synthetic_groups()[equal.positions])
        floor = None
        if equal.floor is not None:
            floor = sliced.distance(_real(sides, channel, equal.floor[0]), _real(sides, channel, equal.floor[1]), sides.seed)
        levels[channel] = [
            {"pixels": size, "value": value, "floor": None if floor is None else floor.levels[size]} for size, value in distance.levels.items()
        ]
        protocol = (
            f"Laplacian pyramid of {', '.join(str(size) for size in distance.levels)} px, patches 7x7 in SD of the real side, "
            f"{sliced.PROJECTIONS} directions, mean over levels; {equal.words}"
        )
        found.append(score("swd", channel, distance.value, distance.interval, None if floor is None else floor.value, equal.count, protocol))
    return found, None


def spectrum_scores(sides: Sides, images: Images) -> tuple[list[Score], Skipped]:
    """Distance of the power spectra per image channel."""
    equal = equal_sides(sides)
    if not sides.dataset.image_channels or too_few(equal):
        return [], too_few(equal) or "only masks were drawn"
    found = []
    for channel in sides.dataset.image_channels:
        real = spectrum.radial_power(_real(sides, channel, equal.reference))
        drawn = spectrum.radial_power(images[channel][equal.positions])
        distance = spectrum.distance_with_interval(real, drawn, sides.patients(equal.reference), sides.synthetic_groups()[equal.positions], sides.seed)
        floor = None
        if equal.floor is not None:
            floor = spectrum.distance(*(spectrum.radial_power(_real(sides, channel, rows)) for rows in equal.floor))
        protocol = (
            f"mean over images of log10 radially averaged power at {sides.store.size}x{sides.store.size} pixels, root mean square of the difference over "
            f"1 to {sides.store.size // 2} cycles a side, centred interval; {equal.words}"
        )
        found.append(score("psd", channel, distance.value, distance.interval, floor, equal.count, protocol))
    return found, None


def _interval_words(sides: Sides, reference: np.ndarray) -> str:
    words = intervals.describe(sides.patients(reference), "patient")
    return words if words.startswith("no") else f"{words} and over {'patients' if sides.partners is not None else 'images'} of the synthetic side, centred"


def floor_sides(sides: Sides) -> tuple[np.ndarray, np.ndarray, str]:
    """Two groups of real slices of different patients, and how they were made. Empty groups if there are too few patients."""
    if sides.against != "train" and len(sides.train):
        return sides.reference, sides.train, f"floor: real {sides.against} against real train, no patient in both"
    names = np.unique(sides.patients(sides.reference))
    if len(names) < 2:
        return np.array([], dtype=np.int64), np.array([], dtype=np.int64), "no floor: only one patient"
    half = rng.permutation(len(names), sides.seed, "floor_halves")[: len(names) // 2]
    in_half = np.isin(sides.patients(sides.reference), names[half])
    return sides.reference[in_half], sides.reference[~in_half], f"floor: one half of the patients of real {sides.against} against the other"


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


@dataclass(frozen=True)
class RandomPairs:
    """Pairs of images that do not belong together: of the synthetic set (positions in `chosen`), and of `real_rows` (positions there), as many."""

    synthetic: np.ndarray
    real: np.ndarray
    real_rows: np.ndarray
    members: list[np.ndarray]  # the group of either image of each synthetic pair
    words: str


def random_pairs_of(sides: Sides) -> RandomPairs | str:
    """Never two synthetic images of one patient's masks, nor two real slices of one patient. Or why there are none."""
    groups = sides.synthetic_groups()
    if sides.partners is not None and len(np.unique(groups)) < 2:
        return "all masks are of one patient, whose slices resemble each other; use a generate stage on masks of several patients"
    real_rows, real_words = sides.reference, f"real {sides.against}"
    if len(np.unique(sides.patients(real_rows))) < 2:
        real_rows, real_words = sides.train, f"real train ({sides.against} has one patient)"
    synthetic = diversity.random_pairs(groups, diversity.MOST_PAIRS, sides.seed, "diversity_synthetic")
    real = diversity.random_pairs(sides.patients(real_rows), diversity.MOST_PAIRS, sides.seed, "diversity_real")
    if len(synthetic) == 0:
        return "there is only one synthetic image"
    count = min(len(synthetic), len(real)) or len(synthetic)
    unit = "patient" if sides.partners is not None else "image"
    words = (f"{count} random pairs on each side at {sides.store.size}x{sides.store.size} pixels, never two of one {unit}; floor: {real_words}, pairs of different patients"
             f"{', slices with a lesion only' if sides.positive_only else ''}; {intervals.describe(groups, unit)}; seed {sides.seed}")  # fmt: skip
    return RandomPairs(synthetic[:count], real[:count], real_rows, [groups[synthetic[:count, side]] for side in (0, 1)], words)


def diversity_scores(sides: Sides, images: Images) -> tuple[list[Score], Skipped]:
    """MS-SSIM between random pairs of different synthetic images, beside pairs of different real patients."""
    drawn = pairs.too_small(sides.store.size) if sides.store.size < pairs.KERNEL_PIXELS else random_pairs_of(sides)
    if not isinstance(drawn, RandomPairs):
        return [], drawn
    found = []
    for channel in images:
        synthetic, real = _synthetic(images, channel), _real(sides, channel, drawn.real_rows)
        values = diversity.similarities(pairs.ms_ssim, synthetic, synthetic, drawn.synthetic)
        floor = float(diversity.similarities(pairs.ms_ssim, real, real, drawn.real).mean()) if len(drawn.real) else None
        protocol = f"MS-SSIM with {pairs.scales_for(sides.store.size)} scales, data range 1; {drawn.words}"
        interval = intervals.mean_interval(values, drawn.members, sides.seed, f"interval_diversity_{channel}")
        found.append(score("ms_ssim_diversity", channel, values.mean(), interval, floor, len(values), protocol))
    return found, None
