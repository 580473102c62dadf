"""Numbers of one image that a radiologist can check by eye, and what a number out of bounds is called. Used by fit.py and judge.py.

numpy and scipy only: the gate must cost little beside the sampling. Masks are not measured; they have rules of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from medgen.spec_accept import OF_SEVERAL_CHANNELS

FOREGROUND = 0.1  # of the bright end of the training slices: what is darker is background
BRIGHT_PERCENTILE = 99
WHITE = 0.999
SPIKE = 0.25  # of the range: a pixel that differs so much from its neighbours' median is an impulse
FEWEST_PIXELS = 16  # below, a mean or a median says nothing
FEWEST_LINES = 8
LONG_LINE = 0.25  # of the longest: shorter lines graze the outline, where steps are large
AROUND_LINES = 7
SMALLEST_STEP = 0.01
TINY = 1e-9
LEAST_SHARE = 1e-4  # an image without foreground has a logarithm too
IMMERKAER = np.array([1.0, -2.0, 1.0])


@dataclass(frozen=True)
class Measured:
    """One image and what several measures need of it. image float64 [H, W] in [0, 1]; foreground, filled bool [H, W].

    filled: the foreground with its holes. pieces: pixels of each piece of the foreground (8 neighbours), the largest first."""

    image: np.ndarray
    foreground: np.ndarray
    filled: np.ndarray
    pieces: np.ndarray

    @classmethod
    def of(cls, image: np.ndarray, level: float) -> Measured:
        """`level`: what is brighter belongs to the foreground."""
        values = image.astype(np.float64)
        foreground = values > level
        labels, _ = ndimage.label(foreground, structure=np.ones((3, 3)))
        pieces = np.sort(np.bincount(labels.ravel())[1:])[::-1]
        return cls(values, foreground, _filled(foreground), pieces)


def _filled(foreground: np.ndarray) -> np.ndarray:
    """With every dark part that does not reach the border (4 neighbours)."""
    dark, count = ndimage.label(~foreground)
    outside = np.zeros(count + 1, dtype=bool)
    for edge in (dark[0], dark[-1], dark[:, 0], dark[:, -1]):
        outside[edge] = True
    outside[0] = False
    filled: np.ndarray = ~outside[dark]
    return filled


@dataclass(frozen=True)
class Measure:
    """`low`, `high`: the rule that an image below or above the bounds breaks; None: that side says nothing.

    `least`: an excess that nobody would see, in the measure's own unit: bounds are moved outwards by at least that.
    `most`: by which they are moved at most, where something must never pass. `by_size`: True if bounds depend on how large the foreground is, as slices at the top of a head differ from those through its middle."""

    name: str
    low: str | None
    high: str | None
    least: float
    meaning: str
    of: Callable[[Measured], float]
    most: float = np.inf
    by_size: bool = True


def foreground_share(measured: Measured) -> float:
    return float(np.log10(measured.foreground.mean() + LEAST_SHARE))


def mean_inside(measured: Measured) -> float:
    return float(measured.image[measured.filled].mean()) if measured.filled.any() else 0.0


def spread_inside(measured: Measured) -> float:
    return float(measured.image[measured.filled].std()) if measured.filled.any() else 0.0


def white_share(measured: Measured) -> float:
    return float((measured.image >= WHITE).mean())


def grain(measured: Measured) -> float:
    """The standard deviation of noise inside, after Immerkaer 1996, from the median of the second differences: edges do not count."""
    image = measured.image
    lines = image[:-2] * IMMERKAER[0] + image[1:-1] * IMMERKAER[1] + image[2:] * IMMERKAER[2]
    found = lines[:, :-2] * IMMERKAER[0] + lines[:, 1:-1] * IMMERKAER[1] + lines[:, 2:] * IMMERKAER[2]
    inside = _eroded(measured.filled, 2)[1:-1, 1:-1]
    if inside.sum() < FEWEST_PIXELS:
        return 0.0
    return float(np.median(np.abs(found[inside])) / 0.6745 / 6)


def spikes(measured: Measured) -> float:
    image = measured.image
    around = ndimage.median_filter(image.astype(np.float32), 3)
    return float((np.abs(image - around) > SPIKE).mean())


def fine_share(measured: Measured) -> float:
    size_rows, size_columns = measured.image.shape
    power = np.abs(np.fft.rfft2(measured.image - measured.image.mean())) ** 2
    power[:, 1 : (size_columns + 1) // 2] *= 2  # the half that the transform of a real image leaves out
    fine = np.hypot(np.fft.fftfreq(size_rows)[:, None], np.fft.rfftfreq(size_columns)[None]) > 0.25
    return float(np.log10((power[fine].sum() + TINY) / (power.sum() + TINY)))


def direction(measured: Measured) -> float:
    between_rows = np.abs(np.diff(measured.image, axis=0)).sum()
    between_columns = np.abs(np.diff(measured.image, axis=1)).sum()
    return float(np.log((between_rows + TINY) / (between_columns + TINY)))


def border_share(measured: Measured) -> float:
    inside = measured.foreground
    return float(np.concatenate([inside[0], inside[-1], inside[1:-1, 0], inside[1:-1, -1]]).mean())


def beside_largest(measured: Measured) -> float:
    return float(measured.pieces[1:].sum() / max(1, measured.pieces.sum()))


def hole_share(measured: Measured) -> float:
    return float((measured.filled & ~measured.foreground).sum() / max(1, measured.filled.sum()))


def seam(measured: Measured) -> float:
    return max(_seam(measured.image, measured.foreground), _seam(measured.image.T, measured.foreground.T))


def _seam(image: np.ndarray, foreground: np.ndarray) -> float:
    """The largest mean step between two neighbouring rows, by the median of those around it."""
    crossed = foreground[1:] | foreground[:-1]
    pixels = crossed.sum(axis=1)
    long = pixels >= max(1, LONG_LINE * pixels.max())
    if long.sum() < FEWEST_LINES:
        return 0.0
    steps = np.abs(np.diff(image, axis=0)).sum(axis=1)[long] / pixels[long]
    around = ndimage.median_filter(steps, AROUND_LINES, mode="nearest")
    return float((steps / (around + SMALLEST_STEP)).max())


def asymmetry(measured: Measured) -> float:
    image = measured.image
    return float(np.abs(image - image[:, ::-1]).sum() / (2 * image.sum() + TINY))


def off_centre_rows(measured: Measured) -> float:
    return _off_centre(measured.filled.sum(axis=1))


def off_centre_columns(measured: Measured) -> float:
    return _off_centre(measured.filled.sum(axis=0))


def _off_centre(pixels: np.ndarray) -> float:
    """Of the centre of the foreground along one axis, as a share of the image side; negative: up or left."""
    if not pixels.any():
        return 0.0
    places = (np.arange(len(pixels)) + 0.5) / len(pixels) - 0.5
    return float((pixels * places).sum() / pixels.sum())


def rough_outline(measured: Measured) -> float:
    area = measured.filled.sum()
    outline = (measured.filled & ~_eroded(measured.filled, 1)).sum()
    return float(outline / (2 * np.sqrt(np.pi * area))) if area else 0.0


def _eroded(inside: np.ndarray, times: int) -> np.ndarray:
    """Without what touches the outside (4 neighbours); beyond the border is outside."""
    for _ in range(times):
        kept = np.zeros_like(inside)
        kept[1:-1, 1:-1] = inside[1:-1, 1:-1] & inside[:-2, 1:-1] & inside[2:, 1:-1] & inside[1:-1, :-2] & inside[1:-1, 2:]
        inside = kept
    return inside


MEASURES = (
    Measure("foreground_share", "blank", "outside", 0.05, "log10 of the share of pixels brighter than the background", foreground_share, most=0.5, by_size=False),
    Measure("mean_inside", "contrast", "contrast", 0.02, "mean brightness of the foreground with its holes", mean_inside),
    Measure("spread_inside", "contrast", "contrast", 0.02, "standard deviation of brightness there: the contrast between tissues", spread_inside),
    Measure("white_share", None, "contrast", 0.005, "share of pixels at the upper end of the range", white_share),
    Measure("grain", None, "noise", 0.005, "standard deviation of noise inside the foreground", grain),
    Measure("spikes", None, "noise", 0.003, "share of pixels that differ by a quarter of the range from the median of their neighbours", spikes),
    Measure("fine_share", "blur", "noise", 0.1, "log10 of the share of power above half the Nyquist frequency: low is blurred, high is noisy", fine_share),
    Measure("direction", "blur", "blur", 0.1, "log of the steps between rows by the steps between columns: smeared along one axis", direction),
    Measure("border_share", None, "outside", 0.03, "share of the image's border that is foreground: it reaches out of the picture", border_share),
    Measure("beside_largest", None, "pieces", 0.02, "share of the foreground that is not in its largest piece: a second head, islands", beside_largest),
    Measure("hole_share", None, "holes", 0.01, "share of the foreground that is dark inside it", hole_share),
    Measure("seam", None, "seam", 0.5, "largest step between two neighbouring lines, by that of the lines around: halves that do not meet", seam),
    Measure("off_centre_rows", "shape", "shape", 0.02, "where the foreground's centre lies between top and bottom", off_centre_rows),
    Measure("off_centre_columns", "shape", "shape", 0.02, "where the foreground's centre lies between left and right", off_centre_columns),
    Measure("asymmetry", None, "shape", 0.03, "difference to the image mirrored left to right, 0 to 1", asymmetry),
    Measure("rough_outline", None, "shape", 0.05, "length of the outline by that of a disc of the same area", rough_outline),
)
# computed by subspace.py, from a small version of the image
UNLIKE = (
    Measure("unlike", None, "unlike", 0.003, "root mean square difference of a small version to what the training slices' principal components can show", lambda _: 0.0),
    Measure("unlike_part", None, "unlike", 0.01, "the same in the part of the image where it is largest", lambda _: 0.0),
)
EDGES_AGREE = Measure("edges_agree", OF_SEVERAL_CHANNELS, None, 0.02, "correlation of the strengths of edges of two channels: low where they are not registered", lambda _: 0.0)
OF_ONE_CHANNEL = (*MEASURES, *UNLIKE)


def level_of(images: np.ndarray) -> float:
    """Where the background ends, from slices [n, H, W] of the training split."""
    bright = np.percentile(images.reshape(len(images), -1), BRIGHT_PERCENTILE, axis=1)
    return float(FOREGROUND * np.median(bright))


def measure(images: np.ndarray, level: float) -> np.ndarray:
    """[n, len(MEASURES)] of images [n, H, W]."""
    found = np.empty((len(images), len(MEASURES)))
    for row, image in zip(found, images, strict=True):
        measured = Measured.of(image, level)
        row[:] = [item.of(measured) for item in MEASURES]
    return found


def edges_agree(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """[n] of two channels [n, H, W]; 1 where one of them has no edge at all, which other rules tell."""
    return np.array([_correlation(_edges(one), _edges(other)) for one, other in zip(first, second, strict=True)])


def _edges(image: np.ndarray) -> np.ndarray:
    rows, columns = np.gradient(image.astype(np.float64))
    return np.hypot(rows, columns)


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    one, other = one - one.mean(), other - other.mean()
    size = float(np.sqrt((one**2).sum() * (other**2).sum()))
    return float((one * other).sum() / size) if size > TINY else 1.0


def pairs_of(channels: Sequence[str]) -> list[tuple[str, str]]:
    """The channels that are compared: each with the first."""
    return [(channels[0], other) for other in channels[1:]]
