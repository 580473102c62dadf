"""The networks whose features are compared, against their published definitions: weights from a hash, in the layouts of the published files."""

from __future__ import annotations

from pathlib import Path

import made_weights
import numpy as np
import pytest
import torch
from passing import features_of

from medgen.errors import InputError
from medgen.evaluate import extractors, vision_transformer
from medgen.files import sha256_file
from medgen.pretrained import torchvision_operators
from medgen.pretrained.folding import folded

ROWS = np.arange(224)
WAVES = (np.sin(ROWS[:, None] / 9) * np.cos(ROWS[None] / 7) + 1) / 2
IMAGES = np.stack([WAVES, WAVES**2]).astype(np.float32)
MEAN, SPREAD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def of(extractor: extractors.Extractor, images: np.ndarray) -> np.ndarray:
    return features_of(extractor, images)


# --- DINOv2 -----------------------------------------------------------------------------------------------------------


# features 0, 1, 100 and 383 of both images: timm's vit_small_patch14_dinov2 and vit_small_patch14_reg4_dinov2 with these weights (1.0.31),
# given the positions that the published code interpolates for 224 px, on the images less the mean and spread of ImageNet
FROM_TIMM = {
    "vits14": [[0.8816417, -1.1982176, -0.0014543, 0.1259502], [0.3873380, -0.8790299, -0.1347627, -0.2279473]],
    "vits14_reg": [[0.8735317, -1.2128272, -0.0135936, 0.1549703], [0.3884217, -0.8945617, -0.1385985, -0.1944766]],
}


@pytest.mark.parametrize("arch", FROM_TIMM)
def test_dinov2_has_the_class_token_of_timm(arch: str, tmp_path: Path) -> None:
    state = made_weights.state_of(vision_transformer.VisionTransformer(vision_transformer.SHAPES[arch]))
    file = made_weights.saved(tmp_path / "dinov2.pth", {**state, "mask_token": torch.zeros(1, 384)})
    extractor = extractors.load({"kind": "dinov2", "arch": arch, "file": str(file)}, None)
    found = of(extractor, IMAGES)
    assert found.shape == (2, 384) and arch in extractor.name
    np.testing.assert_allclose(found[:, [0, 1, 100, 383]], FROM_TIMM[arch], atol=2e-5)
    other = "vits14" if arch == "vits14_reg" else "vits14_reg"
    with pytest.raises(InputError, match=f"does not hold the weights of the ViT {other} of DINOv2: .*register_tokens"):
        extractors.load({"kind": "dinov2", "arch": other, "file": str(file)}, None)


def test_position_embeddings_of_the_published_size_are_left_as_they_are() -> None:
    network = vision_transformer.VisionTransformer(vision_transformer.Shape(12, 1, 2))
    network.load_state_dict(made_weights.state_of(network))
    assert network.positions(37, 37) is network.pos_embed
    assert network.positions(16, 16).shape == (1, 257, 12)
    assert torch.equal(network.positions(16, 16)[:, 0], network.pos_embed[:, 0]), "the class token has one place at every size"


# --- ResNet-50, three trainings ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def resnet() -> torch.nn.Module:
    torchvision_operators.make_importable()
    from torchvision.models import resnet50

    network = resnet50(weights=None).eval()
    network.load_state_dict(made_weights.state_of(network))
    return network


def in_the_layout_of(kind: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
    if kind == "resnet50":
        return state
    if kind == "swav":
        head = {"module.projection_head.0.weight": torch.zeros(2048, 2048), "module.prototypes.weight": torch.zeros(3000, 128)}
        return {**{f"module.{name}": value for name, value in trunk.items()}, **head}
    numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"backbone.{numbers[name.split('.')[0]]}.{name.partition('.')[2]}": value for name, value in trunk.items()}


@pytest.mark.parametrize("kind", ["swav", "resnet50", "radimagenet"])
def test_each_resnet_is_that_of_torchvision_on_its_own_input(kind: str, resnet: torch.nn.Module, tmp_path: Path) -> None:
    """Norms folded into convolutions: 1e-5 of the largest feature is the difference that remains."""
    state = in_the_layout_of(kind, resnet.state_dict())
    file = made_weights.saved(tmp_path / "weights.pth", state)
    asked = {"kind": kind, "file": str(file), "sha256": sha256_file(file)}
    gray = torch.from_numpy(IMAGES)[:, None].expand(-1, 3, -1, -1)
    seen = 2 * gray - 1 if kind == "radimagenet" else (gray - MEAN) / SPREAD
    trunk = torch.nn.Sequential(*list(resnet.children())[:-1], torch.nn.Flatten())
    with torch.inference_mode():
        expected = trunk(seen).numpy()
    found = of(extractors.load(asked, None), IMAGES)
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(np.abs(expected).max()))


def test_a_tensor_too_many_or_too_few_is_refused(resnet: torch.nn.Module, tmp_path: Path) -> None:
    state = in_the_layout_of("swav", resnet.state_dict())
    for wrong, told in (({**state, "module.extra.weight": torch.zeros(1)}, "extra.weight"), ({k: v for k, v in state.items() if k != "module.bn1.bias"}, "bn1.bias")):
        file = made_weights.saved(tmp_path / "weights.pth", wrong)
        with pytest.raises(InputError, match=f"does not hold the weights of ResNet-50 of SwAV: .*{told}"):
            extractors.load({"kind": "swav", "file": str(file)}, None)


def test_folding_leaves_no_norm_and_the_same_features() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = torch.nn.Conv2d(3, 8, 3, bias=False), torch.nn.BatchNorm2d(8)
            self.second, self.relu, self.last = torch.nn.Conv2d(8, 8, 3), torch.nn.ReLU(), torch.nn.BatchNorm2d(8)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.last(self.relu(self.second(self.norm(self.first(images)))))

    network = Block().eval()
    network.load_state_dict(made_weights.state_of(network))
    images = made_weights.made("images", (4, 3, 16, 16))
    with torch.inference_mode():
        expected = network(images)
        found = folded(network)(images)
    assert isinstance(network.norm, torch.nn.Identity)
    assert isinstance(network.last, torch.nn.BatchNorm2d), "a norm after anything else is no part of a convolution"
    np.testing.assert_allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
