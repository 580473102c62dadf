"""Images as they were acquired, with their contours, put on the canvas that a model sees, at their own spacing or another; used through store.py.

Built by cardiac_build.py. A canvas is `size` x `size` pixels on the image's own lattice or a finer or coarser one: padded around where the image
is smaller, cut around the heart where it is larger. Masks are drawn from contours on every canvas anew, never resampled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medgen.cardiac.rasterise import Anatomy, Grid
from medgen.cardiac.regions import Region
from medgen.data.array_files import mapped

MAPS_VERSION = 2  # raise it when the same data and spec would give other canvases
PIXELS, EDGES = "native", "edges"  # arrays of the cache
NATIVES = "natives.json"
PARTS = 3  # of an anatomy: epicardium, left and right ventricle; edges name them by their place
HEART_MARGIN_PIXELS = 4  # that a moved canvas keeps around the heart
ANTIALIAS_SUPPORT = 1.0  # pixels of the coarser lattice on each side, of a triangle: bilinear where nothing gets coarser

Pair = tuple[float, float]


@dataclass(frozen=True)
class Native:
    """Where one image lies in the cache, and its geometry. Pairs are (row, column)."""

    shape: tuple[int, int]
    spacing_mm: Pair
    first_pixel: int  # in the array of all pixels
    edges: tuple[int, int]  # first and last + 1 in the array of all edges
    window: Pair  # what becomes 0 and 1
    heart: tuple[float, float, float, float]  # top, bottom, left, right in pixels of the image

    @property
    def grid(self) -> Grid:
        return Grid(self.shape, self.spacing_mm)


@dataclass(frozen=True)
class Canvas:
    """Pixels around an image. `inside`: first and last + 1 of the rows, then of the columns, that the image covers."""

    grid: Grid
    inside: tuple[int, int, int, int]

    @property
    def field_mm(self) -> Pair:
        """Of what is inside."""
        top, bottom, left, right = self.inside
        return (bottom - top) * self.grid.spacing_mm[0], (right - left) * self.grid.spacing_mm[1]

    def valid(self) -> np.ndarray:
        """uint8 [size, size], 1 inside."""
        top, bottom, left, right = self.inside
        found = np.zeros(self.grid.shape, np.uint8)
        found[top:bottom, left:right] = 1
        return found


@dataclass(frozen=True)
class Placed:
    """One image on a canvas: float32 in [0, 1], 0 where there is no image; labels uint8."""

    canvas: Canvas
    image: np.ndarray
    labels: np.ndarray


class NativeMaps:
    """All images of a cache folder."""

    def __init__(self, folder: Path, natives: list[Native], size: int):
        self.folder, self.natives, self.size = folder, natives, size

    def valid(self, rows: np.ndarray, size: int) -> np.ndarray:
        """uint8 [n, size, size] at the images' own spacings."""
        return np.stack([self.canvas(int(row), size=size).valid() for row in rows])

    def inside_pixels(self, rows: np.ndarray) -> np.ndarray:
        """float32 [n, 2]: rows and columns of each canvas of the usual size that are no padding."""
        inside = np.array([self.canvas(int(row)).inside for row in rows], dtype=np.float32).reshape(-1, 4)
        return np.stack([inside[:, 1] - inside[:, 0], inside[:, 3] - inside[:, 2]], axis=1)

    def canvas(self, row: int, spacing_mm: Pair | None = None, size: int | None = None, shift: Pair = (0.0, 0.0)) -> Canvas:
        """Of an image at a spacing (its own if None). `shift`: see canvas_of."""
        native = self.natives[row]
        return canvas_of(native, spacing_mm or native.spacing_mm, size or self.size, shift)

    def place(self, row: int, canvas: Canvas) -> Placed:
        native = self.natives[row]
        image = resample(self.pixels(row), native.grid, canvas)
        low, high = native.window
        scaled = np.clip((image - low) / (high - low), 0, 1) * canvas.valid()
        return Placed(canvas, scaled.astype(np.float32), self.labels(row, canvas))

    def labels(self, row: int, canvas: Canvas) -> np.ndarray:
        """uint8 [size, size]: the number of each pixel's region."""
        return self.anatomy(row).labels(canvas.grid)

    def respaced(self, row: int, factor: float, shift: Pair) -> Placed:
        """An image at `factor` times its own spacing, as it is trained on. `shift`: see canvas_of."""
        row_mm, column_mm = self.natives[row].spacing_mm
        return self.place(row, self.canvas(row, (row_mm * factor, column_mm * factor), shift=shift))

    def pixels(self, row: int) -> np.ndarray:
        """float32 [rows, columns] in the unit of the image."""
        native = self.natives[row]
        count = native.shape[0] * native.shape[1]
        return mapped(self.folder, PIXELS)[native.first_pixel : native.first_pixel + count].reshape(native.shape)

    def anatomy(self, row: int) -> Anatomy:
        native = self.natives[row]
        edges = mapped(self.folder, EDGES)[slice(*native.edges)]
        parts = [Region(edges[edges[:, 5] == number, :4], edges[edges[:, 5] == number, 4]) for number in range(PARTS)]
        return Anatomy(parts[0], parts[1], parts[2] if len(parts[2].edges) else None, native.spacing_mm)


def edges_of(anatomy: Anatomy) -> np.ndarray:
    """float64 [M, 6]: the edges of every part, their weights, and which part they are of; what NativeMaps.anatomy reads."""
    parts = (anatomy.epicardium, anatomy.left_ventricle, anatomy.right_ventricle)
    return np.concatenate([np.column_stack([part.edges, part.weights, np.full(len(part.edges), number)]) for number, part in enumerate(parts) if part is not None])


def heart_of(anatomy: Anatomy) -> tuple[float, float, float, float]:
    """Top, bottom, left and right end of the epicardium in pixels of the image."""
    edges = anatomy.epicardium.edges
    rows, columns = edges[:, [1, 3]], edges[:, [0, 2]]
    return float(rows.min()), float(rows.max()), float(columns.min()), float(columns.max())


def canvas_of(native: Native, spacing_mm: Pair, size: int, shift: Pair = (0.0, 0.0)) -> Canvas:
    """The field of view at that spacing, to the nearest whole pixel and around the same centre, padded or cut to `size` pixels per side.

    Where it is cut the heart is in the middle, as far as the image reaches. `shift` moves it from there, for rows and for columns:
    -1 and 1 are as far as the heart stays on the canvas, with a margin; of no effect where nothing is cut."""
    field = native.grid.at_spacing(spacing_mm)
    origin, inside = [], []
    for axis in (0, 1):
        count, step, first_mm = field.shape[axis], field.spacing_mm[axis], field.origin_mm[axis]
        ends_mm = [end * native.spacing_mm[axis] for end in native.heart[2 * axis : 2 * axis + 2]]
        low, high = ((end - first_mm) / step for end in ends_mm)
        start = _start(count, size, (low, high), shift[axis])
        origin.append(first_mm + start * step)
        inside += [max(0, -start), min(size, count - start)]
    return Canvas(Grid((size, size), field.spacing_mm, (origin[0], origin[1])), (inside[0], inside[1], inside[2], inside[3]))


def _start(count: int, size: int, heart: Pair, shift: float) -> int:
    """The first pixel of the canvas, counted in those of an image of `count` pixels; below 0 where it is padded."""
    if count <= size:
        return -((size - count) // 2)
    slack = max(0.0, (size - (heart[1] - heart[0])) / 2 - HEART_MARGIN_PIXELS)
    start = round(sum(heart) / 2 - (size - 1) / 2 + shift * slack)
    return min(max(start, 0), count - size)


def resample(pixels: np.ndarray, native: Grid, canvas: Canvas) -> np.ndarray:
    """float64 [size, size], 0 where there is no image: the image itself where its lattice is the canvas's, else triangles around each pixel.

    They are as wide as the coarser lattice, so that nothing is aliased; their weights are positive and sum to 1, so values stay in their range."""
    top, bottom, left, right = canvas.inside
    rows = _weights(native, canvas.grid, 0, range(top, bottom))
    columns = _weights(native, canvas.grid, 1, range(left, right))
    found = np.zeros(canvas.grid.shape)
    found[top:bottom, left:right] = rows @ pixels.astype(np.float64) @ columns.T
    return found


def _weights(native: Grid, wanted: Grid, axis: int, places: range) -> np.ndarray:
    """[len(places), pixels of the image along the axis]"""
    centres_mm = wanted.origin_mm[axis] + np.array(places) * wanted.spacing_mm[axis]
    centres = (centres_mm - native.origin_mm[axis]) / native.spacing_mm[axis]
    width = max(1.0, wanted.spacing_mm[axis] / native.spacing_mm[axis]) * ANTIALIAS_SUPPORT
    distances = np.abs(centres[:, None] - np.arange(native.shape[axis])[None])
    weights = np.maximum(0.0, 1 - distances / width)
    total = weights.sum(axis=1, keepdims=True)
    return np.asarray(weights / total)
