"""Real with real, real with synthetic, synthetic with synthetic, over all images and by class: what is compared, and similarity of random pairs.

Used by run.py and feature_scores.py. What is compared has the same number of images a side, and the same number of every class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medgen import rng
from medgen.evaluate import diversity, intervals, pairs
from medgen.evaluate.distributions import FEWEST_IMAGES, floor_sides
from medgen.evaluate.inputs import Sides, some_rows
from medgen.evaluate.scores import COMPARISONS, Comparison, Score, Skipped, score

Pair = tuple[np.ndarray, np.ndarray]
Measured = tuple[float, tuple[float, float] | None]  # a value and its interval

@dataclass(frozen=True)
class Parts:
    """Equal numbers of images: store rows of two sides that share no patient, and positions in `chosen` of two synthetic halves."""

    label: str | None  # a class; None: all of them
    real: Pair
    synthetic: Pair

    @property
    def count(self) -> int:
        return len(self.real[0])


def equal_parts(sides: Sides) -> tuple[list[Parts], str, Skipped]:
    """All classes together and then each, how the real sides were made, and which classes have too few images.

    A class counts as much on either side of a comparison: otherwise a set of equal classes is far from unequal real ones."""
    first, second, floor_words = floor_sides(sides)
    if min(len(first), len(second)) == 0:
        return [], floor_words, "all real images are of one patient: there is no floor to read the value by"
    half = _halves(sides)
    lots = [first, second, np.flatnonzero(half), np.flatnonzero(~half)]
    found, left_out = [], []
    for label in sides.classes or (None,):
        of_class = lots if label is None else [rows[labels == label] for rows, labels in zip(lots, _labels(sides, lots), strict=True)]
        count = min(len(rows) for rows in of_class)
        if count < FEWEST_IMAGES:
            left_out.append(f"{'' if label is None else f'{label}: '}{count} images on the smallest side, at least {FEWEST_IMAGES} are needed (of the synthetic ones a side is half)")
            continue
        drawn = [some_rows(rows, sides.seed, f"parts_{label}_{number}", count) for number, rows in enumerate(of_class)]
        found.append(Parts(label, (drawn[0], drawn[1]), (drawn[2], drawn[3])))
    return _with_all(found), floor_words, "; ".join(left_out) or None


def _halves(sides: Sides) -> np.ndarray:
    """Which of `chosen` are in the first half, bool [n]: whole groups, and half of the groups of every class."""
    names, first_seen, codes = np.unique(sides.synthetic_groups(), return_index=True, return_inverse=True)
    order = rng.permutation(len(names), sides.seed, "synthetic_halves")
    if sides.classes:
        order = order[np.argsort(sides.synthetic_labels()[first_seen[order]].astype(str), kind="stable")]
    in_first = np.zeros(len(names), dtype=bool)
    in_first[order[::2]] = True
    return in_first[codes]


def _labels(sides: Sides, lots: list[np.ndarray]) -> list[np.ndarray]:
    return [*(sides.labels(rows) for rows in lots[:2]), *(sides.synthetic_labels()[rows] for rows in lots[2:])]


def _with_all(found: list[Parts]) -> list[Parts]:
    if not found or found[0].label is None:
        return found
    joined = [np.concatenate(sides) for sides in zip(*((*part.real, *part.synthetic) for part in found), strict=True)]
    return [Parts(None, (joined[0], joined[1]), (joined[2], joined[3])), *found]


# --- similarity of random pairs ---------------------------------------------------------------------------------------


def pair_scores(sides: Sides, images: dict[str, np.ndarray]) -> tuple[list[Score], Skipped]:
    """SSIM of random pairs of one class that do not belong together: never an image with itself, nor two of one patient."""
    if not sides.dataset.image_channels:
        return [], "only masks were drawn"
    if sides.store.size < pairs.KERNEL_PIXELS:
        return [], pairs.too_small(sides.store.size)
    groups = sides.synthetic_groups()
    drawn: dict[str | None, dict[Comparison, np.ndarray]] = {}
    left_out = []
    for label in sides.classes or (None,):
        chosen = _pairs_of_class(sides, groups, label)
        count = min(len(found) for found in chosen.values())
        if count == 0:
            left_out.append(f"{label or 'all'}: no two real images of different patients and two synthetic ones")
            continue
        drawn[label] = {comparison: found[:count] for comparison, found in chosen.items()}
    found: list[Score] = []
    for channel in sides.dataset.image_channels if drawn else ():
        found += _channel_pair_scores(sides, channel, images[channel], groups, drawn)
    return found, reasons(*left_out)


def _pairs_of_class(sides: Sides, groups: np.ndarray, label: str | None) -> dict[Comparison, np.ndarray]:
    """Pairs of positions in `reference` and `chosen`, up to 1000 of each kind."""
    real, synthetic = np.arange(len(sides.reference)), np.arange(len(sides.chosen))
    if label is not None:
        real, synthetic = np.flatnonzero(sides.labels(sides.reference) == label), np.flatnonzero(sides.synthetic_labels() == label)
    patients, names = sides.patients(sides.reference)[real], groups[synthetic]
    stream = f"ssim_pairs_{label}"
    within_real = diversity.random_pairs(patients, diversity.MOST_PAIRS, sides.seed, f"{stream}_real")
    between = diversity.random_pairs_between(patients, names, diversity.MOST_PAIRS, sides.seed, f"{stream}_between")
    within_synthetic = diversity.random_pairs(names, diversity.MOST_PAIRS, sides.seed, f"{stream}_synthetic")
    return {
        "real-real": real[within_real],
        "real-synthetic": np.stack([real[between[:, 0]], synthetic[between[:, 1]]], axis=1),
        "synthetic-synthetic": synthetic[within_synthetic],
    }


def _channel_pair_scores(
    sides: Sides, channel: str, synthetic: np.ndarray, groups: np.ndarray, drawn: dict[str | None, dict[Comparison, np.ndarray]]
) -> list[Score]:
    real, patients = sides.store.images(channel, sides.reference), sides.patients(sides.reference)
    members = {"real-real": (patients, patients), "real-synthetic": (patients, groups), "synthetic-synthetic": (groups, groups)}
    pictures = {"real-real": (real, real), "real-synthetic": (real, synthetic), "synthetic-synthetic": (synthetic, synthetic)}
    similar = {
        (label, comparison): diversity.similarities(pairs.ssim, *pictures[comparison], chosen)
        for label, of_class in drawn.items() for comparison, chosen in of_class.items()
    }
    protocol = _pair_protocol(sides, {label: len(of_class["real-real"]) for label, of_class in drawn.items()})
    found = []
    for group in (None, *[label for label in drawn if label is not None]):
        labels = list(drawn) if group is None else [group]
        values: dict[Comparison, Measured] = {}
        for comparison in COMPARISONS:
            every = np.concatenate([similar[label, comparison] for label in labels])
            chosen = np.concatenate([drawn[label][comparison] for label in labels])
            names = [side[chosen[:, number]] for number, side in enumerate(members[comparison])]
            values[comparison] = float(every.mean()), _pair_interval(every, names, comparison, sides.seed, f"ssim_pairs_{channel}_{group}_{comparison}")
        found += three_scores("ssim_pairs", channel, group, values, sum(len(drawn[label]["real-real"]) for label in labels), protocol)
    return found


def _pair_interval(values: np.ndarray, names: list[np.ndarray], comparison: Comparison, seed: int, stream: str) -> tuple[float, float] | None:
    if comparison == "real-synthetic" and min(len(np.unique(side)) for side in names) < intervals.FEWEST_GROUPS:
        return None  # many synthetic images do not make up for a handful of patients
    return intervals.mean_interval(values, names, seed, stream)


def _pair_protocol(sides: Sides, counts: dict[str | None, int]) -> str:
    of_classes = "" if None in counts else f" ({', '.join(f'{label} {count}' for label, count in counts.items())})"
    return (
        f"mean SSIM, Gaussian kernel {pairs.KERNEL_PIXELS} px, sigma {pairs.KERNEL_SIGMA_PIXELS:g}, data range 1, {sides.store.size}x{sides.store.size} pixels; "
        f"{sum(counts.values())} random pairs{of_classes} of each kind, both of one class, never two images of one patient; real: {reference_in_words(sides)}; "
        f"95% bootstrap over patients and synthetic images, none where a side has fewer than {intervals.FEWEST_GROUPS}; seed {sides.seed}"
    )


# --- in common ----------------------------------------------------------------------------------------------------------


def three_scores(metric: str, channel: str, label: str | None, values: dict[Comparison, Measured], count: int, protocol: str) -> list[Score]:
    """One score per comparison; what real and real give is the floor of the others."""
    floor = values["real-real"][0]
    return [
        score(metric, channel, *values[comparison], None if comparison == "real-real" else floor, count, protocol, label, comparison)
        for comparison in COMPARISONS
    ]


def counts_in_words(parts: list[Parts]) -> str:
    classes = [f"{part.label} {part.count}" for part in parts if part.label is not None]
    return f"{parts[0].count} images a side" + (f" ({', '.join(classes)})" if classes else "")


def reference_in_words(sides: Sides) -> str:
    return f"real {sides.against}{', slices with a lesion only' if sides.positive_only else ''}"


def reasons(*found: Skipped) -> Skipped:
    """All that is there, in one text."""
    return "; ".join(text for text in found if text) or None
