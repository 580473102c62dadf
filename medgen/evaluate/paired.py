"""Paired scores with their floors and intervals, from the two sides of an evaluation. Used by run.py."""

from __future__ import annotations

import numpy as np

from medgen.evaluate import intervals, pairs
from medgen.evaluate.inputs import Sides
from medgen.evaluate.scores import Score, score


def scores_of(name: str, sides: Sides, images: dict[str, np.ndarray]) -> tuple[list[Score], str | None]:
    """Scores of one paired metric for every image channel, or the reason why it does not apply."""
    if not sides.dataset.image_channels:
        return [], "masks are drawn from nothing, so none belongs to a real one"
    if sides.partners is None:
        return [], "the conditions were not real slices, so no real partner exists; condition the generate stage on a real split for pairs"
    found: list[Score] = []
    for channel in sides.dataset.image_channels:
        found += _channel_scores(name, channel, sides, sides.partners, images[channel])
    return found, None


def _channel_scores(name: str, channel: str, sides: Sides, partners: np.ndarray, synthetic: np.ndarray) -> list[Score]:
    real = sides.store.images(channel, partners)
    strangers = pairs.nearest_of_another_patient(sides.store.rows, partners)
    stranger_images = None if strangers is None else sides.store.images(channel, strangers)
    values = {name: _compute(name, real, synthetic)}
    floors = {name: None if stranger_images is None else _compute(name, real, stranger_images)}
    if name == "mae":
        masks = sides.store.masks(partners).astype(bool) if sides.store.has_masks else np.zeros(real.shape, dtype=bool)
        for region, where in (("mae_foreground", real > 0), ("mae_lesion", masks)):
            values[region] = pairs.mae(real, synthetic, where)
            floors[region] = None if stranger_images is None else pairs.mae(real, stranger_images, where)
    found = []
    for metric, per_image in values.items():
        usable = np.isfinite(per_image)  # a slice without a lesion has no error inside it
        if not usable.any():
            continue
        floor = floors[metric]
        patients = sides.patients(partners)[usable]
        found.append(score(
            metric, channel, per_image[usable].mean(),
            intervals.mean_interval(per_image[usable], [patients], sides.seed, f"interval_{metric}_{channel}"),
            None if floor is None else floor[usable].mean(), int(usable.sum()),
            _protocol(metric, sides, patients, floor is not None),
        ))
    return found


def _compute(name: str, real: np.ndarray, other: np.ndarray) -> np.ndarray:
    return {"mae": pairs.mae, "mse": pairs.mse, "psnr": pairs.psnr, "ssim": pairs.ssim, "ms_ssim": pairs.ms_ssim}[name](real, other)


def _protocol(metric: str, sides: Sides, patients: np.ndarray, has_floor: bool) -> str:
    size = sides.store.size
    parts = [f"mean over pairs (synthetic slice, {sides.pairing}) of {len(np.unique(patients))} patients",
             f"{size}x{size} pixels", "data range 1 (the window of the data)"]
    if metric == "mae_foreground":
        parts.append("pixels where the real slice is above 0")
    if metric == "mae_lesion":
        parts.append("pixels inside the mask; slices with a lesion only")
    if metric == "psnr":
        parts.append("per image, at most 100 dB")
    if metric == "ssim":
        parts.append("Gaussian kernel 11 px, sigma 1.5, no padding, k1 0.01, k2 0.03")
    if metric == "ms_ssim":
        weights = ", ".join(f"{weight:.4f}" for weight in pairs.scale_weights(size))
        parts.append(f"{pairs.scales_for(size)} scales with weights {weights}, kernel 11 px")
    parts.append("floor: the slice of another real patient with the nearest slice number" if has_floor else "no floor: only one patient")
    parts.append(intervals.describe(patients, "patient"))
    parts.append(f"seed {sides.seed}")
    return "; ".join(parts)
