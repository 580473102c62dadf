"""The networks of the trials, with initial weights that depend on a seed alone. Used by learners.py."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from medgen.pretrained import torchvision_operators

PRIOR_LOGIT = -4.0  # lesions are a few pixels in a hundred: begun at a half, the first hundreds of steps only learn that (Lin et al., ICCV 2017)


def unet(channels_in: int, channels: list[int], seed: int, regions: int = 1) -> nn.Module:
    """MONAI's residual U-Net: [n, channels_in, H, W] to logits [n, regions, H, W].

    Batch norm, because instance norm takes away how bright an image is: the brightest of a slice without a lesion then looks like one."""
    from monai.networks.nets.unet import UNet

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet(spatial_dims=2, in_channels=channels_in, out_channels=regions, channels=channels, strides=[2] * (len(channels) - 1), num_res_units=2, norm="BATCH")
    last = [module for module in network.modules() if isinstance(module, nn.Conv2d)][-1]
    assert last.out_channels == regions and last.bias is not None
    nn.init.constant_(last.bias, PRIOR_LOGIT)
    return network


def resnet(name: str, channels_in: int, classes: int, seed: int) -> nn.Module:
    """torchvision's ResNet without any weights: [n, channels_in, H, W] to logits [n, classes]."""
    torchvision_operators.make_importable()
    models = importlib.import_module("torchvision.models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = getattr(models, name)(weights=None, num_classes=classes)
        if channels_in != 3:
            network.conv1 = nn.Conv2d(channels_in, 64, kernel_size=7, stride=2, padding=3, bias=False)
        return network
