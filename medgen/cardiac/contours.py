"""What a contour is, whoever drew it: points in pixels of its image; made by the modules of the formats, used by rasterise.py and tree.py.

Here pixel centres have integer coordinates and the first pixel's is (0, 0): pixel (column 3, row 5) covers 2.5 to 3.5 and 4.5 to 5.5.
Every format's module has FIRST_PIXEL_CENTRE, what its files call that centre, with the reason; contour_files.py subtracts it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from medgen.errors import InputError

Kind = Literal["epicardium", "endocardium", "right_ventricle"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LARGEST_COORDINATE = 1e5  # pixels; no image is that wide, so such a number is a damaged file
MOST_POINTS = 20_000  # of one curve; every pair of edges is looked at
OUTSIDE_PX = 1.0  # how far a hand may draw over the edge of an image that its contour belongs to


@dataclass(frozen=True, eq=False)
class Contour:
    """One curve of one image. Raises InputError naming `source` if it cannot bound an area.

    `points` [N, 2] float64: (column, row); a closed curve does not repeat its first point. `image`: which image of the file it is drawn on,
    as the file names it ("" where the file belongs to one image). `grid_shape`: rows and columns of the grid that the points count in, where
    the file tells; software that draws on an enlarged image writes the enlarged one."""

    kind: Kind
    points: np.ndarray
    closed: bool = True
    image: str = ""
    grid_shape: tuple[int, int] | None = None
    source: str = "contour"  # file and line or key, for messages

    def __post_init__(self) -> None:
        object.__setattr__(self, "points", _checked_points(self.points, self.closed, self.source))
        if self.kind not in KINDS:
            raise InputError(f"{self.source}: unknown kind {self.kind!r}; the kinds are: {', '.join(KINDS)}")
        if self.grid_shape is not None and min(self.grid_shape) < 1:
            raise InputError(f"{self.source}: the image is said to have {self.grid_shape[0]} rows and {self.grid_shape[1]} columns; both must be at least 1")

    def fits(self, rows: int, columns: int) -> bool:
        """Whether all points lie on an image of that size, or at most OUTSIDE_PX beside it."""
        low, high = self.points.min(axis=0), self.points.max(axis=0)
        return bool((low >= -0.5 - OUTSIDE_PX).all() and high[0] <= columns - 0.5 + OUTSIDE_PX and high[1] <= rows - 0.5 + OUTSIDE_PX)


def _checked_points(points: np.ndarray, closed: bool, source: str) -> np.ndarray:
    array = np.array(points, np.float64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise InputError(f"{source}: expected points as (column, row), got an array of shape {array.shape}")
    if len(array) > MOST_POINTS:
        raise InputError(f"{source}: the contour has {len(array)} points, at most {MOST_POINTS} are read; is this the right file?")
    outside = ~(np.abs(array) <= LARGEST_COORDINATE).all(axis=1)  # a NaN is outside too
    if outside.any():
        column, row = array[outside][0]
        raise InputError(f"{source}: point {int(np.argmax(outside)) + 1} is ({column:g}, {row:g}); coordinates are numbers of pixels from "
                         f"{-LARGEST_COORDINATE:g} to {LARGEST_COORDINATE:g}; is the file damaged?")  # fmt: skip
    if closed and len(array) > 1 and (array[0] == array[-1]).all():
        array = array[:-1]
    fewest = 3 if closed else 2
    if len(np.unique(array, axis=0)) < fewest:
        raise InputError(f"{source}: a {'closed' if closed else 'open'} contour needs at least {fewest} different points; draw it again or remove it")
    if closed and _bounds_nothing(array):
        raise InputError(f"{source}: the points of this contour lie on one line and enclose no area; draw it again or remove it")
    array.setflags(write=False)
    return array


def _bounds_nothing(array: np.ndarray) -> bool:
    return bool(np.linalg.matrix_rank(array - array.mean(axis=0), tol=1e-9) < 2)


def polygon_area(points: np.ndarray) -> float:
    """Of [N, 2], in squares of their unit, positive whatever the direction (shoelace formula); loops of opposite directions cancel."""
    x, y = (points - points[0]).T
    return float(abs((x * np.roll(y, -1) - np.roll(x, -1) * y).sum()) / 2)


def on_image(contour: Contour, rows: int, columns: int) -> Contour:
    """The contour in pixels of its image of that size. Raises InputError if it was drawn on an image of another size.

    Points that count in an enlarged grid are divided; the first pixel's centre stays where it is, as all scripts known to read such files
    have it. Nothing is moved to make a contour fit: where rows and columns seem exchanged, the message says so."""
    if contour.grid_shape is not None:
        return _reduced(contour, contour.grid_shape, rows, columns)
    if contour.fits(rows, columns):
        return contour
    if contour.fits(columns, rows):
        raise SwappedError(f"{contour.source}: the contour fits {columns} rows and {rows} columns, its image has {rows} rows and {columns} columns; "
                           "rows and columns seem exchanged: write column (x) first, then row (y)")  # fmt: skip
    (left, top), (right, bottom) = contour.points.min(axis=0), contour.points.max(axis=0)
    raise OtherSizeError(f"{contour.source}: the contour reaches from column {left:g} to {right:g} and from row {top:g} to {bottom:g}, its image has {rows} rows and "
                         f"{columns} columns; take the contour of this image, or the image that it was drawn on")  # fmt: skip


class OtherSizeError(InputError):
    """A contour drawn on an image of another size."""


class SwappedError(InputError):
    """A contour that would fit if rows and columns were exchanged."""


def _reduced(contour: Contour, grid: tuple[int, int], rows: int, columns: int) -> Contour:
    factor = grid[0] / rows
    if grid != (rows * factor, columns * factor) or factor < 1 or factor != int(factor):
        kind = SwappedError if (grid[1] / rows == grid[0] / columns and grid[1] % rows == 0) else OtherSizeError
        raise kind(f"{contour.source}: drawn on an image of {grid[0]} rows and {grid[1]} columns, its image has {rows} rows and {columns} columns; "
                   "the first must be the second times a whole number, the same for both; take the contour of this image")  # fmt: skip
    return on_image(replace(contour, points=contour.points / factor, grid_shape=None), rows, columns)
