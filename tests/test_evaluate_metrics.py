"""Metrics on arrays: against other implementations, known answers, and images that are wrong on purpose."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medgen.errors import MedgenError
from medgen.evaluate import curves, diversity, intervals, pairs, scores, sliced


def textured(count: int, seed: int, size: int = 32) -> np.ndarray:
    """Smooth blobs with edges and grain in [0,1], float32 [n,H,W]: the same distribution for every seed."""
    generator = np.random.default_rng(seed)
    smooth = np.stack([gaussian_filter(image, 3) for image in generator.normal(size=(count, size, size))])
    grain = generator.normal(scale=0.02, size=smooth.shape)
    return np.clip(np.where(smooth > 0, 0.7, 0.3) + grain, 0, 1).astype(np.float32)


def test_mae_and_psnr_have_the_known_answers() -> None:
    real, synthetic = np.zeros((2, 8, 8), np.float32), np.zeros((2, 8, 8), np.float32)
    synthetic[1] += 0.1
    assert pairs.mae(real, synthetic) == pytest.approx([0, 0.1])
    assert pairs.psnr(real, synthetic) == pytest.approx([pairs.PSNR_CEILING_DB, 20.0], abs=1e-4)


def test_mae_inside_a_region_ignores_the_rest_and_is_nan_without_one() -> None:
    real, synthetic = np.zeros((2, 4, 4)), np.zeros((2, 4, 4))
    synthetic[:, 0, 0], synthetic[:, 3, 3] = 0.5, 1.0
    where = np.zeros((2, 4, 4), bool)
    where[0, 0, :2] = True
    values = pairs.mae(real, synthetic, where)
    assert values[0] == pytest.approx(0.25)
    assert np.isnan(values[1])


def test_ssim_agrees_with_scikit_image() -> None:
    from skimage.metrics import structural_similarity

    real, synthetic = textured(3, 1), textured(3, 2)
    ours = pairs.ssim(real, synthetic)
    for number in range(3):
        _, whole = structural_similarity(real[number].astype(float), synthetic[number].astype(float), data_range=1.0, gaussian_weights=True,
                                         sigma=1.5, use_sample_covariance=False, full=True)
        assert ours[number] == pytest.approx(whole[5:-5, 5:-5].mean(), abs=1e-4)


def test_similarities_are_those_of_monai() -> None:
    from monai.metrics.regression import MultiScaleSSIMMetric, SSIMMetric

    real = textured(6, 1, size=64)
    other = np.clip(np.stack([gaussian_filter(image, 1) for image in real]) + 0.05 * np.random.default_rng(1).normal(size=real.shape), 0, 1).astype(np.float32)
    both = [torch.from_numpy(side)[:, None] for side in (other, real)]
    theirs = SSIMMetric(2, data_range=1.0, win_size=11, kernel_sigma=1.5, reduction="none")(*both)
    np.testing.assert_allclose(pairs.ssim(real, other), theirs.reshape(-1), rtol=1e-4)
    scales = MultiScaleSSIMMetric(2, data_range=1.0, kernel_size=11, kernel_sigma=1.5, weights=pairs.scale_weights(64), reduction="none")(*both)
    np.testing.assert_allclose(pairs.ms_ssim(real, other), scales.reshape(-1), rtol=1e-4)


@pytest.mark.parametrize(("size", "scales"), [(16, 1), (24, 2), (32, 2), (64, 3), (96, 4), (128, 4), (256, 5), (512, 5)])
def test_ms_ssim_uses_as_many_scales_as_fit(size: int, scales: int) -> None:
    assert pairs.scales_for(size) == scales
    assert sum(pairs.scale_weights(size)) == pytest.approx(1)
    image = textured(1, 3, size)
    assert pairs.ms_ssim(image, image) == pytest.approx([1.0], abs=1e-5)
    assert pairs.ms_ssim(image, 1 - image)[0] < 0.5


def test_a_stranger_is_the_nearest_slice_of_another_patient() -> None:
    rows = pd.DataFrame({
        "patient": ["a", "a", "b", "b", "c"], "split": ["test", "test", "test", "test", "train"], "slice": [10, 20, 12, 19, 10],
    })
    assert pairs.nearest_of_another_patient(rows, np.array([0, 1, 3])).tolist() == [2, 3, 1]
    # the only patient of its split takes its stranger from another split
    assert pairs.nearest_of_another_patient(rows, np.array([4])).tolist() == [0]
    assert pairs.nearest_of_another_patient(rows[:2], np.array([0])) is None


DAMAGES = {
    "noise": lambda images: np.clip(images + np.random.default_rng(0).normal(scale=0.08, size=images.shape), 0, 1),
    "blur": lambda images: np.stack([gaussian_filter(image, 0.8) for image in images]),
    "contrast": lambda images: 0.5 + 0.7 * (images - 0.5),
    "brightness": lambda images: np.clip(images + 0.08, 0, 1),
    "pure noise": lambda images: np.random.default_rng(0).uniform(size=images.shape),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_swd_tells_damaged_images_from_real_ones(damage: str) -> None:
    real, more_real = textured(48, 1), textured(48, 2)
    floor = sliced.distance(real, more_real, seed=5).value
    damaged = sliced.distance(real, DAMAGES[damage](more_real).astype(np.float32), seed=5).value
    assert damaged > 2 * floor


def test_swd_is_zero_between_equal_sets_and_grows_with_the_damage() -> None:
    real = textured(32, 1)
    assert sliced.distance(real, real.copy(), seed=5).value == 0
    noise = np.random.default_rng(0).normal(size=real.shape).astype(np.float32)
    values = [sliced.distance(real, real + strength * noise, seed=5).value for strength in (0.01, 0.05, 0.2)]
    assert values == sorted(values)


def test_swd_names_the_scale_that_is_wrong() -> None:
    real, more_real = textured(48, 1), textured(48, 2)
    grainy = more_real + np.random.default_rng(0).normal(scale=0.1, size=more_real.shape).astype(np.float32)
    levels = sliced.distance(real, grainy, seed=5).levels
    assert list(levels) == [32, 16]
    assert levels[32] > 2 * levels[16]


def test_swd_of_a_set_that_lacks_half_of_the_patients_grows() -> None:
    bright, dark = textured(40, 1), 0.4 * textured(40, 2)
    real, complete = np.concatenate([bright[:20], dark[:20]]), np.concatenate([bright[20:], dark[20:]])
    lacking = np.concatenate([bright[20:], bright[20:] + 0.001])
    assert sliced.distance(real, lacking, seed=5).value > 3 * sliced.distance(real, complete, seed=5).value


def test_swd_refuses_unequal_sets() -> None:
    with pytest.raises(ValueError, match="same shape"):
        sliced.distance(textured(4, 1), textured(5, 1), seed=5)


def test_swd_interval_holds_the_value_and_needs_patients() -> None:
    real, other = textured(40, 1), textured(40, 2) * 0.9
    images = np.arange(40)
    several = sliced.distance(real, other, 5, np.repeat(np.arange(8), 5), images)
    assert several.interval is not None
    assert several.interval[0] < several.value < several.interval[1]
    assert several.interval[1] - several.interval[0] < several.value
    assert sliced.distance(real, other, 5, np.repeat(np.arange(2), 20), images).interval is None


def test_the_laplacian_pyramid_can_be_put_together_again() -> None:
    images = textured(2, 1, 64)
    levels = sliced.pyramid(images)
    assert [level.shape[-1] for level in levels] == [64, 32, 16]
    again = levels[-1]
    for level in reversed(levels[:-1]):
        again = level + sliced._enlarge(again, level.shape)
    assert np.allclose(again, images, atol=1e-5)


def test_interval_of_a_mean_is_about_groups_not_images() -> None:
    generator = np.random.default_rng(0)
    patients = np.repeat(np.arange(20), 50)
    values = generator.normal(size=20)[patients]  # every slice of a patient says the same
    by_patient = intervals.mean_interval(values, [patients], 1, "test")
    by_image = intervals.mean_interval(values, [np.arange(1000)], 1, "test")
    assert by_patient is not None and by_image is not None
    expected = 2 * 1.96 * values[::50].std() / np.sqrt(20)
    assert by_patient[1] - by_patient[0] == pytest.approx(expected, rel=0.15)
    assert by_image[1] - by_image[0] < 0.25 * expected


def test_no_interval_from_a_handful_of_patients() -> None:
    assert intervals.mean_interval(np.arange(8.0), [np.repeat(["a", "b"], 4)], 1, "test") is None
    assert intervals.describe(np.array(["a", "a"]), "patient") == "no interval: 1 patient, at least 5 are needed"
    assert intervals.describe(np.arange(7), "patient") == "95% bootstrap over 7 patients"


def test_a_share_of_none_still_has_an_interval() -> None:
    from scipy.stats import binomtest

    for found, count in ((0, 48), (7, 48), (48, 48)):
        expected = binomtest(found, count).proportion_ci(method="wilson")
        assert intervals.share_interval(found / count, np.arange(count)) == pytest.approx((expected.low, expected.high), abs=1e-6)
    assert intervals.share_interval(0.5, np.zeros(48)) is None


def test_pairs_of_images_count_by_both_members() -> None:
    first, second = np.triu_indices(12, k=1)
    found = intervals.mean_interval(np.ones(len(first)), [first, second], 1, "test")
    assert found == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize("count", [10, 300])
def test_random_pairs_are_of_different_patients_and_different(count: int) -> None:
    groups = np.repeat(np.arange(count // 5), 5)
    found = diversity.random_pairs(groups, 20, seed=3, stream="test")
    assert len(found) == 20
    assert (groups[found[:, 0]] != groups[found[:, 1]]).all()
    assert len(np.unique(found, axis=0)) == 20
    assert (diversity.random_pairs(groups, 20, seed=3, stream="test") == found).all()
    assert len(diversity.random_pairs(np.zeros(6), 20, seed=3, stream="test")) == 0


def test_a_collapsed_set_resembles_itself_more() -> None:
    every = textured(20, 1)
    few = every[np.arange(20) % 2] + np.random.default_rng(0).normal(scale=0.01, size=every.shape).astype(np.float32)
    chosen = diversity.random_pairs(np.arange(20), 60, 1, "test")
    assert diversity.similarities(pairs.ms_ssim, few, few, chosen).mean() > diversity.similarities(pairs.ms_ssim, every, every, chosen).mean() + 0.2


def test_the_spectrum_shows_blur_and_the_histogram_shows_contrast() -> None:
    real = textured(8, 1)
    soft = np.stack([gaussian_filter(image, 1) for image in real])
    spectrum = curves.power_spectrum(real, soft)
    assert spectrum["synthetic"][0] == pytest.approx(spectrum["real"][0], abs=0.1)
    assert spectrum["synthetic"][-1] < spectrum["real"][-1] - 0.7
    histogram = curves.intensity(real, 0.5 * real)
    assert sum(histogram["real"]) == pytest.approx(1, abs=1e-3)
    means = [np.dot(histogram["x"], histogram[side]) for side in ("real", "synthetic")]
    assert means[1] == pytest.approx(means[0] / 2, abs=0.01)


def test_empty_masks_have_an_area_of_zero() -> None:
    area = curves.mask_area(np.zeros((3, 8, 8), np.uint8), np.zeros((3, 8, 8), np.uint8))
    assert area["real"][0] == 1


def test_scores_survive_json_and_refuse_what_is_not_finite() -> None:
    found = scores.score("swd", "bravo", 0.2, (0.1, 0.3), None, 5, "protocol")
    assert scores.from_json(scores.to_json([found])) == [found]
    assert (found.unit, found.better) == ("SD of real patches", "lower")
    with pytest.raises(MedgenError, match="not a finite number"):
        scores.score("psnr", "bravo", float("nan"), None, None, 5, "protocol")
