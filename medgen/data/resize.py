"""Slices to size x size: antialiased for images, nearest for masks, on the same pixel centres, or the shares that masks cover; called by build.py, jsonl_build.py and evaluate/."""

from __future__ import annotations

from typing import Any

import numpy as np


def pad_to_square(slices: np.ndarray) -> np.ndarray:
    """[n, H, W] with zeros around, centred, as [n, S, S] where S = max(H, W)."""
    height, width = slices.shape[1:]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return np.pad(slices, ((0, 0), (top, side - height - top), (left, side - width - left)))


def resize_images(images: np.ndarray, size: int) -> np.ndarray:
    """[n, H, W] float32 to [n, size, size]: padded to a square, then bilinear with antialiasing.

    Weights are positive and sum to 1, so values stay in the range of the input."""
    square = pad_to_square(images.astype(np.float32, copy=False))
    return _interpolate(square, size, mode="bilinear", antialias=True, align_corners=False)


def resize_masks(masks: np.ndarray, size: int) -> np.ndarray:
    """[n, H, W] integers to [n, size, size] of the same type, by nearest pixel centre: no new labels appear."""
    square = pad_to_square(masks)
    # float32 holds every label below 2**24 exactly; "nearest-exact" uses pixel centres as the images do
    return _interpolate(square.astype(np.float32), size, mode="nearest-exact").astype(masks.dtype)


def shares_of(mask: np.ndarray, size: int) -> np.ndarray:
    """[H, W] of 0 and 1, padded to a square as its image is: float64 [size, size], the share of each new pixel that the ones cover, exact but for rounding."""
    square = pad_to_square(mask[None])[0]
    return _means_along(_means_along(square, size).T, size).T


def _means_along(values: np.ndarray, size: int) -> np.ndarray:
    """[S, n] to [size, n]: the mean over each of `size` equal parts of the first axis, of values that are constant over each pixel."""
    side = len(values)
    sums = np.zeros((side + 1, values.shape[1]))  # the integral from 0 to each border of pixels
    np.cumsum(values, axis=0, dtype=np.float64, out=sums[1:])
    borders = np.arange(size + 1) * side / size
    before = np.minimum(borders.astype(int), side - 1)
    integral = sums[before] + (borders - before)[:, None] * values[before]
    means: np.ndarray = np.diff(integral, axis=0) * size / side
    return means


def _interpolate(square: np.ndarray, size: int, **options: Any) -> np.ndarray:
    import torch

    if square.shape[1] == size or square.shape[0] == 0:
        return square if square.shape[0] else np.zeros((0, size, size), square.dtype)
    resized = torch.nn.functional.interpolate(torch.from_numpy(square)[:, None], size=(size, size), **options)
    return resized[:, 0].numpy()
