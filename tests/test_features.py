"""Extractors: what the networks see, and that their weights come from local files only."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from passing import features_of
from scipy.ndimage import gaussian_filter

from medgen.errors import InputError
from medgen.evaluate import distances, extractors
from medgen.files import sha256_file
from medgen.pretrained import torchvision_operators
from medgen.spec_evaluate import INCEPTION_SHA256, RandomConvExtractor

GENERATOR = np.random.default_rng(5)


# --- extractors -------------------------------------------------------------------------------------------------------


def textured(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    coarse, fine = generator.normal(size=(2, count, 48, 48))
    images = np.stack([2.5 * gaussian_filter(a, 5) + 0.15 * gaussian_filter(b, 0.8) for a, b in zip(coarse, fine, strict=True)])
    return np.clip(images + 0.5, 0, 1).astype(np.float32)


def moments(features: np.ndarray) -> distances.Moments:
    return distances.moments(features, np.arange(len(features)))


def random_features(images: np.ndarray) -> np.ndarray:
    return features_of(extractors.load({"kind": "random_conv"}, None), images)


def test_the_offline_extractor_orders_blur_noise_and_contrast() -> None:
    reference, other = random_features(textured(60, 1)), textured(60, 2)
    every = np.arange(60)

    def far(images: np.ndarray) -> tuple[float, float]:
        found = random_features(images.astype(np.float32))
        return distances.frechet(moments(reference), moments(found)), distances.discrepancy(distances.cubic, reference, found, every, every, 1, "test").value

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
    np.testing.assert_allclose(features_of(extractor, images)[7:9], features_of(extractor, images[7:9]), rtol=1e-4, atol=1e-5)


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
    found = features_of(extractor, (bytes_ / 255).astype(np.float32))
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], feature_extractor_weights_path=str(inception_file))
    (expected,) = theirs(torch.from_numpy(bytes_)[:, None].expand(-1, 3, -1, -1))
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-6 * float(expected.abs().max()))
    small = features_of(extractor, np.zeros((1, 16, 16), np.float32))
    assert small.shape == (1, 2048)


def test_weights_that_are_not_there_or_not_those_are_refused(inception_file: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"never downloaded \(docs/weights\.md\): put there weights-inception\S* from https://github"):
        extractors.load({"kind": "inception", "file": str(tmp_path / "none.pth")}, None)
    with pytest.raises(InputError, match=f"expected {INCEPTION_SHA256}"):
        extractors.load({"kind": "inception", "file": str(inception_file)}, None)

    def load(content: object) -> None:
        torch.save(content, tmp_path / "other.pth")
        extractors.load({"kind": "inception", "file": str(tmp_path / "other.pth"), "sha256": sha256_file(tmp_path / "other.pth")}, None)

    with pytest.raises(InputError, match="does not hold the weights of inception: there is no Mixed_7c"):
        load({"fc.weight": torch.zeros(3)})
    name = "Mixed_7c.branch1x1.conv.weight"  # told by it before torch is loaded
    with pytest.raises(InputError, match="does not hold the weights of torch-fidelity's InceptionV3"):
        load({name: torch.zeros(3)})
    with pytest.raises(InputError, match="holds other objects than tensors"):
        load({name: Trap(tmp_path / "ran")})
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
    found = features_of(extractors.load(asked, None), images[:3])
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
        features_of(extractors.load({**asked, "file": str(tmp_path / "maps.pt")}, None), images[:3])
