"""Dice, IoU and HD95 of masks that belong together. Used by run.py, for folders of masks or of images with masks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from medgen.evaluate import masks, paired, pairs
from medgen.evaluate.inputs import MASK, SPACING, Sides, spacing_mm
from medgen.evaluate.scores import ScoresOrReason

Measure = Callable[[np.ndarray, np.ndarray], np.ndarray]
DETAILS = {
    "dice": "every label above 0 is foreground; both empty: 1",
    "iou": "every label above 0 is foreground; both empty: 1",
    "hd95": "95th percentile of surface distances, the larger direction; pairs with an empty mask left out",
}


def mask_scores(sides: Sides, names: list[str]) -> dict[str, ScoresOrReason]:
    """Scores of each of `names`, beside the masks of the slice of another real patient."""
    if MASK not in sides.dataset.files or not sides.store.has_masks:
        return dict.fromkeys(names, ([], "both sides need masks"))
    if sides.partners is None:
        return dict.fromkeys(names, ([], sides.pairing.missing))
    drawn = sides.dataset.read(MASK, sides.chosen).astype(bool)
    real = sides.store.masks(sides.partners).astype(bool)
    strangers = pairs.nearest_of_another_patient(sides.store.rows, sides.partners)
    stranger_masks = None if strangers is None else sides.store.masks(strangers).astype(bool)
    return {name: _scores(name, sides, drawn, real, stranger_masks) for name in names}


def _scores(name: str, sides: Sides, drawn: np.ndarray, real: np.ndarray, strangers: np.ndarray | None) -> ScoresOrReason:
    measure: Measure = {"dice": masks.dice, "iou": masks.iou, "hd95": _hd95(sides)}[name]
    if name == "hd95" and not set(SPACING) <= set(sides.store.rows.columns):
        return [], "pictures do not say how large a pixel is; NIfTI masks do"
    values = measure(drawn, real)
    if not np.isfinite(values).any():
        return [], "in every pair a mask is empty"
    floor = None if strangers is None else measure(strangers, real)
    if floor is not None and not np.isfinite(floor).any():
        floor = None
    return paired.pair_means(name, MASK, sides, values, floor, [DETAILS[name]]), None


def _hd95(sides: Sides) -> Measure:
    def measure(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        assert sides.partners is not None
        return masks.hd95_mm(first, second, spacing_mm(sides.store.rows, sides.partners))

    return measure
