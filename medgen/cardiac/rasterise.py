"""Contours to label masks and soft masks at any grid, by exact area; called by tree.py's readers, training and generation.

Contours are carried to the grid and rasterised there; label images are never resampled, so a mask is as exact at 1 mm as at 3 mm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from medgen.cardiac.contours import Contour, Kind
from medgen.cardiac.regions import Arrangement, Region, arrange, coverage
from medgen.errors import InputError

BACKGROUND, MYOCARDIUM, LEFT_VENTRICLE, RIGHT_VENTRICLE = 0, 1, 2, 3
LABELS = ("background", "myocardium", "left_ventricle", "right_ventricle")
HALVED = (1e-6, 1.618e-6)  # how far contours are moved for labels, in pixels: in a direction along which hardly any edge lies
ENDO_OUTSIDE = 0.05  # of the cavity's area; where two curves drawn by hand touch, a little of the inner one lies outside


@dataclass(frozen=True)
class Grid:
    """Pixels in the plane of an image, in mm from the centre of its first pixel; all pairs are (row, column). Raises InputError if one cannot be.

    `origin_mm`: where the centre of the grid's own first pixel is."""

    shape: tuple[int, int]
    spacing_mm: tuple[float, float]
    origin_mm: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        if min(self.shape) < 1 or not all(0 < step < 1e3 for step in self.spacing_mm) or not np.isfinite(self.origin_mm).all():
            raise InputError(f"no grid of {self.shape[0]} x {self.shape[1]} pixels, {self.spacing_mm[0]} x {self.spacing_mm[1]} mm apart, from {self.origin_mm} mm; "
                             "both sides need at least 1 pixel and a spacing above 0 mm")  # fmt: skip

    @property
    def pixel_area_mm2(self) -> float:
        return self.spacing_mm[0] * self.spacing_mm[1]

    def at_spacing(self, spacing_mm: tuple[float, float]) -> Grid:
        """The same field of view to the nearest whole pixel, around the same centre."""
        field = [count * step for count, step in zip(self.shape, self.spacing_mm, strict=True)]
        shape = [max(1, round(extent / step)) for extent, step in zip(field, spacing_mm, strict=True)]
        return self._about_the_centre((shape[0], shape[1]), spacing_mm)

    def of_shape(self, shape: tuple[int, int]) -> Grid:
        """The same spacing with that many pixels around the same centre: a crop, or a margin."""
        return self._about_the_centre(shape, self.spacing_mm)

    def _about_the_centre(self, shape: tuple[int, int], spacing_mm: tuple[float, float]) -> Grid:
        origin = [
            start + (own - 1) / 2 * own_step - (count - 1) / 2 * step
            for start, own, own_step, count, step in zip(self.origin_mm, self.shape, self.spacing_mm, shape, spacing_mm, strict=True)
        ]
        return Grid(shape, spacing_mm, (origin[0], origin[1]))


@dataclass(frozen=True, eq=False)
class Anatomy:
    """The regions of one image in pixels of it, ready to be put on many grids.

    `left_ventricle` lies within `epicardium`; `right_ventricle` (None where nobody drew it) lies outside."""

    epicardium: Region
    left_ventricle: Region
    right_ventricle: Region | None
    spacing_mm: tuple[float, float]  # of the image, between rows and between columns

    def shares(self, grid: Grid) -> np.ndarray:
        """[4, H, W] float64: the share of each pixel that background, myocardium, left and right ventricle cover; they add up to 1."""
        epicardium, left, right = (self._covered(part, grid) for part in (self.epicardium, self.left_ventricle, self.right_ventricle))
        return np.clip(np.stack([1 - epicardium - right, epicardium - left, left, right]), 0, 1)

    def labels(self, grid: Grid) -> np.ndarray:
        """[H, W] uint8: 0 background, 1 myocardium, 2 left ventricle, 3 right ventricle.

        A pixel belongs to what is inside a contour if that covers more than half of its square. The largest share among four would be no
        such rule: a pixel with a third of each, on a wall thinner than a pixel, would be taken from the heart although two thirds are in it.
        A pixel that is halved exactly, as happens all along curves drawn on half pixels, goes to the side that HALVED says, else areas would grow."""
        nudged = replace(grid, origin_mm=(grid.origin_mm[0] - HALVED[0] * grid.spacing_mm[0], grid.origin_mm[1] - HALVED[1] * grid.spacing_mm[1]))
        epicardium, left, right = (self._covered(part, nudged) for part in (self.epicardium, self.left_ventricle, self.right_ventricle))
        found = np.where(epicardium > 0.5, MYOCARDIUM, BACKGROUND).astype(np.uint8)
        found[(right > 0.5) & (epicardium <= 0.5)] = RIGHT_VENTRICLE
        found[left > 0.5] = LEFT_VENTRICLE
        return found

    def _covered(self, part: Region | None, grid: Grid) -> np.ndarray:
        if part is None:
            return np.zeros(grid.shape)
        (rows, columns), (row_mm, column_mm) = grid.origin_mm, self.spacing_mm
        offset = (columns / column_mm, rows / row_mm)
        return coverage(part.moved(offset, (column_mm / grid.spacing_mm[1], row_mm / grid.spacing_mm[0])), *grid.shape)


def anatomy(contours: Sequence[Contour], spacing_mm: tuple[float, float]) -> Anatomy:
    """Of the contours of one image, an epicardium and an endocardium and perhaps a right ventricle, in pixels `spacing_mm` apart.

    Open curves, as drawn where the muscle is no full ring: the ends of the epicardium are joined to those of the endocardium, which makes the
    myocardium a C; the cavity is what the endocardium and the straight line between its ends enclose. An open right ventricle is closed by
    that line too. Raises InputError if a contour is missing or there twice, if only one of the two is open, or if the endocardium lies outside."""
    found = {kind: _only(contours, kind) for kind in ("epicardium", "endocardium", "right_ventricle")}
    epicardium, endocardium, right = found["epicardium"], found["endocardium"], found["right_ventricle"]
    if epicardium is None or endocardium is None:
        raise OneSidedError(f"{contours[0].source if contours else 'no contour at all'}: {_missing(epicardium, endocardium)}; the myocardium lies between both: draw it, or leave the image out")
    if epicardium.closed != endocardium.closed:
        words = ["closed" if contour.closed else "open" for contour in (epicardium, endocardium)]
        raise OpenError(f"{epicardium.source}: the epicardium is {words[0]}, the endocardium {words[1]}; draw both closed, or both open where the muscle is no ring")
    others = [right.points] if right else []
    plain = arrange([epicardium.points, endocardium.points, *others])
    _require_inside(endocardium, epicardium, plain)
    if epicardium.closed:
        parts = plain
        heart, cavity = parts.region(lambda winding: winding[0] != 0), parts.region(lambda winding: (winding[0] != 0) & (winding[1] != 0))
    else:
        parts = arrange([c_shape(epicardium.points, endocardium.points), endocardium.points, *others])
        heart, cavity = parts.region(lambda winding: (winding[0] != 0) | (winding[1] != 0)), parts.region(lambda winding: (winding[0] == 0) & (winding[1] != 0))
    closed = epicardium.closed
    beside = parts.region(lambda winding: (winding[2] != 0) & (winding[0] == 0) & (closed | (winding[1] == 0))) if right else None
    return Anatomy(heart, cavity, beside, spacing_mm)


class OneSidedError(InputError):
    """Only one of epicardium and endocardium, or neither."""


class OpenError(InputError):
    """One of the two is open and the other closed."""


class OutsideError(InputError):
    """The endocardium is not inside the epicardium."""


def _only(contours: Sequence[Contour], kind: Kind) -> Contour | None:
    found = [contour for contour in contours if contour.kind == kind]
    if len(found) > 1:
        raise InputError(f"{found[1].source}: a second {kind.replace('_', ' ')} for the same image; the first is {found[0].source}; keep one of them")
    return found[0] if found else None


def _missing(epicardium: Contour | None, endocardium: Contour | None) -> str:
    absent = [name for name, contour in (("epicardium", epicardium), ("endocardium", endocardium)) if contour is None]
    return f"no contour of the {' and the '.join(absent)}"


def c_shape(epicardium: np.ndarray, endocardium: np.ndarray) -> np.ndarray:
    """One closed polygon along the epicardium, across to the endocardium and back along that, both [N, 2] and open.

    The curves may have been drawn in either direction: of the two ways to join their ends the shorter one is taken, for the other crosses itself."""
    same_way = np.hypot(*(epicardium[-1] - endocardium[-1])) + np.hypot(*(epicardium[0] - endocardium[0]))
    other_way = np.hypot(*(epicardium[-1] - endocardium[0])) + np.hypot(*(epicardium[0] - endocardium[-1]))
    return np.concatenate([epicardium, endocardium[::-1] if same_way <= other_way else endocardium])


def _require_inside(endocardium: Contour, epicardium: Contour, both: Arrangement) -> None:
    """`both`: of the epicardium first; open curves are compared as closed by straight lines."""
    area = both.region(lambda winding: winding[1] != 0).area()
    outside = both.region(lambda winding: (winding[1] != 0) & (winding[0] == 0)).area()
    if outside > ENDO_OUTSIDE * area:
        within = both.region(lambda winding: (winding[0] != 0) & (winding[1] == 0)).area() <= ENDO_OUTSIDE * area
        raise OutsideError(f"{endocardium.source}: {outside / area:.0%} of the area inside the endocardium lies outside the epicardium ({epicardium.source}), "
                           f"at most {ENDO_OUTSIDE:.0%} may{'; they seem to be exchanged' if within else ''}; draw them again or leave the image out")  # fmt: skip
