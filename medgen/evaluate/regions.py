"""Values of images inside the regions of their masks, real beside synthetic: are they right, and do they vary as much? Used by run.py.

The value of an image in a region is the mean over the region's pixels; what is compared are these values of all images of a class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from medgen.cardiac.rasterise import LABELS, LEFT_VENTRICLE, MYOCARDIUM
from medgen.evaluate import intervals
from medgen.evaluate.distributions import FEWEST_IMAGES, floor_sides
from medgen.evaluate.inputs import MOST_IMAGES, Sides, some_rows, synthetic_masks
from medgen.evaluate.scores import Score, ScoresOrReason, score

BLOOD, MUSCLE = LABELS[LEFT_VENTRICLE], LABELS[MYOCARDIUM]
DIFFERENCE = f"{BLOOD} - {MUSCLE}"  # within each image: what a scanner's calibration moves is left out
OF_THE_WINDOW = "of the window"
FEWEST_VALUES = 2  # fewer have no spread
READ_BLOCK = 512
REPLICATES = 1000


@dataclass(frozen=True)
class Scale:
    """What the values of a class of images mean: 0 is `low` and 1 `low + width` of the unit."""

    low: float
    width: float
    unit: str

    def of(self, values: np.ndarray, region: str) -> np.ndarray:
        return values * self.width + (0.0 if region == DIFFERENCE else self.low)


@dataclass(frozen=True)
class Values:
    """Of images that show the region: float64 [n], and the names [n] of what varies independently."""

    values: np.ndarray
    groups: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def spread(self) -> float:
        """Standard deviation between images."""
        return float(self.values.std(ddof=1))


@dataclass(frozen=True)
class Compared:
    """One region of one class. `floor`: two sets of real values that share no patient; None without one."""

    group: str | None
    scale: Scale
    synthetic: Values
    real: Values
    floor: tuple[np.ndarray, np.ndarray] | None

    @property
    def count(self) -> int:
        """Images a side of what depends on their number."""
        return min(len(side) for side in (self.synthetic.values, self.real.values, *(self.floor or ())))


def region_scores(sides: Sides, images: dict[str, np.ndarray], told: list[dict[str, Any]]) -> ScoresOrReason:
    """Mean, spread and distance of the values in each region of each class; fills `told` with both spreads and their ratio, in words too."""
    shown = synthetic_masks(sides.dataset, sides.chosen, sides.store)
    reason = _why_not(sides, shown)
    if reason is not None:
        return [], reason
    assert shown is not None
    first, second, floor_words = floor_sides(sides)
    second = some_rows(second, sides.seed, "regions_floor", MOST_IMAGES)
    found: list[Score] = []
    left_out: dict[str, list[str]] = {}  # reason -> of what
    for channel in sides.dataset.image_channels:
        drawn, real = values_in_regions(images[channel], shown, sides.store.regions), _real_values(sides, channel, np.union1d(sides.reference, np.concatenate([first, second])))
        for region in drawn:
            compared = [_compared(sides, channel, region, group, drawn[region], real[region], (first, second)) for group in sides.classes or (None,)]
            usable = [item for item in compared if min(len(item.synthetic.values), len(item.real.values)) >= FEWEST_VALUES]
            for item in compared:
                too_few = _too_few(item)
                if too_few is not None:
                    left_out.setdefault(too_few, []).append(_name(item.group, region))
            found += _scores(sides, f"{channel}: {region}", usable, floor_words)
            told += [_told(channel, region, item) for item in usable]
    return found, "; ".join(f"{reason} ({', '.join(names)})" for reason, names in left_out.items()) or None


def _too_few(item: Compared) -> str | None:
    """Why a region has no scores, or no distance; None where it has all."""
    shown = min(len(item.synthetic.values), len(item.real.values))
    if shown < FEWEST_VALUES:
        return f"a region that {shown} images of a side show is left out, at least {FEWEST_VALUES} are needed"
    return f"no distance with {item.count} images on the smallest side, at least {FEWEST_IMAGES} are needed" if item.count < FEWEST_IMAGES else None


def _why_not(sides: Sides, shown: np.ndarray | None) -> str | None:
    if not sides.dataset.image_channels:
        return "only masks were drawn"
    if shown is None:
        return "the images come without masks, so nobody knows where a region is"
    if not sides.store.has_masks:
        return "the real images come without masks"
    if len(sides.store.regions) > 1 and not sides.dataset.tells_regions:
        return f"masks of a folder say where something is and nothing more, and those of the data hold {', '.join(sides.store.regions)}; a stage of the job compares them"
    return None


def values_in_regions(images: np.ndarray, masks: np.ndarray, regions: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Region -> mean over its pixels in each image, float64 [n], NaN where an image has none; and DIFFERENCE where both its regions are there.

    images [n, H, W]; masks [n, H, W] with 1, 2, ... in the regions of that order."""
    found = {}
    for number, name in enumerate(regions, 1):
        inside = masks == number
        pixels = inside.sum(axis=(1, 2))
        total = np.sum(images, axis=(1, 2), where=inside, dtype=np.float64)
        found[name] = np.divide(total, pixels, out=np.full(len(images), np.nan), where=pixels > 0)
    return found | ({DIFFERENCE: found[BLOOD] - found[MUSCLE]} if {BLOOD, MUSCLE} <= set(regions) else {})


def _real_values(sides: Sides, channel: str, rows: np.ndarray) -> dict[str, np.ndarray]:
    """By store row, NaN for rows that were not asked for."""
    found: dict[str, np.ndarray] = {}
    for start in range(0, len(rows), READ_BLOCK):
        some = rows[start : start + READ_BLOCK]
        for region, values in values_in_regions(sides.store.images(channel, some), sides.store.masks(some), sides.store.regions).items():
            found.setdefault(region, np.full(len(sides.store.rows), np.nan))[some] = values
    return found


def _compared(sides: Sides, channel: str, region: str, group: str | None, drawn: np.ndarray, real: np.ndarray, floor: tuple[np.ndarray, np.ndarray]) -> Compared:
    scale = _scale(sides, channel, group)
    of_group = np.ones(len(drawn), dtype=bool) if group is None else sides.synthetic_labels() == group
    usable = of_group & np.isfinite(drawn)

    def rows_of(rows: np.ndarray) -> np.ndarray:
        rows = rows if group is None else rows[sides.labels(rows) == group]
        return rows[np.isfinite(real[rows])]

    reference = rows_of(sides.reference)
    pair = tuple(scale.of(real[rows_of(rows)], region) for rows in floor)
    return Compared(
        group, scale, Values(scale.of(drawn[usable], region), sides.synthetic_groups()[usable]), Values(scale.of(real[reference], region), sides.patients(reference)),
        (pair[0], pair[1]) if min(len(side) for side in pair) else None,
    )  # fmt: skip


def _scale(sides: Sides, channel: str, group: str | None) -> Scale:
    """In the unit of the files where all real images of the class have one window: then a synthetic image has it too."""
    rows, columns = sides.store.rows, (f"window_low_{channel}", f"window_high_{channel}", "unit")
    if not set(columns) <= set(rows.columns):
        return Scale(0.0, 1.0, OF_THE_WINDOW)
    of_group = rows if group is None else rows[sides.labels(np.arange(len(rows))) == group]
    windows = of_group[list(columns)].drop_duplicates()
    if len(windows) != 1 or windows["unit"].iloc[0] != "ms":
        return Scale(0.0, 1.0, OF_THE_WINDOW)
    low, high, unit = windows.iloc[0]
    return Scale(float(low), float(high) - float(low), str(unit))


# --- scores -------------------------------------------------------------------------------------------------------------


def _scores(sides: Sides, name: str, compared: list[Compared], floor_words: str) -> list[Score]:
    """Of one region of one channel, class by class."""
    found = []
    protocol = _protocol(sides, compared)
    for item in compared:
        count, unit = len(item.synthetic.values), item.scale.unit
        apart, ratio = mean_difference(item.synthetic, item.real), spread_ratio(item.synthetic, item.real)
        around = None if apart is None else (item.real.mean + apart[0], item.real.mean + apart[1])
        found.append(score("region_mean", name, item.synthetic.mean, around, item.real.mean, count, protocol, item.group, unit=unit))
        around = None if ratio is None else (item.real.spread * ratio[0], item.real.spread * ratio[1])
        found.append(score("region_spread", name, item.synthetic.spread, around, item.real.spread, count, protocol, item.group, unit=unit))
    enough = [item for item in compared if item.count >= FEWEST_IMAGES]
    distance_protocol = _distance_protocol(sides, enough, floor_words)
    return found + [_distance_score(sides, name, item, distance_protocol) for item in enough]


def _distance_score(sides: Sides, name: str, item: Compared, protocol: str) -> Score:
    """At the same number of images as its floor: a distance between samples shrinks with their number."""
    stream = f"regions_{name}_{item.group}"
    synthetic, real = _some(item.synthetic, sides.seed, f"{stream}_synthetic", item.count), _some(item.real, sides.seed, f"{stream}_real", item.count)
    floor = None
    if item.floor is not None:
        halves = [values[some_rows(np.arange(len(values)), sides.seed, f"{stream}_floor_{side}", item.count)] for side, values in enumerate(item.floor)]
        floor = wasserstein(halves[0], halves[1])
    value = wasserstein(synthetic.values, real.values)
    return score("region_distance", name, value, _distance_interval(synthetic, real, value, sides.seed, stream), floor, item.count, protocol, item.group, unit=item.scale.unit)


def _some(side: Values, seed: int, stream: str, count: int) -> Values:
    kept = some_rows(np.arange(len(side.values)), seed, stream, count)
    return Values(side.values[kept], side.groups[kept])


def wasserstein(first: np.ndarray, second: np.ndarray) -> float:
    """The exact distance of two samples of equal size: the mean distance of values of the same rank. Raises ValueError for unequal sizes."""
    if first.shape != second.shape:
        raise ValueError(f"both sides must have the same number of values, got {len(first)} and {len(second)}")
    return float(np.abs(np.sort(first) - np.sort(second)).mean())


def _distance_interval(first: Values, second: Values, value: float, seed: int, stream: str) -> tuple[float, float] | None:
    """Groups of both sides are drawn again, and the spread is centred on the value: drawing again alone moves a distance upwards."""
    codes = [np.unique(side.groups, return_inverse=True)[1] for side in (first, second)]
    counts = [int(code.max()) + 1 for code in codes]
    if min(counts) < intervals.FEWEST_GROUPS:
        return None
    every = np.concatenate([first.values, second.values])
    order = np.argsort(every, kind="stable")
    below = []
    for number, (code, count) in enumerate(zip(codes, counts, strict=True)):
        weights = np.zeros((REPLICATES, len(every)))
        start = 0 if number == 0 else len(first.values)
        weights[:, start : start + len(code)] = intervals.draw_weights(count, REPLICATES, seed, f"{stream}_{number}")[:, code]
        cumulated = np.cumsum(weights[:, order], axis=1)
        below.append(cumulated / cumulated[:, -1:])
    replicates = np.abs(below[0] - below[1])[:, :-1] @ np.diff(every[order])
    low, high = np.percentile(replicates - replicates.mean(), intervals.COVERAGE_PERCENTILES)
    return max(0.0, value + float(low)), value + float(high)


def mean_difference(synthetic: Values, real: Values) -> tuple[float, float] | None:
    """95% interval of the difference of both means."""
    return intervals.difference_interval(*(intervals.jackknifed(side.values - real.mean, side.groups, _mean) for side in (synthetic, real)))


def spread_ratio(synthetic: Values, real: Values) -> tuple[float, float] | None:
    """95% interval of the ratio of both spreads. By the jackknife, as a bootstrap of a few patients finds spreads too certain:
    of 8 patients with three images each its interval held the truth in 79% of cases, this one in 91%."""
    found = intervals.difference_interval(*(intervals.jackknifed(side.values - side.mean, side.groups, _log_spread) for side in (synthetic, real)))
    return None if found is None else (float(np.exp(found[0])), float(np.exp(found[1])))


def _mean(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    return np.asarray(total / count)


def _log_spread(count: np.ndarray, total: np.ndarray, squares: np.ndarray) -> np.ndarray:
    variance = np.maximum(squares - total**2 / count, 0) / (count - 1)
    return np.asarray(np.log(variance) / 2)


# --- words --------------------------------------------------------------------------------------------------------------


def _name(group: str | None, region: str) -> str:
    return region if group is None else f"{group} {region}"


def _protocol(sides: Sides, compared: list[Compared]) -> str:
    return "; ".join([
        f"value of an image: mean over the pixels of the region at {sides.store.size}x{sides.store.size} pixels; standard deviation between images by n - 1; {_counts(compared)}", _units(compared),
        f"floor: {_reference(sides)}; interval: 95% of the difference of the means and of the ratio of the spreads, laid on the floor, by leaving out each patient of the real side "
        f"and each {_unit(sides)} of the synthetic one, none where a side has fewer than {intervals.FEWEST_GROUPS}", f"seed {sides.seed}",
    ])  # fmt: skip


def _distance_protocol(sides: Sides, compared: list[Compared], floor_words: str) -> str:
    counts = ", ".join(_counted(item, item.count) for item in compared)
    return "; ".join([
        f"Wasserstein distance of order 1; value of an image: mean over the pixels of the region at {sides.store.size}x{sides.store.size} pixels; images a side: {counts}", _units(compared),
        f"reference: {_reference(sides)}; {floor_words}; interval: 95% bootstrap over patients of the real side and {_unit(sides)}s of the synthetic one, centred, none where a side has fewer "
        f"than {intervals.FEWEST_GROUPS}", f"seed {sides.seed}",
    ])  # fmt: skip


def _counts(compared: list[Compared]) -> str:
    synthetic = ", ".join(_counted(item, len(item.synthetic.values)) for item in compared)
    real = ", ".join(f"{_counted(item, len(item.real.values))} of {len(np.unique(item.real.groups))} patients" for item in compared)
    return f"synthetic images: {synthetic}; real images: {real}"


def _counted(item: Compared, count: int) -> str:
    return f"{count}" if item.group is None else f"{item.group} {count}"


def _units(compared: list[Compared]) -> str:
    return "unit: " + ", ".join(_counted_unit(item) for item in compared)


def _counted_unit(item: Compared) -> str:
    scale = item.scale
    told = scale.unit if scale.unit == OF_THE_WINDOW else f"{scale.unit} by the window {scale.low:g} to {scale.low + scale.width:g}"
    return told if item.group is None else f"{item.group} {told}"


def _unit(sides: Sides) -> str:
    return "patient" if sides.partners is not None else "image"


def _reference(sides: Sides) -> str:
    return f"real {sides.against}{', slices with a lesion only' if sides.positive_only else ''}"


def _told(channel: str, region: str, item: Compared) -> dict[str, Any]:
    """What metrics.json says of the two spreads, and of the means, to be read as it stands."""
    interval = spread_ratio(item.synthetic, item.real)
    ratio = item.synthetic.spread / item.real.spread if item.real.spread > 0 else None
    verdict = "narrow" if ratio == 0 else "too few patients" if interval is None else "narrow" if interval[1] < 1 else "wide" if interval[0] > 1 else "not shown"
    return {
        "channel": channel, "region": region, "group": item.group, "unit": item.scale.unit,
        "mean": item.synthetic.mean, "mean_real": item.real.mean, "spread": item.synthetic.spread, "spread_real": item.real.spread,
        "ratio": ratio, "ratio_interval": interval, "verdict": verdict, "words": f"{_name(item.group, region)}: {_spread_words(item, ratio, interval, verdict)}; {_mean_words(item)}",
    }  # fmt: skip


def _spread_words(item: Compared, ratio: float | None, interval: tuple[float, float] | None, verdict: str) -> str:
    if ratio is None:
        return "real images do not vary at all"
    if ratio == 0:
        return f"synthetic images do not vary at all, real ones by {item.real.spread:.3g} {item.scale.unit}"
    told = f"spread between images {item.synthetic.spread:.3g} {item.scale.unit}, {ratio:.2f} times the real {item.real.spread:.3g}"
    if interval is None:
        return f"{told}, with too few patients to tell it from chance"
    told += f" ({interval[0]:.2f} to {interval[1]:.2f})"
    return f"{told}: {abs(1 - ratio):.0%} too {verdict}" if verdict in ("narrow", "wide") else f"{told}: no difference shown"


def _mean_words(item: Compared) -> str:
    apart, gap = mean_difference(item.synthetic, item.real), item.synthetic.mean - item.real.mean
    told = f"mean {item.synthetic.mean:.4g} beside {item.real.mean:.4g}"
    if apart is None:
        return told
    shown = f"{'above' if gap > 0 else 'below'} by {abs(gap):.3g} ({apart[0]:+.3g} to {apart[1]:+.3g})"
    return f"{told}: {shown}" if apart[0] > 0 or apart[1] < 0 else f"{told}: no difference shown"
