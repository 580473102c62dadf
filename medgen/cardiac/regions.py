"""Which area contours bound, exactly: polygons to weighted edges, and those to the share of each pixel that is covered; called by rasterise.py.

A region is where a rule about winding numbers holds, such as "inside the epicardium and outside the endocardium". Its edges are cut wherever
any two meet; each piece then has one weight: what the region's indicator gains when the piece is crossed to the right. Coverage follows by
Green's theorem, a signed trapezoid per piece, with no sampling. A polygon that crosses itself counts as inside where it winds around at all
(the non-zero rule): someone who draws past the start, or with a small loop, means the whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE_PX = 1e-9  # what lies closer together is the same place: rounding must not lose a meeting of edges
PAIRS_AT_ONCE = 2**20  # edges are compared in blocks, so that a contour of thousands of points needs little memory

Rule = Callable[[np.ndarray], np.ndarray]  # winding numbers around each polygon to whether that is in the region


@dataclass(frozen=True, eq=False)
class Region:
    """`edges` [M, 4]: column and row of both ends, rows not falling; `weights` [M]: 1 where the region begins to the right, -1 where it ends."""

    edges: np.ndarray
    weights: np.ndarray

    def area(self) -> float:
        """In squares of the unit of its points."""
        return float(-(self.weights * (self.edges[:, 3] - self.edges[:, 1]) * (self.edges[:, 0] + self.edges[:, 2]) / 2).sum())

    def moved(self, offset: tuple[float, float], factor: tuple[float, float]) -> Region:
        """(points - offset) * factor, as (column, row); `factor` is positive, so left and right stay what they are."""
        return Region((self.edges - np.tile(offset, 2)) * np.tile(factor, 2), self.weights)


@dataclass(frozen=True, eq=False)
class Arrangement:
    """All edges of some polygons, cut wherever two meet, and how often each polygon winds around what is beside them.

    `edges` [M, 4] as in Region; `left`, `right` [polygons, M]: the winding numbers just left and right of each edge."""

    edges: np.ndarray
    left: np.ndarray
    right: np.ndarray

    def region(self, rule: Rule) -> Region:
        weights = rule(self.right).astype(np.float64) - rule(self.left).astype(np.float64)
        return Region(self.edges[weights != 0], weights[weights != 0])


def arrange(polygons: Sequence[np.ndarray]) -> Arrangement:
    """Closed polygons [N, 2] as (column, row), the last point joined to the first."""
    edges = np.concatenate([np.concatenate([points, np.roll(points, -1, axis=0)], axis=1) for points in polygons])
    owner = np.repeat(np.arange(len(polygons)), [len(points) for points in polygons])
    pieces, owner = _cut_where_they_meet(edges, owner)
    signs = np.sign(pieces[:, 3] - pieces[:, 1])  # a horizontal piece bounds nothing to its right
    pieces, owner, signs = pieces[signs != 0], owner[signs != 0], signs[signs != 0]
    falling = signs < 0
    pieces[falling] = pieces[falling][:, [2, 3, 0, 1]]
    left = _windings(pieces, owner, signs, len(polygons))
    return Arrangement(pieces, left, left + signs * (owner == np.arange(len(polygons))[:, None]))


def _cut_where_they_meet(edges: np.ndarray, owner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The same edges in pieces that meet only at their ends, in no order."""
    places = [np.stack([np.arange(len(edges)), np.zeros(len(edges))], axis=1)]  # (edge, where on it from 0 to 1)
    block = max(1, PAIRS_AT_ONCE // len(edges))
    for first in range(0, len(edges), block):
        places.append(_meetings(edges, np.arange(first, min(first + block, len(edges)))))
    edge, at = np.unique(np.concatenate(places), axis=0).T
    edge = edge.astype(int)
    last = np.append(edge[1:] != edge[:-1], True)
    end = np.where(last, 1.0, np.append(at[1:], 1.0))
    start_points, way = edges[edge, :2], edges[edge, 2:] - edges[edge, :2]
    starts = start_points + at[:, None] * way
    ends = np.where(last[:, None], edges[edge, 2:], start_points + end[:, None] * way)
    return np.concatenate([starts, ends], axis=1), owner[edge]


def _meetings(edges: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(edge, where on it) strictly inside each of `chosen` where another edge crosses it or begins on it."""
    low = np.minimum(edges[:, :2], edges[:, 2:]) - TOLERANCE_PX
    high = np.maximum(edges[:, :2], edges[:, 2:]) + TOLERANCE_PX
    near = (low[chosen, None] <= high[None]).all(axis=-1) & (low[None] <= high[chosen, None]).all(axis=-1)
    own, other = np.nonzero(near)
    own = chosen[own]
    d, e = edges[own, 2:] - edges[own, :2], edges[other, 2:] - edges[other, :2]
    between = edges[other, :2] - edges[own, :2]
    length = np.hypot(*d.T)
    with np.errstate(divide="ignore", invalid="ignore"):  # parallel edges have no crossing and give infinity, which is on no edge
        at = _cross(between, e) / _cross(d, e)
        on_other = _cross(between, d) / _cross(d, e)
        crossing = (on_other >= 0) & (on_other <= 1)
        # where an edge begins on this one, or lies along it, a crossing at its very end may be lost to rounding
        foot = (between * d).sum(axis=1) / length**2
        touching = np.abs(_cross(between, d)) <= TOLERANCE_PX * length
        found = [_strictly_inside(own, at, crossing, length), _strictly_inside(own, foot, touching, length)]
    return np.concatenate(found)


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]


def _strictly_inside(edge: np.ndarray, at: np.ndarray, valid: np.ndarray, length: np.ndarray) -> np.ndarray:
    keep = valid & (at * length > TOLERANCE_PX) & ((1 - at) * length > TOLERANCE_PX)
    return np.stack([edge[keep], at[keep]], axis=1)


def _windings(pieces: np.ndarray, owner: np.ndarray, signs: np.ndarray, polygons: int) -> np.ndarray:
    """[polygons, M]: how often each polygon winds around a point just left of the middle of each piece.

    Pieces on top of each other are taken in their order here, whichever lies left by rounding: their weights then add up to the same."""
    middle = (pieces[:, :2] + pieces[:, 2:]) / 2
    found = np.zeros((polygons, len(pieces)))
    block = max(1, PAIRS_AT_ONCE // max(1, len(pieces)))
    for first in range(0, len(pieces), block):
        row = middle[first : first + block, 1][:, None]
        own, other = np.nonzero((pieces[None, :, 1] <= row) & (row < pieces[None, :, 3]))
        own += first
        x0, y0, x1, y1 = pieces[other].T
        behind = middle[own, 0] - (x0 + (middle[own, 1] - y0) / (y1 - y0) * (x1 - x0))
        before = (behind > TOLERANCE_PX) | ((np.abs(behind) <= TOLERANCE_PX) & (other < own))
        np.add.at(found, (owner[other[before]], own[before]), signs[other[before]])
    return found


def coverage(area: Region, rows: int, columns: int) -> np.ndarray:
    """[rows, columns] float64: the share of each pixel's square that the region covers, exact but for rounding. Pixel (0, 0) is around (0, 0).

    What reaches beyond the image is left out."""
    edges = area.edges + 0.5  # now pixel (row r, column c) covers r to r + 1 and c to c + 1
    weights = area.weights
    edges, weights = _cut_at_lines(edges, weights, 1, rows)
    edges, weights = _cut_at_lines(edges, weights, 0, columns)
    height = np.abs(edges[:, 3] - edges[:, 1]) * weights
    column, row = ((edges[:, :2] + edges[:, 2:]) / 2).T
    inside = (row > 0) & (row < rows) & (column < columns)
    height, column, row = height[inside], np.maximum(column[inside], 0), row[inside].astype(int)
    cell = column.astype(int)
    size = rows * (columns + 1)
    here = row * (columns + 1) + cell
    own = np.bincount(here, height * (cell + 1 - column), size)
    # every pixel to the right of the edge's own is covered along the whole height of the edge
    beyond = np.bincount(here + 1, height, size + 1)[:size].reshape(rows, columns + 1)
    found = own.reshape(rows, columns + 1) + np.cumsum(beyond, axis=1)
    return np.clip(found[:, :columns], 0, 1)


def _cut_at_lines(edges: np.ndarray, weights: np.ndarray, axis: int, lines: int) -> tuple[np.ndarray, np.ndarray]:
    """The edges in pieces that cross none of the grid's lines 0 to `lines` along an axis (0: column, 1: row)."""
    backwards = edges[:, axis] > edges[:, axis + 2]
    edges = np.where(backwards[:, None], edges[:, [2, 3, 0, 1]], edges)
    first = np.maximum(np.floor(edges[:, axis]) + 1, 0)
    last = np.minimum(np.ceil(edges[:, axis + 2]) - 1, lines)
    cuts = np.maximum(last - first + 1, 0).astype(int)
    whole = np.repeat(np.arange(len(edges)), cuts + 1)
    number = np.arange(len(whole)) - np.repeat(np.cumsum(cuts + 1) - (cuts + 1), cuts + 1)  # of the piece on its edge
    starts = _points_at(edges[whole], axis, first[whole] + number - 1)
    ends = _points_at(edges[whole], axis, first[whole] + number)
    starts = np.where((number == 0)[:, None], edges[whole, :2], starts)
    ends = np.where((number == cuts[whole])[:, None], edges[whole, 2:], ends)
    return np.concatenate([starts, ends], axis=1), weights[whole]


def _points_at(edges: np.ndarray, axis: int, line: np.ndarray) -> np.ndarray:
    way = edges[:, 2:] - edges[:, :2]
    with np.errstate(divide="ignore", invalid="ignore"):  # an edge along the line is not cut, and its entry not used
        share = (line - edges[:, axis]) / way[:, axis]
        points = edges[:, :2] + share[:, None] * way
    points[:, axis] = line
    return points
