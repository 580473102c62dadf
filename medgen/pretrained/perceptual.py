"""Images as vectors whose squared distance is how different two images look. Used by evaluate/lpips_distance.py and by families' losses.

LPIPS: Zhang et al. 2018, arXiv:1801.03924, version 0.1 of their package, which brings the weights on top of the network. The network
itself comes from a local file; the package would download it. RadImageNet: Mei et al. 2022, doi:10.1148/ryai.210315, compared as MONAI does."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medgen import weights
from medgen.pretrained import resnet50, torchvision_operators
from medgen.pretrained.folding import folded
from medgen.pretrained.layout import other_layout
from medgen.pretrained.settings import LPIPS_BACKBONES

TINY = 1e-10  # added to a norm, as in the package


class Lpips(nn.Module):
    """Gray images [n, 1, H, W] or colour images [n, 3, H, W] in [-1, 1] as vectors [n, d]: LPIPS of two is the squared distance of theirs.

    It is the sum over layers of the mean over places of w (a - b)^2, where a and b are features of norm 1 and w the weights
    on top: so each layer is multiplied by the root of w over the number of places."""

    model: Any

    def __init__(self, model: Any):
        """`model` is that of the package."""
        super().__init__()
        self.model = folded(model)

    def forward(self, images: Tensor) -> Tensor:
        colours = self.model.scaling_layer(images.expand(-1, 3, -1, -1))
        vectors = []
        for maps, top in zip(self.model.net(colours), self.model.lins, strict=True):
            root = (top.model[-1].weight / (maps.shape[2] * maps.shape[3])).sqrt()
            vectors.append((of_norm_one(maps) * root).flatten(1))
        return torch.cat(vectors, dim=1)


class RadImageNet(nn.Module):
    """Images like those of Lpips as vectors [n, d], by the last maps of the ResNet-50 of RadImageNet.

    The squared distance is the mean over places of |a - b|^2, where a and b are features of norm 1: as in RadImageNetPerceptualSimilarity
    of MONAI, whose copy of the weights is fed BGR less a mean. These are the published ones of PyTorch, and fed as their authors do."""

    def __init__(self, maps: nn.Module):
        super().__init__()
        self.maps = maps

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.maps(images.expand(-1, 3, -1, -1))
        return of_norm_one(maps).flatten(1) / (maps.shape[2] * maps.shape[3]) ** 0.5


def of_norm_one(maps: Tensor) -> Tensor:
    """Features [n, C, h, w] divided by their norm over the channels; 0 where all of them are 0.

    By vector_norm, since a root has no gradient at 0, and maps behind a ReLU hold places where all features are 0."""
    return maps / (torch.linalg.vector_norm(maps, dim=1, keepdim=True) + TINY)


def lpips_of(net: str, file: Path, key: str) -> Lpips:
    """LPIPS 0.1 over `net`, one of LPIPS_BACKBONES. Raises InputError, naming `key`, for a file that holds another network."""
    found = weights.tensors(file, key)
    model = _untrained(net)
    # slice2.3.weight in the package is features.3.weight in torchvision
    wanted = {name: f"features.{name.partition('.')[2]}" for name in model.net.state_dict()}
    missing = [name for name in wanted.values() if name not in found]
    try:
        if missing:
            raise RuntimeError(f"there is no {missing[0]}")
        model.net.load_state_dict({name: found[theirs] for name, theirs in wanted.items()})
    except RuntimeError as error:
        raise other_layout(file, f"torchvision's {LPIPS_BACKBONES[net]}", key, str(error)) from None
    return Lpips(model)


def radimagenet_of(file: Path, key: str) -> RadImageNet:
    """Raises InputError, naming `key`, for a file that holds another network."""
    return RadImageNet(resnet50.feature_maps("radimagenet", file, key))


def _untrained(net: str) -> Any:
    """The model of the package with its own weights on top; it neither prints, downloads, nor draws from the global generator."""
    torchvision_operators.make_importable()
    import lpips

    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="(The parameter 'pretrained'|Arguments other than a weight enum)")
        return lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
