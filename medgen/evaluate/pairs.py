"""Scores between a synthetic slice and the real slice it belongs to: MAE, MSE, PSNR, SSIM, MS-SSIM. Used by run.py and diversity.py.

The data range is fixed at 1 (the window of the data), never taken from an image."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

KERNEL_PIXELS = 11
KERNEL_SIGMA_PIXELS = 1.5
# Wang, Simoncelli and Bovik 2003, finest scale first
SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
BRIGHTNESS_CONSTANT, CONTRAST_CONSTANT = 0.01**2, 0.03**2  # k1 and k2 of the paper, for a data range of 1
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
    """How many scales of MS-SSIM an image of `size` pixels carries: the kernel must fit into the coarsest one."""
    scales = 1
    while scales < len(SCALE_WEIGHTS) and size // 2**scales >= KERNEL_PIXELS:
        scales += 1
    return scales


def too_small(size: int) -> str:
    """Why images of `size` pixels have no structural similarity."""
    return f"the kernel of SSIM has {KERNEL_PIXELS} px, the images {size}"


def scale_weights(size: int) -> tuple[float, ...]:
    """The finest weights of the paper, scaled to sum to 1."""
    weights = SCALE_WEIGHTS[: scales_for(size)]
    return tuple(weight / sum(weights) for weight in weights)


def ssim(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Structural similarity per image, [n], of float [n,H,W] (Wang et al. 2004): Gaussian kernel of 11 pixels, no padding, data range 1.

    Equal to MONAI's; there the kernel is not taken apart into rows and columns, which costs five times as much."""
    return _in_batches(lambda first, second: _similarity_and_contrast(first, second)[0], real, synthetic)


def ms_ssim(real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    """Multi-scale structural similarity per image, [n], with as many scales as fit (Wang, Simoncelli and Bovik 2003)."""
    import torch

    weights = scale_weights(real.shape[-1])

    def measure(first: Tensor, second: Tensor) -> Tensor:
        product = torch.ones(len(first))
        for scale, weight in enumerate(weights):
            similarity, contrast = _similarity_and_contrast(first, second)
            last = scale == len(weights) - 1
            product = product * torch.relu(similarity if last else contrast) ** weight
            first, second = (torch.nn.functional.avg_pool2d(side[:, None], 2)[:, 0] for side in (first, second))
        return product

    return _in_batches(measure, real, synthetic)


def _similarity_and_contrast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Means over the pixels of SSIM and of its contrast-structure factor, [n] each."""
    means = [_smooth(side) for side in (first, second)]
    variances = [_smooth(side * side) - mean * mean for side, mean in zip((first, second), means, strict=True)]
    covariance = _smooth(first * second) - means[0] * means[1]
    contrast = (2 * covariance + CONTRAST_CONSTANT) / (variances[0] + variances[1] + CONTRAST_CONSTANT)
    brightness = (2 * means[0] * means[1] + BRIGHTNESS_CONSTANT) / (means[0] ** 2 + means[1] ** 2 + BRIGHTNESS_CONSTANT)
    return (brightness * contrast).mean((1, 2)), contrast.mean((1, 2))


def _smooth(images: Tensor) -> Tensor:
    """Weighted by the Gaussian kernel: its rows and columns as two products with a band matrix, the fastest way on a CPU."""
    bands = [_band(size) for size in images.shape[1:]]
    return bands[0] @ images @ bands[1].T


@functools.cache
def _band(size: int) -> Tensor:
    """[size - 10, size]: row i holds the kernel at columns i to i + 10."""
    import torch

    places = torch.arange(KERNEL_PIXELS) - KERNEL_PIXELS // 2
    kernel = torch.exp(-((places / KERNEL_SIGMA_PIXELS) ** 2) / 2)
    band = torch.zeros(size - KERNEL_PIXELS + 1, size)
    for row in range(len(band)):
        band[row, row : row + KERNEL_PIXELS] = kernel / kernel.sum()
    return band


def _in_batches(measure: Callable[[Tensor, Tensor], Tensor], real: np.ndarray, synthetic: np.ndarray) -> np.ndarray:
    import torch

    parts = []
    for start in range(0, len(real), BATCH):
        both = [torch.from_numpy(np.ascontiguousarray(side[start : start + BATCH], dtype=np.float32)) for side in (synthetic, real)]
        parts.append(measure(*both).numpy().astype(np.float64))
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
