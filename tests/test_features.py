"""Features and the distances between them: against brute force, scipy and torch-fidelity; extractors from local files only."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.ndimage import gaussian_filter

from medgen.errors import InputError
from medgen.evaluate import by_class, distances, extractors, features, torchvision_operators
from medgen.files import sha256_file
from medgen.spec_evaluate import INCEPTION_SHA256, RandomConvExtractor

GENERATOR = np.random.default_rng(5)


def gaussian(count: int, width: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    """Correlated features with a falling spectrum."""
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(width, width)) / np.arange(1, width + 1)
    return generator.normal(size=(count, width)) @ mixing + shift


# --- distances --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [(200, 150), (20, 150), (12, 9), (2, 40)])
def test_the_frechet_distance_is_that_of_the_matrix_root(first: int, second: int) -> None:
    """Also for fewer images than features, where the covariances have no full rank."""
    one, other = gaussian(first, 30, seed=1), gaussian(second, 30, 0.3, seed=2)
    covariances = [np.cov(side, rowvar=False) for side in (one, other)]
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    expected = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert distances.frechet(one, other) == pytest.approx(expected, rel=1e-5)
    assert distances.frechet(one, one) == pytest.approx(0, abs=1e-9)


def test_both_distances_are_those_of_torch_fidelity() -> None:
    torchvision_operators.make_importable()
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    one, other = (torch.from_numpy(side) for side in (gaussian(300, 40, seed=1), gaussian(300, 40, 0.2, seed=2)))
    fid = fid_statistics_to_metric(fid_features_to_statistics(one), fid_features_to_statistics(other), False)[KEY_METRIC_FID]
    assert distances.frechet(one.numpy(), other.numpy()) == pytest.approx(fid, rel=1e-3)
    # one subset of everything is the whole set
    kid = kid_features_to_metric(one, other, kid_subsets=1, kid_subset_size=300, verbose=False)[KEY_METRIC_KID_MEAN]
    every = np.arange(300)
    assert distances.kernel(one.numpy(), other.numpy(), every, every, 1, "test").value == pytest.approx(kid, rel=1e-3)


def test_both_distances_are_those_of_clean_fid() -> None:
    """Computed once with clean-fid 0.1.35: fid_from_feats, and kernel_distance with one subset of everything, on these features."""
    one, fewer, other = gaussian(300, 40, seed=1), gaussian(250, 40, 0.2, seed=2), gaussian(300, 40, 0.2, seed=2)
    assert distances.frechet(one, fewer) == pytest.approx(2.474367079732744, rel=1e-6)
    every = np.arange(300)
    assert distances.kernel(one, other, every, every, 1, "test").value == pytest.approx(0.18604552390966014, rel=1e-6)


def test_the_kernel_distance_leaves_out_pairs_of_one_patient() -> None:
    one, other = gaussian(12, 5, seed=1), gaussian(9, 5, seed=2)
    patients, images = np.repeat(["c", "a", "b", "d"], 3)[::-1], np.arange(9)

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 5 + 1) ** 3)

    def within(side: np.ndarray, groups: np.ndarray) -> float:
        return float(np.mean([kernel(side[i], side[j]) for i in range(len(side)) for j in range(len(side)) if groups[i] != groups[j]]))

    expected = within(one, patients) + within(other, images) - 2 * np.mean([kernel(x, y) for x in one for y in other])
    found = distances.kernel(one, other, patients, images, 1, "test")
    assert found.value == pytest.approx(expected)
    assert found.interval is None, "four patients"


def test_slices_of_one_patient_do_not_make_equal_distributions_look_different() -> None:
    """The same distribution from 20 patients of 8 slices each and from single images: zero on average, and inside the interval."""
    values, inside = [], 0
    for trial in range(30):
        generator = np.random.default_rng(trial)
        middle = np.repeat(generator.normal(size=(20, 16)), 8, axis=0)
        clustered = np.sqrt(0.9) * middle + np.sqrt(0.1) * generator.normal(size=(160, 16))
        found = distances.kernel(clustered, generator.normal(size=(100, 16)), np.repeat(np.arange(20), 8), np.arange(100), trial, "test")
        assert found.interval is not None
        values.append(found.value)
        inside += found.interval[0] <= 0 <= found.interval[1]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(30)
    assert inside >= 27


def test_only_published_inception_features_of_many_images_are_called_fid() -> None:
    def name(count: int, published: bool) -> str:
        return by_class._frechet_name(count, extractors.Extractor("x", 8, (0, 1), torch.nn.Identity(), published))

    assert [name(count, True) for count in (2047, 2048, 9_999, 10_000)] == ["fd_small_n", "fd", "fd", "fid"]
    assert name(10_000, False) == "fd"


# --- extractors -------------------------------------------------------------------------------------------------------


def textured(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse, fine = generator.normal(size=(2, count, 48, 48))
    images = np.stack([2.5 * gaussian_filter(a, 5) + 0.15 * gaussian_filter(b, 0.8) for a, b in zip(coarse, fine, strict=True)])
    return np.clip(images + 0.5, 0, 1).astype(np.float32)


def random_features(images: np.ndarray) -> np.ndarray:
    return features.features(extractors.load({"kind": "random_conv"}, None), lambda rows: images[rows], np.arange(len(images)))


def test_the_offline_extractor_orders_blur_noise_and_contrast() -> None:
    reference, other = random_features(textured(60, 1)), textured(60, 2)
    every = np.arange(60)

    def far(images: np.ndarray) -> tuple[float, float]:
        found = random_features(images.astype(np.float32))
        return distances.frechet(reference, found), distances.kernel(reference, found, every, every, 1, "test").value

    noise = GENERATOR.normal(size=other.shape)
    for worse in (
        [np.stack([gaussian_filter(image, sigma) for image in other]) for sigma in (0.6, 1.0, 2.0)],
        [np.clip(other + strength * noise, 0, 1) for strength in (0.02, 0.05, 0.1)],
        [other * factor for factor in (0.9, 0.75, 0.5)],
    ):
        values = [far(images) for images in (other, *worse)]
        assert values == sorted(values) and [kid for _, kid in values] == sorted(kid for _, kid in values), values
        assert values[-1][0] > 3 * values[0][0]


def test_the_offline_extractor_never_changes_and_looks_at_each_image_alone() -> None:
    extractor = extractors.random_conv(RandomConvExtractor(kind="random_conv"))
    content = b"".join(weight.detach().numpy().tobytes() for weight in extractor.network.parameters())
    assert hashlib.sha256(content).hexdigest() == "c18da214ce32f52a0bca6ddea3eee2dca3d1c89536053f2c6560c725a1d6bafa", "other weights are another extractor: give it another name"
    images = textured(40, 1)
    sizes: list[int] = []

    def read(rows: np.ndarray) -> np.ndarray:
        sizes.append(len(rows))
        return images[rows]

    found = features.features(extractor, read, np.arange(40))
    assert max(sizes) <= features.BATCH and sum(sizes) == 40, "each image once, a batch at a time"
    np.testing.assert_allclose(found[7:9], features.features(extractor, lambda rows: images[rows], np.arange(7, 9)), rtol=1e-4, atol=1e-5)


def test_an_image_reaches_the_network_in_float_in_its_range_and_in_three_channels() -> None:
    extractor = extractors.Extractor("x", 8, (-1.0, 1.0), torch.nn.Identity())
    stripes = np.tile(np.array([0.0, 1.0], np.float32), (1, 32, 16))  # one pixel on, one off
    seen = extractor.prepared(stripes)
    assert seen.shape == (1, 3, 8, 8) and seen.dtype == torch.float32
    assert (seen[:, 0] == seen[:, 1]).all() and (seen[:, 0] == seen[:, 2]).all()
    assert seen[..., 1:-1].abs().max() < 0.05, "antialiased: stripes become gray, not black or white"
    faint = extractor.prepared(np.full((1, 8, 8), 0.3 / 255, np.float32))
    assert float(faint.mean()) == pytest.approx(2 * 0.3 / 255 - 1, abs=1e-7), "not rounded to 8 bits"


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untrained weights in the layout of the published file."""
    torchvision_operators.make_importable()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state: object, *_: object) -> None:
            """Stays as it was made."""

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.manual_seed(0)
    torch.save(Untrained("untrained", ["2048"], feature_extractor_weights_path=empty).state_dict(), path)
    return path


def test_inception_gives_the_features_of_torch_fidelity(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    extractor = extractors.load({"kind": "inception", "file": str(inception_file), "sha256": sha256_file(inception_file)}, None)
    assert not extractor.published_inception and sha256_file(inception_file)[:12] in extractor.name
    bytes_ = GENERATOR.integers(0, 256, size=(2, 299, 299), dtype=np.uint8)
    found = features.features(extractor, lambda rows: (bytes_[rows] / 255).astype(np.float32), np.arange(2))
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(inception_file))
    (expected,) = theirs(torch.from_numpy(bytes_)[:, None].expand(-1, 3, -1, -1))
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-6 * float(expected.abs().max()))
    small = features.features(extractor, lambda rows: np.zeros((len(rows), 16, 16), np.float32), np.arange(1))
    assert small.shape == (1, 2048)


def test_weights_that_are_not_there_or_not_those_are_refused(inception_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"never downloaded \(docs/weights\.md\): put there weights-inception\S* from https://github"):
        extractors.load({"kind": "inception", "file": str(tmp_path / "none.pth")}, None)
    with pytest.raises(InputError, match=f"expected {INCEPTION_SHA256}"):
        extractors.load({"kind": "inception", "file": str(inception_file)}, None)

    def load(content: object) -> None:
        torch.save(content, tmp_path / "other.pth")
        extractors.load({"kind": "inception", "file": str(tmp_path / "other.pth"), "sha256": sha256_file(tmp_path / "other.pth")}, None)

    with pytest.raises(InputError, match="does not hold the weights of torch-fidelity's InceptionV3"):
        load({"fc.weight": torch.zeros(3)})
    with pytest.raises(InputError, match="holds other objects than tensors"):
        load(Trap(tmp_path / "ran"))
    assert not (tmp_path / "ran").exists(), "code in a weights file is not run"


class Trap:
    """Unpickled, it writes a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.target,))


def test_any_torchscript_file_is_an_extractor(tmp_path: Path) -> None:
    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean(dim=[2, 3])

    torch.jit.script(Means()).save(str(tmp_path / "means.pt"))
    asked = {"kind": "torchscript", "file": str(tmp_path / "means.pt"), "size": 24, "range": [-1, 1]}
    images = textured(3, 1)
    found = features.features(extractors.load(asked, None), lambda rows: images[rows], np.arange(3))
    np.testing.assert_allclose(found, np.repeat(2 * images.mean(axis=(1, 2)) - 1, 3).reshape(3, 3), atol=1e-3)
    assert "means.pt" in extractors.load(asked, None).name and "24 px in float in [-1, 1]" in extractors.load(asked, None).name
    (tmp_path / "text.pt").write_bytes(pickle.dumps("no network"))
    with pytest.raises(InputError, match=r"text\.pt is no TorchScript file"):
        extractors.load({**asked, "file": str(tmp_path / "text.pt")}, None)

    class Maps(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images * 2.0

    torch.jit.script(Maps()).save(str(tmp_path / "maps.pt"))
    with pytest.raises(InputError, match=r"got shape \[3, 3, 24, 24\]"):
        features.features(extractors.load({**asked, "file": str(tmp_path / "maps.pt")}, None), lambda rows: images[rows], np.arange(3))
