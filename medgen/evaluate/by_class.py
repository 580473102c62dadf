"""FID, KID and similarity of random pairs: real with real, real with synthetic, synthetic with synthetic; over all images and by class.

Used by run.py. What is compared has the same number of images a side, and the same number of every class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from medgen import rng
from medgen.evaluate import distances, diversity, extractors, features, intervals, pairs
from medgen.evaluate.distributions import FEWEST_IMAGES, Skipped, floor_sides
from medgen.evaluate.extractors import Extractor
from medgen.evaluate.inputs import Sides, some_rows
from medgen.evaluate.scores import COMPARISONS, Comparison, Score, score

MOST_FEATURES = 50_000  # images a side, as many as published FIDs have
FEWEST_FOR_FRECHET = 2048  # with fewer, the covariance of 2048 features has no full rank and the distance is mostly bias
FEWEST_FOR_FID = 10_000
Say = Callable[[str], None]
Pair = tuple[np.ndarray, np.ndarray]
Measured = tuple[float, tuple[float, float] | None]  # a value and its interval

FRECHET_METHOD = (
    "Frechet distance of Gaussians, by singular values; no interval: drawing patients again moves it upwards by more than it varies, "
    "so that only the floor at the same n tells what a value means"
)
KERNEL_METHOD = (
    f"squared maximum mean discrepancy, kernel (x.y/d + 1)^3 of d features, unbiased over the whole set (at most {distances.MOST_KERNEL_IMAGES:,} a side), no two images "
    f"of one patient compared within a side; 95% bootstrap over patients of the real and over images (or patients of their conditions) of the synthetic sides, none where a side has "
    f"fewer than {intervals.FEWEST_GROUPS}"
)


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
    if len(first) == 0:
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


# --- distances between features ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compared:
    """The two sides of one comparison: which rows of two tables of features, and the names of what varies independently on each."""

    label: str | None
    comparison: Comparison
    tables: Pair
    places: Pair
    groups: Pair

    def sides(self, most: int, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Features [n, d] and groups [n] of both sides, at most `most` images; taken from the tables only now, many comparisons share them."""
        kept = [some_rows(np.arange(len(places)), seed, f"compared_{number}", most) for number, places in enumerate(self.places)]
        both = zip(self.tables, self.places, self.groups, kept, strict=True)
        found = [(table[places[rows]], groups[rows]) for table, places, groups, rows in both]
        return [features for features, _ in found], [groups for _, groups in found]


def feature_scores(sides: Sides, names: list[str], asked: dict[str, Any], allow_small_n: bool, say: Say) -> dict[str, tuple[list[Score], Skipped]]:
    """Scores of each of `names` (fid, kid) and what had to be left out, from one feature pass over each set."""
    if not sides.dataset.image_channels:
        return dict.fromkeys(names, ([], "only masks were drawn, and extractors know images"))
    wide = sides.widened(MOST_FEATURES)
    parts, floor_words, left_out = equal_parts(wide)
    if not parts:
        return dict.fromkeys(names, ([], left_out))
    kept = {
        "fid": [part for part in parts if allow_small_n or part.count >= FEWEST_FOR_FRECHET],
        "kid": [part for part in parts if _has_two_groups(wide, part)],
    }
    reasons = {"fid": _reasons(left_out, _too_few(parts, kept["fid"])), "kid": _reasons(left_out, _of_one_patient(parts, kept["kid"]))}
    found: dict[str, list[Score]] = {name: [] for name in names}
    if any(kept[name] for name in names):
        extractor = extractors.load(asked, None)
        facts = f"{extractor.name}; {_counts(parts)}; reference: {_reference(wide)}; {floor_words}; synthetic-synthetic: one half of the set against the other"
        for channel in sides.dataset.image_channels:
            say(f"features of {channel}: 4 x {parts[0].count} images, {extractor.name}")
            compared = {(item.label, item.comparison): item for item in _compared(wide, extractor, channel, parts)}
            for name in names:
                for part in kept[name]:
                    of_part = {comparison: compared[part.label, comparison] for comparison in COMPARISONS}
                    found[name] += _distance_scores(name, channel, part, of_part, extractor, facts, wide.seed)
    return {name: (found[name], reasons[name]) for name in names}


def _distance_scores(
    name: str, channel: str, part: Parts, compared: dict[Comparison, Compared], extractor: Extractor, facts: str, seed: int
) -> list[Score]:
    if name == "fid":
        metric, method, measure = _frechet_name(part.count, extractor), FRECHET_METHOD, _frechet
    else:
        metric, method, measure = name, KERNEL_METHOD, _kernel
    values = {comparison: measure(item, seed) for comparison, item in compared.items()}
    return _three_scores(metric, channel, part.label, values, part.count, f"{facts}; {method}; seed {seed}")


def _compared(sides: Sides, extractor: Extractor, channel: str, parts: list[Parts]) -> Iterator[Compared]:
    """Every comparison of every part; the first part holds the rows of all others, so that each image is seen once."""
    rows, positions = np.unique(np.concatenate(parts[0].real)), np.unique(np.concatenate(parts[0].synthetic))
    real = features.features(extractor, lambda some: sides.store.images(channel, some), rows)
    synthetic = features.features(extractor, lambda some: sides.dataset.read(channel, sides.chosen[some]), positions)
    groups = sides.synthetic_groups()
    for part in parts:
        of_real = [(real, np.searchsorted(rows, side), sides.patients(side)) for side in part.real]
        of_drawn = [(synthetic, np.searchsorted(positions, side), groups[side]) for side in part.synthetic]
        for comparison, both in zip(COMPARISONS, (of_real, [of_real[0], of_drawn[0]], of_drawn), strict=True):
            (one, there, whose), (other, elsewhere, others) = both
            yield Compared(part.label, comparison, (one, other), (there, elsewhere), (whose, others))


def _frechet(item: Compared, seed: int) -> Measured:
    (first, second), _ = item.sides(MOST_FEATURES, seed)
    return distances.frechet(first, second), None


def _kernel(item: Compared, seed: int) -> Measured:
    (first, second), groups = item.sides(distances.MOST_KERNEL_IMAGES, seed)
    found = distances.kernel(first, second, groups[0], groups[1], seed, f"kid_bootstrap_{item.comparison}_{item.label}")
    return found.value, found.interval


def _frechet_name(count: int, extractor: Extractor) -> str:
    """The name that a Frechet distance of `count` images a side may carry."""
    if count < FEWEST_FOR_FRECHET:
        return "fd_small_n"
    return "fid" if count >= FEWEST_FOR_FID and extractor.published_inception else "fd"


def _too_few(parts: list[Parts], kept: list[Parts]) -> Skipped:
    few = [f"{part.label or 'all'} {part.count}" for part in parts if part not in kept]
    if not few:
        return None
    return (f"images a side: {', '.join(few)}; a Frechet distance of fewer than {FEWEST_FOR_FRECHET:,} is mostly bias: "
            "read kid, or write allow_small_n: true for a number to compare at the same n only")  # fmt: skip


def _has_two_groups(sides: Sides, part: Parts) -> bool:
    groups = sides.synthetic_groups()
    return all(len(np.unique(names)) > 1 for names in (*(sides.patients(side) for side in part.real), *(groups[side] for side in part.synthetic)))


def _of_one_patient(parts: list[Parts], kept: list[Parts]) -> Skipped:
    alone = [part.label or "all" for part in parts if part not in kept]
    return f"{', '.join(alone)}: the images of a side are of one patient, whose slices are not compared with each other" if alone else None


def _reasons(*found: Skipped) -> Skipped:
    return "; ".join(text for text in found if text) or None


# --- similarity of random pairs ---------------------------------------------------------------------------------------


def pair_scores(sides: Sides, images: dict[str, np.ndarray]) -> tuple[list[Score], Skipped]:
    """SSIM of random pairs of one class that do not belong together: never an image with itself, nor two of one patient."""
    if not sides.dataset.image_channels:
        return [], "only masks were drawn"
    if sides.store.size < pairs.KERNEL_PIXELS:
        return [], f"the kernel of SSIM has {pairs.KERNEL_PIXELS} px, the images {sides.store.size}"
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
    return found, _reasons(*left_out)


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
        found += _three_scores("ssim_pairs", channel, group, values, sum(len(drawn[label]["real-real"]) for label in labels), protocol)
    return found


def _pair_interval(values: np.ndarray, names: list[np.ndarray], comparison: Comparison, seed: int, stream: str) -> tuple[float, float] | None:
    if comparison == "real-synthetic" and min(len(np.unique(side)) for side in names) < intervals.FEWEST_GROUPS:
        return None  # many synthetic images do not make up for a handful of patients
    return intervals.mean_interval(values, names, seed, stream)


def _pair_protocol(sides: Sides, counts: dict[str | None, int]) -> str:
    of_classes = "" if None in counts else f" ({', '.join(f'{label} {count}' for label, count in counts.items())})"
    return (
        f"mean SSIM, Gaussian kernel {pairs.KERNEL_PIXELS} px, sigma {pairs.KERNEL_SIGMA_PIXELS:g}, data range 1 (MONAI), {sides.store.size}x{sides.store.size} pixels; "
        f"{sum(counts.values())} random pairs{of_classes} of each kind, both of one class, never two images of one patient; real: {_reference(sides)}; "
        f"95% bootstrap over patients and synthetic images, none where a side has fewer than {intervals.FEWEST_GROUPS}; seed {sides.seed}"
    )


# --- in common ----------------------------------------------------------------------------------------------------------


def _three_scores(metric: str, channel: str, label: str | None, values: dict[Comparison, Measured], count: int, protocol: str) -> list[Score]:
    """One score per comparison; what real and real give is the floor of the others."""
    floor = values["real-real"][0]
    return [
        score(metric, channel, *values[comparison], None if comparison == "real-real" else floor, count, protocol, label, comparison)
        for comparison in COMPARISONS
    ]


def _counts(parts: list[Parts]) -> str:
    classes = [f"{part.label} {part.count}" for part in parts if part.label is not None]
    return f"{parts[0].count} images a side" + (f" ({', '.join(classes)})" if classes else "")


def _reference(sides: Sides) -> str:
    return f"real {sides.against}{', slices with a lesion only' if sides.positive_only else ''}"
