"""Scores between a synthetic slice and the real slice it belongs to: MAE, MSE, PSNR, SSIM, MS-SSIM. Used by run.py and diversity.py.

The data range is fixed at 1 (the window of the data), never taken from an image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

KERNEL_PIXELS = 11
KERNEL_SIGMA_PIXELS = 1.5
# Wang, Simoncelli and Bovik 2003, finest scale first
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
BATCH = 64
PSNR_CEILING_DB = 100.0  # identical images have an infinite PSNR, which would make every mean infinite


def mae(real: np.ndarray, synthetic: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """Mean absolute error per image, [n]; both float [n,H,W] in [0,1]. `where` bool [n,H,W] limits it; NaN where it is empty."""
    difference = np.abs(real.astype(np.float64) - synthetic)
    if where is None:
        return difference.mean(axis=(1, 2))
    pixels = where.sum(axis=(1, 2))
    total = (difference * where).sum(axis=(1, 2))
    return np.divide(total, pixels, out=np.full(len(real), np.nan), where=pixels > 0)


def mse(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Mean squared error per image, [n]; both float [n,H,W] in [0,1]."""
    return np.asarray(((real.astype(np.float64) - synthetic) ** 2).mean(axis=(1, 2)))


def psnr(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio per image in dB, [n], data range 1, at most 100 dB."""
    squared = mse(real, synthetic)
    floor = 10 ** (-PSNR_CEILING_DB / 10)
    return -10 * np.log10(np.maximum(squared, floor))


def scales_for(size: int) -> int:
    """How many scales of MS-SSIM an image of `size` pixels carries: the kernel must fit into the coarsest one.

    MONAI divides by (scales-1)^2 where the pooling divides by 2^(scales-1): its own check refuses four scales of 96 pixels,
    which would work, and lets two scales of 16 pixels through to a crash. Both are asked."""
    scales = 1
    while scales < len(SCALE_WEIGHTS) and size // 2**scales >= KERNEL_PIXELS and size // scales**2 >= KERNEL_PIXELS:
        scales += 1
    return scales


def scale_weights(size: int) -> tuple[float, ...]:
    """The finest weights of the paper, scaled to sum to 1."""
    weights = SCALE_WEIGHTS[: scales_for(size)]
    return tuple(weight / sum(weights) for weight in weights)


def ssim(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Structural similarity per image, [n]; Gaussian kernel of 11 pixels, data range 1 (MONAI)."""
    from monai.metrics.regression import SSIMMetric

    return _in_batches(SSIMMetric(2, data_range=1.0, win_size=KERNEL_PIXELS, kernel_sigma=KERNEL_SIGMA_PIXELS, reduction="none"),
                       real, synthetic)


def ms_ssim(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity per image, [n], with as many scales as fit (see scales_for)."""
    from monai.metrics.regression import MultiScaleSSIMMetric

    metric = MultiScaleSSIMMetric(2, data_range=1.0, kernel_size=KERNEL_PIXELS, kernel_sigma=KERNEL_SIGMA_PIXELS,
                                  weights=scale_weights(real.shape[-1]), reduction="none")
    return _in_batches(metric, real, synthetic)


def _in_batches(metric: object, real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    import torch

    assert callable(metric)
    parts = []
    for start in range(0, len(real), BATCH):
        both = [torch.from_numpy(np.ascontiguousarray(side[start : start + BATCH], dtype=np.float32))[:, None]
                for side in (synthetic, real)]
        parts.append(metric(*both).reshape(-1).numpy().astype(np.float64))
    return np.concatenate(parts)


def nearest_of_another_patient(rows: pd.DataFrame, wanted: np.ndarray) -> np.ndarray | None:
    """For each row number in `wanted` the row of another patient with the nearest slice number, [n].

    Patients of the same split first; if it has one patient only, any other patient. None if there is no other patient."""
    patients, splits = rows["patient"].to_numpy(), rows["split"].to_numpy()
    slices = rows["slice"].to_numpy(dtype=float)
    chosen = []
    for row in wanted:
        others = patients != patients[row]
        same_split = others & (splits == splits[row])
        candidates = np.flatnonzero(same_split if same_split.any() else others)
        if len(candidates) == 0:
            return None
        chosen.append(candidates[np.argmin(np.abs(slices[candidates] - slices[row]))])
    return np.array(chosen, dtype=np.int64)
