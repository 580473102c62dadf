"""Slices as inline PNGs with the outlines of their mask's regions as SVG paths over them. Used by gallery.py, trainings.py."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MOST_PIXELS = 256  # per side: shown smaller than that, and a page is sent by mail
MOST_GRID_PIXELS = 384  # of a grid of samples
COLOURS = 3  # of regions; a further one has the first again


@dataclass(frozen=True)
class Outline:
    """An SVG path in pixels around one region. `colour` 1, 2 or 3: of the style sheet."""

    path: str
    colour: int


@dataclass(frozen=True)
class Tile:
    """One picture: `source` is a data URL, `outlines` those of the mask's regions, `kind` real, synthetic or mask."""

    source: str
    outlines: tuple[Outline, ...]
    width: int
    height: int
    label: str
    kind: str
    title: str


def tile(image: np.ndarray, mask: np.ndarray | None, label: str, kind: str, title: str) -> Tile:
    """image float [H,W] or, in colour, [H,W,3], in [0,1]; mask [H,W] to outline, the number of each pixel's region, or None."""
    height, width = image.shape[:2]
    return Tile(_png(image), () if mask is None else outlines(mask), width, height, label, kind, title)


def mask_tile(mask: np.ndarray, label: str, title: str, kind: str = "mask") -> Tile:
    """A mask on its own: each region filled in its colour of the page by its outline, on black."""
    return Tile(_png(np.zeros(mask.shape)), outlines(mask), mask.shape[1], mask.shape[0], label, f"{kind} filled", title)


def grid_tile(path: Path, label: str, title: str) -> Tile:
    """A grid of samples that a training has drawn. Raises OSError, ValueError or SyntaxError if the file is no picture."""
    from PIL import Image

    with Image.open(path) as picture:
        pixels = np.asarray(picture.convert("L")) / 255
    return Tile(_png(pixels, MOST_GRID_PIXELS), (), pixels.shape[1], pixels.shape[0], label, "grid", title)


def colour_of(label: int) -> int:
    """Of the region with this number, from 1."""
    return (label - 1) % COLOURS + 1


def outlines(mask: np.ndarray) -> tuple[Outline, ...]:
    """Of each label above 0 of a mask [H,W]."""
    return tuple(Outline(outline(mask == label), colour_of(int(label))) for label in np.unique(mask) if label > 0)


def outline(mask: np.ndarray) -> str:
    """The border of a mask {0,1} [H,W] as an SVG path; pixel (row, column) covers [column, column+1] x [row, row+1]."""
    from skimage.measure import approximate_polygon, find_contours

    loops = find_contours(np.pad(mask.astype(float), 1), 0.5)
    parts = []
    for loop in loops:
        points = approximate_polygon(loop, 0.1) - 0.5  # minus the padding of 1, plus half a pixel to its centre
        parts.append("M" + "L".join(f"{column:.1f} {row:.1f}" for row, column in points) + "Z")
    return "".join(parts)


def _png(image: np.ndarray, most_pixels: int = MOST_PIXELS) -> str:
    from PIL import Image

    picture = Image.fromarray(np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8))
    picture.thumbnail((most_pixels, most_pixels), Image.Resampling.LANCZOS)
    packed = io.BytesIO()
    picture.save(packed, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
