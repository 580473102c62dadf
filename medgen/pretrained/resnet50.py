"""ResNet-50 in three trainings, each with the names that its authors gave the weights. Used by evaluate/extractors.py and pretrained/perceptual.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn

from medgen import weights
from medgen.pretrained import torchvision_operators
from medgen.pretrained.folding import folded
from medgen.pretrained.layout import fill

Tensors = dict[str, Tensor]


def feature_maps(kind: str, file: Path, key: str) -> nn.Module:
    """The network up to its last maps: [n, 3, h, w] to [n, 2048, h / 32, w / 32], never negative; frozen, for evaluation.

    `kind`: swav, resnet50 or radimagenet; each wants its own range of input. Raises InputError, naming `key`, for weights of another network."""
    torchvision_operators.make_importable()
    from torchvision.models import resnet50

    network = resnet50(weights=None)
    network.fc = nn.Identity()
    words, renamed = LAYOUTS[kind]
    fill(network, renamed(weights.tensors(file, key)), file, words, key)
    trunk = (network.conv1, network.bn1, network.relu, network.maxpool, network.layer1, network.layer2, network.layer3, network.layer4)
    return folded(nn.Sequential(*trunk))


def _from_swav(found: Tensors) -> Tensors:
    """Saved from a parallel training, with the head and the prototypes that the features were compared by. (Its padding before the
    first convolution is a layer of its own, of the same pixels.)"""
    return {name.removeprefix("module."): value for name, value in found.items() if not name.startswith(("module.projection_head.", "module.prototypes."))}


def _from_torchvision(found: Tensors) -> Tensors:
    return {name: value for name, value in found.items() if not name.startswith("fc.")}


def _from_radimagenet(found: Tensors) -> Tensors:
    """Saved from a Sequential of torchvision's parts, by their numbers; 2, 3 and 8 have no weights."""
    parts = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    renamed = {}
    for name, value in found.items():
        number, _, rest = name.removeprefix("backbone.").partition(".")
        renamed[f"{parts[number]}.{rest}" if number in parts else name] = value
    return renamed


LAYOUTS: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
    "swav": ("ResNet-50 of SwAV", _from_swav),
    "resnet50": ("ResNet-50 of torchvision", _from_torchvision),
    "radimagenet": ("ResNet-50 of RadImageNet", _from_radimagenet),
}
