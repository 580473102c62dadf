"""What a metric reports, and what each metric means in plain words. Filled by evaluate, rendered by report."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medgen.errors import MedgenError

Better = Literal["lower", "higher", "closer to floor"]
METRICS_SCHEMA = 1


@dataclass(frozen=True)
class Score:
    """One number with what is needed to read it.

    `floor` is the same metric between real images and other real images; `ci` a 95% interval or None when there are too
    few patients to give one (the protocol says so); `protocol` names everything that changes the number."""

    metric: str
    channel: str
    value: float
    ci: tuple[float, float] | None
    floor: float | None
    n: int
    unit: str
    better: Better
    protocol: str


@dataclass(frozen=True)
class Meaning:
    """A metric in words: title for the table, what it measures, how to read the value next to its floor."""

    title: str
    unit: str
    better: Better
    measures: str
    reading: str


BEAT_THE_FLOOR = (
    "The floor is what the nearest slice of another real patient scores. Better than the floor means that the image "
    "follows its own patient and not just any patient; a mask does not fix the anatomy, so a large gap is not to be expected."
)

MEANINGS: dict[str, Meaning] = {
    "mae": Meaning(
        "Mean absolute error", "of the window", "lower",
        "Average difference per pixel between a synthetic slice and the real slice whose mask it was given.",
        BEAT_THE_FLOOR,
    ),
    "mae_foreground": Meaning(
        "Mean absolute error inside the head", "of the window", "lower",
        "The same, only where the real slice is not background. Empty background flatters the error over the whole slice.",
        BEAT_THE_FLOOR,
    ),
    "mae_lesion": Meaning(
        "Mean absolute error inside the mask", "of the window", "lower",
        "The same, only inside the mask: errors of a small lesion vanish in an average over the slice.",
        BEAT_THE_FLOOR,
    ),
    "psnr": Meaning(
        "Peak signal-to-noise ratio", "dB", "higher",
        "Squared error per pixel on a logarithmic scale, against a fixed data range of 1.",
        BEAT_THE_FLOOR,
    ),
    "ssim": Meaning(
        "Structural similarity", "", "higher",
        "Agreement of local brightness, contrast and structure between a synthetic slice and its real partner; 1 is identical.",
        BEAT_THE_FLOOR,
    ),
    "ms_ssim": Meaning(
        "Multi-scale structural similarity", "", "higher",
        "Structural similarity over several resolutions; 1 is identical.",
        BEAT_THE_FLOOR,
    ),
    "ms_ssim_diversity": Meaning(
        "Similarity within the set", "", "closer to floor",
        "Multi-scale structural similarity between random pairs of different images of one set.",
        "The floor is the same between slices of different real patients. Higher than the floor: the images resemble each "
        "other more than real ones do (mode collapse). Lower is no merit: noise scores low as well.",
    ),
    "swd": Meaning(
        "Sliced Wasserstein distance", "SD of real patches", "lower",
        "Distance between the distributions of small patches, from coarse shape to fine texture; needs no trained network.",
        "The floor is the distance between two groups of different real patients. At the floor, patches cannot be told "
        "from real ones; several times the floor is a visible difference (blur, noise, wrong contrast).",
    ),
    "near_train": Meaning(
        "Suspected copies", "share of images", "lower",
        "Share of synthetic images that single out one training patient: the nearest training slice is so much nearer than the "
        "nearest slice of any other training patient that 99% of held-out real slices show less.",
        "The floor is that share for the held-out slices themselves, about 1% by construction. Much more points to copied "
        "training images; look at the nearest pairs. Nothing found is no proof of privacy: only copies in pixel space are seen.",
    ),
}


def score(metric: str, channel: str, value: float, interval: tuple[float, float] | None, floor: float | None, n: int,
          protocol: str) -> Score:
    """A Score with unit and direction of its metric. Raises MedgenError if a number is not finite."""
    meaning = MEANINGS[metric]
    numbers = [value, *(interval or ()), *(() if floor is None else (floor,))]
    if not all(math.isfinite(number) for number in numbers):
        raise MedgenError(f"{metric} of {channel} is not a finite number ({numbers}); look at the images of this dataset")
    rounded = None if interval is None else (float(interval[0]), float(interval[1]))
    return Score(metric, channel, float(value), rounded, None if floor is None else float(floor), int(n), meaning.unit,
                 meaning.better, protocol)


def to_json(scores: list[Score]) -> list[dict[str, Any]]:
    return [asdict(item) for item in scores]


def from_json(records: list[dict[str, Any]]) -> list[Score]:
    return [Score(**{**record, "ci": None if record["ci"] is None else (record["ci"][0], record["ci"][1])}) for record in records]
