"""Exact coverage against closed forms and brute force; labels, open curves, other grids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from medgen.cardiac.contour_files import read_contours
from medgen.cardiac.contours import Contour, polygon_area
from medgen.cardiac.rasterise import Anatomy, Grid, OneSidedError, OpenError, OutsideError, anatomy, c_shape
from medgen.cardiac.regions import arrange, coverage
from medgen.errors import InputError

ONE = (1.0, 1.0)


def ellipse(centre: tuple[float, float], radii: tuple[float, float], turn: float = 0.0, count: int = 100) -> np.ndarray:
    """[count, 2] as (column, row)."""
    angle = np.arange(count) * 2 * np.pi / count
    x, y = radii[0] * np.cos(angle), radii[1] * np.sin(angle)
    return np.stack([centre[0] + x * np.cos(turn) - y * np.sin(turn), centre[1] + x * np.sin(turn) + y * np.cos(turn)], axis=1)


def arc(radius: float, first: float, last: float, count: int = 400) -> np.ndarray:
    """Around (40, 40), angles in degrees."""
    angle = np.radians(np.linspace(first, last, count))
    return np.stack([40 + radius * np.cos(angle), 40 + radius * np.sin(angle)], axis=1)


def square(low: float, high: float) -> np.ndarray:
    return np.array([[low, low], [high, low], [high, high], [low, high]], np.float64)


def ring(epicardium: np.ndarray, endocardium: np.ndarray, spacing_mm: tuple[float, float] = ONE) -> Anatomy:
    return anatomy([Contour("epicardium", epicardium), Contour("endocardium", endocardium)], spacing_mm)


def covered(points: np.ndarray, rows: int, columns: int) -> np.ndarray:
    return coverage(arrange([points]).region(lambda winding: winding[0] != 0), rows, columns)


def sampled(points: np.ndarray, rows: int, columns: int, finer: int = 48) -> np.ndarray:
    """The same by brute force: `finer` squared points in each pixel, inside where the polygon winds around them."""
    row, column = (axis.ravel() for axis in np.mgrid[0 : rows * finer, 0 : columns * finer] / finer - 0.5 + 0.5 / finer)
    winding = np.zeros(len(row), int)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 != y1:
            left = x0 + (row - y0) / (y1 - y0) * (x1 - x0) < column
            winding += (left & (y0 <= row) & (row < y1)).astype(int) - (left & (y1 <= row) & (row < y0)).astype(int)
    return (winding != 0).reshape(rows, finer, columns, finer).mean(axis=(1, 3))


# myocardium, cavity: the exact areas of the polygons, and with what labels at 1 mm count (a pixel in two is lost or won along the edge)
CASES = {
    "on a pixel": (ellipse((64, 64), (30, 30)), ellipse((64, 64), (20, 20)), (128, 128), (1569.76, 1255.81), (1564, 1245)),
    "between pixels": (ellipse((64.5, 64.5), (30, 30)), ellipse((64.5, 64.5), (20, 20)), (128, 128), (1569.76, 1255.81), (1564, 1264)),
    "turned ellipses": (ellipse((100.3, 80.7), (25, 21), 0.4), ellipse((100.3, 80.7), (17, 14), 0.4), (224, 256), (901.04, 747.21), (897, 748)),
    "squares": (square(10, 20), square(13, 17), (32, 32), (84.0, 16.0), (84, 15)),
    "apex": (ellipse((96.2, 84.6), (8, 8)), ellipse((96.2, 84.6), (5.5, 5.5)), (168, 192), (105.96, 94.97), (105, 96)),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_areas_are_exact(name: str) -> None:
    epicardium, endocardium, shape, exact, counts = CASES[name]
    found = ring(epicardium, endocardium)
    background, myocardium, cavity, right = found.shares(Grid(shape, ONE)).sum(axis=(1, 2))
    assert (myocardium, cavity) == pytest.approx(exact, abs=0.005) and right == 0
    assert cavity == pytest.approx(polygon_area(endocardium), abs=1e-9) == found.left_ventricle.area()
    assert myocardium + cavity == pytest.approx(polygon_area(epicardium), abs=1e-9) == found.epicardium.area()
    assert background + myocardium + cavity == pytest.approx(shape[0] * shape[1])
    labels = found.labels(Grid(shape, ONE))
    assert ((labels == 1).sum(), (labels == 2).sum()) == counts and labels.dtype == np.uint8


@pytest.mark.parametrize("radii", [(30, 20), (25.5, 17.3), (8, 5.5), (3.1, 1.2)])
@pytest.mark.parametrize("count", [100, 1000])
def test_circles_within_two_in_a_thousand(radii: tuple[float, float], count: int) -> None:
    centre = (40.37, 39.81)
    _, myocardium, cavity, _ = ring(*(ellipse(centre, (radius, radius), 0.1, count) for radius in radii)).shares(Grid((80, 82), ONE)).sum(axis=(1, 2))
    assert cavity == pytest.approx(np.pi * radii[1] ** 2, rel=2e-3)
    assert myocardium == pytest.approx(np.pi * (radii[0] ** 2 - radii[1] ** 2), rel=2e-3)


@pytest.mark.parametrize("seed", range(16))
def test_any_polygon_against_brute_force(seed: int) -> None:
    """Crossing themselves, partly outside; every second with points on half pixels, where edges touch, overlap and run along the grid."""
    random = np.random.default_rng(seed)
    points = random.uniform(-3, 12, (random.integers(3, 12), 2))
    points = np.round(points * 2) / 2 if seed % 2 else points
    assert np.abs(covered(points, 8, 9) - sampled(points, 8, 9)).max() < 0.02


def test_corners_on_edges_are_not_lost_to_rounding() -> None:
    """A curve that passes through an edge at one of its own corners, which lies on that edge but for the last bits: a millionth further changes nothing."""
    random = np.random.default_rng(3)
    for _ in range(200):
        first, second, third = random.uniform(0, 10, (3, 2))
        on_edge = first + random.uniform(0.2, 0.8) * (second - first)
        inwards = third - on_edge
        overlaps = []
        for further in (0, 1e-6):
            path = [np.add(on_edge + 0.3 * inwards, (0.1, 0.02)), on_edge - further * inwards, on_edge - 0.4 * inwards, np.add(on_edge, (4, 1.3))]
            both = arrange([np.array([first, second, third]), np.array(path)])
            overlaps.append(both.region(lambda winding: (winding[0] != 0) & (winding[1] != 0)).area())
        assert overlaps[0] == pytest.approx(overlaps[1], abs=1e-3)


def test_a_loop_counts_once_whatever_its_direction() -> None:
    eight = np.array([[0.0, 0], [10, 10], [10, 0], [0, 10]])  # two triangles of 25, drawn in opposite directions
    assert covered(eight + 2, 14, 14).sum() == pytest.approx(50)
    twice = np.concatenate([ellipse((10, 10), (6, 6)), ellipse((10, 10), (6, 6))])
    backwards = ellipse((10, 10), (6, 6))[::-1]
    once = covered(ellipse((10, 10), (6, 6)), 20, 20)
    np.testing.assert_allclose(covered(twice, 20, 20), once, atol=1e-9)
    np.testing.assert_allclose(covered(backwards, 20, 20), once, atol=1e-12)


def test_what_reaches_beyond_the_image_is_left_out() -> None:
    circle = ellipse((2.2, 17.4), (9, 9))
    whole = covered(circle + 20, 60, 60)
    np.testing.assert_allclose(covered(circle, 22, 15), whole[20:42, 20:35], atol=1e-12)
    assert covered(circle + 100, 22, 15).sum() == 0 and covered(circle - 100, 22, 15).sum() == 0
    np.testing.assert_array_equal(covered(square(-50, 50), 7, 5), np.ones((7, 5)))


def test_a_whole_pixel_to_the_side_is_the_same_mask() -> None:
    still = ring(ellipse((30.3, 28.9), (14, 11), 0.3), ellipse((30.3, 28.9), (9, 7), 0.3))
    moved = ring(ellipse((35.3, 36.9), (14, 11), 0.3), ellipse((35.3, 36.9), (9, 7), 0.3))
    np.testing.assert_allclose(moved.shares(Grid((64, 64), ONE))[:, 8:, 5:], still.shares(Grid((64, 64), ONE))[:, :-8, :-5], atol=1e-9)
    origin = Grid((56, 59), ONE, (-8.0, -5.0))
    np.testing.assert_array_equal(still.labels(origin)[8:, 5:], still.labels(Grid((48, 54), ONE)))


@pytest.mark.parametrize("spacing_mm", [(0.5, 0.5), (1.40625, 1.40625), (1.875, 1.875), (3.1, 2.3)])
def test_areas_in_mm_agree_at_any_spacing(spacing_mm: tuple[float, float]) -> None:
    own = Grid((128, 112), (1.40625, 1.6))
    heart = ring(ellipse((60, 62), (20, 19)), ellipse((60, 62), (13, 12.5)), own.spacing_mm)
    exact_mm2 = [polygon_area(ellipse((60, 62), radii)) * own.pixel_area_mm2 for radii in ((20, 19), (13, 12.5))]
    grid = own.at_spacing(spacing_mm)
    _, myocardium, cavity, _ = heart.shares(grid).sum(axis=(1, 2)) * grid.pixel_area_mm2
    assert (cavity, myocardium + cavity) == pytest.approx((exact_mm2[1], exact_mm2[0]), rel=1e-12)
    labels = heart.labels(grid)
    assert (labels == 2).sum() * grid.pixel_area_mm2 == pytest.approx(exact_mm2[1], rel=0.05)


def test_a_grid_keeps_its_centre() -> None:
    grid = Grid((10, 20), (2.0, 1.0), (3.0, 4.0))
    finer, cropped = grid.at_spacing((0.5, 0.5)), grid.of_shape((6, 6))
    assert finer.shape == (40, 40) and cropped.origin_mm == (3 + 2 * 2.0, 4 + 7 * 1.0)
    for other in (finer, cropped):
        for axis in (0, 1):
            centre = other.origin_mm[axis] + (other.shape[axis] - 1) / 2 * other.spacing_mm[axis]
            assert centre == pytest.approx(grid.origin_mm[axis] + (grid.shape[axis] - 1) / 2 * grid.spacing_mm[axis])
    with pytest.raises(InputError, match="spacing above 0 mm"):
        Grid((4, 4), (0.0, 1.0))


@pytest.mark.parametrize("reverse", [False, True])
def test_open_curves_make_a_c(reverse: bool) -> None:
    """A ring of 20 and 12 px that is open for 80 degrees: the muscle is the rest of the ring, the cavity a disc less the segment beyond the chord."""
    endocardium = arc(12, 40, 320)
    curves = [Contour("epicardium", arc(20, 40, 320), closed=False), Contour("endocardium", endocardium[::-1] if reverse else endocardium, closed=False)]
    found = anatomy(curves, ONE)
    _, myocardium, cavity, _ = found.shares(Grid((80, 80), ONE)).sum(axis=(1, 2))
    angle = np.radians(80)
    assert myocardium == pytest.approx((20**2 - 12**2) * (2 * np.pi - angle) / 2, rel=1e-4)
    assert cavity == pytest.approx(12**2 * np.pi - 12**2 * (angle - np.sin(angle)) / 2, rel=1e-4)
    labels = found.labels(Grid((80, 80), ONE))
    assert labels[40, 24] == 1 and labels[40, 40] == 2 and labels[40, 56] == 0  # left, middle, the opening on the right
    assert len(c_shape(curves[0].points, curves[1].points)) == 800


def test_a_thin_wall_is_not_lost() -> None:
    """Where background, wall and cavity share a pixel, two thirds of heart make it heart."""
    found = ring(np.array([[2 / 3 - 0.5, -5.0], [9, -5], [9, 15], [2 / 3 - 0.5, 15]]) - [1 / 3, 0], np.array([[2 / 3 - 0.5, -4.0], [8, -4], [8, 14], [2 / 3 - 0.5, 14]]))
    grid = Grid((10, 10), ONE)
    np.testing.assert_allclose(found.shares(grid)[:3, 5, 0], 1 / 3)
    assert found.labels(grid)[5, 0] == 1


def test_curves_on_half_pixels_do_not_grow() -> None:
    """Edges that halve pixels, straight and diagonal: as many are won as lost, wherever the curve lies."""
    diamond = np.array([[0.0, -6], [6, 0], [0, 6], [-6, 0]])
    for shape, inner in ((square(-8, 8), square(-4, 4)), (diamond * 2, diamond)):
        for offset in ((20, 20), (20.5, 20), (20.5, 20.5)):
            labels = ring(shape + offset, inner + offset).labels(Grid((50, 50), ONE))
            assert ((labels > 0).sum(), (labels == 2).sum()) == pytest.approx((polygon_area(shape), polygon_area(inner)), abs=1)


def test_the_cavity_stays_inside_and_the_right_ventricle_outside() -> None:
    """Curves that touch: what crosses over is left to the wall, and the right ventricle takes nothing of the left."""
    contours = [Contour("epicardium", square(10, 30)), Contour("endocardium", np.subtract(square(15, 25), (5.2, 0))), Contour("right_ventricle", np.add(square(12, 28), (15, 0)))]
    background, myocardium, cavity, right = anatomy(contours, ONE).shares(Grid((50, 50), ONE))
    assert cavity.sum() == pytest.approx(98) and (cavity + myocardium).sum() == pytest.approx(400) and right.sum() == pytest.approx(16 * 13)
    np.testing.assert_allclose(background + myocardium + cavity + right, 1)
    labels = anatomy(contours, ONE).labels(Grid((50, 50), ONE))
    assert labels[20, 38] == 3 and labels[20, 29] == 1 and labels[20, 12] == 2


def test_what_makes_no_heart_is_refused() -> None:
    epicardium, endocardium = Contour("epicardium", square(10, 30), source="a"), Contour("endocardium", square(15, 25), source="b")
    with pytest.raises(OneSidedError, match="a: no contour of the endocardium"):
        anatomy([epicardium], ONE)
    with pytest.raises(OneSidedError, match="no contour at all: no contour of the epicardium and the endocardium"):
        anatomy([], ONE)
    with pytest.raises(InputError, match="b: a second endocardium for the same image; the first is b"):
        anatomy([epicardium, endocardium, endocardium], ONE)
    with pytest.raises(OpenError, match="a: the epicardium is closed, the endocardium open"):
        anatomy([epicardium, Contour("endocardium", square(15, 25), closed=False)], ONE)
    with pytest.raises(OutsideError, match="50% of the area inside the endocardium lies outside"):
        anatomy([epicardium, Contour("endocardium", np.add(square(15, 25), (10, 0)))], ONE)
    with pytest.raises(OutsideError, match="seem to be exchanged"):
        anatomy([Contour("endocardium", square(10, 30)), Contour("epicardium", square(15, 25))], ONE)


def test_real_contours_keep_their_area(sunnybrook: Path) -> None:
    """46 slices have both curves. In all 9 of SC-HF-I-6 the epicardium was drawn beside the heart, which is told; the others keep their areas."""
    refused, differences = [], []
    for outer in sorted((sunnybrook / "contourfiles").glob("*/o-contours/*.txt")):
        inner = outer.parent.parent / "i-contours" / outer.name.replace("ocontour", "icontour")
        contours = [read_contours(path).contours[0] for path in (outer, inner)]
        try:
            found = anatomy(contours, (1.37, 1.37))
        except OutsideError:
            refused.append(outer.parent.parent.name)
            continue
        _, myocardium, cavity, _ = found.shares(Grid((256, 256), (1.37, 1.37))).sum(axis=(1, 2))
        assert cavity == pytest.approx(found.left_ventricle.area(), abs=1e-6) == pytest.approx(polygon_area(contours[1].points), rel=0.01)
        assert myocardium + cavity == pytest.approx(polygon_area(contours[0].points), rel=0.01)
        labels = found.labels(Grid((256, 256), (1.37, 1.37)))
        differences.append((((labels == 1).sum() - myocardium) / myocardium, ((labels == 2).sum() - cavity) / cavity))
    assert np.abs(np.mean(differences, axis=0)).max() < 0.002, "labels of curves on half pixels grow or shrink"
    assert refused == ["SC-HF-I-6"] * 9
