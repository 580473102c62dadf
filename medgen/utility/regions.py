"""Regions of masks as channels of a network, and as columns of what it answers. Used where trials are run and where they are put together; loads no torch.

Where the data have one region it has no name here (None), and its columns are called as lesions are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Region = str | None
ONE: tuple[Region, ...] = (None,)


def as_channels(masks: np.ndarray, count: int) -> np.ndarray:
    """bool [n, count, H, W] of masks [n, H, W]: where the labels 1, 2, ... are."""
    return np.asarray(masks[:, None] == np.arange(1, count + 1, dtype=np.uint8)[:, None, None])


def named(regions: Sequence[str]) -> tuple[Region, ...]:
    return tuple(regions) if len(regions) > 1 else ONE


def of_sides(facts: dict[str, Any]) -> tuple[Region, ...]:
    """From what a result says of its sides; data with one region, and earlier results, name none."""
    return named(facts["regions"]) if "regions" in facts else ONE


def column(name: str, region: Region) -> str:
    """Of a region among several: dice_myocardium; its own pixels are no lesion's: pixels_myocardium."""
    return name if region is None else f"{name.removeprefix('lesion_')}_{region}"


def channel(channels: Sequence[str], region: Region) -> str:
    """What a score is of: the images, or one region of them."""
    return ", ".join(channels) + ("" if region is None else f": {region}")


def listed(regions: Sequence[Region]) -> str:
    names = [str(region) for region in regions]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
