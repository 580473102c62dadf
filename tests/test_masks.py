"""Overlap, surface distance and size of masks: against closed forms, brute force and MONAI's metrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from scipy.ndimage import gaussian_filter

from medgen.errors import InputError
from medgen.evaluate import masks

EMPTY, POINT = np.zeros((1, 8, 8), dtype=bool), np.zeros((1, 8, 8), dtype=bool)
POINT[0, 3, 4] = True
ONE_MM = np.ones((1, 2))


def blobs(count: int, seed: int, size: int = 24) -> np.ndarray:
    generator = np.random.default_rng(seed)
    return np.stack([gaussian_filter(generator.normal(size=(size, size)), 2) > 0.1 for _ in range(count)])


@given(st.integers(0, 1000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_overlap_counts_pixels(seed: int) -> None:
    first, second = blobs(2, seed)[:1], blobs(2, seed + 1)[:1]
    pixels = [{tuple(place) for place in np.argwhere(mask[0])} for mask in (first, second)]
    common, either = len(pixels[0] & pixels[1]), len(pixels[0] | pixels[1])
    assert masks.dice(first, second)[0] == pytest.approx(2 * common / (len(pixels[0]) + len(pixels[1])))
    assert masks.iou(first, second)[0] == pytest.approx(common / either)


def test_empty_masks() -> None:
    for overlap in (masks.dice, masks.iou):
        assert [overlap(*pair)[0] for pair in ((EMPTY, EMPTY), (EMPTY, POINT), (POINT, EMPTY), (POINT, POINT))] == [1, 0, 0, 1]
    assert [np.isnan(masks.hd95_mm(*pair, ONE_MM)[0]) for pair in ((EMPTY, EMPTY), (EMPTY, POINT), (POINT, EMPTY))] == [True] * 3
    assert masks.hd95_mm(POINT, POINT, ONE_MM)[0] == 0


def test_surface_distance_is_that_of_monai_and_of_brute_force() -> None:
    first, second, spacing = blobs(8, 1), blobs(8, 2), np.tile([2.0, 0.7], (8, 1))
    found = masks.hd95_mm(first, second, spacing)
    theirs = compute_hausdorff_distance(torch.tensor(first)[:, None].float(), torch.tensor(second)[:, None].float(), include_background=True, percentile=95, spacing=[2.0, 0.7])
    assert found == pytest.approx(theirs[:, 0].numpy(), rel=1e-5)
    outlines = [np.array([place for place in np.argwhere(mask[0]) if _touches_outside(mask[0], *place)]) * [2.0, 0.7] for mask in (first, second)]
    distances = np.linalg.norm(outlines[0][:, None] - outlines[1][None], axis=2)
    assert found[0] == pytest.approx(max(np.percentile(distances.min(axis=1), 95), np.percentile(distances.min(axis=0), 95)))


def _touches_outside(mask: np.ndarray, row: int, column: int) -> bool:
    around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
    return any(not (0 <= r < mask.shape[0] and 0 <= c < mask.shape[1]) or not mask[r, c] for r, c in around)


def test_what_is_no_mask_is_refused_by_name() -> None:
    good = np.stack([EMPTY[0], POINT[0]]).astype(np.uint8)
    assert masks.require_masks(good, ["a", "b"]).dtype == bool
    with pytest.raises(InputError, match=r"case_7 is no mask: it holds 2 values from 0 to 255"):
        masks.require_masks(np.stack([good[0], 255 * good[1]]), ["case_6", "case_7"])
    with pytest.raises(InputError, match="case_6 is no mask"):
        masks.require_masks(np.full((1, 4, 4), 0.5), ["case_6"])
    with pytest.raises(InputError, match="one for each of 1 names"):
        masks.require_masks(good, ["a"])
    with pytest.raises(InputError, match="cannot be compared"):
        masks.dice(POINT, np.zeros((1, 9, 8), dtype=bool))


def test_lesions_are_sorted_by_their_longest_diameter_in_millimetres() -> None:
    bar = np.zeros((3, 40, 40), dtype=bool)
    bar[0, 5, 5:14] = True  # 9 pixels in a row, one high
    bar[1, 5, 5:14] = bar[1, 20:35, 20:22] = True  # and a larger one beside it
    assert masks.longest_diameter_mm(bar[0], np.array([2.0, 1.0])) == pytest.approx(np.hypot(9, 2))
    assert masks.longest_diameter_mm(bar[1], np.array([1.0, 1.0])) == pytest.approx(np.hypot(15, 2))
    assert masks.lesion_bins(bar, np.ones((3, 2))).tolist() == ["<10 mm", "10-20 mm", ""]
    assert masks.lesion_bins(bar, np.full((3, 2), 2.0)).tolist() == ["10-20 mm", ">=30 mm", ""]
    diagonal = np.eye(40, dtype=bool)[None]
    assert masks.longest_diameter_mm(diagonal[0], np.ones(2)) == pytest.approx(40 * np.sqrt(2)), "pixels that touch at a corner are one lesion"


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 5))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_control_is_never_of_the_own_group(members: list[int], seed: int) -> None:
    groups = np.array([f"patient {member}" for member in members])
    chosen = masks.strangers(groups, seed, "test")
    assert all(groups[number] != groups[other] for number, other in enumerate(chosen) if other >= 0)
    assert len(set(chosen[chosen >= 0])) == (chosen >= 0).sum(), "each mask is used once"
    largest = max((members.count(member) for member in members), default=0)
    if largest == 1 and len(members) > 1:
        assert (chosen >= 0).all()
