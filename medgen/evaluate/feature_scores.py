"""Scores that compare features: FID, KID, CMMD, precision and its kin, each real-real, real-synthetic and synthetic-synthetic, by class. Used by run.py.

One pass over the images of each side feeds them all."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from medgen.evaluate import by_class, distances, extractors, features, intervals, manifold
from medgen.evaluate.by_class import Measured, Pair, Parts
from medgen.evaluate.encoder import TrainingImages
from medgen.evaluate.extractors import Extractor
from medgen.evaluate.features import Bench, Pictures
from medgen.evaluate.inputs import Sides, some_rows
from medgen.evaluate.scores import COMPARISONS, Comparison, Score, ScoresOrReason, Skipped
from medgen.spec_evaluate import Measures

MOST_FEATURES = 50_000  # images a side, as many as published FIDs have
FEWEST_FOR_FRECHET = 2048  # with fewer, the covariance of 2048 features has no full rank and the distance is mostly bias
FEWEST_FOR_FID = 10_000

BOOTSTRAP = (
    "95% bootstrap over patients of the real and over images (or patients of their conditions) of the synthetic sides, none where a side has "
    f"fewer than {intervals.FEWEST_GROUPS}"
)
APART = f"unbiased over the whole set (at most {distances.MOST_KERNEL_IMAGES:,} a side), no two images of one patient compared within a side; {BOOTSTRAP}"
METHODS = {
    "fid": "Frechet distance of Gaussians, by singular values; no interval: drawing patients again moves it upwards by more than it varies, "
    "so that only the floor at the same n tells what a value means",
    "kid": f"squared maximum mean discrepancy, kernel (x.y/d + 1)^3 of d features, {APART}",
    "cmmd": f"1000 times the squared maximum mean discrepancy, Gaussian kernel with sigma {distances.CMMD_SIGMA:g} of features of length 1, {APART}",
    "prdc": f"balls to the {manifold.NEIGHBOURS}th nearest image of the same side, at most {manifold.MOST_IMAGES:,} a side; {BOOTSTRAP}, with the balls as they are",
}
KERNELS = {"kid": distances.cubic, "cmmd": distances.gaussian}


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


@dataclass(frozen=True)
class Needed:
    """What the metrics of features of a stage compare: the groups of images, and which rows of the two sides the network must see."""

    sides: Sides
    parts: list[Parts]
    floor_words: str
    left_out: Skipped

    @property
    def real_rows(self) -> np.ndarray:
        return np.unique(np.concatenate(self.parts[0].real))

    @property
    def synthetic_positions(self) -> np.ndarray:
        return np.unique(np.concatenate(self.parts[0].synthetic))


def needed(sides: Sides) -> Needed:
    """Many more images than the metrics of pixels use: features are small."""
    wide = sides.widened(MOST_FEATURES)
    return Needed(wide, *by_class.equal_parts(wide))


def pictures_of(sides: Sides, name: str) -> tuple[Pictures, Pictures]:
    """The real side by store row, the synthetic one by position in `chosen`, as a network sees the picture `name`."""
    channels, chosen = sides.pictures[name], sides.chosen
    real = Pictures(
        lambda rows: _joined([sides.store.images(channel, rows) for channel in channels]),
        lambda rows: _texts([sides.store.contents(channel, rows) for channel in channels]), f"{sides.store.fingerprint} {name}",
    )  # fmt: skip
    synthetic = Pictures(
        lambda positions: _joined([sides.dataset.read(channel, chosen[positions]) for channel in channels]),
        lambda positions: _texts([sides.dataset.contents(channel, chosen[positions]) for channel in channels]), f"{sides.dataset.fingerprint} {name}",
    )  # fmt: skip
    return real, synthetic


def _joined(channels: list[np.ndarray]) -> np.ndarray:
    """[n,H,W] of one channel, [n,C,H,W] of several."""
    return channels[0] if len(channels) == 1 else np.stack(channels, axis=1)


def _texts(channels: list[list[str]]) -> list[str]:
    return [" ".join(texts) for texts in zip(*channels, strict=True)]


def extractor_of(sides: Sides, picture: str, measures: Measures, bench: Bench) -> Extractor:
    """The network for one picture; one that trains itself does so on the training slices of this picture."""
    assert measures.extractor is not None  # the spec refuses metrics of features without
    return extractors.load(measures.extractor.model_dump(mode="json"), training_of(sides, picture, bench))


def training_of(sides: Sides, picture: str, bench: Bench) -> TrainingImages | None:
    """What an encoder learns from; colours as gray. None where no training images are known."""
    if len(sides.train) == 0:
        return None
    of_real, _ = pictures_of(sides, picture)

    def read(rows: np.ndarray) -> np.ndarray:
        images = of_real.read(sides.train[rows])
        return images if images.ndim == 3 else images.mean(axis=1)

    fingerprint = f"{of_real.fingerprint} {'+'.join(sides.seen)}{' positive' if sides.positive_only else ''}"
    return TrainingImages(read, len(sides.train), sides.patients(sides.train), sides.store.size, fingerprint, bench.cache, sides.seed, bench.say)


def feature_scores(sides: Sides, names: list[str], measures: Measures, bench: Bench) -> dict[str, ScoresOrReason]:
    """Scores of each of `names` (fid, kid, ...) and what had to be left out, from one feature pass over each set."""
    if not sides.dataset.image_channels:
        return dict.fromkeys(names, ([], "only masks were drawn, and extractors know images"))
    need = needed(sides)
    if not need.parts:
        return dict.fromkeys(names, ([], need.left_out))
    kept = {name: [part for part in need.parts if _reason(name, part, need.sides, measures) is None] for name in names}
    found: dict[str, list[Score]] = {name: [] for name in names}
    if any(kept.values()):
        for picture in need.sides.pictures:
            extractor = extractor_of(need.sides, picture, measures, bench)
            facts = (f"{extractor.name}; {by_class.counts_in_words(need.parts)}; reference: {by_class.reference_in_words(need.sides)}; {need.floor_words}; "
                     "synthetic-synthetic: one half of the set against the other")  # fmt: skip
            compared = {(item.label, item.comparison): item for item in _compared(need, extractor, picture, bench)}
            for name in names:
                for part in kept[name]:
                    of_part = {comparison: compared[part.label, comparison] for comparison in COMPARISONS}
                    protocol = f"{facts}; {METHODS[name]}; seed {need.sides.seed}"
                    found[name] += _scores(name, picture, part, of_part, extractor, protocol, need.sides.seed)
    return {name: (found[name], _told(name, need, measures)) for name in names}


def _compared(need: Needed, extractor: Extractor, picture: str, bench: Bench) -> Iterator[Compared]:
    """Every comparison of every part; the first part holds the rows of all others, so that each image is seen once."""
    sides, rows, positions = need.sides, need.real_rows, need.synthetic_positions
    of_real, of_synthetic = pictures_of(sides, picture)
    real = features.features(extractor, of_real, rows, bench)
    synthetic = features.features(extractor, of_synthetic, positions, bench)
    groups = sides.synthetic_groups()
    for part in need.parts:
        real_sides = [(real, np.searchsorted(rows, side), sides.patients(side)) for side in part.real]
        drawn = [(synthetic, np.searchsorted(positions, side), groups[side]) for side in part.synthetic]
        for comparison, both in zip(COMPARISONS, (real_sides, [real_sides[0], drawn[0]], drawn), strict=True):
            (one, there, whose), (other, elsewhere, others) = both
            yield Compared(part.label, comparison, (one, other), (there, elsewhere), (whose, others))


def _scores(name: str, picture: str, part: Parts, compared: dict[Comparison, Compared], extractor: Extractor, protocol: str, seed: int) -> list[Score]:
    """The scores of one metric for one group of images; several metrics where one computation gives them."""
    if name == "prdc":
        found = {comparison: _overlap(item, seed) for comparison, item in compared.items()}
        return [score for metric in next(iter(found.values()))
                for score in by_class.three_scores(metric, picture, part.label, {key: of[metric] for key, of in found.items()}, part.count, protocol)]  # fmt: skip
    if name == "fid":
        values: dict[Comparison, Measured] = {comparison: (_frechet(item), None) for comparison, item in compared.items()}
        return by_class.three_scores(frechet_name(part.count, extractor), picture, part.label, values, part.count, protocol)
    values = {comparison: _discrepancy(name, item, seed) for comparison, item in compared.items()}
    return by_class.three_scores(name, picture, part.label, values, part.count, protocol)


def _frechet(item: Compared) -> float:
    first, second = (distances.moments(table, places) for table, places in zip(item.tables, item.places, strict=True))
    return distances.frechet(first, second)


def _discrepancy(name: str, item: Compared, seed: int) -> Measured:
    (first, second), groups = item.sides(distances.MOST_KERNEL_IMAGES, seed)
    found = distances.discrepancy(KERNELS[name], first, second, groups[0], groups[1], seed, f"{name}_bootstrap_{item.comparison}_{item.label}")
    return found.value, found.interval


def _overlap(item: Compared, seed: int) -> dict[str, Measured]:
    (first, second), groups = item.sides(manifold.MOST_IMAGES, seed)
    found = manifold.overlap(first, second)
    of_side = {"precision": (found.precision, 1), "recall": (found.recall, 0), "density": (found.density, 1), "coverage": (found.coverage, 0)}
    return {
        metric: (float(values.mean()), _interval_of_overlap(values, groups[side], seed, f"{metric}_{item.comparison}_{item.label}"))
        for metric, (values, side) in of_side.items()
    }


def _interval_of_overlap(values: np.ndarray, groups: np.ndarray, seed: int, stream: str) -> tuple[float, float] | None:
    """All alike is no certainty: a bootstrap of only ones or zeros would have no width."""
    if values.min() == values.max() and values[0] in (0, 1):
        return intervals.share_interval(float(values[0]), groups)
    return intervals.mean_interval(values, [groups], seed, stream)


def frechet_name(count: int, extractor: Extractor) -> str:
    """The name that a Frechet distance of `count` images a side may carry."""
    if count < FEWEST_FOR_FRECHET:
        return "fd_small_n"
    return "fid" if count >= FEWEST_FOR_FID and extractor.published_inception else "fd"


def _reason(name: str, part: Parts, sides: Sides, measures: Measures) -> Skipped:
    """Why a metric is not computed for a group of images; None if it is."""
    if name == "fid" and part.count < FEWEST_FOR_FRECHET and not measures.allow_small_n:
        return (f"a Frechet distance of fewer than {FEWEST_FOR_FRECHET:,} images a side is mostly bias: "
                "read kid, or allow it (allow_small_n) for a number to compare at the same n only")  # fmt: skip
    groups = sides.synthetic_groups()
    names = (*(sides.patients(side) for side in part.real), *(groups[side] for side in part.synthetic))
    if name in KERNELS and any(len(np.unique(side)) < 2 for side in names):
        return "the images of a side are of one patient, whose slices are not compared with each other"
    return None


def _told(name: str, need: Needed, measures: Measures) -> Skipped:
    """What is left out of one metric, each reason once with the groups that it is for."""
    groups_of: dict[str, list[str]] = {}
    for part in need.parts:
        reason = _reason(name, part, need.sides, measures)
        if reason is not None:
            groups_of.setdefault(reason, []).append(f"{part.label or 'all'} {part.count}")
    return by_class.reasons(need.left_out, *(f"{', '.join(groups)} a side: {reason}" for reason, groups in groups_of.items()))
