"""Distances between sets of features, and how sets overlap: against brute force, scipy and torch-fidelity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from medgen.evaluate import distances, extractors, feature_scores, manifold
from medgen.pretrained import torchvision_operators


def gaussian(count: int, width: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    """Correlated features with a falling spectrum."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.arange(1, width + 1)
    return generator.normal(size=(count, width)) @ mixing + shift


def frechet(one: np.ndarray, other: np.ndarray) -> float:
    return distances.frechet(*(distances.moments(side, np.arange(len(side))) for side in (one, other)))


@pytest.mark.parametrize(("first", "second"), [(200, 150), (20, 150), (12, 9), (2, 40)])
def test_the_frechet_distance_is_that_of_the_matrix_root(first: int, second: int) -> None:
    """Also for fewer images than features, where the covariances have no full rank."""
    one, other = gaussian(first, 30, seed=1), gaussian(second, 30, 0.3, seed=2)
    covariances = [np.cov(side, rowvar=False) for side in (one, other)]
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet(one, other) == pytest.approx(expected, rel=1e-5)
    assert frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_both_distances_are_those_of_torch_fidelity() -> None:
    torchvision_operators.make_importable()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    one, other = (torch.from_numpy(side) for side in (gaussian(300, 40, seed=1), gaussian(300, 40, 0.2, seed=2)))
    fid = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(other), False)[KEY_METRIC_FID]
    assert frechet(one.numpy(), other.numpy()) == pytest.approx(fid, rel=1e-3)
    # one subset of everything is the whole set
    kid = kid_features_to_metric(one, other, kid_subsets=1, kid_subset_size=300, verbose=False)[KEY_METRIC_KID_MEAN]
    every = np.arange(300)
    assert distances.discrepancy(distances.cubic, one.numpy(), other.numpy(), every, every, 1, "test").value == pytest.approx(kid, rel=1e-3)


def test_both_distances_are_those_of_clean_fid() -> None:
    """Computed once with clean-fid 0.1.35: fid_from_feats, and kernel_distance with one subset of everything, on these features."""
    one, fewer, other = gaussian(300, 40, seed=1), gaussian(250, 40, 0.2, seed=2), gaussian(300, 40, 0.2, seed=2)
    assert frechet(one, fewer) == pytest.approx(2.474367079732744, rel=1e-6)
    every = np.arange(300)
    assert distances.discrepancy(distances.cubic, one, other, every, every, 1, "test").value == pytest.approx(0.18604552390966014, rel=1e-6)


def test_the_kernel_distance_leaves_out_pairs_of_one_patient() -> None:
    one, other = gaussian(12, 5, seed=1), gaussian(9, 5, seed=2)
    patients, images = np.repeat(["c", "a", "b", "d"], 3)[::-1], np.arange(9)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1) ** 3)

    def within(side: np.ndarray, groups: np.ndarray) -> float:
        return float(np.mean([kernel(side[i], side[j]) for i in range(len(side)) for j in range(len(side)) if groups[i] != groups[j]]))

    expected = within(one, patients) + within(other, images) - 2 * np.mean([kernel(x, y) for x in one for y in other])
    found = distances.discrepancy(distances.cubic, one, other, patients, images, 1, "test")
    assert found.value == pytest.approx(expected)
    assert found.interval is None, "four patients"


def test_slices_of_one_patient_do_not_make_equal_distributions_look_different() -> None:
    """The same distribution from 20 patients of 8 slices each and from single images: zero on average, and inside the interval."""
    values, inside = [], 0
    for trial in range(30):
        generator = np.random.default_rng(trial)
        middle = np.repeat(generator.normal(size=(20, 16)), 8, axis=0)
        clustered = np.sqrt(0.9) * middle + np.sqrt(0.1) * generator.normal(size=(160, 16))
        found = distances.discrepancy(distances.cubic, clustered, generator.normal(size=(100, 16)), np.repeat(np.arange(20), 8), np.arange(100), trial, "test")
        assert found.interval is not None
        values.append(found.value)
        inside += found.interval[0] <= 0 <= found.interval[1]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(30)
    assert inside >= 27


def test_only_published_inception_features_of_many_images_are_called_fid() -> None:
    def name(count: int, published: bool) -> str:
        return feature_scores.frechet_name(count, extractors.Extractor("x", 8, (0, 1), torch.nn.Identity(), published))

    assert [name(count, True) for count in (2047, 2048, 9_999, 10_000)] == ["fd_small_n", "fd", "fd", "fid"]
    assert name(10_000, False) == "fd"


def test_moments_do_not_depend_on_the_blocks_they_are_read_in(monkeypatch: pytest.MonkeyPatch) -> None:
    table, rows = gaussian(300, 30, seed=3).astype(np.float32), np.arange(0, 300, 2)
    whole = distances.moments(table, rows)
    monkeypatch.setattr(distances, "BLOCK", 7)
    cut = distances.moments(table, rows)
    assert np.allclose(whole.mean, cut.mean) and np.allclose(whole.root.T @ whole.root, cut.root.T @ cut.root)
    assert np.allclose(cut.root.T @ cut.root, np.cov(table[rows].astype(float), rowvar=False))


def test_the_gaussian_kernel_is_that_of_cmmd() -> None:
    """1000 MMD^2 with exp(-|x-y|^2 / (2 10^2)) of unit features, here without the diagonal."""
    one, other = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (gaussian(40, 8, 1, seed=1), gaussian(30, 8, -1, seed=2)))

    def mean(first: np.ndarray, second: np.ndarray, same: bool) -> float:
        kernel = np.exp(-((first[:, None] - second[None]) ** 2).sum(2) / 200)
        return float(kernel[~np.eye(len(first), dtype=bool)].mean() if same else kernel.mean())

    expected = 1000 * (mean(one, one, True) + mean(other, other, True) - 2 * mean(one, other, False))
    found = distances.discrepancy(distances.gaussian, 3 * one, 0.2 * other, np.arange(40), np.arange(30), 1, "test")
    assert found.value == pytest.approx(expected)


def test_overlap_is_that_of_brute_force_and_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision_operators.make_importable()
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    monkeypatch.setattr(manifold, "BLOCK", 17)
    real, made = gaussian(70, 6, seed=1), gaussian(50, 6, 0.4, seed=2)
    distance = [[np.linalg.norm(x - y) for y in made] for x in real]
    balls = [[sorted(np.linalg.norm(x - y) for y in side)[manifold.NEIGHBOURS] for x in side] for side in (real, made)]
    inside = np.array([[distance[i][j] <= balls[0][i] for j in range(50)] for i in range(70)])
    found = manifold.overlap(real, made)
    assert found.precision.tolist() == inside.any(0).tolist()
    assert found.density.tolist() == (inside.sum(0) / manifold.NEIGHBOURS).tolist()
    assert found.coverage.tolist() == inside.any(1).tolist()
    assert found.recall.tolist() == [any(distance[i][j] <= balls[1][j] for j in range(50)) for i in range(70)]
    theirs = prc_features_to_metric(torch.from_numpy(made), torch.from_numpy(real), prc_neighborhood=manifold.NEIGHBOURS, prc_batch_size=32, save_cpu_ram=False, verbose=False)
    assert found.precision.mean() == pytest.approx(theirs[KEY_METRIC_PRECISION], rel=1e-3)
    assert found.recall.mean() == pytest.approx(theirs[KEY_METRIC_RECALL], rel=1e-3)


def test_a_collapsed_set_is_precise_and_covers_nothing() -> None:
    real = gaussian(400, 6, seed=1)
    spread, collapsed = manifold.overlap(real, gaussian(400, 6, seed=2)), manifold.overlap(real, np.repeat(gaussian(8, 6, seed=3), 50, axis=0))
    assert spread.coverage.mean() == pytest.approx(1 - 2.0**-manifold.NEIGHBOURS, abs=0.03), "closed form for one distribution"
    assert collapsed.precision.mean() > 0.6 and collapsed.coverage.mean() < 0.15 and collapsed.recall.mean() < 0.1
