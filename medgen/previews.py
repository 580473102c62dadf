"""Sample grids of a training: how the images of one preview are laid out, as a PNG. Used by train_log.py, which writes them."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np

ACROSS = 4  # images in a row of a grid; more where that makes it square
GAP_PIXELS = 2
GAP_GREY = 0.25
FEWEST_PIXELS = 64  # per side of an image: smaller ones are enlarged by a whole number


def sample_grid(channels: Sequence[np.ndarray]) -> np.ndarray:
    """uint8 [height, width]: samples from left to right, row by row, each with its channels side by side.

    channels: [N, H, W] in [0, 1] each; what lies outside is cut off."""
    count, size = channels[0].shape[:2]
    columns = min(count, max(1, max(ACROSS, math.ceil(math.sqrt(count * len(channels)))) // len(channels)))
    rows = math.ceil(count / columns)
    enlarged = max(1, FEWEST_PIXELS // size)
    samples = np.concatenate(channels, axis=2).clip(0, 1).repeat(enlarged, axis=1).repeat(enlarged, axis=2)
    cells = np.pad(samples, ((0, rows * columns - count), (0, GAP_PIXELS), (0, GAP_PIXELS)), constant_values=GAP_GREY)
    cells[count:] = GAP_GREY
    height, width = cells.shape[1:]
    grid = cells.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, columns * width)
    return np.rint(grid[:-GAP_PIXELS, :-GAP_PIXELS] * 255).astype(np.uint8)


def as_png(grid: np.ndarray) -> bytes:
    """The same bytes for the same grid."""
    from PIL import Image

    packed = io.BytesIO()
    Image.fromarray(grid).save(packed, format="PNG", optimize=True)
    return packed.getvalue()
