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
        return [], sides.pairing.missing
    if name in ("ssim", "ms_ssim") and sides.store.size < pairs.KERNEL_PIXELS:
        return [], pairs.too_small(sides.store.size)
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
    return [item for metric, per_pair in values.items() for item in pair_means(metric, channel, sides, per_pair, floors[metric], _details(metric, sides.store.size))]


def pair_means(metric: str, channel: str, sides: Sides, values: np.ndarray, floor: np.ndarray | None, details: list[str]) -> list[Score]:
    """The mean over pairs, of all and of each group, from a value [n] per pair, NaN where there is none; `details`: what else changes the number."""
    assert sides.partners is not None
    patients = sides.patients(sides.partners)
    groups = [(None, np.ones(len(values), dtype=bool)), *((label, sides.synthetic_labels() == label) for label in sides.classes)]
    found = []
    for group, members in groups:
        usable = np.isfinite(values) & members  # a slice without a lesion has no error inside it
        if not usable.any():
            continue
        protocol = "; ".join([
            f"mean over pairs (synthetic slice, {sides.pairing.partner}) of {len(np.unique(patients[usable]))} patients", f"{sides.store.size}x{sides.store.size} pixels",
            *details, "floor: the slice of another real patient with the nearest slice number" if floor is not None else "no floor: only one patient",
            intervals.describe(patients[usable], "patient"), f"seed {sides.seed}",
        ])  # fmt: skip
        interval = intervals.mean_interval(values[usable], [patients[usable]], sides.seed, f"interval_{metric}_{channel}_{group}")
        found.append(score(metric, channel, values[usable].mean(), interval, _floor(floor, usable), int(usable.sum()), protocol, group))
    return found


def _floor(floor: np.ndarray | None, usable: np.ndarray) -> float | None:
    known = np.array([]) if floor is None else floor[usable & np.isfinite(floor)]
    return float(known.mean()) if len(known) else None


def _compute(name: str, real: np.ndarray, other: np.ndarray) -> np.ndarray:
    return {"mae": pairs.mae, "mse": pairs.mse, "psnr": pairs.psnr, "ssim": pairs.ssim, "ms_ssim": pairs.ms_ssim}[name](real, other)


def _details(metric: str, size: int) -> list[str]:
    weights = ", ".join(f"{weight:.4f}" for weight in pairs.scale_weights(size))
    of_metric = {
        "mae_foreground": ["pixels where the real slice is above 0"],
        "mae_lesion": ["pixels inside the mask; slices with a lesion only"],
        "psnr": ["per image, at most 100 dB"],
        "ssim": ["Gaussian kernel 11 px, sigma 1.5, no padding, k1 0.01, k2 0.03"],
        "ms_ssim": [f"{pairs.scales_for(size)} scales with weights {weights}, kernel 11 px"],
    }
    return ["data range 1 (the window of the data)", *of_metric.get(metric, ())]
