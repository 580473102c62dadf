"""How far the two images of one slice lie from each other: a pair that is made together must be registered. Used by run.py.

The edges of both are laid over each other at every shift of whole pixels: edges are in the same places whatever the contrast."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from medgen.evaluate import intervals
from medgen.evaluate.inputs import SPACING, Sides, spacing_mm
from medgen.evaluate.scores import Score, ScoresOrReason, score

LARGEST_SHARE = 8  # of the side, its inverse: shifts are looked for up to an eighth


def registration_scores(sides: Sides, images: dict[str, np.ndarray]) -> ScoresOrReason:
    """The mean distance for each two image channels, beside that of the real slices."""
    channels = sides.dataset.image_channels
    if len(channels) < 2:
        return [], "registration is of two image channels, and there is one" if channels else "only masks were drawn"
    if not all(set(SPACING) <= set(table.columns) for table in (sides.store.rows, sides.dataset.index)):
        return [], "pictures do not say how large a pixel is; NIfTI files do"
    found = [item for first, second in combinations(channels, 2) for item in _scores(first, second, sides, images)]
    return found, None if found else "in every image a channel is empty"


def _scores(first: str, second: str, sides: Sides, images: dict[str, np.ndarray]) -> list[Score]:
    drawn = distances_mm(images[first], images[second], spacing_mm(sides.dataset.index, sides.chosen))
    rows = sides.reference
    real = distances_mm(sides.store.images(first, rows), sides.store.images(second, rows), spacing_mm(sides.store.rows, rows))
    usable, known = np.isfinite(drawn), np.isfinite(real)
    if not usable.any():
        return []
    groups, unit = sides.synthetic_groups()[usable], "patient" if sides.partners is not None else "image"
    protocol = (
        f"mean over images of the length of the shift, in whole pixels up to {reach(sides.store.size)} of {sides.store.size}, at which the edges of both channels "
        f"agree best; {usable.sum()} images with edges in both; floor: real {sides.against}, {known.sum()} slices; {intervals.describe(groups, unit)}; seed {sides.seed}"
    )
    name = f"{first} to {second}"
    interval = intervals.mean_interval(drawn[usable], [groups], sides.seed, f"interval_registration_{name}")
    floor = float(real[known].mean()) if known.any() else None
    return [score("registration", name, drawn[usable].mean(), interval, floor, int(usable.sum()), protocol)]


def reach(size: int) -> int:
    """The largest shift that is looked for, in pixels along each axis."""
    return max(1, size // LARGEST_SHARE)


def distances_mm(first: np.ndarray, second: np.ndarray, spacing: np.ndarray) -> np.ndarray:
    """Lengths of `shifts` in mm, float64 [n]; spacing [n, 2]: between rows, between columns."""
    return np.asarray(np.hypot(*(shifts(first, second) * spacing).T))


def shifts(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(rows, columns) by which each of `second` lies from its partner in `first`, float64 [n, 2]; NaN where one has no edges. Images [n, H, H]."""
    most = reach(first.shape[-1])
    found = np.full((len(first), 2), np.nan)
    for number, pair in enumerate(zip(first, second, strict=True)):
        # without the outermost lines, where a gradient has one neighbour only and noise is stronger: a frame that both would share
        strengths = [np.hypot(*np.gradient(image.astype(float)))[1:-1, 1:-1] for image in pair]
        if not (strengths[0].any() and strengths[1].any()):
            continue
        # room at the border, so that what leaves on one side does not come back on the other; less their mean, as otherwise whatever
        # overlaps most agrees best, and two images of noise would seem registered
        edges = [np.pad(strength - strength.mean(), most) for strength in strengths]
        correlation = np.fft.irfft2(np.conj(np.fft.rfft2(edges[0])) * np.fft.rfft2(edges[1]), edges[0].shape)
        near = np.roll(correlation, (most, most), axis=(0, 1))[: 2 * most + 1, : 2 * most + 1]
        found[number] = np.array(np.unravel_index(np.argmax(near), near.shape)) - most
    return found
