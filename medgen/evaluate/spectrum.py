"""Radially averaged power spectra of images, and the distance between those of two sets; needs no weights. Used by distributions.py and curves.py."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from medgen.evaluate import intervals

BLOCK = 256
FAINTEST = 1e-12  # an empty frequency has no logarithm
DECIBEL = 10.0
REPLICATES = 1000


def radial_power(images: np.ndarray) -> np.ndarray:
    """log10 of the power of each image at 1 to H/2 cycles per image side, [n, H/2], of float [n,H,H]."""
    size = images.shape[-1]
    frequency = np.fft.fftfreq(size)
    radius = np.rint(np.hypot(frequency[:, None], frequency[None]) * size).astype(int).ravel()
    inside = np.arange(1, size // 2 + 1)
    counts = np.bincount(radius)[inside]
    found = []
    for start in range(0, len(images), BLOCK):
        power = np.abs(np.fft.fft2(images[start : start + BLOCK])) ** 2
        radial = np.stack([np.bincount(radius, image.ravel())[inside] / counts for image in power])
        found.append(np.log10(np.maximum(radial, FAINTEST)))
    return np.concatenate(found)


@dataclass(frozen=True)
class SpectrumDistance:
    """In dB: root mean square over frequencies of the difference of mean log spectra."""

    value: float
    interval: tuple[float, float] | None


def distance(first: np.ndarray, second: np.ndarray) -> float:
    """Of two sets of log spectra [n, f] and [m, f], in dB."""
    return float(_between(first.mean(axis=0), second.mean(axis=0)))


def distance_with_interval(first: np.ndarray, second: np.ndarray, first_groups: np.ndarray, second_groups: np.ndarray, seed: int) -> SpectrumDistance:
    """With a 95% interval that draws groups (patients, images) of both sides anew, centred on the value, because drawing
    again alone moves a distance upwards; None with fewer than 5 groups on a side."""
    value = distance(first, second)
    codes = [np.unique(groups, return_inverse=True)[1] for groups in (first_groups, second_groups)]
    counts = [int(code.max()) + 1 for code in codes]
    if min(counts) < intervals.FEWEST_GROUPS:
        return SpectrumDistance(value, None)
    means = []
    for side, (spectra, code, count) in enumerate(zip((first, second), codes, counts, strict=True)):
        sums = np.zeros((count, spectra.shape[1]))
        np.add.at(sums, code, spectra)
        weights = intervals.draw_weights(count, REPLICATES, seed, f"psd_bootstrap_{side}").astype(float)
        means.append((weights @ sums) / (weights @ np.bincount(code))[:, None])
    replicates = _between(means[0], means[1])
    low, high = np.percentile(replicates - replicates.mean(), intervals.COVERAGE_PERCENTILES)
    return SpectrumDistance(value, (max(0.0, value + float(low)), value + float(high)))


def _between(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.asarray(DECIBEL * np.sqrt(((first - second) ** 2).mean(axis=-1)))
